import inspect
import sys
from pathlib import Path

import pytest
import torch
from truth import assert_as_good_as_torch, max_error

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench/ is no installed package

from bench import measure
from sysdag.ops import _head_walk, linear_logprob
from sysdag.ops._dispatch import BackendError, use_backend, why_unavailable
from sysdag.ops.linear_logprob import linear_logprob_reference

IGNORED = -100
TRAINED = [False, True]
SHAPES = [(1, 8, 50257, 3), (5, 7, 3, 40), (3, 1, 1, 5), (2049, 4, 130, 2300), (40, 8, 2500, 2)]


def problem(N=13, H=24, V=1003, M=29, *, dtype=torch.float32, device="cpu", bias=False, scale=0.5, seed=0):
    """Rows with several labels, with equal ones and with none; ignored labels; a gradient of both signs."""
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=made).to(dtype)
    weight = (torch.randn(V, H, generator=made) * scale).to(dtype)
    added = torch.randn(V, generator=made).to(dtype) if bias else None
    rows, labels = torch.randint(N, (M,), generator=made), torch.randint(V, (M,), generator=made)
    if M > 8:
        labels[::5] = IGNORED
        rows[2], labels[2] = rows[1], labels[1]
        rows[rows == 3] = 0
    grad = torch.randn(M, generator=made) * torch.tensor([1.0, 10.0, 0.1])[torch.arange(M) % 3]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [hidden, weight, added, rows, labels, grad.to(wide)]
    return [None if each is None else each.to(device) for each in tensors]


def eager(hidden, weight, rows, labels, *, bias=None, softcap=None, logit_scale=1.0):
    """What torch computes in the arguments' own dtype."""
    logits = hidden @ weight.T * logit_scale
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = labels != IGNORED
    return logits.log_softmax(-1)[rows.where(kept, 0), labels.where(kept, 0)].where(kept, 0)


def run(function, hidden, weight, bias, rows, labels, grad, *, trained, hidden_trained=True, **options):
    """The result and the gradients of what is trained."""
    leaves = [hidden, weight, *([] if bias is None else [bias])]
    trains = [hidden_trained, trained, trained][: len(leaves)]
    leaves = [leaf.detach().clone().requires_grad_(train) for leaf, train in zip(leaves, trains, strict=True)]
    result = function(leaves[0], leaves[1], rows, labels, bias=None if bias is None else leaves[2], **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, wanted, grad.to(result.dtype))]


def assert_accurate(parts, **options):
    found = run(linear_logprob, *parts, **options)
    theirs = run(eager, *parts, **options)
    truth = run(eager, *(x.double() if x is not None and x.is_floating_point() else x for x in parts), **options)
    assert found[0].dtype == parts[-1].dtype
    names = ("log-probabilities", "d hidden", "d weight", "d bias")
    for name, got, own, true in zip(names, found, theirs, truth, strict=False):
        if name != "log-probabilities":
            assert got.dtype == own.dtype
        if parts[0].dtype == torch.float64:  # there is no wider truth
            assert max_error(got, true) <= 256 * torch.finfo(true.dtype).eps * max(1.0, float(true.abs().max())), name
            continue
        assert_as_good_as_torch(got, own, true, name)
    return found, truth


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("extras", [{}, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "all"])
def test_accuracy(backend, trained, extras):
    options = dict(extras)
    bias = options.pop("bias", False)
    for dtype in backend.dtypes:
        parts = problem(dtype=dtype, device=backend.device, bias=bias)
        found, truth = assert_accurate(parts, trained=trained, **options)
        if dtype in (torch.float16, torch.bfloat16):  # statistics in fp32 from fp32 logits, whatever the arguments
            wide = [x.float() if x is not None and x.is_floating_point() else x for x in parts]
            assert_as_good_as_torch(found[0], run(eager, *wide, trained=trained, **options)[0], truth[0], "statistics")


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_sizes(backend, shape, trained):
    if backend.interpreted and shape[0] > 100:
        shape = (150, *shape[1:3], 170)
    assert_accurate(problem(*shape, device=backend.device), trained=trained)


@pytest.mark.parametrize("budget", [0, 3 * 4 * 8 * 256, 1 << 30])
def test_several_tiles_kept_or_not(backend, budget, monkeypatch):
    """Many small tiles, the last ones ragged: none, some or all are kept for the backward."""
    monkeypatch.setattr(_head_walk, "tile_shape", lambda *_: (8, 256))
    monkeypatch.setattr(_head_walk, "keep_budget", lambda *_: budget)
    shape = (13, 16, 515, 30) if backend.interpreted else (29, 16, 1003, 60)
    for options in ({}, {"softcap": 2.0, "logit_scale": 1.5}):
        assert_accurate(problem(*shape, device=backend.device, bias=bool(options)), trained=True, **options)
        assert_accurate(problem(*shape, device=backend.device), trained=False, **options)


def test_the_gradient_of_the_head_alone_and_of_the_bias_alone(backend):
    parts = problem(device=backend.device, bias=True)
    assert_accurate(parts, trained=True, hidden_trained=False)
    hidden, weight, bias, rows, labels, grad = parts
    leaf = bias.clone().requires_grad_()
    (found,) = torch.autograd.grad(linear_logprob(hidden, weight, rows, labels, bias=leaf), leaf, grad)
    (own,) = torch.autograd.grad(eager(hidden, weight, rows, labels, bias=leaf), leaf, grad)
    double = bias.double().requires_grad_()
    result = eager(hidden.double(), weight.double(), rows, labels, bias=double)
    assert_as_good_as_torch(found, own, torch.autograd.grad(result, double, grad.double())[0])


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kind", ["far apart", "a large common offset"])
def test_extreme_logits(backend, kind, trained):
    hidden, weight, _, rows, labels, grad = problem(device=backend.device)
    if kind == "far apart":
        bias = torch.zeros(len(weight), device=backend.device)
        bias[labels[1]], bias[labels[3]] = 1e4, -1e4
    else:
        bias = torch.full((len(weight),), 1e4, device=backend.device)
    assert_accurate([hidden, weight, bias, rows, labels, grad], trained=trained)


@pytest.mark.parametrize("trained", TRAINED)
def test_labels_that_are_almost_certain(backend, trained):
    """p_y near 1, where W[y] - sum_v p_v W_v cancels: half precision must not leave rounding alone."""
    for dtype in backend.dtypes:
        hidden, weight, _, rows, labels, grad = problem(9, 16, 300, 9, dtype=dtype, device=backend.device)
        rows, labels = torch.arange(9, device=backend.device), torch.arange(9, device=backend.device)
        hidden = (weight[:9].float() * 4).to(dtype)
        parts = [hidden, weight, None, rows, labels, grad]
        found, truth = assert_accurate(parts, trained=trained)
        assert truth[0].median() > -0.2
        if dtype in (torch.float16, torch.bfloat16):
            exact = run(linear_logprob, hidden.float(), weight.float(), None, rows, labels, grad, trained=trained)
            assert max_error(found[1], exact[1]) <= 2 * torch.finfo(dtype).eps * float(exact[1].abs().max())


def test_masked_vocabulary(backend):
    hidden, weight, _, rows, labels, grad = problem(device=backend.device)
    bias = torch.zeros(len(weight), device=backend.device)
    bias[:700] = -torch.inf
    labels = labels.where(labels == IGNORED, 700 + labels % 303)
    for trained in TRAINED:
        assert_accurate([hidden, weight, bias, rows, labels, grad], trained=trained)


def test_nothing_to_score(backend):
    hidden, weight, _, rows, labels, grad = problem(device=backend.device)
    for trained in TRAINED:
        for count in (0, 5):
            ignored = torch.full_like(labels[:count], IGNORED)
            result, *gradients = run(
                linear_logprob, hidden, weight, None, rows[:count], ignored, grad[:count], trained=trained
            )
            assert result.tolist() == [0.0] * count
            assert all(not gradient.any() for gradient in gradients)
    assert linear_logprob(hidden[:0], weight, rows[:0], labels[:0]).shape == (0,)


def test_rows_without_labels_are_not_read(backend):
    hidden, weight, _, rows, labels, grad = problem(device=backend.device)
    hidden[3], hidden[7] = torch.nan, torch.inf
    labels = labels.masked_fill(rows == 7, IGNORED)
    for trained in TRAINED:
        result, dh, *_ = run(linear_logprob, hidden, weight, None, rows, labels, grad, trained=trained)
        assert result.isfinite().all()
        assert dh.isfinite().all()
        assert not dh[[3, 7]].any()


def test_uninitialised_memory_is_not_read(backend, monkeypatch):
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poisoned(real(*a, **k)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poisoned(empty(*a, **k)))
    for trained in TRAINED:
        assert_accurate(problem(device=backend.device, bias=True), trained=trained)


def _poisoned(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def test_misaligned_narrow_and_strided_arguments(backend):
    hidden, weight, bias, rows, labels, grad = problem(device=backend.device, bias=True)
    expected = run(linear_logprob, hidden, weight, bias, rows, labels, grad, trained=True)
    odd_labels = torch.cat([labels[:1], labels])[1:]
    narrow_rows = rows.int()
    strided = torch.stack([hidden, hidden], -1)[..., 0]
    columns = weight.t().contiguous().t()
    for trained in TRAINED:
        found = run(linear_logprob, strided, columns, bias, narrow_rows, odd_labels, grad, trained=trained)
        for one, other in zip(found, expected, strict=False):
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("trained", TRAINED)
def test_the_same_bits_twice(backend, trained):
    parts = problem(40, 16, 1100 if backend.interpreted else 3000, 90, device=backend.device, bias=True)
    first, again = (run(linear_logprob, *parts, trained=trained, softcap=4.0) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_backward_can_run_twice(backend):
    """What the forward kept is not consumed."""
    hidden, weight, _, rows, labels, grad = problem(device=backend.device)
    for trained in TRAINED:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        result = linear_logprob(leaves[0], leaves[1], rows, labels)
        first, again = (torch.autograd.grad(result, leaves[0], grad, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("budget", [3 * 4 * 8 * 256, 1 << 30])
def test_kept_tiles_are_used_once(backend, budget, monkeypatch):
    """The backward writes over them and gives their memory back; another one, or one after an error, computes anew."""
    monkeypatch.setattr(_head_walk, "tile_shape", lambda *_: (8, 256))
    monkeypatch.setattr(_head_walk, "keep_budget", lambda *_: budget)
    hidden, weight, _, rows, labels, grad = problem(29, 16, 1003, 60)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    expected = torch.autograd.grad(eager(*leaves, rows, labels), leaves, grad)
    result = linear_logprob(*leaves, rows, labels)
    plain, calls = _head_walk.folds, []

    def failing(name):
        steps = plain(name)

        def slope(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise ZeroDivisionError
            steps.slope(*arguments)

        return steps._replace(slope=slope)

    with monkeypatch.context() as patched:
        patched.setattr(_head_walk, "folds", failing)
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(result, leaves, grad, retain_graph=True)
    for _ in range(2):
        for found, own in zip(torch.autograd.grad(result, leaves, grad, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(why_unavailable("cpp", "cpu") is not None, reason="the extension is not built")
def test_the_head_s_gradient_takes_the_place_of_kept_tiles(monkeypatch):
    """Resident memory over a backward of 64 MiB of tiles and 16 MiB of gradient."""
    monkeypatch.setattr(_head_walk, "keep_budget", lambda *_: 1 << 30)
    code = """
import torch
from bench.measure import PeakMemory
from sysdag.ops import linear_logprob
torch.set_num_threads(1)
hidden, weight = torch.randn(1024, 256).requires_grad_(), torch.randn(16384, 256).requires_grad_()
rows = torch.arange(1024)
small = linear_logprob(hidden[:8], weight[:64], rows[:8], rows[:8])
torch.autograd.grad(small.sum(), (hidden, weight))
result = linear_logprob(hidden, weight, rows, rows)
with PeakMemory("cpu") as memory:
    torch.autograd.grad(result.sum(), (hidden, weight))
print(memory.mib)
"""
    monkeypatch.setenv(_head_walk.KEEP_VARIABLE, "1000")
    assert measure.peak_in_a_process(code) < 12


@pytest.mark.parametrize("equal", [False, True])
def test_labels_of_a_row_that_are_equal_and_that_are_not(backend, equal):
    rows, labels = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([3, 5, 1, 4, IGNORED, 0])
    labels[1] = 3 if equal else 5
    hidden, weight, _, _, _, _ = problem(3, 6, 11, 6, device=backend.device)
    grad = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, -1.0], device=backend.device)
    parts = hidden, weight, None, rows.to(backend.device), labels.to(backend.device), grad
    doubles = hidden.double(), weight.double(), *parts[2:]
    for trained in TRAINED:
        for scale in (0.5, 1.0):
            found = run(linear_logprob, *parts, trained=trained, logit_scale=scale)
            truth = run(eager, *doubles, trained=trained, logit_scale=scale)
            for one, true in zip(found, truth, strict=True):
                torch.testing.assert_close(one.double(), true, rtol=1e-5, atol=1e-5)


def test_sums_over_a_sequence_keep_their_precision(backend):
    """512 tokens: bf16 logits would be off by 0.1 nats and more."""
    dtype = torch.bfloat16 if torch.bfloat16 in backend.dtypes else torch.float16
    hidden, weight, _, _, _, _ = problem(64, 64, 997, 9, dtype=dtype, device=backend.device)
    rows = torch.arange(512, device=backend.device) % 64
    labels = (torch.arange(512, device=backend.device) * 37) % 997
    truth = eager(hidden.double(), weight.double(), rows, labels).sum()
    assert abs(float(linear_logprob(hidden, weight, rows, labels).double().sum() - truth)) < 2e-3


@pytest.mark.parametrize("trained", TRAINED)
def test_gradcheck(backend, trained):
    shape = (2, 2, 5, 4) if backend.interpreted else (4, 3, 7, 10)
    hidden, weight, bias, rows, labels, _ = problem(*shape, dtype=torch.float64, device=backend.device, bias=True)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]
    for softcap in (None, 1.5):
        assert torch.autograd.gradcheck(
            lambda h, w, b, c=softcap: linear_logprob(h, w, rows, labels, bias=b, softcap=c, logit_scale=0.8), leaves
        )


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("trained", TRAINED)
def test_opcheck(backend, trained):
    hidden, weight, bias, rows, labels, _ = problem(4, 3, 7, 10, bias=True)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(trained), bias, rows, labels, 2.0, 0.5, IGNORED)
    torch.library.opcheck(torch.ops.sysdag.linear_logprob, (*arguments, not trained, 1 if trained else 0))


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("trained", TRAINED)
def test_compiles_without_a_graph_break(backend, trained):
    parts = problem(bias=True)
    compiled = torch.compile(
        lambda h, w, r, y, bias: linear_logprob(h, w, r, y, bias=bias, softcap=3.0), fullgraph=True, backend="aot_eager"
    )
    found = run(compiled, *parts, trained=trained)
    expected = run(linear_logprob, *parts, trained=trained, softcap=3.0)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)  # the BLAS rounds by its operands' alignment


def test_a_frozen_head_makes_nothing_of_its_size(monkeypatch):
    parts = problem(64, 8, 40_000, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(linear_logprob, *parts, trained=False)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 64 * 32768 * 4, "one tile of logits is the largest that a frozen head needs"
    monkeypatch.setattr(_head_walk, "tile_shape", lambda *_: (8, 256))
    with torch.profiler.profile(profile_memory=True) as profile:
        hidden, weight, _, rows, labels, grad = parts
        leaf = hidden.clone().requires_grad_()
        torch.autograd.grad(linear_logprob(leaf, weight, rows, labels), leaf, grad)
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 64 * 1024


def test_autocast_casts_like_a_linear_layer():
    hidden, weight, _, rows, labels, grad = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(linear_logprob, hidden, weight, None, rows, labels, grad, trained=True)
    halves = hidden.bfloat16(), weight.bfloat16()
    expected = run(linear_logprob, *halves, None, rows, labels, grad, trained=True)
    assert torch.equal(found[0], expected[0])
    assert found[1].dtype == torch.float32
    assert torch.equal(found[2], expected[2].float())


def test_the_reference_is_the_definition():
    hidden, weight, bias, rows, labels, _ = problem(dtype=torch.float64, bias=True)
    options = dict(bias=bias, softcap=3.0, logit_scale=0.7)
    assert torch.equal(
        linear_logprob_reference(hidden, weight, rows, labels, **options),
        eager(hidden, weight, rows, labels, **options),
    )
    assert inspect.signature(linear_logprob_reference) == inspect.signature(linear_logprob)


def test_errors():
    hidden, weight, _, rows, labels, _ = problem()
    wrong = [
        (dict(hidden=hidden[:, :5]), r"hidden \(N, H\) and weight \(V, H\)"),
        (dict(rows=rows[:4]), r"rows \(M,\) and labels \(M,\)"),
        (dict(bias=torch.zeros(7)), r"a bias \(1003,\)"),
        (dict(hidden=hidden.half()), "one floating dtype"),
        (dict(labels=labels.float()), "integer labels"),
        (dict(softcap=0.0), "softcap > 0"),
        (dict(softcap=-1.0), "softcap > 0"),
        (dict(labels=labels.masked_fill(labels == IGNORED, 1003)), r"labels must be in \[0, 1003\), got 1003"),
        (dict(labels=labels.masked_fill(labels == IGNORED, -3)), r"labels must be in .* got -3"),
        (dict(rows=torch.full_like(rows, 13)), r"rows must be in \[0, 13\), got 13"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            linear_logprob(**(dict(hidden=hidden, weight=weight, rows=rows, labels=labels) | change))


def test_a_backend_that_cannot_serve_says_so():
    hidden, weight, _, rows, labels, _ = problem()
    with use_backend("cuda"), pytest.raises(BackendError, match="linear_logprob"):
        linear_logprob(hidden, weight, rows, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("trained", TRAINED)
def test_on_a_gpu(trained):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        parts = problem(300, 128, 50257, 700, dtype=dtype, device="cuda", scale=0.1)
        with use_backend("triton"):
            assert_accurate(parts, trained=trained)
            first, again = (run(linear_logprob, *parts, trained=trained) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
