"""Attention over tries by pieces: against softmax over each token's own prefix, and models against plain rows."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language_head import SIZES, lora, made
from test_prefix_scorer import BATCH, GPT2, PACKED, STEM, assert_same_gradients, by_hand, calls, gradients
from tiny import llama
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma2Config, GPT2Config, Qwen2Config

from sysdag.components.language import prefix_scorer, trie_pieces
from sysdag.components.language.packed_inputs import model_inputs
from sysdag.components.language.prefix_scorer import PrefixScorer
from sysdag.components.language.token_trie import pack
from sysdag.components.language.trie_mask import TrieMask, dense_mask
from sysdag.components.language.trie_pieces import Kind, pieces
from sysdag.components.memory import SavedBytes

TOKENS = st.integers(3, 5)
SEQUENCES = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=9), st.lists(TOKENS, max_size=6)), min_size=1, max_size=9
)
CALLS = st.sampled_from([0.0, 30.0, 300.0, 3000.0])  # with a width of 16: from no masks to few pieces
DEEP = [
    (STEM, [*draft, *answer, *end])
    for draft in ([20, 21, 22], [23, 24], [20, 25, 26, 27])
    for answer in ([30, 31], [32, 33, 34, 35])
    for end in ([40], [41, 42], [43, 44, 40])
]


@pytest.fixture
def split(monkeypatch):
    """A call costs nothing, so that short tries are cut into every piece."""
    monkeypatch.setattr(trie_pieces, "CALL", 0)


def prefixes(trie):
    """(R, T, T) which tokens each token comes after, itself included, found by going from parent to parent."""
    seen = torch.zeros(*trie.tokens.shape, trie.tokens.shape[1], dtype=torch.bool)
    for row in range(len(trie.tokens)):
        for token in range(trie.tokens.shape[1]):
            column = token
            while column >= 0:
                seen[row, token, column] = True
                column = int(trie.parent[row, column])
    return seen


def seen_by(found, trie):
    """How often each query meets each key."""
    counts = torch.zeros(*trie.tokens.shape, trie.tokens.shape[1], dtype=torch.long)
    queried = torch.zeros(trie.tokens.shape, dtype=torch.bool)
    for piece in found:
        assert piece.opens == (not queried[piece.row, piece.queries].any())
        assert piece.opens or queried[piece.row, piece.queries].all()
        queried[piece.row, piece.queries] = True
        part = counts[piece.row, piece.queries, piece.keys]
        if piece.kind is Kind.MASKED:
            assert piece.queries == piece.keys
            part += prefixes(trie)[piece.row, piece.queries, piece.keys]
        else:
            part += torch.ones_like(part) if piece.kind is Kind.ALL else torch.ones_like(part).tril()
    return counts


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, CALLS, st.sampled_from([0.5, 8.0, float("inf")]))
def test_pieces_are_every_token_with_its_prefix_once(sequences, call, hidden_size):
    trie = pack(sequences, hidden_size)
    found = pieces(trie, 16, call)
    if not found:
        assert call
        return
    real = torch.arange(trie.tokens.shape[1]) < trie.lengths[:, None]
    wanted = prefixes(trie).long()
    counts = seen_by(found, trie)
    assert torch.equal(counts[real], wanted[real])
    assert (counts[~real].sum(-1) > 0).all(), "a softmax over nothing is nan"
    assert not (counts[~real] * real.repeat_interleave((~real).sum(1), 0)).any(), "padding reads no sequence"
    if not call:
        assert all(piece.kind is not Kind.MASKED for piece in found)


def test_pieces_are_as_few_as_pay():
    """Of k = 8 completions after a long prompt: the prompt, what reads it, and each completion or all of them."""
    stem = [*range(3, 23)] * 100
    trie = pack([(stem, [30 + k, *range(3, 10)]) for k in range(8)], 1e9)
    kinds = [piece.kind for piece in pieces(trie, 576)]
    assert kinds == [Kind.CAUSAL, Kind.ALL, Kind.MASKED]
    kinds = [piece.kind for piece in pieces(trie, 576, call=100)]
    assert kinds == [Kind.CAUSAL, Kind.ALL, *[Kind.CAUSAL] * 8]
    assert not pieces(pack(BATCH, 1e9), 576), "short rows are one square"


def attention(query, key, value, seen, scale):
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ value


@settings(max_examples=60, deadline=None)
@given(SEQUENCES, CALLS, st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1)]), st.booleans())
def test_outputs_and_gradients_are_those_of_each_tokens_prefix(sequences, call, heads, repeated):
    trie = pack(sequences, float("inf"))
    found = pieces(trie, 16, call)
    numbers = torch.Generator().manual_seed(0)
    rows, tokens = trie.tokens.shape
    shapes = [(rows, tokens, count, 8) for count in (heads[0], heads[1], heads[1], heads[0])]
    query, key, value, wish = (
        torch.randn(shape, generator=numbers, dtype=torch.float64).transpose(1, 2).requires_grad_() for shape in shapes
    )
    groups = heads[0] // heads[1]
    full_key, full_value = (each.repeat_interleave(groups, 1) for each in (key, value))
    mask = TrieMask(trie.end, found, dtype=torch.float64, groups=(groups,))
    if repeated:
        got = scaled_dot_product_attention(query, full_key, full_value, attn_mask=mask, scale=0.3)
    else:
        got = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert mask.use.by_pieces == bool(found)
    want = attention(query, full_key, full_value, prefixes(trie), 0.3)
    real = (torch.arange(tokens) < trie.lengths[:, None])[:, None, :, None]
    torch.testing.assert_close(got * real, want * real, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad((got * wish.detach() * real).sum(), (query, key, value)),
        torch.autograd.grad((want * wish.detach() * real).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [BATCH, DEEP], ids=["batch", "deep"])
@pytest.mark.parametrize("name", [name for name in PACKED if name != "gemma2"])
def test_models_score_by_pieces_as_in_rows_of_their_own(name, batch, split, caplog):
    model = PACKED[name]()
    model.set_attn_implementation("sdpa")
    scorer = PrefixScorer(model)
    scorer(batch, 0)
    seen = calls(model)
    with caplog.at_level(logging.INFO):
        got = scorer(batch, 0)
    want = by_hand(model, batch)
    mask = seen[0]["attention_mask"]
    assert mask.use.by_pieces >= 2, "each layer's attention"
    assert not mask.use.dense_because
    assert mask._content.dense is None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 2, len(batch))
    trained = [each for each in model.parameters() if each.requires_grad]
    mine, theirs = (
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(trained, torch.autograd.grad(total @ weights, trained, allow_unused=True), strict=True)
        ]
        for total in (got, want)
    )
    assert_same_gradients(mine, theirs, 1e-5)


MODEL = llama(attn_implementation="sdpa")
SCORER = PrefixScorer(MODEL)


@settings(max_examples=40, deadline=None)
@given(SEQUENCES, CALLS)
def test_any_tries_score_as_separate_sequences(sequences, call):
    before, trie_pieces.CALL = trie_pieces.CALL, 2 * call
    try:
        torch.testing.assert_close(SCORER(sequences, 0), by_hand(MODEL, sequences), rtol=1e-5, atol=2e-5)
    finally:
        trie_pieces.CALL = before


def test_long_stems_are_cut_without_being_told():
    model = llama(attn_implementation="sdpa", max_position_embeddings=1024)
    scorer = PrefixScorer(model)
    batch = [([*range(3, 43)] * 15, [4 + k, 9, 8, 1]) for k in range(6)]
    scorer(batch, 0)
    seen = calls(model)
    got = scorer(batch, 0)
    assert seen[0]["attention_mask"].use.by_pieces == 2
    torch.testing.assert_close(got, by_hand(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpoints_compute_the_same_again(reentrant, split):
    model = lora(llama(attn_implementation="sdpa"), "q_proj", "v_proj")
    model.enable_input_require_grads()
    plain = gradients(by_hand(model, BATCH), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    scorer = PrefixScorer(model)
    scorer(BATCH, 0)
    seen = calls(model)
    found = scorer(BATCH, 0)
    again = {p: None for p in model.parameters() if p.requires_grad}
    (found @ torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 2.0, 0.25, -0.75, 1.25, 3.0])).backward()
    again = [p.grad for p in again]
    assert seen[0]["attention_mask"].use.by_pieces == 4, "both layers, forward and again"
    assert not seen[0]["attention_mask"].use.dense_because
    assert_same_gradients(again, plain, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_in_half_precision_and_under_autocast_pieces_are_as_near_to_the_truth_as_rows(name, split):
    truth = by_hand(PACKED[name](), BATCH)
    for half in (PACKED[name]().bfloat16(), PACKED[name]()):
        half.set_attn_implementation("sdpa")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half.dtype == torch.float32):
            scorer = PrefixScorer(half)
            scorer(BATCH, 0)
            seen = calls(half)
            packed = scorer(BATCH, 0)
            plain = PrefixScorer(half, pack_prefixes=False)(BATCH, 0)
        assert seen[0]["attention_mask"].use.by_pieces == 2
        assert (packed - truth).norm() <= 2 * (plain - truth).norm() + 1e-3


def test_attention_that_drops_out_gets_a_dense_mask_and_that_is_said_once(split, caplog):
    model = made(GPT2Config(**GPT2)).train()
    model.set_attn_implementation("sdpa")
    scorer = PrefixScorer(model)
    seen = calls(model)
    with caplog.at_level(logging.INFO):
        one, other = scorer([(STEM, [4]), (STEM, [5])], 0).exp().tolist()
        many = scorer([(STEM, [k]) for k in range(3, 45)] + [(STEM, [k]) for k in range(3)], 0)
        deep = scorer(DEEP, 0)
    assert one != pytest.approx(other)
    assert float(many.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert caplog.text.count("through dense masks: its attention drops out") == 1
    assert seen[-1]["attention_mask"].use.by_pieces == 0
    model.eval()
    assert not torch.allclose(deep, scorer(DEEP, 0))
    assert seen[-1]["attention_mask"].use.by_pieces == 2


def test_eager_attention_and_soft_caps_have_dense_masks(split):
    for model in (llama(attn_implementation="eager"), made(Gemma2Config(**SIZES, layer_types=["full_attention"] * 2))):
        scorer = PrefixScorer(model)
        scorer(DEEP, 0)
        seen = calls(model)
        got = scorer(DEEP, 0)
        assert type(seen[0]["attention_mask"]) is torch.Tensor
        torch.testing.assert_close(got, by_hand(model, DEEP), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiles", ["a function", "a module", "a layer", "nothing"])
def test_compiled_models_have_dense_masks(compiles):
    model = llama(attn_implementation="sdpa")
    if compiles == "a function":
        model.forward = torch.compile(model.forward)
    elif compiles == "a module":
        model = torch.compile(model)
    elif compiles == "a layer":
        model.model.layers[0].compile()
    mask = model_inputs(model, pack(DEEP, float("inf")), torch.device("cpu"), call=0)["attention_mask"]
    assert type(mask) is (TrieMask if compiles == "nothing" else torch.Tensor)


def biased(model, change):
    """What the model does to its mask before its layers see it."""
    inner = model.model.forward

    def changed(*args, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = change(attention_mask)
        return inner(*args, attention_mask=attention_mask, **options)

    model.model.forward = changed
    return model


def added(mask):
    return mask + torch.linspace(0, 1, mask.shape[-1])


def in_place(mask):
    mask.add_(torch.linspace(0, 1, mask.shape[-1]))
    return mask


def through_a_slice(mask):
    mask[:, :, :, : mask.shape[-1] // 2] -= 1.0
    return mask


def written(mask):
    mask[..., 0, 0] = 0.0
    mask[:, :, 3:, 1] = -1.0
    return mask


@pytest.mark.parametrize("change", [added, in_place, through_a_slice, written])
def test_whatever_a_model_does_with_its_mask_is_done(change):
    """As it is with a dense mask, which plain tensors are."""
    trie = pack(BATCH, float("inf"))
    logits = []
    for by_pieces in (True, False):
        model = biased(llama(attn_implementation="sdpa"), change)
        inputs = model_inputs(model, trie, torch.device("cpu"), by_pieces=by_pieces, call=0)
        assert isinstance(inputs["attention_mask"], TrieMask) == by_pieces
        logits.append(model(**inputs, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    plain = model_inputs(model, trie, torch.device("cpu"), call=0)
    assert not torch.allclose(logits[0], llama(attn_implementation="sdpa")(**plain, use_cache=False).logits, atol=1e-3)


def test_read_as_a_tensor_it_is_the_dense_mask():
    trie = pack(DEEP, float("inf"))
    want = torch.where(prefixes(trie), 0.0, torch.finfo(torch.float32).min)[:, None]
    mask = TrieMask(trie.end, pieces(trie, 16, 0), dtype=torch.float32)
    assert torch.equal(dense_mask(trie.end, torch.float32, trie.end.device), want)
    assert (mask.shape, mask.dtype, mask.ndim, mask.device) == (want.shape, want.dtype, 4, want.device)
    for same in (mask.detach(), mask.clone(), mask.to(torch.bfloat16).float(), mask.to("cpu"), mask.double()):
        assert isinstance(same, TrieMask)
        assert same.pieces
    assert torch.equal(mask.clone()[0, 0], want[0, 0])
    lowest = torch.full(want.shape, torch.finfo(torch.float64).min, dtype=torch.float64)
    assert torch.equal(mask.double().add(0), lowest.masked_fill(want == 0, 0))
    shares = mask.detach()
    assert torch.equal(mask == 0, want == 0)
    assert not shares.pieces
    shares.fill_(1)
    assert (mask == 1).all()
    assert not mask.pieces, "what was read may be written to"
    assert mask.use.dense_because == "its mask is read by select", "of whichever copy first"


def test_keys_and_values_that_heads_share_are_kept_once():
    config = dict(SIZES, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    trie = pack([([*range(3, 40)], [k, 1]) for k in range(3, 9)], float("inf"))
    kept = []
    for groups in ((4,), ()):
        model = made(Qwen2Config(**config))
        model.set_attn_implementation("sdpa")
        inputs = model_inputs(model, trie, torch.device("cpu"), call=0)
        inputs["attention_mask"].groups = groups
        with SavedBytes() as saved:
            model(**inputs, use_cache=False)
        kept.append(saved.total)
    of_heads = 4 * 16 * 2 * trie.tokens.numel() * config["num_hidden_layers"]
    assert kept[1] - kept[0] == (8 - 2) * of_heads


def test_heads_that_differ_are_never_taken_for_shared():
    trie = pack(DEEP, float("inf"))
    numbers = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, trie.tokens.shape[1], 8, generator=numbers) for _ in range(3))
    key = key[:, :2].repeat_interleave(2, 1).requires_grad_()  # the keys are shared, the values are not
    mask = TrieMask(trie.end, pieces(trie, 16, 0), dtype=torch.float32, groups=(2,))
    got = scaled_dot_product_attention(query, key, value.requires_grad_(), attn_mask=mask)
    want = attention(query, key, value, prefixes(trie), 8**-0.5)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), (key, value)),
        torch.autograd.grad(want.square().sum(), (key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_where_pieces_come_out_wrong_the_mask_is_dense(monkeypatch, split, caplog):
    wrong = prefix_scorer.model_inputs

    def spoiled(*args, **options):
        inputs = wrong(*args, **options)
        if isinstance(mask := inputs["attention_mask"], TrieMask):
            mask._content.pieces = trie_pieces.one_branch(mask.shape[-1], mask.shape[-1]) * len(mask)
        return inputs

    monkeypatch.setattr(prefix_scorer, "model_inputs", spoiled)
    model = llama(attn_implementation="sdpa")
    with caplog.at_level(logging.INFO):
        got = PrefixScorer(model)(BATCH, 0)
    assert "through dense masks: a probe's logits differed by" in caplog.text
    torch.testing.assert_close(got, by_hand(model, BATCH), rtol=1e-5, atol=1e-5)
