import inspect
import itertools
import sys
from pathlib import Path

import pytest
import torch
from truth import assert_as_good_as_torch

from sysdag.objectives.candidate_sums import candidate_log_sum
from sysdag.objectives.losses import LOSSES, PairScores
from sysdag.ops import _dispatch
from sysdag.ops._dispatch import BackendError, extension_raises, use_backend
from sysdag.ops.preference_loss import LOSS_TYPES, SMOOTHED, _op, preference_loss, preference_loss_reference

CASES = [(name, 0.0) for name in LOSS_TYPES] + [(name, 0.2) for name in SMOOTHED]
ROOT = Path(__file__).resolve().parents[2]
needs_cpp = pytest.mark.skipif(
    _dispatch.why_unavailable("cpp", "cpu") is not None, reason="the extension sysdag._C is not built"
)


def segments(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)])


def problem(sizes=(3, 1, 4, 2, 2, 5, 1, 3), seed=0, offset=0.0, scale=4.0, dtype=torch.float32):
    """Log-probabilities of policy and reference, offsets, an upstream gradient with signs, lengths; 4 pairs."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    logps, ref_logps = (offset + scale * torch.randn(2, total, generator=generator, dtype=torch.float64)).to(dtype)
    grad = torch.randn(len(sizes) // 2, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(0, 6, (len(sizes),), generator=generator).to(dtype)
    return logps, ref_logps, segments(sizes), grad, lengths


def run(function, logps, ref_logps, offsets, grad, **options):
    """Loss, coefficients, and the gradient that reaches `logps`."""
    logps = logps.clone().requires_grad_()
    loss, coefficients = function(logps, ref_logps, offsets, 0.3, **options)
    return loss.detach(), coefficients, torch.autograd.grad(loss, logps, grad)[0]


def in_fp64(tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def on(served, tensors):
    return [tensor.to(served.device) for tensor in tensors]


@pytest.mark.parametrize(("loss_type", "e"), CASES)
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_as_good_as_torch_forward_and_backward(backend, loss_type, e, offset):
    for dtype in [torch.float32] if offset else [torch.float32, torch.float64]:  # fp64 is no truth of fp64
        *tensors, lengths = problem(offset=offset, dtype=dtype, seed=len(loss_type))
        options = {"loss_type": loss_type, "label_smoothing": e}
        with_lengths = [{"lengths": lengths}, {}] if loss_type == "ipo" else [{}]
        for extra in with_lengths:
            exact = {name: value.double() for name, value in extra.items()}
            truth = run(preference_loss_reference, *in_fp64(tensors), **options, **exact)
            eager = run(preference_loss_reference, *tensors, **options, **extra)
            moved = {name: value.to(backend.device) for name, value in extra.items()}
            found = run(preference_loss, *on(backend, tensors), **options, **moved)
            for what, f, e_, t in zip(("loss", "coefficients", "gradient"), found, eager, truth, strict=True):
                assert f.dtype == dtype
                assert_as_good_as_torch(f.cpu(), e_, t, f"{loss_type} {what} {dtype}")


@pytest.mark.parametrize(("loss_type", "e"), CASES)
def test_the_losses_of_the_objective(backend, loss_type, e):
    logps, ref_logps, offsets, _, lengths = problem(dtype=torch.float64)
    index, pairs, beta = torch.arange(8).repeat_interleave(offsets.diff()), 4, 0.3
    logps.requires_grad_()
    rewards = beta * (candidate_log_sum(logps, index, 8) - candidate_log_sum(ref_logps, index, 8))
    scores = PairScores(
        chosen_rewards=rewards[:pairs], rejected_rewards=rewards[pairs:], chosen_lengths=lengths[:pairs],
        rejected_lengths=lengths[pairs:], chosen_nll=torch.zeros(()),
    )  # fmt: skip
    expected = LOSSES[loss_type](scores, beta, e)
    (gradient,) = torch.autograd.grad(expected.sum(), logps)
    loss, coefficients = preference_loss(
        *on(backend, (logps.detach(), ref_logps, offsets)), beta, loss_type=loss_type, label_smoothing=e,
        lengths=lengths.to(backend.device) if loss_type == "ipo" else None,
    )  # fmt: skip
    torch.testing.assert_close(loss.cpu(), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(coefficients.cpu(), gradient, rtol=1e-12, atol=1e-12)


def test_one_candidate_is_direct_by_hand(backend):
    loss, coefficients = preference_loss(
        *on(backend, (torch.tensor([-3.0, -7.0]), torch.tensor([-4.0, -5.0]), segments([1, 1]))), 0.5
    )
    # Margin 0.5 * ((-3 + 4) - (-7 + 5)) = 1.5; d(-log sigmoid(m)) = -sigmoid(-m).
    miss = torch.tensor(-1.5).sigmoid()
    torch.testing.assert_close(loss.cpu(), -torch.tensor(1.5).sigmoid().log()[None])
    torch.testing.assert_close(coefficients.cpu(), torch.stack([-0.5 * miss, 0.5 * miss]))


@pytest.mark.parametrize(("loss_type", "e"), CASES)
def test_candidates_of_probability_zero(backend, loss_type, e):
    logps, ref_logps, offsets, grad, _ = problem()
    logps[[0, 4]] = -torch.inf
    ref_logps[[0, 1, 5]] = -torch.inf
    options = {"loss_type": loss_type, "label_smoothing": e}
    tensors = logps, ref_logps, offsets, grad
    truth = run(preference_loss_reference, logps.double(), ref_logps.double(), offsets, grad.double(), **options)
    eager = run(preference_loss_reference, *tensors, **options)
    found = run(preference_loss, *on(backend, tensors), **options)
    for what, f, e_, t in zip(("loss", "coefficients", "gradient"), found, eager, truth, strict=True):
        assert_as_good_as_torch(f.cpu(), e_, t, what)
    assert (found[1].cpu()[[0, 4]] == 0).all()
    assert found[2].isfinite().all()


def test_a_side_without_any_probability(backend):
    """The impossible winner's loss is infinite and the impossible loser's 0; neither gives a nan gradient."""
    logps = torch.tensor([-torch.inf, -torch.inf, -1.0, -2.0, -1.0, -torch.inf])
    tensors = on(backend, (logps, torch.full((6,), -2.0), segments([2, 1, 2, 1]), torch.ones(2)))
    loss, coefficients, gradient = run(preference_loss, *tensors)
    assert loss.tolist() == [torch.inf, 0.0]
    assert coefficients[:2].tolist() == [0.0, 0.0]
    assert torch.equal(gradient, coefficients)
    assert coefficients[3:5].sum().item() == pytest.approx(0.3)
    assert coefficients[[2, 5]].tolist() == [0.0, 0.0]


def test_an_empty_segment_is_nan_and_no_pairs_are_nothing(backend):
    loss, coefficients = preference_loss(*on(backend, (torch.zeros(3), torch.zeros(3), segments([1, 0, 1, 1]))), 0.1)
    assert loss.isnan().tolist() == [False, True]
    assert coefficients[:2].isfinite().all()
    loss, coefficients, gradient = run(
        preference_loss, *on(backend, (torch.zeros(0), torch.zeros(0), torch.tensor([0]), torch.zeros(0)))
    )
    assert loss.shape == coefficients.shape == gradient.shape == (0,)


def test_many_candidates_and_many_pairs(backend):
    sizes = [1 + 37 * i % 300 for i in range(6)] if backend.interpreted else [1 + 37 * i % 300 for i in range(2000)]
    tensors = problem(sizes, seed=3)[:-1]
    truth = run(preference_loss_reference, *in_fp64(tensors))
    eager = run(preference_loss_reference, *tensors)
    found = run(preference_loss, *on(backend, tensors))
    for what, f, e, t in zip(("loss", "coefficients", "gradient"), found, eager, truth, strict=True):
        assert_as_good_as_torch(f.cpu(), e, t, what)
    again = run(preference_loss, *on(backend, tensors))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_as_many_candidates_everywhere(backend, size):
    """The extension has loops of their own for some sizes."""
    tensors = problem([size] * 6, seed=size)[:-1]
    truth = run(preference_loss_reference, *in_fp64(tensors))
    eager = run(preference_loss_reference, *tensors)
    found = run(preference_loss, *on(backend, tensors))
    for what, f, e, t in zip(("loss", "coefficients", "gradient"), found, eager, truth, strict=True):
        assert_as_good_as_torch(f.cpu(), e, t, what)


@pytest.mark.parametrize("same_size", [False, True])
def test_threads_change_no_bit(same_size):
    """Several threads, each from its own pair on; with lengths, which only they read at an offset."""
    sizes = [4] * 20000 if same_size else [1 + 37 * i % 300 for i in range(2000)]
    *tensors, lengths = problem(sizes, seed=5)
    truth = run(preference_loss_reference, *in_fp64(tensors), loss_type="ipo", lengths=lengths.double())
    eager = run(preference_loss_reference, *tensors, loss_type="ipo", lengths=lengths)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(preference_loss, *tensors, loss_type="ipo", lengths=lengths))
    finally:
        torch.set_num_threads(threads)
    for what, one, two, e, t in zip(("loss", "coefficients", "gradient"), *results, eager, truth, strict=True):
        assert torch.equal(one, two)
        assert_as_good_as_torch(one, e, t, what)


def test_strided_and_half_precision_inputs(backend):
    logps, ref_logps, offsets, _, lengths = on(backend, problem())
    wide = torch.stack([logps, ref_logps, logps], 1)
    every_other = torch.stack([offsets, offsets + 1], 1)[:, 0]
    packed = preference_loss(logps, ref_logps, offsets, 0.3)
    for starts in (every_other, every_other.int()):
        strided = preference_loss(wide[:, 0], wide[:, 1], starts, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))
    rounded, ref_rounded = logps.half(), ref_logps.half()
    half = preference_loss(rounded, ref_rounded, offsets, 0.3, loss_type="ipo", lengths=lengths.int().half())
    full = preference_loss(rounded.float(), ref_rounded.float(), offsets, 0.3, loss_type="ipo", lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))


def test_a_broadcast_upstream_gradient(backend):
    logps, ref_logps, offsets, _, _ = on(backend, problem())
    logps.requires_grad_()
    loss, coefficients = preference_loss(logps, ref_logps, offsets, 0.3)
    (of_mean,) = torch.autograd.grad(loss.mean(), logps, retain_graph=True)
    torch.testing.assert_close(of_mean, coefficients / 4)
    (of_sum,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)  # one number with stride 0
    torch.testing.assert_close(of_sum, coefficients)
    (strided,) = torch.autograd.grad(loss, logps, torch.arange(8.0, device=backend.device)[::2])
    torch.testing.assert_close(strided, coefficients * 2 * (torch.arange(8) % 4).repeat_interleave(
        offsets.cpu().diff()).to(backend.device))  # fmt: skip


def test_the_hinge_is_flat_from_a_margin_of_1_on(backend):
    logps, offsets = torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.arange(5)
    loss, coefficients = preference_loss(*on(backend, (logps, torch.zeros(4), offsets)), 1.0, loss_type="hinge")
    assert loss.tolist() == [0.0, 0.5]
    assert coefficients.tolist() == [0.0, -1.0, 0.0, 1.0]


def test_small_losses_keep_their_digits(backend):
    """log(1 + exp(-m)) of large margins: 1 + exp(-m) alone would round them away."""
    margins = torch.arange(2.0, 40.0, 0.5)
    logps = torch.cat([margins, torch.zeros_like(margins)])
    offsets = torch.arange(len(logps) + 1)
    loss, coefficients = preference_loss(*on(backend, (logps, torch.zeros_like(logps), offsets)), 1.0)
    truth = torch.nn.functional.softplus(-margins.double())
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-6, atol=0)
    slope = (-margins.double()).sigmoid()
    torch.testing.assert_close(coefficients.cpu().double(), torch.cat([-slope, slope]), rtol=1e-6, atol=0)


def test_uninitialised_memory_is_all_written(backend):
    logps, ref_logps, offsets, grad, _ = on(backend, problem())
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # torch.empty is nan
    try:
        assert all(part.isfinite().all() for part in run(preference_loss, logps, ref_logps, offsets, grad))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("loss_type", "e"), CASES)
def test_gradcheck(backend, loss_type, e):
    logps, ref_logps, offsets, _, lengths = on(backend, problem((2, 1, 1, 3), dtype=torch.float64))
    logps.requires_grad_()
    lengths = lengths if loss_type == "ipo" else None

    def loss(values):
        options = {"loss_type": loss_type, "label_smoothing": e, "lengths": lengths}
        return preference_loss(values, ref_logps, offsets, 0.3, **options)[0]

    assert torch.autograd.gradcheck(loss, logps)


def test_only_the_policy_has_a_gradient_and_only_once(backend):
    logps, ref_logps, offsets, grad, _ = on(backend, problem())
    logps.requires_grad_()
    ref_logps.requires_grad_()
    loss, coefficients = preference_loss(logps, ref_logps, offsets, 0.3)
    assert not coefficients.requires_grad
    assert torch.autograd.grad(loss, ref_logps, grad, retain_graph=True, allow_unused=True) == (None,)
    if backend.name != "reference":
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again .*use_backend\('reference'\)"):
            torch.autograd.grad(loss, logps, grad, create_graph=True)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_opcheck_of_the_traced_op(backend, loss_type):
    logps, ref_logps, offsets, _, lengths = on(backend, problem())
    lengths = lengths if loss_type == "ipo" else None
    arguments = logps.requires_grad_(), ref_logps, offsets, lengths, 0.3, LOSS_TYPES.index(loss_type), 0.0
    torch.library.opcheck(_op, arguments)


@needs_cpp
def test_schemas_of_the_extension():
    logps, ref_logps, offsets, grad, lengths = problem()
    forward, backward = torch.ops.sysdag_C.preference_loss.default, torch.ops.sysdag_C.preference_loss_backward.default
    torch.library.opcheck(forward, (logps, ref_logps, offsets, lengths, 0.3, 1, 0.0), test_utils=["test_schema"])
    torch.library.opcheck(backward, (grad, logps, offsets), test_utils=["test_schema"])


@needs_cpp
@pytest.mark.skipif(not _dispatch.extension_raises(), reason="this torch ends the process instead")
def test_the_backward_of_the_extension_reads_nothing_past_its_arguments():
    _, coefficients, offsets, grad, _ = problem()
    backward = torch.ops.sysdag_C.preference_loss_backward.default
    for arguments, what in [
        ((grad.double(), coefficients, offsets), "dtypes"), ((grad, coefficients, offsets.int()), "dtypes"),
        ((grad[:3], coefficients, offsets), "shapes"), ((grad[None], coefficients, offsets), "shapes"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=f"preference_loss_backward: the {what} do not fit"):
            backward(*arguments)


COMPILED = """
from sysdag.ops import preference_loss

def function(values, reference, offsets, lengths):
    return preference_loss(2 * values, reference, offsets, 0.3, loss_type="ipo", lengths=lengths)

def check():
    logps, reference = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    fixed = reference, torch.tensor([0, 2, 3, 7, 9]), torch.tensor([3.0, 1.0, 4.0, 1.0])
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        values = logps.clone().requires_grad_()
        loss, coefficients = call(values, *fixed)
        results.append([loss, coefficients, *torch.autograd.grad(loss, values, torch.tensor([0.3, -2.0]))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
"""


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
def test_compiled_without_a_graph_break(backend, compiled_backends):
    assert compiled_backends[backend.name] is None, compiled_backends[backend.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logps": torch.zeros(3)}, r"logps and ref_logps: expected one shape \(S,\), got \(4,\) and \(3,\)"),
        ({"offsets": torch.tensor([0, 1, 2, 4])}, r"offsets: expected shape \(2P\+1,\) for P pairs, got \(4,\)"),
        ({"offsets": torch.tensor([0, 3, 5])}, r"offsets: expected them to rise from 0 to 4, .*, got \[0, 3, 5\]"),
        ({"offsets": torch.tensor([1, 3, 4])}, r"offsets: expected them to rise from 0"),
        ({"offsets": torch.tensor([0, 3, 1, 2, 4])}, r"offsets: expected them to rise from 0"),
        ({"beta": 0.0}, r"beta: expected a positive number, got 0\.0"),
        ({"loss_type": "kto"}, r"loss_type: expected one of \['sigmoid', 'ipo', 'hinge', 'robust'\], got 'kto'"),
        ({"label_smoothing": 0.5}, r"label_smoothing: expected a number in \[0, 0\.5\), .*got 0\.5 for"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, r"label_smoothing: .* got 0\.1 for 'hinge'"),
        ({"lengths": torch.ones(2)}, r"lengths: expected None unless loss_type is 'ipo', got a tensor for 'sigmoid'"),
        ({"lengths": torch.ones(3), "loss_type": "ipo"}, r"lengths: expected shape \(2,\), got \(3,\)"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@pytest.mark.parametrize("raises", [True, False])
def test_errors(backend, change, message, raises, monkeypatch):
    if raises and not extension_raises():
        pytest.skip("with this torch the extension is never asked about bad input")
    op = sys.modules["sysdag.ops.preference_loss"]
    monkeypatch.setattr(op, "extension_raises", lambda: raises)
    if not raises:
        monkeypatch.setattr(op._PreferenceLoss, "apply", None)  # it would end the process
    arguments = {"logps": torch.zeros(4), "ref_logps": torch.zeros(4), "offsets": torch.tensor([0, 2, 4]), "beta": 0.1}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(preference_loss)(**(arguments | change))  # without the tests' shape checks


def test_a_forced_backend_that_cannot_serve_is_an_error():
    with use_backend("cuda"), pytest.raises(BackendError, match="preference_loss: backend 'cuda' does not implement"):
        preference_loss(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1, 2]), 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("loss_type", "e"), CASES)
def test_on_a_gpu(loss_type, e):
    tensors = problem([1 + 37 * i % 300 for i in range(2000)], seed=3)[:-1]
    options = {"loss_type": loss_type, "label_smoothing": e}
    truth = run(preference_loss_reference, *in_fp64(tensors), **options)
    eager = run(preference_loss_reference, *(t.cuda() for t in tensors), **options)
    with use_backend("triton"):
        found = run(preference_loss, *(t.cuda() for t in tensors), **options)
    for what, f, e_, t in zip(("loss", "coefficients", "gradient"), found, eager, truth, strict=True):
        assert_as_good_as_torch(f.cpu(), e_.cpu(), t, what)
