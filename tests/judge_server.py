"""A stand-in for an OpenAI-compatible endpoint, on loopback."""

import http.server
import json
import re
import threading
import time

END = re.compile(r"----- BEGIN (\w+) -----\n(.*?)\n----- END \1 -----", re.DOTALL)


def responses(text):
    """What the default template shows: the input, the response called A, the one called B."""
    return [found[1] for found in END.findall(text)]


def prefer_longer(text):
    _, first, second = responses(text)
    return "VERDICT: TIE" if len(first) == len(second) else f"VERDICT: {'A' if len(first) > len(second) else 'B'}"


class JudgeServer:
    """Answers with what `respond(text)` returns: a text, or (status, headers, body) for anything else.

    Attributes:
        requests: the bodies that were asked, as dicts.
        headers: of each.
    """

    def __init__(self, respond=prefer_longer, delay=0.0):
        self.requests, self.headers, self.respond, self.delay = [], [], respond, delay
        self.most_at_once, self._now, lock = 0, 0, threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append({**self.headers, "path": self.path})
                    outer._now += 1
                    outer.most_at_once = max(outer.most_at_once, outer._now)
                time.sleep(outer.delay)
                content = body["messages"][0]["content"]
                if isinstance(content, list):
                    content = "".join(part.get("text", "<image>") for part in content)
                found = outer.respond(content)
                with lock:
                    outer._now -= 1
                if isinstance(found, str):
                    choice = {"message": {"role": "assistant", "content": found}, "finish_reason": "stop"}
                    found = 200, {}, json.dumps({"choices": [choice]})
                status, headers, data = found
                try:
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data.encode()))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data.encode())
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
