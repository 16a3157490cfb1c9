"""Families of causal language models: scored, sampled and searched as their own forwards and `generate` say.

`python tests/decoder_families.py` goes through all families of the installed transformers.
"""

import inspect
import logging
from functools import cache

import pytest
import torch
import transformers
from decoder_families import greedy, left_pad, plain_log_prob, tiny_decoder
from tiny import char_tokenizer, llama
from transformers import BertConfig, BertLMHeadModel

from sysdag import Draw, PlanError
from sysdag.components import CausalLM
from sysdag.components.language.beam import diverse_beam_search
from sysdag.components.language.prefix_scorer import PrefixScorer
from sysdag.components.language.sampling import sample_tokens

PROMPTS = ["ab", "a longer prompt", "z? yes"]
CACHE, BATCHES = "", "decodes batches that no prompt enters before they end"
BY_LENGTH, WHOLE = "decodes a batch for each length of prompt", "decodes whole sequences for each token"
# Each another kind of cache, position or mask.
FAMILIES = {
    "mistral": CACHE,  # a sliding window
    # Layers that share keys; the oldest release's cache takes rows that enter.
    "gemma4_text": CACHE if transformers.__version__.startswith("5.20.") else BATCHES,
    "deepseek_v3": CACHE,  # latent attention
    "bloom": CACHE,  # positions by the mask
    "bert-generation": CACHE,  # an encoder as a decoder
    "mamba": CACHE,  # states that take a mask
    "falcon_mamba": CACHE,
    "mamba2": CACHE,
    "jamba": CACHE,  # states beside keys
    "qwen3_next": CACHE,
    "minimax": BATCHES,  # a cache class of its own
    "bart": BY_LENGTH,  # positions count padding
    "roberta": BY_LENGTH,  # positions from the ids
    "rwkv": WHOLE,  # a state that batches confuse
    "recurrent_gemma": WHOLE,  # states inside modules
    "openai-gpt": WHOLE,  # no cache
    "zamba2": WHOLE,  # a step that is not the forward's
}


@cache
def component(family):
    return CausalLM(tiny_decoder(family), char_tokenizer(), max_new_tokens=6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_draws_and_searches_are_those_of_plain_forwards(family, caplog):
    lm = component(family)
    prompts = lm.prompt_ids(PROMPTS)
    with caplog.at_level(logging.WARNING):
        draws = lm.sample(PROMPTS * 2, generator=torch.Generator().manual_seed(1))
    assert caplog.text.count("decodes") == (FAMILIES[family] != CACHE)
    assert FAMILIES[family] in caplog.text
    wanted = [
        plain_log_prob(lm.module, prompt, draw.record["token_ids"])
        for prompt, draw in zip(prompts * 2, draws, strict=True)
    ]
    assert [draw.log_prob for draw in draws] == pytest.approx(wanted, abs=1e-3)
    assert lm.log_prob(PROMPTS * 2, draws).tolist() == pytest.approx(wanted, abs=1e-3)

    ids, mask = left_pad(prompts, 0, lm.device)
    options = dict(max_new_tokens=6, pad_token_id=0, num_beam_groups=1, diversity_penalty=0.0)
    found, _ = diverse_beam_search(lm.module, ids, mask, num_beams=1, eos_token_id=1, **options)
    for prompt, row in zip(prompts, found, strict=True):
        expected = greedy(lm.module, prompt, 6)
        assert row[0, : len(expected)].tolist() == expected
    found, scores = diverse_beam_search(lm.module, ids, mask, num_beams=3, **options)
    for prompt, rows, score in zip(prompts, found.tolist(), scores.tolist(), strict=True):
        totals = [plain_log_prob(lm.module, prompt, row) for row in rows]
        assert [6 * each for each in score] == pytest.approx(totals, abs=2e-3)


@pytest.mark.parametrize("family", ["mistral", "mamba2", "minimax", "bart", "openai-gpt"])
def test_a_beam_search_is_that_of_generate_on_each_prompt_alone(family):
    lm = component(family)
    lm.module.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    prompts = lm.prompt_ids(PROMPTS)
    ids, mask = left_pad(prompts, 0, lm.device)
    found, _ = diverse_beam_search(
        lm.module, ids, mask, num_beams=3, num_beam_groups=1, diversity_penalty=0.0, max_new_tokens=6, pad_token_id=0
    )
    for prompt, rows in zip(prompts, found, strict=True):
        alone = torch.tensor([prompt])
        wanted = lm.module.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=6, num_beams=3, num_return_sequences=3,
            do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert rows.tolist() == wanted[:, len(prompt) :].tolist()


def test_how_a_model_is_decoded_is_found_out_once_and_said_once(caplog):
    lm = CausalLM(tiny_decoder("openai-gpt"), char_tokenizer(), max_new_tokens=3)
    calls = []
    with caplog.at_level(logging.WARNING):
        lm.sample(["ab"], generator=torch.Generator().manual_seed(0))
        lm.module.register_forward_pre_hook(
            lambda m, a, options: calls.append(options["input_ids"].shape), with_kwargs=True
        )
        lm.sample(["ab"], generator=torch.Generator().manual_seed(0))
    assert calls == [(1, 2), (1, 3), (1, 4)]
    assert caplog.text.count("OpenAIGPTLMHeadModel decodes whole sequences") == 1


def test_a_prompts_last_logits_alone_are_asked_for_and_the_draws_stay():
    model = llama()
    prompts, seeds = [[5, 6, 7], [8, 9, 10, 11, 12]], [3, 4]
    options = dict(max_new_tokens=5, eos_token_ids=[1])
    sample_tokens(model, prompts, seeds, **options)
    asked, forward = [], model.forward

    def all_of_them(*arguments, logits_to_keep=0, **inputs):
        asked.append(logits_to_keep)
        return forward(*arguments, **inputs)

    found = sample_tokens(model, prompts, seeds, **options)
    model.forward = all_of_them
    all_of_them.__signature__ = inspect.signature(forward)
    wanted = sample_tokens(model, prompts, seeds, **options)
    assert set(asked) == {1}
    assert found.token_ids == wanted.token_ids
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-6, atol=1e-6)  # a head of other shape rounds


@pytest.fixture(scope="module")
def encoder():
    config = BertConfig(
        vocab_size=45, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertLMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made = CausalLM(model, char_tokenizer(), max_new_tokens=4)
    model.config.is_decoder = False  # which a config of its own would have had refused at once
    for part in model.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = False
    return made


def test_a_model_that_looks_ahead_is_refused_by_name(encoder):
    for use in (
        lambda: encoder.sample(["ab"]),
        lambda: encoder.search(["ab"], 2, 1.0),
        lambda: encoder.log_prob(["ab"], [Draw("x", {"token_ids": [4, 5]})]),
    ):
        with pytest.raises(
            PlanError, match=r"BertLMHeadModel cannot be .* tokens .*no causal language model.*is_decoder=True"
        ):
            use()


def test_a_model_that_padding_on_the_right_changes_is_scored_in_rows_of_one_length(caplog):
    model = llama()
    forward = model.forward

    def counts_padding(input_ids=None, attention_mask=None, **options):
        output = forward(input_ids, attention_mask, **options)
        if attention_mask is not None:
            output.logits = output.logits * (1 + 0.1 * (1 - attention_mask.float()).sum(-1))[:, None, None]
        return output

    model.forward = counts_padding
    sequences = [([5, 6, 7], [8, 9]), ([5, 6], [10]), ([7], [8, 9, 11, 12]), ([5, 6], [])]
    scorer = PrefixScorer(model, pack_prefixes=False)
    with caplog.at_level(logging.WARNING):
        found = scorer(sequences, 0)
    assert "scored in rows of one length: a probe's logits differed by" in caplog.text
    wanted = [plain_log_prob(llama(), prompt, completion) for prompt, completion in sequences]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
