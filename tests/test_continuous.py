"""`CausalLM(decoder="continuous")`: transformers' generate_batch draws from the distribution that sysdag scores."""

import collections
import itertools
import logging

import pytest
import torch
import transformers
from decoder_families import plain_log_prob, tiny_decoder
from packaging.version import Version
from peft import LoraConfig
from scipy.stats import chisquare
from tiny import ALPHABET, char_tokenizer, llama
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sysdag import MonteCarlo, PlanError, System, node
from sysdag.components import CausalLM
from sysdag.errors import RunError
from sysdag.graph.variables import Input

NEWEST = Version(transformers.__version__) >= Version("5.24")

END = 1


def exact(model, prompt, warpers, length=2):
    """Log-probability of every completion of up to `length` tokens, by transformers' own warpers."""
    found = {}
    for size in range(1, length + 1):
        for ids in itertools.product(range(model.config.vocab_size), repeat=size):
            if END in ids[:-1] or (size < length and ids[-1] != END):
                continue
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :].float()
            for warper in warpers:
                logits = warper(None, logits)
            steps = logits.log_softmax(-1)
            found[ids] = sum(float(steps[place, token]) for place, token in enumerate(ids))
    return found


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({}, []),
        ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        (
            {"temperature": 1.3, "top_k": 5, "top_p": 0.8},
            [TemperatureLogitsWarper(1.3), TopKLogitsWarper(5), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_draws_have_the_exact_distribution(options, warpers):
    model = llama(vocab_size=8, peaked=1.5)
    lm = CausalLM(model, char_tokenizer("abcde"), max_new_tokens=2, decoder="continuous", batch_size=512, **options)
    count = 3000
    draws = lm.sample(["ab"] * count, generator=torch.Generator().manual_seed(5))
    [prompt] = lm.prompt_ids(["ab"])
    expected = exact(model, prompt, warpers)
    for draw in draws[:20]:
        assert draw.log_prob == pytest.approx(expected[tuple(draw.record["token_ids"])], abs=1e-4)
    drawn = collections.Counter(tuple(draw.record["token_ids"]) for draw in draws)
    often = [ids for ids, log_prob in expected.items() if count * torch.tensor(log_prob).exp() >= 5]
    chances = torch.tensor([expected[ids] for ids in often], dtype=torch.float64).exp()
    seen = [drawn[ids] for ids in often]
    rest = count - sum(seen)
    if 1 - chances.sum() > 1e-4:
        seen, chances = [*seen, rest], torch.cat([chances, (1 - chances.sum())[None]])
    else:
        assert rest == 0
    assert chisquare(seen, (chances / chances.sum() * count).numpy()).pvalue > 1e-3


def test_an_adapter_draws_where_it_is_on_and_not_where_it_is_off():
    model = llama(vocab_size=8)
    options = {"max_new_tokens": 4, "decoder": "continuous", "peft_config": LoraConfig(target_modules=["q_proj"])}
    first, second = (CausalLM(model, char_tokenizer("abcde"), **options) for _ in range(2))
    assert second.module is first.module
    with torch.no_grad():
        for parameter in second.own_parameters().values():
            parameter.normal_(0, 0.7)
    prompts = ["ab", "cde", "a"] * 4
    for lm, other in ((first, second), (second, first), (first, second)):
        draws = lm.sample(prompts, generator=torch.Generator().manual_seed(0))
        drawn = torch.tensor([draw.log_prob for draw in draws])
        assert torch.allclose(lm.log_prob(prompts, draws), drawn, atol=1e-4)
        assert not torch.allclose(other.log_prob(prompts, draws), drawn, atol=1e-2)


def test_a_stop_string_ends_a_draw_that_transformers_goes_on_with():
    model = llama(vocab_size=8, peaked=1.0)
    lm = CausalLM(model, char_tokenizer("abcde"), max_new_tokens=12, stop=["c", "bb"], decoder="continuous")
    draws = lm.sample(["ab"] * 60, generator=torch.Generator().manual_seed(0))
    [prompt] = lm.prompt_ids(["ab"])
    stopped = 0
    for draw in draws:
        ids = draw.record["token_ids"]
        text = lm.tokenizer.decode(ids)
        assert all(text.find(stop) in (-1, len(text) - len(stop)) for stop in ("c", "bb"))
        assert "c" not in draw.value
        stopped += text.endswith(("c", "bb"))
        assert draw.record["finished"] == (ids[-1] == END or text.endswith(("c", "bb")))
        assert draw.log_prob == pytest.approx(plain_log_prob(model, prompt, ids), abs=1e-4)
    assert stopped > 10  # that it was about something


def test_nothing_of_the_model_or_of_torch_is_left_changed():
    model = llama()
    lm = CausalLM(model, char_tokenizer(), max_new_tokens=3, decoder="continuous")
    model.train()
    attention = model.config._attn_implementation
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    lm.sample(["ab"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(2), wanted)
    assert model.training
    assert model.config._attn_implementation == attention
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_the_same_generator_gives_the_same_draws_and_another_one_others():
    lm = CausalLM(llama(), char_tokenizer(), max_new_tokens=8, decoder="continuous")

    def drawn(seed):
        draws = lm.sample(["ab", "cd"] * 3, generator=torch.Generator().manual_seed(seed))
        return [draw.record["token_ids"] for draw in draws]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "gptj" if NEWEST else "opt", "phi3", "gpt_oss"])
def test_families_that_are_served(family):
    model = tiny_decoder(family)
    lm = CausalLM(model, char_tokenizer(ALPHABET[:42]), max_new_tokens=8, decoder="continuous", batch_size=2)
    prompts = ["a prompt that is longer than the others are", "ab", "what is it?"]
    draws = lm.sample(prompts, generator=torch.Generator().manual_seed(0))
    for ids, draw in zip(lm.prompt_ids(prompts), draws, strict=True):
        assert draw.log_prob == pytest.approx(plain_log_prob(model, ids, draw.record["token_ids"]), abs=1e-3)


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("mamba", PlanError, "does not serve MambaForCausalLM"),
        ("deepseek_v3", RunError, "finished 0 of 2 completions with DeepseekV3ForCausalLM"),
        *(
            [
                ("bloom", RunError, "finished 0 of 2 completions with BloomForCausalLM"),
                ("opt", RunError, "finished 0 of 2 completions with OPTForCausalLM"),
            ]
            if NEWEST
            else [
                ("bloom", PlanError, "log-probabilities of BloomForCausalLM are .* nats from its own"),
                ("gptj", PlanError, "log-probabilities of GPTJForCausalLM are .* nats from its own"),
            ]
        ),
    ],
)
def test_families_that_are_not_served_are_refused(family, kind, message, caplog):
    """transformers itself refuses the first two, and from 5.24 all; of the others it drew from another distribution."""
    caplog.set_level(logging.CRITICAL, logger="transformers")
    lm = CausalLM(tiny_decoder(family), char_tokenizer(ALPHABET[:42]), max_new_tokens=8, decoder="continuous")
    with pytest.raises(kind, match=message) as error:
        lm.sample(["a prompt of some words", "ab"], generator=torch.Generator().manual_seed(0))
    assert "decoder='local'" in str(error.value)


def test_it_draws_in_a_system_and_cannot_search():
    lm = CausalLM(llama(), char_tokenizer(chat=True), max_new_tokens=4, decoder="continuous")

    @node(lm)
    def draft(question):
        return f"q: {question}"

    plan = System(Input("question") >> draft).compile()
    trace = plan.sample({"question": ["ab", "cd"]}, seed=0)
    assert torch.allclose(
        plan.log_probs(trace)["draft"], torch.tensor([cell.log_prob for cell in trace.cells["draft"]]), atol=1e-4
    )
    with pytest.raises(PlanError, match="decoder='continuous' draws, and cannot search. Use MonteCarlo"):
        lm.search(["ab"], 2, 1.0)
    assert MonteCarlo(num_candidates=2).num_candidates == 2


@pytest.mark.parametrize("given", ["vllm", "server", 3, None])
def test_a_decoder_that_there_is_not(given):
    with pytest.raises(PlanError, match="decoder must be 'local', 'continuous', a server's URL"):
        CausalLM("anything", decoder=given)
