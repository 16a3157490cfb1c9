"""`CausalLM(decoder=Server(...))`: what a server is asked for, and what of its answers is believed.

The server is a stand-in that speaks as vLLM was recorded to (see `vllm_stand_in`); test_real_servers.py has real ones.
"""

import collections

import pytest
import torch
from decoder_families import plain_log_prob
from scipy.stats import chisquare
from served_models import MODEL, PROMPTS, TOKENIZER, changed, component, generator, shifted, stand_in
from tiny import char_tokenizer, llama
from vllm_stand_in import RECORDED, VllmStandIn

from sysdag import PlanError
from sysdag.components import CausalLM, Server
from sysdag.components.language.engines.completions_api import read_reply
from sysdag.endpoints.http_client import HttpClient
from sysdag.errors import EndpointError

pytestmark = pytest.mark.usefixtures("no_waits")


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
