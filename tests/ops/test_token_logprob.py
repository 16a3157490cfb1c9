import importlib
import re

import pytest
import torch
from truth import assert_as_good_as_torch, max_error

from sysdag.ops._dispatch import BackendError, use_backend
from sysdag.ops.token_logprob import token_logprob, token_logprob_reference

IGNORED = -100
SHAPES = [(5, 257), (3, 50257), (7, 64), (1, 5), (4, 1), (2, 4097)]


def problem(rows, width, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    """Logits, labels of which some are ignored, and an upstream gradient of both signs."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
    labels = torch.randint(width, (rows,), generator=generator)
    labels[1::3] = IGNORED
    grad = torch.randn(rows, generator=generator) * torch.tensor([1.0, 100.0, 0.01])[torch.arange(rows) % 3]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return logits.to(device), labels.to(device), grad.to(device, wide)


def result_and_gradient(function, logits, labels, grad, **options):
    leaf = logits.detach().clone().requires_grad_()
    result = function(leaf * 1 if options.get("inplace_backward") else leaf, labels, **options)
    return result.detach(), torch.autograd.grad(result, leaf, grad)[0]


def eager(logits, labels):
    """What torch computes in the logits' own dtype."""
    kept = labels != IGNORED
    return logits.log_softmax(-1).gather(1, labels.where(kept, 0)[:, None])[:, 0].where(kept, 0)


def assert_accurate(logits, labels, grad, **options):
    result, gradient = result_and_gradient(token_logprob, logits, labels, grad, **options)
    theirs, their_gradient = result_and_gradient(eager, logits, labels, grad.to(logits.dtype))
    truth, true_gradient = result_and_gradient(eager, logits.double(), labels, grad.double())
    assert result.dtype == grad.dtype
    assert gradient.dtype == logits.dtype
    assert_as_good_as_torch(result, theirs, truth, "log-probabilities")
    assert_as_good_as_torch(gradient, their_gradient, true_gradient, "gradient")
    if logits.dtype in (torch.float16, torch.bfloat16):  # statistics in fp32, whatever the logits
        wide = result_and_gradient(eager, logits.float(), labels, grad)[0]
        assert_as_good_as_torch(result, wide, truth, "log-probabilities, statistics")
        half_a_step = torch.finfo(logits.dtype).eps / 2 * true_gradient.abs()
        slack = 1e-6 * grad.abs()[:, None] + torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
        assert ((gradient.double() - true_gradient).abs() <= half_a_step + slack).all(), "gradient is not rounded"
    return result, gradient


def served_dtypes(backend):
    return [d for d in backend.dtypes if not (backend.name == "cpp" and d == torch.float16)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(backend, shape, inplace):
    for dtype in served_dtypes(backend):
        assert_accurate(*problem(*shape, dtype, backend.device), inplace_backward=inplace)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_extreme_logits(backend, offset):
    logits, labels, grad = problem(6, 1000, torch.float32, backend.device)
    assert_accurate(logits + offset, labels, grad)
    logits[0, 3], logits[2, 5], labels[0], labels[2] = 1e4, -1e4, 3, 5
    assert_accurate(logits + offset, labels, grad)


def test_peaked_rows(backend):
    """A label whose probability is nearly 1, one whose probability is nearly 0, and the largest logit last."""
    logits, labels, grad = problem(4, 300, torch.float32, backend.device, scale=30.0)
    labels[0], labels[2], labels[3] = logits[0].argmax(), logits[2].argmin(), 299
    logits[3, 299] = 500
    assert_accurate(logits, labels, grad)


def test_masked_vocabulary(backend):
    """-inf excludes a token, also where it fills whole blocks; a row of nothing else is nan, as torch's is."""
    logits, labels, grad = problem(5, 9000, torch.float32, backend.device)
    logits[:, :8500], labels[labels != IGNORED] = -torch.inf, 8700
    labels[3] = 3
    result, gradient = result_and_gradient(token_logprob, logits, labels, grad)
    truth, true_gradient = result_and_gradient(eager, logits.double(), labels, grad.double())
    assert result[3] == -torch.inf
    assert max_error(result, truth) < 1e-5
    assert max_error(gradient, true_gradient) < 1e-5
    assert token_logprob(torch.full_like(logits, -torch.inf), labels)[0].isnan()
    logits[0, 17] = torch.nan
    assert token_logprob(logits, labels)[0].isnan()


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 4)], ids=str)
def test_nothing_to_predict(backend, shape):
    logits = torch.full(shape, torch.nan, device=backend.device)
    labels = torch.full(shape[:1], IGNORED, device=backend.device)
    result, gradient = result_and_gradient(token_logprob, logits, labels, torch.ones(shape[0], device=backend.device))
    assert torch.equal(result, torch.zeros_like(result))
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_any_ignore_index(backend):
    logits, labels, _ = problem(6, 11, device=backend.device)
    labels = labels.where(labels != IGNORED, 0)
    result = token_logprob(logits, labels, ignore_index=0)
    assert torch.equal(result == 0, labels == 0)
    expected = token_logprob_reference(logits, labels, ignore_index=0)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_labels_that_are_not_aligned_and_strided_logits(backend):
    logits, labels, grad = problem(6, 33, device=backend.device)
    shifted = torch.cat([labels[:1], labels])[1:]
    strided = torch.stack([labels, labels * 0], dim=1)[:, 0]
    columns = logits.t().contiguous().t()
    assert not columns.is_contiguous()
    expected = result_and_gradient(token_logprob, logits, labels, grad)
    for x, y in ((logits, shifted), (logits, strided), (columns, labels)):
        found = result_and_gradient(token_logprob, x, y, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    broadcast = token_logprob(x := logits.clone().requires_grad_(), labels)
    broadcast.sum().backward()  # the gradient that arrives has stride 0
    ones = result_and_gradient(token_logprob, logits, labels, torch.ones_like(grad))[1]
    assert torch.equal(x.grad, ones)


def test_the_same_bits_twice_and_on_any_number_of_threads(backend):
    logits, labels, grad = problem(9, 3001, device=backend.device)
    first = result_and_gradient(token_logprob, logits, labels, grad)
    torch.set_num_threads(2)
    try:
        second = result_and_gradient(token_logprob, logits, labels, grad)
    finally:
        torch.set_num_threads(1)
    inplace = result_and_gradient(token_logprob, logits, labels, grad, inplace_backward=True)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, inplace, strict=True))


def test_every_element_is_written(backend, monkeypatch):
    """Memory that torch.empty hands out is full of nan."""
    logits, labels, grad = problem(6, 131, device=backend.device)
    expected = result_and_gradient(token_logprob, logits, labels, grad)
    torch.use_deterministic_algorithms(True)  # fills what is allocated, also in C++
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(3).isnan().all()
        found = result_and_gradient(token_logprob, logits, labels, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradcheck(backend):
    logits, labels, _ = problem(4, 7, torch.float64, backend.device)
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, labels), logits.requires_grad_())


def test_opcheck(backend):
    logits, labels, grad = problem(4, 7, torch.float32, backend.device)
    stats = torch.ops.sysdag.token_logprob(logits, labels, IGNORED, False)[1]
    torch.library.opcheck(torch.ops.sysdag.token_logprob, (logits.requires_grad_(), labels, IGNORED, False))
    arguments = (grad, logits.detach(), labels, stats, IGNORED, None)
    torch.library.opcheck(torch.ops.sysdag.token_logprob_backward, arguments)
    torch.library.opcheck(torch.ops.sysdag.token_logprob_backward_, arguments)


def test_compile(backend):
    logits, labels, grad = problem(5, 37, device=backend.device)
    compiled = torch.compile(lambda x, y: token_logprob(x * 2, y) * 3, fullgraph=True, backend="aot_eager")
    found = result_and_gradient(compiled, logits, labels, grad)
    expected = result_and_gradient(lambda x, y: token_logprob(x * 2, y) * 3, logits, labels, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compile_refuses_inplace():
    logits, labels, _ = problem(5, 37)
    compiled = torch.compile(
        lambda x: token_logprob(x * 2, labels, inplace_backward=True), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="does not work under"):
        compiled(logits.requires_grad_())


def test_inplace_backward_uses_the_logits_memory(backend):
    logits, labels, grad = problem(5, 37, device=backend.device)
    expected = result_and_gradient(token_logprob, logits, labels, grad)[1]
    computed = logits.clone().requires_grad_() * 1
    arrived = []
    computed.register_hook(arrived.append)
    token_logprob(computed, labels, inplace_backward=True).backward(grad)
    assert arrived[0].data_ptr() == computed.data_ptr()
    assert torch.equal(computed, expected)


def test_inplace_backward_is_noticed_by_other_readers(backend):
    logits, labels, grad = problem(5, 37, device=backend.device)
    computed = logits.requires_grad_() * 1
    result = token_logprob(computed, labels, inplace_backward=True)
    result.backward(grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward(grad)
    computed = logits * 1
    other = computed.square().sum()
    token_logprob(computed, labels, inplace_backward=True).backward(grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_saves_the_logits_and_two_numbers_a_row(backend):
    logits, labels, _ = problem(5, 370, device=backend.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logprob(logits.requires_grad_(), labels)
    floats = [t for t in saved if t.is_floating_point() and t.data_ptr() != logits.data_ptr()]
    assert sum(t.numel() for t in floats) == 2 * len(labels)


def test_inplace_backward_refuses_what_it_cannot_take():
    logits, labels, _ = problem(6, 37)
    token_logprob(logits, labels, inplace_backward=True)  # nothing to differentiate, nothing to refuse
    logits.requires_grad_()
    with pytest.raises(ValueError, match="would overwrite a leaf that requires grad"):
        token_logprob(logits, labels, inplace_backward=True)
    with pytest.raises(ValueError, match="needs contiguous logits"):
        token_logprob((logits * 1)[:, ::2], labels.clamp(max=18), inplace_backward=True)


@pytest.mark.parametrize("label", [7, -1, 10**12])
def test_labels_out_of_range(backend, label):
    if backend.device.type != "cpu":
        pytest.skip("labels on a GPU are not read by the host")
    labels = torch.tensor([0, IGNORED, label])
    message = f"row 2 has the label {label}, expected one of 0 to 6 or ignore_index=-100"
    with pytest.raises(ValueError, match=re.escape(message)):
        token_logprob(torch.zeros(3, 7), labels)


def test_wrong_arguments():
    logits, labels, _ = problem(6, 37)
    for x, y in [(logits[0], labels), (logits, labels[:-1]), (logits, labels.int()), (logits[None], labels)]:
        with pytest.raises(ValueError, match=r"needs logits \(N, V\) and int64 labels \(N,\), got"):
            token_logprob(x, y)
    with pytest.raises(ValueError, match="needs floating-point logits and labels on their device"):
        token_logprob(logits.int(), labels)


def test_a_forced_backend_that_cannot_serve():
    logits, labels, _ = problem(6, 37, torch.float16)
    with use_backend("cpp"), pytest.raises(BackendError, match="token_logprob: backend 'cpp' does not implement"):
        token_logprob(logits, labels)
    with use_backend("cuda"), pytest.raises(BackendError, match="token_logprob: backend 'cuda' does not implement"):
        token_logprob(logits.float(), labels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_rows_on_a_gpu(dtype):
    """Offsets beyond 2^31 elements, and no memory of the logits' size beside them."""
    rows, width = 2**31 // 128256 + 3, 128256
    logits = torch.randn(rows, width, device="cuda", dtype=dtype).requires_grad_()
    labels = torch.randint(width, (rows,), device="cuda")
    computed = logits.view_as(logits)
    with use_backend("triton"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = token_logprob(computed, labels, inplace_backward=True)
        tail = eager(logits[-3:].detach().double(), labels[-3:])
        result.sum().backward()
    torch.testing.assert_close(result[-3:].double(), tail, rtol=1e-5, atol=1e-5)
    assert torch.cuda.max_memory_allocated() - before < 2**24


@pytest.mark.gpu
def test_a_forced_backend_reaches_the_backward_thread(monkeypatch):
    module = importlib.import_module("sysdag.ops.token_logprob")
    used = []
    resolve = module.resolve
    monkeypatch.setattr(module, "resolve", lambda *arguments: used.append(resolve(*arguments)) or used[-1])
    logits, labels, grad = problem(6, 37, device="cuda")
    with use_backend("reference"):
        result_and_gradient(token_logprob, logits, labels, grad)
    assert used == ["reference", "reference"]
