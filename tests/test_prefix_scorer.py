"""Packed scoring against one forward a sequence, without padding, masks or sharing."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_language_head import SIZES, lora, made
from tiny import char_tokenizer, llama
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from sysdag import Draw
from sysdag.components import CausalLM
from sysdag.components.language import language_head
from sysdag.components.language.prefix_scorer import PrefixScorer, obstacle

GPT2 = dict(vocab_size=45, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None)
NO_HEAD_DIM = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
FULL = dict(layer_types=["full_attention"] * 2)
PACKED = {
    "llama": lambda: llama(),
    "llama-sdpa": lambda: llama(attn_implementation="sdpa"),
    "qwen2": lambda: made(Qwen2Config(**SIZES)),
    "qwen3": lambda: made(Qwen3Config(**SIZES)),
    "gpt2": lambda: made(GPT2Config(**GPT2, resid_pdrop=0.0)),
    "gemma2": lambda: made(Gemma2Config(**SIZES, **FULL, final_logit_softcapping=2.0)),
    "gpt-neox": lambda: made(GPTNeoXConfig(**NO_HEAD_DIM)),
    "mixtral": lambda: made(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "mistral-short": lambda: made(MistralConfig(**SIZES, sliding_window=64)),
    "opt": lambda: made(OPTConfig(vocab_size=45, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, dropout=0.0,
                                  num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)),
    "lora": lambda: lora(llama(), "q_proj", "v_proj"),
    "head-with-lora": lambda: lora(llama(), "q_proj", "lm_head"),
}  # fmt: skip
STEM, OTHER = [*range(3, 15)], [20, 21]
BATCH = [
    (STEM, [4, 5, 6, 1]), (STEM, [4, 5, 7]), (STEM, [4, 5, 6, 1]), (STEM, [4]), ([*STEM, 4], [5, 9, 1]),
    (STEM, [30, 1]), (OTHER, [4, 5]), (OTHER, [8]), (STEM[:5], [8, 40, 1]), (STEM, []),
]  # fmt: skip
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 2.0, 0.25, -0.75, 1.25, 3.0])


def by_hand(model, sequences):
    totals = []
    for prompt, completion in sequences:
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(completion, dtype=torch.long)[:, None])
        totals.append(picked.sum() if completion else logits.new_zeros(()))
    return torch.stack(totals)


def gradients(scores, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(scores @ WEIGHTS.to(scores.dtype), trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def calls(model):
    """What the model's forward gets from here on."""
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def assert_same_gradients(got, want, tolerance):
    """Each to a relative tolerance; one that is zero but for rounding (the bias of keys) stays so."""
    zero = 1e-5 * max(float(each.norm()) for each in want)
    for mine, theirs in zip(got, want, strict=True):
        size = float(theirs.norm())
        assert float((mine - theirs).norm()) <= (tolerance * size if size > zero else 2 * zero)


@pytest.mark.parametrize("name", PACKED)
def test_log_probs_and_gradients_are_those_of_separate_sequences(name, caplog):
    model = PACKED[name]()
    scorer = PrefixScorer(model)
    with caplog.at_level(logging.INFO):
        scorer(BATCH, 0)
    assert "shared prefixes once: a probe agreed" in caplog.text
    seen = calls(model)
    got, want = scorer(BATCH, 0), by_hand(model, BATCH)
    assert seen[0]["attention_mask"].ndim == 4
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got[-1] == 0
    assert_same_gradients(gradients(got, model), gradients(want, model), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_in_double_precision_they_agree_much_further(attention):
    """GPT-2 alone computes nothing in fp32 then; RMS norms do."""
    model = PACKED["gpt2"]().double()
    model.set_attn_implementation(attention)
    got, want = PrefixScorer(model)(BATCH, 0), by_hand(model, BATCH)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert_same_gradients(gradients(got, model), gradients(want, model), 1e-12)


TOKENS = st.integers(3, 5)
SEQUENCES = st.tuples(st.lists(TOKENS, min_size=1, max_size=7), st.lists(TOKENS, max_size=4))
MODEL = llama()
SCORER = PrefixScorer(MODEL)


@settings(max_examples=60, deadline=None)
@given(st.lists(SEQUENCES, min_size=1, max_size=9))
def test_any_tries_score_as_separate_sequences(sequences):
    torch.testing.assert_close(SCORER(sequences, 0), by_hand(MODEL, sequences), rtol=1e-5, atol=2e-5)


def test_each_distinct_prefix_is_computed_once_and_the_head_runs_where_something_is_predicted(monkeypatch):
    model = llama()
    scorer = PrefixScorer(model)
    scorer(BATCH, 0)
    seen, predicted = calls(model), []
    real = language_head.linear_logprob

    def recorded(hidden, weight, rows, labels, **options):
        predicted.append((rows, labels))
        return real(hidden, weight, rows, labels, **options)

    monkeypatch.setattr(language_head, "linear_logprob", recorded)
    stem = [*range(3, 23)]
    sequences = [(stem, [25, k, k, 1]) for k in range(30, 38)]
    scorer(sequences, 0)
    ((rows, labels),) = predicted
    assert len(seen) == 1
    assert seen[0]["input_ids"].numel() == len(stem) + 1 + 8 * 3
    assert len(rows.unique()) == 1 + 1 + 8 * 2, "the stem's end, the common token, and two of each that follow"
    assert len(labels) == 1 + 8 * 3


def test_nothing_shared_runs_as_ordinary_rows():
    model = llama()
    scorer = PrefixScorer(model)
    scorer(BATCH, 0)
    seen = calls(model)
    scorer([([k, 4, 5], [6, 1]) for k in range(6, 12)], 0)
    assert seen[0].keys() == {"input_ids", "attention_mask", "use_cache", "logits_to_keep"}
    assert seen[0]["attention_mask"].shape == seen[0]["input_ids"].shape == (6, 5)


def rope(**options):
    return {"rope_parameters": {"rope_theta": 10000.0, **options}}


UNPACKED = {
    "mistral": (lambda: made(MistralConfig(**SIZES, sliding_window=8)), "longer than its attention's 8 tokens"),
    "gemma2": (lambda: made(Gemma2Config(**SIZES, sliding_window=8)), "longer than its attention's 8 tokens"),
    "mamba": (
        lambda: made(MambaConfig(vocab_size=45, hidden_size=32, num_hidden_layers=2, state_size=4)),
        "takes no position_ids",
    ),
    "bloom": (lambda: made(BloomConfig(vocab_size=45, hidden_size=32, n_layer=2, n_head=4)), "takes no position_ids"),
    "falcon": (
        lambda: made(FalconConfig(vocab_size=45, hidden_size=32, num_hidden_layers=2,
 num_attention_heads=4, alibi=True)),
        "distance in the row (alibi)",
    ),
    "gpt-neo": (
        lambda: made(GPTNeoConfig(vocab_size=45, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                                  attention_types=[[["global", "local"], 1]], max_position_embeddings=64)),
        "masks by the place in the row",
    ),
    "dynamic": (lambda: llama(**rope(rope_type="dynamic", factor=2.0)), "depends on the row's length (dynamic)"),
    "jamba": (
        lambda: made(JambaConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, num_experts=2,
                                 attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)),
        "it has layers of type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPACKED)
def test_other_models_are_scored_in_rows_of_their_own_and_said_once(name, caplog):
    build, reason = UNPACKED[name]
    model = build()
    scorer = PrefixScorer(model)
    seen = calls(model)
    with caplog.at_level(logging.WARNING):
        for each in (scorer, scorer, PrefixScorer(model)):
            got = each(BATCH, 0)
    assert seen[-1]["attention_mask"].ndim == 2
    assert caplog.text.count("for each sequence anew") == 1
    assert reason in caplog.text
    torch.testing.assert_close(got, by_hand(model, BATCH), rtol=1e-4, atol=1e-4)


def test_a_window_that_holds_every_sequence_is_no_obstacle():
    model = PACKED["mistral-short"]()
    scorer = PrefixScorer(model)
    scorer(BATCH, 0)
    seen = calls(model)
    scorer(BATCH, 0)
    scorer([*BATCH, ([*range(3, 40)] * 2, [1])], 0)
    assert [call["attention_mask"].ndim for call in seen] == [4, 2]


def places_by_row(model):
    """Adds to its logits what depends on the column, which only the probe can notice."""
    forward = model.forward

    def shifted(input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **options):
        columns = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        return forward(input_ids, attention_mask, position_ids=columns, logits_to_keep=logits_to_keep, **options)

    model.forward = shifted
    return model


def refuses_masks(model):
    forward = model.forward

    def picky(input_ids=None, attention_mask=None, position_ids=None, **options):
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("expected a mask of two dimensions")
        return forward(input_ids, attention_mask, position_ids=position_ids, **options)

    model.forward = picky
    return model


def ignores_masks(model):
    """Has every token attend to all before it in the row, whatever the mask of a packed row says."""
    forward = model.forward

    def causal(input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **options):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        options = {**options, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return forward(input_ids, attention_mask, **options)

    model.forward = causal
    return model


def deep():
    """Rounding to bfloat16 moves its logits by as much of their spread as in real models."""
    model = llama(num_hidden_layers=12)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_in_bfloat16_is_no_wrong_mask(autocast, caplog):
    model = deep() if autocast else deep().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            ids = torch.tensor([[5, 9, 13, 17, 21, 25]])
            rounded = model(ids).logits.float()
        with caplog.at_level(logging.INFO):
            PrefixScorer(model)(BATCH, 0)
        seen = calls(model)
        PrefixScorer(model)(BATCH, 0)
        masks = [call["attention_mask"].ndim for call in seen]
    truth = deep() if autocast else model.float()
    with torch.no_grad():
        exact = truth(ids).logits
    noise = (rounded - exact).norm(dim=-1) / (exact - exact.mean(-1, keepdim=True)).norm(dim=-1)
    assert noise.max() > 0.06
    assert "shared prefixes once: a probe agreed" in caplog.text
    assert masks == [4], "decided once for the model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spoil", [places_by_row, ignores_masks])
@pytest.mark.parametrize("build", [llama, deep])
def test_wrong_masks_and_positions_are_seen_in_any_dtype(build, spoil, dtype, caplog):
    model = spoil(build().to(dtype))
    assert obstacle(model) is None
    with caplog.at_level(logging.WARNING):
        PrefixScorer(model)(BATCH, 0)
    assert "for each sequence anew: a probe's logits differed by" in caplog.text
    seen = calls(model)
    PrefixScorer(model)(BATCH, 0)
    assert [call["attention_mask"].ndim for call in seen] == [2]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(places_by_row, "logits differed by"), (refuses_masks, "raised ValueError: expected a mask of two dimensions")],
)
def test_what_the_config_cannot_tell_the_probe_does(spoil, reason, caplog):
    model = spoil(llama())
    assert obstacle(model) is None
    with caplog.at_level(logging.WARNING):
        got = PrefixScorer(model)(BATCH, 0)
    assert reason in caplog.text
    torch.testing.assert_close(got, by_hand(llama(), BATCH), rtol=1e-5, atol=1e-5)


def test_the_probe_leaves_modes_and_random_state_alone():
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert PrefixScorer(model).groups(BATCH, 40)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_weights_that_are_not_finite_decide_nothing():
    model = llama()
    scorer = PrefixScorer(model)
    kept = model.lm_head.weight.detach().clone()
    model.lm_head.weight.data.fill_(float("nan"))
    assert scorer(BATCH, 0).isnan().any()
    model.lm_head.weight.data.copy_(kept)
    seen = calls(model)
    scorer(BATCH, 0)
    assert seen[-1]["attention_mask"].ndim == 4


def test_virtual_tokens_are_an_obstacle():
    model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert "virtual tokens" in obstacle(model)
    assert obstacle(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))) is None


def test_an_attention_that_takes_no_masks_is_an_obstacle():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    assert "'flash_attention_2', which takes no such mask" in obstacle(model)


def test_positions_that_scale_with_the_row_are_an_obstacle_wherever_the_config_keeps_them():
    model = llama()
    model.config.rope_parameters = {
        "full_attention": {"rope_type": "longrope"},
        "sliding_attention": {"rope_type": "default"},
    }
    assert "(longrope)" in obstacle(model)
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 2.0}
    assert obstacle(model) is None
    model.config.rope_scaling = {"type": "dynamic"}
    assert "(dynamic)" in obstacle(model)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = lora(llama(), "q_proj", "v_proj")
    model.enable_input_require_grads()
    plain = gradients(PrefixScorer(model)(BATCH, 0), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again = gradients(PrefixScorer(model)(BATCH, 0), model)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["llama", "llama-sdpa", "gpt2"])
def test_in_bfloat16_and_under_autocast_packed_is_as_near_to_the_truth_as_unpacked(name):
    truth = by_hand(PACKED[name](), BATCH)
    for half in (PACKED[name]().bfloat16(), PACKED[name]()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half.dtype == torch.float32):
            scorer = PrefixScorer(half)
            packed = scorer(BATCH, 0)
            plain = PrefixScorer(half, pack_prefixes=False)(BATCH, 0)
        assert scorer._packs
        assert packed.dtype == torch.float32
        assert (packed - truth).norm() <= 2 * (plain - truth).norm() + 1e-3


def test_dropout_of_a_shared_prefix_is_shared():
    model = made(GPT2Config(**GPT2)).train()
    scorer = PrefixScorer(model)
    one, other = scorer([(STEM, [4]), (STEM, [5])], 0).exp().tolist()
    with torch.no_grad():
        assert one != pytest.approx(other)
        many = scorer([(STEM, [k]) for k in range(45)], 0)
    assert float(many.exp().sum()) == pytest.approx(1, abs=1e-5)


def draws_of(completions):
    return [Draw("", {"token_ids": completion}) for completion in completions]


def test_the_component_packs_unless_told_not_to():
    scores, shapes = [], []
    for pack_prefixes in (True, False):
        model = llama()
        lm = CausalLM(model, char_tokenizer(), max_new_tokens=10, pack_prefixes=pack_prefixes)
        draws = draws_of([[4, 5, 1], [4, 6, 1], [7, 8]])
        lm.log_prob(["a common prompt"] * 3, draws)
        seen = calls(model)
        scores.append(lm.log_prob(["a common prompt"] * 3, draws))
        shapes.append(tuple(seen[0]["input_ids"].shape))
    assert shapes == [(1, 22), (3, 18)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)


def test_groups_of_the_component_are_scored_as_the_whole():
    model = llama()
    lm = CausalLM(model, char_tokenizer(), max_new_tokens=10)
    inputs = ["a common prompt", "another prompt"] * 6
    draws = draws_of([[3 + k, 5, 1] for k in range(12)])
    assert lm.micro_batches(inputs, draws, None) == [list(range(12))]
    assert lm.micro_batches([], [], 10) == lm.micro_batches([], [], None) == []
    found = lm.micro_batches(inputs, draws, 40)
    assert sorted(sum(found, [])) == list(range(12))
    assert 1 < len(found) < 6
    whole, seen = lm.log_prob(inputs, draws), calls(model)
    for group in found:
        part = lm.log_prob([inputs[i] for i in group], [draws[i] for i in group])
        torch.testing.assert_close(part, whole[group], rtol=1e-5, atol=1e-5)
    assert max(call["input_ids"].numel() for call in seen) <= 40
