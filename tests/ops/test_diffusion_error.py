import math

import pytest
import torch
from truth import assert_as_good_as_torch

from sysdag.ops._dispatch import BackendError, use_backend
from sysdag.ops.diffusion_error import diffusion_error, diffusion_error_reference

SHAPES = [(3, 4, 5, 7), (2, 3, 64, 65), (1, 1), (5, 1031), (4,), (2, 1, 40000)]


def problem(shape, dtype=torch.float32, device="cpu", seed=0, close=False):
    """eps, policy, reference and an upstream gradient of both signs; with `close` both predictions nearly agree."""
    generator = torch.Generator().manual_seed(seed)
    eps, policy, reference = torch.randn(3, *shape, generator=generator)
    if close:
        reference = policy + 1e-4 * reference
    grad = torch.randn(shape[0], generator=generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return *(x.to(device, dtype) for x in (eps, policy, reference)), grad.to(device, wide)


def eager(eps, policy, reference=None, mask=None):
    """What one writes in torch, in the tensors' own dtype."""
    weight = 1 if mask is None else mask
    error = ((eps - policy).square() * weight).reshape(len(eps), -1).sum(1)
    if reference is not None:
        error = error - ((eps - reference).square() * weight).reshape(len(eps), -1).sum(1)
    return error


def exact(eps, policy, reference=None, mask=None):
    """The sums of the fp64 terms without rounding: two large sums cancel, so fp64 is no truth for fp64."""
    weight = torch.ones(()) if mask is None else mask.double()
    terms = [(eps.double() - policy.double()).square() * weight]
    if reference is not None:
        terms.append(-(eps.double() - reference.double()).square() * weight)
    rows = torch.cat([term.reshape(len(eps), -1) for term in terms], dim=1).tolist()
    return torch.tensor([math.fsum(row) for row in rows], dtype=torch.float64, device=eps.device)


def result_and_gradient(function, eps, policy, reference, grad, mask=None):
    leaf = policy.detach().clone().requires_grad_()
    result = function(eps, leaf, reference, mask=mask)
    return result.detach(), torch.autograd.grad(result, leaf, grad)[0]


def assert_accurate(eps, policy, reference, grad, mask=None):
    result, gradient = result_and_gradient(diffusion_error, eps, policy, reference, grad, mask)
    their_gradient = result_and_gradient(eager, eps, policy, reference, grad.to(policy.dtype), mask)[1]
    sums_in = [None if x is None else x.to(grad.dtype) for x in (eps, policy, reference, mask)]
    theirs = eager(*sums_in)  # in fp32 also for half precision, whose own sums overflow
    doubles = [None if x is None else x.double() for x in (eps, policy, reference, grad, mask)]
    truth, true_gradient = exact(eps, policy, reference, mask), result_and_gradient(eager, *doubles)[1]
    assert result.dtype == grad.dtype
    assert gradient.dtype == policy.dtype
    assert_as_good_as_torch(result, theirs, truth, "error")
    assert_as_good_as_torch(gradient, their_gradient, true_gradient, "gradient")


def served_dtypes(backend):
    return [d for d in backend.dtypes if not (backend.name == "cpp" and d in (torch.float16, torch.bfloat16))]


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(backend, shape, with_reference):
    for dtype in served_dtypes(backend):
        eps, policy, reference, grad = problem(shape, dtype, backend.device)
        assert_accurate(eps, policy, reference if with_reference else None, grad)


@pytest.mark.parametrize("mask_shape", [(3, 4, 5, 7), (3, 1, 5, 7), (5, 7), (3, 1, 1, 1), ()], ids=str)
def test_masks_of_any_shape_that_broadcasts(backend, mask_shape):
    eps, policy, reference, grad = problem((3, 4, 5, 7), device=backend.device)
    weights = torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)).to(backend.device)
    for mask in (weights, (weights > 0.5).float()):
        assert_accurate(eps, policy, reference, grad, mask)
        assert_accurate(eps, policy, None, grad, mask)
    as_bool = result_and_gradient(diffusion_error, eps, policy, reference, grad, weights > 0.5)
    as_float = result_and_gradient(diffusion_error, eps, policy, reference, grad, (weights > 0.5).float())
    assert all(torch.equal(a, b) for a, b in zip(as_bool, as_float, strict=True))


def test_masked_elements_may_be_nan(backend):
    eps, policy, reference, grad = problem((3, 50), device=backend.device)
    mask = torch.arange(50, device=backend.device) < 30
    kept = [x[:, :30].contiguous() for x in (eps, policy, reference)]
    eps[:, 30:], policy[:, 40:] = torch.nan, torch.inf
    result, gradient = result_and_gradient(diffusion_error, eps, policy, reference, grad, mask)
    expected, expected_gradient = result_and_gradient(diffusion_error, *kept, grad)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient[:, :30], expected_gradient)
    assert not gradient[:, 30:].any()


def test_predictions_that_nearly_agree(backend):
    assert_accurate(*problem((4, 3, 32, 32), device=backend.device, close=True))
    eps, policy, _, _ = problem((4, 3, 32, 32), device=backend.device)
    assert torch.equal(diffusion_error(eps, policy, policy), torch.zeros(4, device=backend.device))


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_scales(backend, scale):
    eps, policy, reference, grad = problem((4, 3, 32, 32), device=backend.device)
    assert_accurate(eps * scale, policy * scale, reference * scale, grad)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0), (0, 0), (0,)], ids=str)
def test_nothing_to_sum(backend, shape):
    eps, policy, reference, grad = problem(shape, device=backend.device)
    result, gradient = result_and_gradient(diffusion_error, eps, policy, reference, grad)
    assert torch.equal(result, torch.zeros(shape[0], device=backend.device))
    assert gradient.shape == shape


def test_only_the_policy_gets_a_gradient(backend):
    eps, policy, reference, _ = problem((3, 5), device=backend.device)
    mask = torch.rand(3, 5, device=backend.device)
    leaves = [x.requires_grad_() for x in (eps, policy, reference, mask)]
    diffusion_error(eps, policy, reference, mask=mask).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [False, True, False, False]


def test_strided_and_mixed_tensors(backend):
    """Of a model that learns its variance the first channels are compared; eps often is fp32 beside a half model."""
    eps, policy, _, grad = problem((3, 8, 6), device=backend.device)
    expected = result_and_gradient(diffusion_error, eps[:, :4].contiguous(), policy[:, :4].contiguous(), None, grad)
    leaf = policy.clone().requires_grad_()
    result = diffusion_error(eps[:, :4], leaf[:, :4])
    result.backward(grad)
    assert torch.equal(result, expected[0])
    assert torch.equal(leaf.grad[:, :4], expected[1])
    assert not leaf.grad[:, 4:].any()
    if backend.name != "cpp":
        half, wide = policy.half(), problem((3, 8, 6), device=backend.device)[2]
        result, gradient = result_and_gradient(diffusion_error, eps, half, wide, grad)
        assert gradient.dtype == torch.float16
        torch.testing.assert_close(result, diffusion_error(eps, half.float(), wide), rtol=1e-6, atol=1e-4)
    broadcast = policy.clone().requires_grad_()
    diffusion_error(eps, broadcast).sum().backward()  # the gradient that arrives has stride 0
    torch.testing.assert_close(broadcast.grad, 2 * (policy - eps), rtol=1e-6, atol=1e-6)


def test_the_same_bits_twice_and_on_any_number_of_threads(backend):
    shape = (2, 1, 40000) if backend.interpreted else (3, 5, 77777)
    eps, policy, reference, grad = problem(shape, device=backend.device)
    first = result_and_gradient(diffusion_error, eps, policy, reference, grad)
    torch.set_num_threads(2)
    try:
        second = result_and_gradient(diffusion_error, eps, policy, reference, grad)
    finally:
        torch.set_num_threads(1)
    if backend.name != "reference":  # torch's own sums may depend on the number of threads
        assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    third = result_and_gradient(diffusion_error, eps, policy, reference, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_every_element_is_written(backend):
    """Memory that torch.empty hands out is full of nan."""
    eps, policy, reference, grad = problem((3, 1031), device=backend.device)
    expected = result_and_gradient(diffusion_error, eps, policy, reference, grad)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = result_and_gradient(diffusion_error, eps, policy, reference, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradcheck(backend):
    eps, policy, reference, _ = problem((3, 2, 5), torch.float64, backend.device)
    mask = torch.rand(2, 5, dtype=torch.float64, device=backend.device)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diffusion_error(eps, x, reference), policy)
    assert torch.autograd.gradcheck(lambda x: diffusion_error(eps, x, mask=mask), policy)


def test_opcheck(backend):
    eps, policy, reference, grad = problem((3, 2, 5), device=backend.device)
    mask = torch.rand(2, 5, device=backend.device)
    for other, weights in ((reference, None), (None, mask)):
        torch.library.opcheck(torch.ops.sysdag.diffusion_error, (eps, policy.clone().requires_grad_(), other, weights))
        torch.library.opcheck(torch.ops.sysdag.diffusion_error_backward, (grad, eps, policy, weights, None))


def test_compile(backend):
    eps, policy, reference, grad = problem((3, 2, 5), device=backend.device)

    def function(eps, policy, reference, mask):
        return diffusion_error(eps, policy * 2, reference, mask=mask) * 3

    mask = torch.rand(2, 5, device=backend.device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = result_and_gradient(compiled, eps, policy, reference, grad, mask)
    expected = result_and_gradient(function, eps, policy, reference, grad, mask)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_saves_its_inputs_only(backend):
    eps, policy, reference, _ = problem((3, 2, 5), device=backend.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        diffusion_error(eps, policy.requires_grad_(), reference)
    assert set(saved) == {eps.data_ptr(), policy.data_ptr()}


def test_the_reference_is_the_definition():
    eps, policy, reference = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 5.0]])
    assert diffusion_error_reference(eps, policy, reference).tolist() == [(1 + 4) - (0 + 9)]
    assert diffusion_error_reference(eps, policy, mask=torch.tensor([0.5, 0.0])).tolist() == [0.5]


def test_wrong_arguments():
    eps, policy, reference, _ = problem((3, 4))
    with pytest.raises(ValueError, match=r"eps and policy of one shape \(B, ...\) on one device, got \(3, 4\) on cpu"):
        diffusion_error(eps, policy[:, :3])
    with pytest.raises(ValueError, match="eps and reference of one shape"):
        diffusion_error(eps, policy, reference[:2])
    with pytest.raises(ValueError, match="eps and policy of one shape"):
        diffusion_error(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"mask \(3,\) does not broadcast to \(3, 4\)"):
        diffusion_error(eps, policy, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"mask \(2, 3, 4\) does not broadcast"):
        diffusion_error(eps, policy, mask=torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="needs floating-point tensors, got "):
        diffusion_error(eps, policy.long())


def test_a_forced_backend_that_cannot_serve():
    eps, policy, _, _ = problem((3, 4))
    with use_backend("cpp"), pytest.raises(BackendError, match="backend 'cpp' does not implement it"):
        diffusion_error(eps, policy.half())
    with use_backend("cuda"), pytest.raises(BackendError, match="backend 'cuda' does not implement it"):
        diffusion_error(eps, policy)


@pytest.mark.gpu
def test_large_tensors_on_a_gpu():
    """Offsets beyond 2^31 elements."""
    shape = (3, 2**30)
    eps, policy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with use_backend("triton"):
        found = diffusion_error(eps, policy)
        last = diffusion_error(eps[2:].contiguous(), policy[2:].contiguous())
    assert torch.equal(found[2:], last)
    torch.testing.assert_close(found, torch.full_like(found, 2.0 * 2**30), rtol=1e-3, atol=0)
