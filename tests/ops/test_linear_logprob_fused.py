"""The fused forward of the head, and the choice between it and the chunked one."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from test_linear_logprob import IGNORED, eager, problem, run
from truth import assert_as_good_as_torch, max_error

from sysdag.ops import _head_fused, linear_logprob
from sysdag.ops._dispatch import BackendError, use_backend

pytest.importorskip("triton.tools.tensor_descriptor", reason="this triton has no tensor descriptors")
from sysdag.kernels import linear_logprob_fused as kernel

EXTRAS = [{}, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}]


@pytest.fixture
def calls(monkeypatch):
    """The problems that the fused kernel was given."""
    real, made = kernel.statistics, []

    def counted(problem, *out):
        made.append(problem)
        halves = problem.hidden.to(problem.weight.dtype)  # on a CPU the products are in fp32
        real(dataclasses.replace(problem, hidden=halves), *out)

    monkeypatch.setattr(kernel, "statistics", counted)
    return made


@pytest.fixture
def fused(calls, monkeypatch):
    """Triton's interpreter serves in a GPU's stead."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter does not run where there is a GPU; the tests marked gpu do")
    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "fused")
    monkeypatch.setattr(_head_fused, "why_not_fused", lambda *_: None)
    with use_backend("triton"):
        yield calls


def assert_accurate(parts, **options):
    """Against torch in the same dtype, and in fp32 from the same halves: logits and statistics are fp32.

    Tensor cores add 16 products at a time to an fp32 sum and truncate it, cuBLAS's too: H / 16 roundings of a logit.
    """
    hidden, weight, bias, rows, labels, _ = parts
    logit = float((hidden.double() @ weight.double().T).abs().max()) if hidden.is_cuda else 0.0
    truncated = hidden.shape[1] / 16 * torch.finfo(torch.float32).eps * logit
    with torch.no_grad():
        found = linear_logprob(hidden, weight, rows, labels, bias=bias, **options)
        for dtype in {hidden.dtype, torch.float32}:
            own, truth = (
                eager(*(x.to(wide) for x in (hidden, weight)), rows, labels, **options,
                      bias=None if bias is None else bias.to(wide)) for wide in (dtype, torch.float64)
            )  # fmt: skip
            if hidden.is_cuda and dtype == torch.float32:
                assert max_error(found, truth) <= max_error(own, truth) + truncated
            else:
                assert_as_good_as_torch(found, own, truth, str(dtype))
    assert found.dtype == torch.float32
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extras", EXTRAS, ids=["plain", "all"])
@pytest.mark.parametrize("shape", [(13, 24, 1003, 29), (1, 8, 515, 3), (37, 72, 130, 60), (5, 64, 3, 40)], ids=str)
def test_accuracy(fused, shape, extras, dtype):
    options = dict(extras)
    bias = options.pop("bias", False)
    assert_accurate(problem(*shape, dtype=dtype, bias=bias), **options)
    assert len(fused) == 1


def test_several_groups_of_row_blocks(fused):
    """More than one group, the last one short, each with several slices, the last one short."""
    hidden, weight, *_ = parts = problem(11 * 32 + 5, 16, 8 * 128 + 7, 700)
    _, many = kernel.INTERPRETED
    blocks, tiles = -(-len(hidden) // many.R), -(-len(weight) // many.C)
    splits, each = kernel.splits_of(blocks, tiles, 8)
    assert blocks > kernel.GROUP
    assert splits > 1
    assert tiles % each
    assert_accurate(parts)


@pytest.mark.parametrize("kind", ["far apart", "a large common offset", "most of the vocabulary is masked"])
def test_extreme_logits(fused, kind):
    hidden, weight, _, rows, labels, grad = problem()
    bias = torch.full((len(weight),), 1e4 if kind == "a large common offset" else 0.0)
    if kind == "far apart":
        bias[labels[1]], bias[labels[3]] = 1e4, -1e4
    if kind == "most of the vocabulary is masked":  # whole slices have no probability
        bias[:700] = -torch.inf
        labels = labels.where(labels == IGNORED, 700 + labels % 303)
    assert_accurate([hidden, weight, bias, rows, labels, grad])


def test_a_nan_or_infinite_row_is_its_own_matter(fused):
    hidden, weight, _, rows, labels, _ = problem()
    hidden[4], hidden[6, 0] = torch.nan, torch.inf
    labels = torch.arange(len(labels))
    found = linear_logprob(hidden, weight, rows, labels)
    assert torch.equal(found.isnan(), (rows == 4) | (rows == 6))


def test_a_row_with_every_label(fused):
    """Its probabilities sum to 1; the cursor takes many labels from one tile."""
    hidden, weight, _, _, _, _ = problem(3, 16, 300, 3)
    rows, labels = torch.arange(3).repeat_interleave(300), torch.arange(300).repeat(3)
    mixed = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    found = linear_logprob(hidden, weight, rows[mixed], labels[mixed])
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, rows[mixed], found.double().exp())
    torch.testing.assert_close(sums, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_certain_label_has_exactly_no_loss(fused):
    """Its logit is the very number that the row's statistics hold."""
    _, weight, _, _, _, _ = problem(9, 40, 300, 9)
    hidden, ids = weight[:9] * 40, torch.arange(9)
    for cap in (None, 1e4):
        assert linear_logprob(hidden, weight, ids, ids, softcap=cap).tolist() == [0.0] * 9


def test_what_is_not_scored(fused):
    hidden, weight, _, rows, labels, _ = problem()
    hidden[3] = torch.nan  # no label is its
    assert_ignored = linear_logprob(hidden, weight, rows, labels)
    assert (assert_ignored[labels == IGNORED] == 0).all()
    assert assert_ignored.isfinite().all()
    assert len(fused) == 1
    assert linear_logprob(hidden, weight, rows, torch.full_like(labels, IGNORED)).tolist() == [0.0] * len(labels)
    assert len(fused) == 1


def test_uninitialised_memory_is_not_read_and_the_same_bits_twice(fused, monkeypatch):
    parts = problem(40, 16, 700, 90, bias=True)
    expected = assert_accurate(parts, softcap=4.0)
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda *a, real=real, **k: (t := real(*a, **k)).fill_(torch.nan if t.is_floating_point() else 7),
        )
    assert torch.equal(assert_accurate(parts, softcap=4.0), expected)


def test_a_forward_that_keeps_something_is_chunked(fused):
    parts = problem()
    for trained in (False, True):
        run(linear_logprob, *parts, trained=trained)
    assert not fused


def test_slices_cover_the_vocabulary():
    for blocks in (1, 3, 64, 65, 500):
        for tiles in (1, 2, 7, 396, 501, 1019):
            for processors in (1, 8, 132, 148):
                splits, each = kernel.splits_of(blocks, tiles, processors)
                assert splits * each >= tiles > (splits - 1) * each
    for blocks, tiles in ((64, 501), (128, 594), (4, 256)):  # at most a twentieth of the time is waiting for the last
        splits, each = kernel.splits_of(blocks, tiles, 132)
        assert -(-blocks * splits // 132) * each <= 1.05 * blocks * tiles / 132


# The choice.


@pytest.fixture
def measured(calls, monkeypatch):
    """`SYSDAG_HEAD_FORWARD=measure` with a clock of our own: {"chunked": ms, "fused": ms}, and what was timed."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter does not run where there is a GPU; the tests marked gpu do")
    clock = SimpleNamespace(chunked=2.0, fused=1.0, timed=[])

    def milliseconds(forward, out):
        before = len(calls)
        forward(*out)
        name = "fused" if len(calls) > before else "chunked"
        clock.timed.append(name)
        return getattr(clock, name)

    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "measure")
    monkeypatch.setattr(_head_fused, "why_not_fused", lambda *_: None)
    monkeypatch.setattr(_head_fused, "_milliseconds", milliseconds)
    monkeypatch.setattr(_head_fused, "_winners", {})
    with use_backend("triton"):
        yield clock


@pytest.mark.parametrize("winner", ["chunked", "fused"])
def test_the_faster_one_is_kept_for_the_shape_class(measured, calls, winner, caplog):
    setattr(measured, winner, 0.5)
    hidden, weight, _, _, _, _ = problem(16, 16, 130, 16)

    def score(count):
        ids = torch.arange(count)
        return linear_logprob(hidden, weight, ids, ids)

    with caplog.at_level(logging.INFO, "sysdag"):
        expected = score(16)
        assert sorted(measured.timed) == ["chunked"] * 5 + ["fused"] * 5
        before = len(calls)
        assert torch.equal(score(16), expected)
        score(9)  # the same class: rows are rounded up to 16
        assert len(measured.timed) == 10
        assert len(calls) - before == (2 if winner == "fused" else 0)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert f"{winner} is used" in caplog.text
        score(8)
        assert len(measured.timed) == 20
    assert_as_good_as_torch(expected, (hidden @ weight.T).log_softmax(-1).diagonal(),
                            (hidden.double() @ weight.double().T).log_softmax(-1).diagonal())  # fmt: skip


def test_results_that_differ_disqualify(measured, caplog, monkeypatch):
    real = kernel.statistics

    def wrong(problem, top, total, chosen):
        real(problem, top, total, chosen)
        total[-1] *= 1.01

    monkeypatch.setattr(kernel, "statistics", wrong)
    assert_accurate(problem())
    assert not measured.timed
    assert "results are off" in caplog.text
    assert list(_head_fused._winners.values()) == ["chunked"]


def test_a_nan_among_the_arguments_disqualifies_nothing(measured):
    hidden, weight, _, rows, labels, _ = problem()
    hidden[rows[1]] = torch.nan
    assert linear_logprob(hidden, weight, rows, labels)[1].isnan()
    assert list(_head_fused._winners.values()) == ["fused"]


def test_a_kernel_that_fails_disqualifies(measured, caplog, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(kernel, "statistics", broken)
    assert_accurate(problem())
    assert "the fused forward failed, the chunked one is used: out of resource" in caplog.text
    assert list(_head_fused._winners.values()) == ["chunked"]


@pytest.mark.parametrize(
    "where", ["torch.compiler.is_compiling", "torch.are_deterministic_algorithms_enabled", "capture"]
)
def test_nothing_is_timed_where_it_must_not_be(measured, calls, where, monkeypatch):
    if where == "capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(where, lambda: True)
    out = [torch.empty(13), torch.empty(13), torch.empty(29)]
    hidden, weight, *_ = problem()
    asked = _head_fused.Problem(hidden, weight, None, 1.0, 0.0, None)
    used = []
    _head_fused.statistics(asked, "triton", lambda *_: used.append("chunked"), *out)
    assert used == ["chunked"]
    assert not measured.timed
    assert not _head_fused._winners  # a later call may still measure
    _head_fused._winners[_head_fused.shape_class(asked)] = "fused"
    monkeypatch.setattr(kernel, "statistics", lambda *_: used.append("fused"))
    _head_fused.statistics(asked, "triton", lambda *_: used.append("chunked"), *out)
    assert used == ["chunked", "fused"]  # already chosen


@pytest.mark.parametrize("named", [None, "", "chunked"])
def test_chunked_is_the_default(calls, named, monkeypatch):
    monkeypatch.setattr(_head_fused, "why_not_fused", lambda *_: None)
    monkeypatch.delenv(_head_fused.FORWARD_VARIABLE, raising=False)
    if named is not None:
        monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, named)
    assert_accurate(problem())
    assert not calls


def test_what_cannot_serve_says_why(monkeypatch):
    hidden, weight, _, rows, labels, _ = problem()
    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "fused")
    with (
        use_backend("reference"),
        pytest.raises(BackendError, match=r"FORWARD=fused cannot serve: .*'reference'.* cpu"),
    ):
        linear_logprob(hidden, weight, rows, labels)
    if not torch.cuda.is_available():
        with use_backend("triton"), pytest.raises(BackendError, match=r"needs CUDA tensors, got tensors on cpu"):
            linear_logprob(hidden, weight, rows, labels)
    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "fast")
    with pytest.raises(BackendError, match=r"expected one of \['chunked', 'fused', 'measure'\], got 'fast'"):
        linear_logprob(hidden, weight, rows, labels)


def test_what_the_gpu_and_the_shapes_must_have(monkeypatch):
    half = torch.zeros(40, 64, dtype=torch.bfloat16)

    def reason(hidden=half, weight=half, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        names = ("shape", "dtype", "stride", "element_size", "data_ptr", "__len__")
        on_gpu = type("OnGPU", (), {name: getattr(hidden, name) for name in names})()
        on_gpu.is_cuda, on_gpu.device = True, "cuda:0"
        return _head_fused.why_not_fused(SimpleNamespace(hidden=on_gpu, weight=weight), "triton")

    assert reason() is None
    assert reason(capability=(10, 3)) is None
    assert "fp16 or bf16, got torch.float32" in reason(half.float(), half.float())
    assert "capability 9.x or 10.x, got 8.6" in reason(capability=(8, 6))
    assert "H must be a multiple of 8 (16 bytes), got 60" in reason(half[:, :60], half[:, :60])
    shifted = torch.zeros(40 * 64 + 1, dtype=torch.bfloat16)[1:].view(40, 64)
    assert "weight must have contiguous rows" in reason(weight=shifted)
    assert "at an address of 2 modulo 16" in reason(weight=shifted)
    assert "weight must have contiguous rows" in reason(weight=torch.zeros(64, 64, dtype=torch.bfloat16).t())
    assert "weight must have contiguous rows" in reason(weight=torch.zeros(40, 68, dtype=torch.bfloat16)[:, :64])
    assert reason(weight=torch.zeros(40, 72, dtype=torch.bfloat16)[:, :64]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 64, 515, 3), (64, 4096, 1003, 90), (300, 128, 50257, 700), (1025, 2048, 32000, 1100)], ids=str
)
@pytest.mark.parametrize("extras", EXTRAS, ids=["plain", "all"])
def test_on_a_gpu(calls, shape, extras, dtype, monkeypatch):
    parts = problem(*shape, dtype=dtype, device="cuda", scale=0.1, bias=extras.get("bias", False))
    if torch.cuda.get_device_capability()[0] not in _head_fused.CAPABILITIES:
        pytest.skip("no GPU that the fused forward serves")
    options = {name: value for name, value in extras.items() if name != "bias"}
    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "fused")
    with use_backend("triton"):
        first, again = (assert_accurate(parts, **options) for _ in range(2))
    assert len(calls) == 2
    assert torch.equal(first, again)


@pytest.mark.gpu
def test_a_certain_label_and_a_measured_choice_on_a_gpu(calls, monkeypatch, caplog):
    if torch.cuda.get_device_capability()[0] not in _head_fused.CAPABILITIES:
        pytest.skip("no GPU that the fused forward serves")
    _, weight, *_ = problem(9, 512, 5003, 9, dtype=torch.bfloat16, device="cuda")
    hidden, ids = weight[:300] * 4, torch.arange(300, device="cuda")
    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "fused")
    assert linear_logprob(hidden, weight, ids, ids).tolist() == [0.0] * 300
    monkeypatch.setenv(_head_fused.FORWARD_VARIABLE, "measure")
    monkeypatch.setattr(_head_fused, "_winners", {})
    with caplog.at_level(logging.INFO, "sysdag"):
        linear_logprob(hidden, weight, ids, ids)
        linear_logprob(hidden, weight, ids, ids)
    assert [record.levelname for record in caplog.records] == ["INFO"]
