from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from truth import assert_as_good_as_torch

from sysdag.ops import _dispatch
from sysdag.ops._dispatch import BackendError, use_backend
from sysdag.ops.diverse_beam_step import LONGEST_LIST, _op, diverse_beam_step, diverse_beam_step_reference

ROOT = Path(__file__).resolve().parents[2]
needs_cpp = pytest.mark.skipif(
    _dispatch.why_unavailable("cpp", "cpu") is not None, reason="the extension sysdag._C is not built"
)


def problem(B=2, G=3, K=2, V=120, seed=0, offset=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (offset + 3 * torch.randn(B, G, K, V, generator=generator)).to(dtype)
    scores = -2 * torch.rand(B, G, K, generator=generator)
    return logits, scores


def by_hand(logits, scores, penalty, M, eos=(), done=None, pad=0):
    """Tokens, parents and scores in fp64, a prompt and a group at a time, from a sorted list of all continuations."""
    B, G, K, V = logits.shape
    log_probs = logits.double().log_softmax(-1)
    found = []
    for b in range(B):
        chosen = []
        for g in range(G):
            times = torch.bincount(torch.tensor(chosen, dtype=torch.int64), minlength=V)
            total = (scores[b, g].double()[:, None] + log_probs[b, g] - penalty * times).flatten()
            order = total.argsort(descending=True)[:M]
            found.append((order % V, order // V, total[order]))
            open_ = [int(place) % V for place in order if int(place) % V not in eos]
            chosen += [pad] * K if done is not None and done[b, g] else open_[:K]
    return tuple(torch.stack(parts).view(B, G, M) for parts in zip(*found, strict=True))


def assert_by_hand(served, logits, scores, penalty, M, eos=(), done=None, pad=0):
    truth = by_hand(logits, scores, penalty, M, eos, done, pad)
    ids = torch.tensor(eos) if len(eos) else None
    eager = diverse_beam_step_reference(logits, scores, penalty, M, ids, done, pad)
    moved = [None if t is None else t.to(served.device) for t in (ids, done)]
    with short_blocks(logits.shape[-1]) if served.interpreted else nullcontext():
        found = diverse_beam_step(
            logits.to(served.device), scores.to(served.device), penalty, num_candidates=M, eos_token_ids=moved[0],
            done=moved[1], pad_token_id=pad,
        )  # fmt: skip
    assert torch.equal(found[0].cpu(), truth[0])
    assert torch.equal(found[1].cpu(), truth[1])
    assert found[2].dtype == torch.float32
    assert_as_good_as_torch(found[2].cpu(), eager[2], truth[2], "scores")


def ngram_penalties(scored, history, size, penalty, done):
    """Of one prompt, in fp64: the groups' rankings (score, beam, token), from lists of tokens and sets of n-grams."""
    G, K, _ = scored.shape
    rankings, chosen = [], []
    for g in range(G):
        held = [{tuple(one[i : i + size]) for i in range(len(one) - size + 1)} for one in chosen]
        ranked = []
        for k in range(K):
            past = [token for token in history[g][k] if token >= 0]
            for v, score in enumerate(scored[g, k].tolist()):
                gram = tuple([*past, v][-size:])
                ranked.append((score - penalty * sum(gram in grams for grams in held), k, v))
        ranked.sort(key=lambda each: -each[0])
        rankings.append(ranked)
        kept = [[token for token in history[g][k] if token >= 0] + [v] for _, k, v in ranked[:K]]
        chosen += [[t for t in one if t >= 0] for one in history[g]] if done[g] else kept
    return rankings


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize(("size", "V"), [(2, 700), (3, 700), (2, 40)])
def test_ngrams_of_the_groups_before(backend, size, V):
    """Beams that wrote few different tokens: one n-gram was followed by many, which are all penalised.

    The histories of the second prompt are shorter, and a group of the third is done.
    """
    logits, scores = problem(3, 4, 2, V, seed=size)
    numbers = torch.Generator().manual_seed(size)
    best = logits.mean((0, 1, 2)).topk(12).indices
    logits[..., best] += 6
    history = best[torch.randint(0, 12, (3, 4, 2, 60), generator=numbers)]
    history[..., ::size] = best[0]
    history[1, ..., : 60 - size + 2] = -1
    done = torch.zeros(3, 4, dtype=torch.bool)
    done[2, 1] = True
    history[2, 1, :, 50:] = -1
    tokens, parents, found = diverse_beam_step(
        logits, scores, 2.5, num_candidates=4, done=done, history=history, ngram_size=size
    )
    log_probs = logits.double().log_softmax(-1) + scores.double()[..., None]
    penalised = 0
    for b in range(3):
        rankings = ngram_penalties(log_probs[b], history[b].tolist(), size, 2.5, done[b].tolist())
        for g in range(4):
            if not done[b, g]:
                wanted = rankings[g][:4]
                assert list(zip(parents[b, g].tolist(), tokens[b, g].tolist(), strict=True)) == [w[1:] for w in wanted]
                assert found[b, g].tolist() == pytest.approx([score for score, _, _ in wanted], abs=1e-4)
                penalised += sum(score < float(log_probs[b, g, k, v]) - 1 for score, k, v in rankings[g])
    assert penalised > 10


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_no_ngram_before_there_are_tokens_enough(backend):
    """Two prompts side by side, one of them at its first token: what fills its history is no token."""
    logits = torch.zeros(2, 2, 1, 300)
    logits[..., 7] = 5.0
    history = torch.tensor([[[[3, 7]], [[3, 3]]], [[[-1, -1]], [[-1, -1]]]])
    tokens, _, scores = diverse_beam_step(logits, torch.zeros(2, 2, 1), 1.0, history=history, ngram_size=2)
    assert tokens[:, :, 0].tolist() == [[7, 7], [7, 7]]
    assert (scores[:, 0, 0] - scores[:, 1, 0]).tolist() == pytest.approx([1.0, 0.0])


@contextmanager
def short_blocks(V):
    """Triton's interpreter sorts all of a block, which need not be longer than a row. A row of several is as it is."""
    from sysdag.kernels import diverse_beam_step as kernel

    with mock.patch.object(kernel, "BLOCK", min(kernel.BLOCK, max(64, 1 << (V - 1).bit_length()))):
        yield


@pytest.mark.parametrize("penalty", [0.0, 0.7, 25.0])
def test_the_groups_choose_in_turn(backend, penalty):
    logits, scores = problem()
    assert_by_hand(backend, logits, scores, penalty, 4)


def test_ends_and_done_groups(backend):
    logits, scores = problem(3, 4, 2, 40, seed=1)
    done = torch.tensor([[True, False, False, False], [False, True, True, False], [False] * 4])
    best = logits.mean((0, 1, 2)).topk(3).indices.tolist()
    assert_by_hand(backend, logits, scores, 1.5, 6, best[:2], done, pad=best[2])


@pytest.mark.parametrize("order", ["mixed", "best first"])
@pytest.mark.parametrize("V", [70, 700])
def test_all_groups_want_the_same_tokens(backend, V, order):
    """The penalties push a group down its list as far as they can: P = (G-1)K tokens.

    Of a row whose best tokens come first, a list holds no more than it must; of a vocabulary of 70, it is all of it.
    """
    row = torch.linspace(4, -4, V)
    row = row if order == "best first" else row[torch.randperm(V, generator=torch.Generator().manual_seed(0))]
    logits = row.expand(1, 4, 2, V) + 1e-4 * problem(1, 4, 2, V)[0]
    assert_by_hand(backend, logits, torch.tensor([0.0, -0.01]).expand(1, 4, 2), 100.0, 4)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_large_common_offset(backend, offset):
    logits, scores = problem(offset=offset)
    assert_by_hand(backend, logits, scores, 0.7, 4)


def test_rows_that_begin_and_end_with_impossible_tokens(backend):
    logits, scores = problem(1, 2, 1, 5000, seed=11)
    logits[0, 0, 0, :2100], logits[0, 1, 0, 1100:] = -torch.inf, -torch.inf
    assert_by_hand(backend, logits, scores, 0.7, 4)


def test_fewer_possible_tokens_than_candidates(backend):
    for dtype in {torch.float32, torch.float16, backend.dtypes[-1]}:
        logits = torch.full((1, 1, 1, 300), -torch.inf, dtype=dtype)
        logits[..., [7, 200]] = torch.tensor([1.0, 2.0], dtype=dtype)
        tokens, _, best = (part.cpu() for part in diverse_beam_step(
            logits.to(backend.device), torch.zeros(1, 1, 1, device=backend.device), 0.7, num_candidates=4))  # fmt: skip
        assert tokens[0, 0, :2].tolist() == [200, 7]
        assert best[0, 0, 2:].tolist() == [-torch.inf] * 2
        assert best[0, 0, :2].exp().sum().item() == pytest.approx(1.0)


def test_a_row_without_any_probability_is_nan_as_in_torch(backend):
    logits, scores = (part.to(backend.device) for part in problem(1, 1, 2, 1500))
    logits[0, 0, 1] = -torch.inf
    _, parents, best = diverse_beam_step(logits, scores, 0.7)
    assert best.isnan().all()
    assert (parents == 1).all()


def test_impossible_tokens_and_steep_rows(backend):
    logits, scores = problem(1, 3, 2, 300, seed=2)
    logits[..., ::3] = -torch.inf
    logits[0, 1] *= 1e3
    assert_by_hand(backend, logits, scores, 0.7, 4)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 2, 5), (1, 2, 1, 513), (2, 1, 3, 1025)])
def test_odd_sizes(backend, shape):
    logits, scores = problem(*shape, seed=3)
    assert_by_hand(backend, logits, scores, 0.7, min(2 * shape[2], shape[2] * shape[3]))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_rows_of_several_stretches(backend, monkeypatch):
    from sysdag.kernels import diverse_beam_step as kernel

    monkeypatch.setattr(kernel, "STRETCH", kernel.BLOCK)
    logits, scores = problem(1, 2, 1, 5 * kernel.BLOCK - 7, seed=9)
    logits[0, 0, 0, kernel.BLOCK : 3 * kernel.BLOCK] = -torch.inf  # stretches without any probability
    assert_by_hand(backend, logits, scores, 3.0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_fp32(backend, dtype):
    if backend.name == "triton" and (dtype == torch.float64 or dtype not in backend.dtypes):
        pytest.skip("not for this backend")
    logits, scores = problem(1, 3, 2, 1300, seed=4, dtype=dtype)
    assert dtype == torch.float64 or (logits == logits.roll(1, -1)).any()  # halves repeat values
    found = diverse_beam_step(logits.to(backend.device), scores.to(backend.device), 0.7)
    expected = diverse_beam_step_reference(logits.float(), scores, 0.7, 4)
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-6, atol=2e-6)
    if backend.name != "triton":
        assert torch.equal(found[0], expected[0])


def test_half_precision_special_values():
    if _dispatch.why_unavailable("cpp", "cpu"):
        pytest.skip("the extension sysdag._C is not built")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite() | (every == -torch.inf)].clone()
    logits = torch.stack([every.clamp(max=5.0), every.clamp(-1.0, 1.0) * 2**-10]).view(1, 1, 2, -1)  # with subnormals
    with use_backend("cpp"):
        found = diverse_beam_step(logits, torch.zeros(1, 1, 2), 0.0, num_candidates=40)
    expected = diverse_beam_step_reference(logits, torch.zeros(1, 1, 2), 0.0, 40)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])


@needs_cpp
@pytest.mark.parametrize("seed", range(60))
def test_ties_come_in_torchs_order(seed):
    """Few distinct values: which of the equal candidates are taken, and in which order, is as torch.topk has it.

    The logits are whole and the penalty is not: a penalised candidate equals no other but by the last digit of a row's
    normaliser, which may differ from torch's.
    """
    generator = torch.Generator().manual_seed(seed)
    B, G, K, E = (int(torch.randint(1, high, (1,), generator=generator)) for high in (4, 5, 4, 3))
    V = (9, 50, 100, 300, 1024, 1025, 5000)[seed % 7]
    logits = (3 * torch.randn(B, G, K, V, generator=generator)).round()
    if seed % 5 == 0:
        logits = logits.sort(-1).values  # every token is better than all before it
    if seed % 11 == 0:
        logits = logits[:, :1, :1].expand(B, G, K, V)
    scores = torch.zeros(B, G, K) if seed % 2 else -torch.rand(B, G, K, generator=generator)
    eos = torch.randperm(V, generator=generator)[:E]
    done = torch.rand(B, G, generator=generator) < 0.3
    M = min((1 + E) * K, K * V)
    with use_backend("cpp"):
        found = diverse_beam_step(logits, scores, 0.7, num_candidates=M, eos_token_ids=eos, done=done, pad_token_id=1)
    expected = diverse_beam_step_reference(logits, scores, 0.7, M, eos, done, 1)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=1e-6)


@needs_cpp
def test_a_vocabulary_of_50257_by_several_threads():
    logits, scores = problem(3, 4, 2, 50257, seed=6)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            with use_backend("cpp"):
                results.append(diverse_beam_step(logits, scores, 0.7))
    finally:
        torch.set_num_threads(threads)
    truth = by_hand(logits, scores, 0.7, 4)
    eager = diverse_beam_step_reference(logits, scores, 0.7, 4)
    assert torch.equal(results[0][0], truth[0])
    assert_as_good_as_torch(results[0][2], eager[2], truth[2], "scores")
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@needs_cpp
def test_strided_and_expanded_logits():
    logits, scores = problem(2, 2, 2, 200, seed=7)
    views = [
        logits.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([logits, logits], -1)[..., 1],
        logits[:, :, :1].expand(2, 2, 2, 200), logits[:, :1].expand(2, 2, 2, 200), logits[..., 3:150],
    ]  # fmt: skip
    for view in views:
        with use_backend("cpp"):
            found = diverse_beam_step(view, scores.transpose(0, 1).contiguous().transpose(0, 1), 0.7)
        expected = diverse_beam_step_reference(view, scores, 0.7, 4)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@needs_cpp
def test_strided_ends_and_done_groups():
    """All groups want the same tokens, so each choice of an earlier group shows in the later ones."""
    logits = problem(1, 1, 1, 200, seed=7)[0].expand(2, 3, 2, 200) + 0.01 * problem(2, 3, 2, 200)[0]
    best = logits.mean((0, 1, 2)).topk(6).indices
    done = torch.tensor([[True, False], [False, False], [True, True]]).t()
    with use_backend("cpp"):
        found = diverse_beam_step(
            logits, torch.zeros(2, 3, 2), 9.0, num_candidates=8, eos_token_ids=best[::2], done=done, pad_token_id=5
        )
    expected = diverse_beam_step_reference(logits, torch.zeros(2, 3, 2), 9.0, 8, best[::2], done, 5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 650, 1030, 2999])
@pytest.mark.parametrize("around", ["finite", "impossible"])
def test_a_row_with_a_nan_or_an_infinity_is_nan_as_in_torch(backend, bad, place, around):
    """Wherever it stands, also where nothing else in its block of 1024 has any probability."""
    logits, scores = problem(1, 1, 2, 3000)
    if around == "impossible":
        logits[0, 0, 1, place // 1024 * 1024 : (place // 1024 + 1) * 1024] = -torch.inf
    logits[0, 0, 1, place] = bad
    logits = logits.to(torch.float16 if place == 650 else torch.float32)
    tokens, parents, best = (part.cpu() for part in diverse_beam_step(
        logits.to(backend.device), scores.to(backend.device), 0.7))  # fmt: skip
    assert best.isnan().all()
    assert (parents == 1).all()
    assert ((tokens >= 0) & (tokens < 3000)).all()


def test_a_score_that_is_nan_comes_first_and_one_that_is_impossible_last(backend):
    logits, scores = problem(2, 1, 2, 300)
    scores[0, 0, 1], scores[1, 0, 0] = torch.nan, -torch.inf
    _, parents, best = (part.cpu() for part in diverse_beam_step(
        logits.to(backend.device), scores.to(backend.device), 0.7))  # fmt: skip
    assert parents[:, 0].tolist() == [[1] * 4] * 2
    assert best[0].isnan().all()
    assert best[1].isfinite().all()


@needs_cpp
@pytest.mark.skipif(not _dispatch.extension_raises(), reason="this torch ends the process instead")
def test_the_extension_reads_nothing_past_its_arguments():
    logits, scores = problem(2, 2, 2, 60)
    op = torch.ops.sysdag_C.diverse_beam_step.default
    for eos, done, message in [
        (torch.tensor([3], dtype=torch.int32), None, "eos_token_ids: int64"),
        (None, torch.ones(1, 2, dtype=torch.bool), r"done: \(B, G\)"),
        (None, torch.ones(2, 2), r"done: \(B, G\)"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(logits, scores, 0.7, 4, eos, done, 0, None, 1)
    with pytest.raises(RuntimeError, match=r"scores: \(B, G, K\)"):
        op(logits, scores[:1], 0.7, 4, None, None, 0, None, 1)
    history = torch.zeros(2, 2, 2, 5, dtype=torch.int64)
    for wrong, size in [(history.int(), 2), (history[:1], 2), (history, 1)]:
        with pytest.raises(RuntimeError, match=r"history: \(B, G, K, t\) in int64"):
            op(logits, scores, 0.7, 4, None, None, 0, wrong, size)


def test_no_prompts_the_same_bits_and_no_gradient(backend):
    logits, scores = (t.to(backend.device) for t in problem(1, 2, 2, 60))
    first, again = (diverse_beam_step(logits.requires_grad_(), scores, 0.7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not first[2].requires_grad
    tokens, parents, best = diverse_beam_step(logits[:0], scores[:0], 0.7)
    assert tokens.shape == parents.shape == best.shape == (0, 2, 4)


def test_uninitialised_memory_is_all_written(backend):
    logits, scores = (t.to(backend.device) for t in problem(1, 2, 2, 60))
    expected = diverse_beam_step(logits, scores, 0.7)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is nan, and its integers the largest
    try:
        found = diverse_beam_step(logits, scores, 0.7)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_opcheck(backend):
    logits, scores = problem(1, 2, 2, 60)
    eos, done = torch.tensor([3, 4]), torch.tensor([[True, False]])
    torch.library.opcheck(_op, (logits, scores, 0.7, 6, eos, done, 1, None, 1))
    if backend.name == "cpp":
        op = torch.ops.sysdag_C.diverse_beam_step.default
        torch.library.opcheck(op, (logits, scores, 0.7, 6, eos, done, 1, None, 1), test_utils=["test_schema"])


COMPILED = """
from sysdag.ops import diverse_beam_step

def function(logits, scores):
    return diverse_beam_step(2 * logits, scores, 0.7, eos_token_ids=torch.tensor([3, 4]))

def check():
    inputs = torch.randn(1, 2, 2, 60, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 2, 2)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), function(*inputs), strict=True))
"""


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_compiled_without_a_graph_break(backend, compiled_backends):
    assert compiled_backends[backend.name] is None, compiled_backends[backend.name]


def test_what_a_backend_cannot_serve_is_an_error_when_it_is_forced():
    logits, scores = problem(1, 2, 2, 60)
    history = torch.zeros(1, 2, 2, 3, dtype=torch.int64)
    for name in ("triton", "cuda"):
        message = f"diverse_beam_step: backend '{name}' does not implement"
        with use_backend(name), pytest.raises(BackendError, match=message):
            diverse_beam_step(logits, scores, 0.7, history=history, ngram_size=2)
    long = LONGEST_LIST + 1
    with use_backend("triton"), pytest.raises(BackendError, match="'triton' does not implement it for these arguments"):
        diverse_beam_step(torch.zeros(1, 1, 1, long), torch.zeros(1, 1, 1), 0.7, num_candidates=long)


def test_the_padding_of_a_done_group_is_a_token():
    logits, scores = problem(1, 2, 2, 60)
    done = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="pad_token_id: expected a token of the vocabulary, 0 to 59, got 60"):
        diverse_beam_step(logits, scores, 0.7, done=done, pad_token_id=60)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 4, 2, 32000), (3, 8, 4, 50257), (1, 1, 2, 128256), (2, 3, 1, 7)])
def test_on_a_gpu(name, dtype, shape):
    logits, scores = problem(*shape, seed=8, dtype=dtype)
    logits = logits + 1e-3 * torch.arange(shape[-1]).to(dtype) if dtype == torch.float32 else logits
    M = 2 * shape[2]
    expected = diverse_beam_step_reference(logits, scores, 0.7, M)
    with use_backend(name):
        found, again = (diverse_beam_step(logits.cuda(), scores.cuda(), 0.7) for _ in range(2))
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-6, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    if dtype == torch.float32:
        assert torch.equal(found[0].cpu(), expected[0])
