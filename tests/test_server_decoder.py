"""`CausalLM(decoder=Server(...))`: what a server is asked for, and what of its answers is believed.

The server is a stand-in that speaks as vLLM was recorded to (see `vllm_stand_in`); test_real_servers.py has real ones.
"""

import collections
import itertools
import json
import threading

import pytest
import torch
from decoder_families import plain_log_prob
from peft import LoraConfig, PeftModel
from scipy.stats import chisquare
from tiny import char_tokenizer, llama
from vllm_stand_in import RECORDED, VllmStandIn

from sysdag import ImportanceSampling, MonteCarlo, PlanError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM, Server
from sysdag.components.language.engines.completions_api import read_reply
from sysdag.endpoints.http_client import HttpClient
from sysdag.errors import DataError, EndpointError
from sysdag.graph.variables import Input

KEY = "sk-never-to-be-seen-0123456789"
MODEL, TOKENIZER = llama(), char_tokenizer(chat=True)
PROMPTS = ["what is it", "ab", "a longer prompt than that"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    wait = threading.Event.wait
    monkeypatch.setattr(
        threading.Event, "wait", lambda self, timeout=None: self.is_set() if timeout else wait(self, timeout)
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def component(server, *, weights=MODEL, max_new_tokens=8, adapter=None, **options):
    own = {name: options.pop(name) for name in ("stop", "temperature", "top_p", "top_k") if name in options}
    decoder = Server(server if isinstance(server, str) else server.url, **options)
    return CausalLM(weights, TOKENIZER, max_new_tokens=max_new_tokens, decoder=decoder, peft_config=adapter, **own)


def stand_in(**options):
    return VllmStandIn({"base": MODEL}, TOKENIZER, **options)


# What is asked for


def test_a_request_says_every_option_of_sampling():
    with stand_in() as server:
        lm = component(server, temperature=0.7, top_k=20, top_p=0.9, stop=["ab"])
        lm.sample(PROMPTS, generator=generator())
        asked = server.asked()
    assert sorted(request["prompt"] for request in asked) == sorted(lm.prompt_ids(PROMPTS))
    assert len({request["seed"] for request in asked}) == 3
    for request in asked:
        given = {name: value for name, value in request.items() if name not in ("prompt", "seed", "path")}
        assert given == {
            "model": "base", "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": ["ab"],
            "stop_token_ids": [1], "n": 1, "logprobs": 1, "return_token_ids": True, "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }  # fmt: skip
    assert given.keys() <= RECORDED["request"].keys()  # which the real one took


def test_sglang_is_asked_in_its_own_words():
    with stand_in(family="sglang") as server:
        component(server, top_k=5).sample(PROMPTS, generator=generator())
        [request, *_] = server.asked()
        assert request["no_stop_trim"] is True
        assert "spaces_between_special_tokens" not in request
        with pytest.raises(PlanError, match="SGLang takes top_p=0.9 of all tokens and top_k=5 beside it"):
            component(server, top_k=5, top_p=0.9).sample(PROMPTS)


def test_the_same_prompt_gets_other_draws_each_time():
    with stand_in() as server:
        draws = component(server).sample(["ab"] * 6, generator=generator())
    assert len({tuple(draw.record["token_ids"]) for draw in draws}) > 3


def test_requests_go_out_side_by_side_and_come_back_in_order():
    with stand_in() as server:
        draws = component(server, concurrency=3).sample(PROMPTS * 5, generator=generator())
        alone = component(server, concurrency=1).sample(PROMPTS * 5, generator=generator())
    assert [draw.record for draw in draws] == [draw.record for draw in alone]


# Draws


def test_draws_hold_the_ids_and_are_scored_here():
    with stand_in() as server:
        lm = component(server)
        draws = lm.sample(PROMPTS * 4, generator=generator())
    assert all(draw.log_prob is None for draw in draws)
    for ids, draw, scored in zip(lm.prompt_ids(PROMPTS * 4), draws, lm.log_prob(PROMPTS * 4, draws), strict=True):
        drawn = draw.record["token_ids"]
        assert draw.record["finished"] == (drawn[-1] == 1)
        assert draw.value == TOKENIZER.decode(drawn, skip_special_tokens=True)
        assert float(scored.detach()) == pytest.approx(plain_log_prob(MODEL, ids, drawn), abs=1e-4)
    assert {draw.record["finished"] for draw in draws} == {True, False}


def test_log_probabilities_of_draws_are_computed_here_where_they_are_asked_for():
    with stand_in(change=shifted(0.01)) as server:  # as a server rounds otherwise
        draws = component(server, score_draws=True).sample(PROMPTS, generator=generator())
        lm = component(server)
    for ids, draw in zip(lm.prompt_ids(PROMPTS), draws, strict=True):
        assert draw.log_prob == pytest.approx(plain_log_prob(MODEL, ids, draw.record["token_ids"]), abs=1e-4)


def test_scored_draws_have_the_log_probability_of_the_distribution_that_they_are_from():
    """Against all completions of two tokens, which sum to 1, and by chi-square against how often each was drawn."""
    model, tokenizer = llama(vocab_size=8, peaked=1.5), char_tokenizer("abcde")
    sampling = {"temperature": 2.0, "top_k": 4, "top_p": 0.85}
    with VllmStandIn({"base": model}, tokenizer) as server:
        decoder = Server(server.url, score_draws=True)
        lm = CausalLM(model, tokenizer, max_new_tokens=2, decoder=decoder, **sampling)
        draws = lm.sample(["ab"] * 500, generator=generator())
    known = {tuple(draw.record["token_ids"]): draw.log_prob for draw in draws}
    assert sum(torch.tensor(list(known.values())).exp()) == pytest.approx(1, abs=1e-3)
    counts = collections.Counter(tuple(draw.record["token_ids"]) for draw in draws)
    often = [ids for ids, log_prob in known.items() if 500 * torch.tensor(log_prob).exp() >= 5]
    expected = torch.tensor([known[ids] for ids in often], dtype=torch.float64).exp()
    seen = torch.tensor([counts[ids] for ids in often], dtype=torch.float64)
    assert chisquare(seen, (expected / expected.sum() * seen.sum()).numpy()).pvalue > 1e-3


def test_a_stop_string_ends_a_draw_with_its_tokens():
    with stand_in() as server:
        lm = component(server, stop=["q", "z", "j", "bb"], max_new_tokens=20)
        draws = lm.sample(PROMPTS * 5, generator=generator())
    stopped = 0
    for draw in draws:
        text = TOKENIZER.decode(draw.record["token_ids"])
        assert "q" not in draw.value
        stopped += text.endswith(("q", "z", "j", "bb"))
    assert stopped > 3


def test_a_draw_ends_where_the_model_here_would_end_it_though_the_server_went_on():
    def goes_on(reply, body):
        choice = reply["choices"][0]
        if choice["token_ids"][-1] == 1:
            more = [5] * (body["max_tokens"] - len(choice["token_ids"]))
            choice["token_ids"] = choice["token_ids"] + more
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"] + [-1.0] * len(more)
            choice["finish_reason"] = "length"
        return reply

    with stand_in(change=goes_on) as server:
        draws = component(server).sample(PROMPTS * 4, generator=generator())
    ended = [draw.record for draw in draws if 1 in draw.record["token_ids"]]
    assert ended
    assert all(record["token_ids"].index(1) == len(record["token_ids"]) - 1 for record in ended)


# What is not believed


def shifted(by):
    def change(reply, body):
        del body
        told = reply["choices"][0]["logprobs"]
        told["token_logprobs"] = [each + by for each in told["token_logprobs"]]
        return reply

    return change


def changed(**fields):
    def change(reply, body):
        del body
        reply["choices"][0] |= {name: v(reply["choices"][0]) if callable(v) else v for name, v in fields.items()}
        return reply

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(token_ids=None), "returned no token ids, got None.*'return_token_ids'.*--by.*decoder='local'"),
        (changed(token_ids=[]), "returned no token ids, got \\[\\]"),
        (changed(token_ids=["a", "b"]), "returned no token ids"),
        (changed(logprobs=None), "returned no log-probabilities of its tokens, got None.*answers 'logprobs'"),
        (changed(logprobs={"token_logprobs": [-1.0]}), "returned 1 log-probabilities of [2-8] tokens"),
        (changed(token_ids=lambda c: [44, *c["token_ids"][1:]]), "returned the text .* for token ids that spell"),
        (changed(token_ids=lambda c: [4400, *c["token_ids"][1:]]), "returned the token id 4400, and the model here"),
        (changed(text="something else"), "returned the text 'something else' for token ids that spell .*vocabulary"),
        (changed(prompt_token_ids=[5, 6]), "read another prompt than it was sent: 2 tokens, expected"),
        (changed(token_ids=lambda c: [9], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"),
         "cut a completion at 1 tokens, and max_new_tokens is 8.*--max-model-len"),
        (changed(token_ids=lambda c: [9], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
         r"ended a completion \(finish_reason 'stop'\) at token 9 .*end tokens are \[1\].*generation_config"),
        (shifted(-0.3), r"log-probabilities 0.300 nats from those of the model here.*tolerance is 0.1.*another model"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_draw_of_this_model_is_refused(change, message):
    with stand_in(change=change) as server, pytest.raises(EndpointError, match=message) as error:
        component(server, max_retries=0).sample(PROMPTS, generator=generator(1))
    assert str(error.value).startswith(f"CausalLM('LlamaForCausalLM'): {server.url}, asked for 'base', ")


def test_another_model_of_the_same_vocabulary_is_refused():
    with VllmStandIn({"base": llama(1)}, TOKENIZER) as server:
        with pytest.raises(EndpointError, match="it holds another model, other weights, or another adapter"):
            component(server).sample(PROMPTS, generator=generator())
        draws = component(server, checked_draws=0).sample(PROMPTS, generator=generator())
    assert len(draws) == 3


@pytest.mark.parametrize("tempered", [False, True])
def test_log_probabilities_before_or_at_the_temperature_are_both_known(tempered):
    """vLLM tells the model's, SGLang those at the temperature of sampling."""

    def change(reply, body):
        if tempered:
            choice = reply["choices"][0]
            ids = choice["token_ids"]
            with torch.no_grad():
                logits = MODEL(torch.tensor([[*body["prompt"], *ids]])).logits[0, len(body["prompt"]) - 1 : -1]
            found = (logits / body["temperature"]).log_softmax(-1)
            choice["logprobs"]["token_logprobs"] = [float(found[place, token]) for place, token in enumerate(ids)]
        return reply

    with stand_in(change=change) as server:
        component(server, temperature=0.5, tolerance=1e-3).sample(PROMPTS, generator=generator())


def test_a_server_that_ignores_top_k_is_found_out():
    with stand_in() as server:
        server.truncated = lambda logits, body: logits.log_softmax(-1)
        with pytest.raises(EndpointError, match="drew .* tokens that top_p or top_k leave out here"):
            component(server, top_k=2, checked_draws=8, temperature=1.0).sample(PROMPTS * 3, generator=generator())


def test_a_temperature_that_servers_change_is_refused():
    with stand_in() as server, pytest.raises(PlanError, match="temperature 0.001 is below 0.01"):
        component(server, temperature=0.001).sample(PROMPTS)


def test_an_end_token_that_sglang_trimmed_off_is_put_back():
    choice = {"text": "x", "token_ids": [9, 8], "logprobs": {"token_logprobs": [-1.0, -2.0, -0.5]}, "matched_stop": 1,
              "finish_reason": "stop"}  # fmt: skip
    body = {"model": "m", "prompt": [3], "stop_token_ids": [1]}
    client = HttpClient(url="http://127.0.0.1:1/v1")
    assert read_reply("it", client, choice, body).token_ids == [9, 8, 1]


def test_what_vllm_was_recorded_to_say_is_read():
    """Its end token is among the ids and not in the text; a stop string's tokens are, and not the string."""
    client = HttpClient(url="http://127.0.0.1:1/v1")
    found = read_reply("it", client, RECORDED["completion"]["choices"][0], RECORDED["request"])
    assert (found.token_ids, found.finish_reason) == ([504, 3575, 282, 4649, 314, 7042, 30, 2], "stop")
    assert found.text == "The capital of France is Paris."
    assert found.log_probs[0] == pytest.approx(-0.5874, abs=1e-3)
    stopped = read_reply("it", client, RECORDED["stopped"]["choices"][0], RECORDED["request"])
    assert (stopped.token_ids, stopped.text) == ([504, 3575, 282, 4649, 314, 7042], "The capital of France is ")


# Models and adapters


def test_which_model_is_asked_for():
    with VllmStandIn({"base": MODEL, "lora": MODEL}, TOKENIZER) as server:
        component(server).sample(["ab"], generator=generator())
        component(server, model="lora").sample(["ab"], generator=generator())
        assert [request["model"] for request in server.asked()] == ["base", "lora"]
        with pytest.raises(EndpointError, match=r"asked for 'nope', does not know it: .*serves \['base', 'lora'\]"):
            component(server, model="nope").sample(["ab"])


def test_an_adapter_is_loaded_by_its_weights_and_again_when_they_change(tmp_path):
    def load(folder):
        return PeftModel.from_pretrained(llama(), folder).eval()

    config = LoraConfig(r=2, target_modules=["q_proj"])
    with stand_in(load=load) as server:
        lm = component(server, weights=llama(), adapter=config, checked_draws=8, tolerance=1e-4, adapter_dir=tmp_path)
        lm.sample(PROMPTS, generator=generator())
        lm.sample(PROMPTS, generator=generator())
        assert len(server.asked("/v1/load_lora_adapter")) == 1
        with torch.no_grad():
            for parameter in lm.own_parameters().values():
                parameter.add_(0.3)
        lm.sample(PROMPTS, generator=generator())
        first, second = (request["lora_name"] for request in server.asked("/v1/load_lora_adapter"))
        assert first != second
        assert [request["lora_name"] for request in server.asked("/v1/unload_lora_adapter")] == [first]
        assert [request["model"] for request in server.asked()] == [first] * 6 + [second] * 3
        assert len(list(tmp_path.iterdir())) == 1


def test_a_server_that_loads_no_adapters_says_how_it_would():
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with stand_in() as server, pytest.raises(EndpointError, match="--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        component(server, weights=llama(), adapter=config).sample(PROMPTS)


def test_a_folder_that_the_server_does_not_see_is_named(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    with stand_in(load=lambda folder: None) as server:
        server.answer = lambda path, body: (404, {}, RECORDED["no_adapter"])
        with pytest.raises(
            EndpointError, match=r"does not load the adapter in .*must see that folder \(Server\(adapter"
        ):
            component(server, weights=llama(), adapter=config, adapter_dir=tmp_path).sample(PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_server_cannot_follow_are_refused():
    model = llama()
    with stand_in() as server:
        lm = component(server, weights=model)
        lm.sample(PROMPTS, generator=generator())
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.001)
        with pytest.raises(EndpointError, match="its weights have changed since .* Train an adapter"):
            lm.sample(PROMPTS, generator=generator())


def test_a_frozen_node_is_not_held_to_another_nodes_adapter_on_the_same_model():
    shared = llama()
    with stand_in() as server:
        frozen = component(server, weights=shared)
        trained = component(server, weights=shared, adapter=LoraConfig(r=2, target_modules=["q_proj"]))
        assert trained.module is frozen.module
        frozen.sample(PROMPTS, generator=generator())
        with torch.no_grad():
            for parameter in trained.own_parameters().values():
                parameter.add_(0.3)
        frozen.sample(PROMPTS, generator=generator())


# Candidates


def asked(question):
    return f"q {question}"


def two_nodes(server, **options):
    @node(component(server, max_new_tokens=4, **options))
    def draft(question):
        return f"q {question}"

    @node(CausalLM(MODEL, TOKENIZER, max_new_tokens=4))
    def answer(draft):
        return f"a {draft}"

    question = Input("question")
    return System(question >> draft, draft >> answer).compile()


def test_importance_weights_need_log_probabilities_of_ours():
    rows = {"question": ["ab", "cd"]}
    with stand_in() as server:
        plan = two_nodes(server)
        found = MonteCarlo(num_candidates=3).draw(plan, rows, generator())
        assert found.log_proposal is None
        with pytest.raises(PlanError, match=r"the draws of \['draft'\] have no log-probability.*score_draws=True"):
            ImportanceSampling(num_candidates=3).draw(plan, rows, generator())
        scored = two_nodes(server, score_draws=True)
        weighed = ImportanceSampling(num_candidates=3, temperature=1.5).draw(scored, rows, generator())
    lm = scored.system["draft"].component
    for weight, cell, row in zip(weighed.log_weight, weighed.trace.cells["draft"], weighed.prompt, strict=True):
        [prompt] = lm.prompt_ids([f"q {rows['question'][row]}"])
        with torch.no_grad():
            logits = MODEL(torch.tensor([[*prompt, *cell.record["token_ids"]]])).logits[0, len(prompt) - 1 : -1]
        steps = (logits / 1.5).log_softmax(-1)
        log_q = sum(float(steps[place, token]) for place, token in enumerate(cell.record["token_ids"]))
        assert weight == pytest.approx(-log_q - torch.tensor(3.0).log().item(), abs=1e-4)


def test_errors_name_the_node():
    with stand_in(change=changed(token_ids=None)) as server:
        plan = two_nodes(server, max_retries=0)
        with pytest.raises(EndpointError, match="^Node 'draft': CausalLM"):
            plan.sample({"question": ["ab"]}, seed=0)
        with pytest.raises(EndpointError, match="^Node 'draft': CausalLM"):
            MonteCarlo(num_candidates=2).draw(plan, {"question": ["ab"]})


def test_a_prompt_that_is_refused_alone_is_a_fault_of_its_row():
    def change(reply, body):
        return (400, {}, RECORDED["too_long"]) if len(body["prompt"]) > 20 else reply

    with stand_in(change=change) as server:
        plan = two_nodes(server)
        with pytest.raises(DataError, match="^Node 'draft', row 1: .*maximum context length.*Lower max_new_tokens"):
            plan.sample({"question": ["ab", "x" * 30, "cd"]}, seed=0)


def test_training_draws_its_candidates_with_the_adapter_of_each_step(tmp_path):
    """A stale adapter would be seen: every draw's log-probabilities are compared with those of the weights here."""

    def load(folder):
        return PeftModel.from_pretrained(llama(), folder).eval()

    def prompt(question):
        return f"q {question}"

    def refine(draft):
        return f"a {draft}"

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with stand_in(load=load) as server:
        drafter = component(
            server, weights=llama(), adapter=config, max_new_tokens=4, checked_draws=99, tolerance=1e-4,
            adapter_dir=tmp_path / "adapters",
        )  # fmt: skip
        refiner = CausalLM(llama(1), TOKENIZER, max_new_tokens=4, peft_config=config)
        draft, answer = node(drafter, name="draft")(prompt), node(refiner, name="answer")(refine)
        arguments = SysDPOConfig(
            output_dir=str(tmp_path / "run"), objective="sampling", max_steps=3, per_device_train_batch_size=2,
            learning_rate=0.05, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
        )  # fmt: skip
        rows = [{"question": text, "chosen": "yes", "rejected": "no"} for text in ("ab", "cd", "ef", "gh")]
        trainer = SysDPOTrainer(
            model=System(Input("question") >> draft, draft >> answer), args=arguments, train_dataset=rows,
            candidates=MonteCarlo(num_candidates=3),
        )  # fmt: skip
        trainer.train()
        loaded = [request["lora_name"] for request in server.asked("/v1/load_lora_adapter")]
        drawn = list(dict.fromkeys(request["model"] for request in server.asked()))
    assert len(set(loaded)) == len(loaded) == 3  # as often as there are steps
    assert drawn == loaded
    record = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))
    assert server.url not in record


# Servers that fail, keys


def test_a_failing_server_is_asked_again_and_a_dead_one_named():
    gone = (410, {}, "it has stopped.")
    with stand_in(change=lambda *_: gone) as server, pytest.raises(EndpointError, match="HTTP 410 .*it has stopped"):
        component(server).sample(PROMPTS * 3)
    fails = itertools.cycle([True, True, False])

    with stand_in(change=lambda reply, body: (503, {}, "starting") if next(fails) else reply) as server:
        assert len(component(server).sample(PROMPTS, generator=generator())) == 3
        url = server.url
    with pytest.raises(
        EndpointError, match=r"gave no answer in 2 tries: ConnectionRefusedError.*Is it running there\?"
    ):
        component(url, max_retries=1).sample(PROMPTS)


def test_a_key_is_read_when_it_is_used_and_stays_out_of_everything_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SERVER_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", f"other-{KEY}")
    with stand_in() as server:
        lm = component(server, api_key_env="MY_SERVER_KEY")
        draws = lm.sample(PROMPTS, generator=generator())
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        server.headers.clear()
        component(server).sample(PROMPTS, generator=generator())
        assert all("Authorization" not in headers for headers in server.headers)
        with pytest.raises(
            EndpointError, match="OPENAI_API_KEY .* holds a key of openai.com, which is not sent to 127"
        ):
            component(server, api_key_env="OPENAI_API_KEY").sample(PROMPTS)
        System(Input("question") >> node(lm, name="draft")(asked)).save_pretrained(tmp_path / "saved")
    kept = [path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert kept
    assert not any(KEY.encode() in each or server.url.encode() in each for each in kept)
    assert KEY not in repr(vars(lm)) + json.dumps([dict(draw.record) for draw in draws])


def test_a_saved_system_draws_where_it_is_loaded(tmp_path):
    with stand_in() as server:
        lm = component(server)
        options = lm.save_pretrained(tmp_path / "lm")
    again = CausalLM.from_pretrained(tmp_path / "lm", json.loads(json.dumps(options)))
    assert again.decoder == "local"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "decoder: '127.0.0.1:8000' is no http"),
        ({"url": f"http://user:{KEY}@host/v1"}, "holds credentials"),
        ({"url": "http://host/v1", "concurrency": 0}, "concurrency >= 1"),
        ({"url": "http://host/v1", "timeout": 0}, "timeout > 0"),
        ({"url": "http://host/v1", "max_retries": -1}, "max_retries >= 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(PlanError, match=message) as error:
        Server(**options)
    assert KEY not in str(error.value)


def test_a_url_alone_is_a_server():
    assert CausalLM("anything", decoder="http://host:8000/v1").decoder == Server("http://host:8000/v1")


def test_without_checks_no_weights_are_loaded(tmp_path):
    from sysdag.execution.batches import load

    llama().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with stand_in() as server:
        lm = CausalLM(tmp_path, max_new_tokens=4, decoder=Server(server.url, checked_draws=0))
        load("draft", lm, "cpu")
        lm.sample(["ab"], generator=generator())
        assert not lm.lm.is_loaded
        checked = CausalLM(tmp_path, max_new_tokens=4, decoder=Server(server.url))
        load("draft", checked, "cpu")
        assert checked.lm.is_loaded
