"""Eager calls go straight to a backend; whatever traces, intercepts or transforms sees the registered operator."""

import importlib
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sysdag.ops import _dispatch, diffusion_error, linear_logprob, preference_loss, token_logprob
from sysdag.ops._dispatch import BackendError, use_backend, why_unavailable

OPS = ("token_logprob", "diffusion_error", "preference_loss", "linear_logprob")
needs_cpp = pytest.mark.skipif(why_unavailable("cpp", "cpu") is not None, reason="the extension is not built")


def problem(op):
    """An op as a function of its differentiable argument, that argument, and the same in plain torch."""
    drawn = torch.Generator().manual_seed(0)
    one, two, three = torch.randn(3, 4, 6, generator=drawn)
    labels = torch.tensor([0, 5, 2, 2])
    offsets = torch.arange(0, 25, 6)
    flat, flat_reference = two.flatten(), three.flatten()

    def plain_preference(logps):
        ratios = logps.view(4, 6).logsumexp(1) - flat_reference.view(4, 6).logsumexp(1)
        return -torch.nn.functional.logsigmoid(0.1 * (ratios[:2] - ratios[2:]))

    return {
        "token_logprob": (
            lambda x: token_logprob(x, labels), one,
            lambda x: x.log_softmax(-1).gather(1, labels[:, None])[:, 0],
        ),
        "diffusion_error": (
            lambda x: diffusion_error(one, x, three), two,
            lambda x: ((one - x) ** 2).sum(1) - ((one - three) ** 2).sum(1),
        ),
        "preference_loss": (
            lambda x: preference_loss(x, flat_reference, offsets, 0.1)[0], flat, plain_preference,
        ),
        "linear_logprob": (
            lambda x: linear_logprob(x, two.repeat(2, 1), torch.arange(4), labels), one,
            lambda x: (x @ two.repeat(2, 1).T).log_softmax(-1).gather(1, labels[:, None])[:, 0],
        ),
    }[op]  # fmt: skip


def gradient(function, argument, **options):
    leaf = argument.detach().clone().requires_grad_()
    result = function(leaf)
    return torch.autograd.grad(result, leaf, torch.linspace(-1, 2, len(result)), **options)[0]


class Recorded(TorchDispatchMode):
    """The package's operators that are called, by library and name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("sysdag"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that holds another tensor and records what it is given to."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, requires_grad=held.requires_grad)
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace.startswith("sysdag"):
            cls.seen.append(str(func))
        plain = tree_map(lambda x: x.held if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        found = func(*plain[0], **plain[1])
        return tree_map(lambda x: Wrapped(x) if type(x) is torch.Tensor else x, found)


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def operators(op):
    return [f"sysdag.{op}.default", f"sysdag.{op}_backward.default"]


@pytest.mark.parametrize("leaf", [torch.Tensor, torch.nn.Parameter])
def test_an_eager_call_is_one_function_of_autograd(op, leaf):
    function, argument, plain = problem(op)
    argument = torch.nn.Parameter(argument) if leaf is torch.nn.Parameter else argument.requires_grad_()
    result = function(argument)
    if why_unavailable("cpp", "cpu") is None or op != "preference_loss":
        named = "".join(part.capitalize() for part in op.split("_"))
        assert type(result.grad_fn).__name__ == f"_{named}Backward"
    torch.testing.assert_close(result, plain(argument), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(function, argument), gradient(plain, argument), rtol=1e-5, atol=1e-5)


@needs_cpp
def test_a_dispatch_mode_sees_the_operators(op):
    function, argument, _ = problem(op)
    with Recorded() as seen:
        found = gradient(function, argument)
    assert [name for name in seen.names if name.startswith("sysdag.")] == operators(op)
    torch.testing.assert_close(found, gradient(function, argument))


@needs_cpp
def test_a_subclass_sees_the_operators(op):
    function, argument, plain = problem(op)
    Wrapped.seen.clear()
    leaf = Wrapped(argument.clone().requires_grad_())
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    assert isinstance(found, Wrapped)
    assert Wrapped.seen == operators(op)
    expected = torch.autograd.grad(plain(argument.requires_grad_()).sum(), argument)[0]
    torch.testing.assert_close(found.held, expected, rtol=1e-5, atol=1e-5)


@needs_cpp
def test_fake_tensors_and_traces(op):
    function, argument, _ = problem(op)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(argument).requires_grad_()
        result = function(fake)
        (found,) = torch.autograd.grad(result.sum(), fake)
    assert type(result).__name__ == type(found).__name__ == "FakeTensor"
    assert found.shape == argument.shape
    for kind in ("real", "fake"):
        traced = make_fx(lambda x: gradient(function, x), tracing_mode=kind, _allow_non_fake_inputs=True)(argument)
        targets = [str(node.target) for node in traced.graph.nodes if str(node.target).startswith("sysdag")]
        assert targets == operators(op)
        torch.testing.assert_close(traced(argument), gradient(function, argument))


def test_meta_tensors():
    logits, labels = torch.empty(4, 7, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    result = token_logprob(logits.requires_grad_(), labels)
    assert (result.device.type, result.shape, result.dtype) == ("meta", (4,), torch.float32)
    assert torch.autograd.grad(result.sum(), logits)[0].shape == logits.shape


@needs_cpp
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(op):
    """vmap calls once for each element; what needs a derivative inside is refused."""
    function, argument, plain = problem(op)
    several = torch.stack([argument, argument.flip(0)])
    torch.testing.assert_close(
        torch.vmap(function)(several), torch.stack([plain(each) for each in several]), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.grad(lambda x: function(x).sum())(argument)
    with pytest.raises(NotImplementedError, match=f"{op} has no forward-mode derivative"):
        torch.func.jvp(function, (argument,), (argument,))
    leaf = argument.clone().requires_grad_()
    result = function(leaf)
    (rows,) = torch.autograd.grad(result, leaf, torch.eye(len(result)), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(plain, argument), rtol=1e-5, atol=1e-5)


@needs_cpp
def test_forward_mode_is_refused(op):
    function, argument, _ = problem(op)
    for leaf in (argument, argument.clone().requires_grad_()):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            function(forward_ad.make_dual(leaf, torch.ones_like(leaf)))


@needs_cpp
@pytest.mark.parametrize("op", [name for name in OPS if name != "preference_loss"])
def test_a_gradient_is_not_differentiated_again(op):
    """With create_graph the gradient is right; what would differentiate it is refused."""
    function, argument, plain = problem(op)
    leaf = argument.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(plain(leaf).sum(), leaf)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=f"Trying to backward through sysdag.{op}_backward.default but no autograd"):
        found.square().sum().backward()


def test_preference_losss_gradient_is_refused_under_create_graph():
    function, argument, _ = problem("preference_loss")
    leaf = argument.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="its gradient cannot be differentiated again"):
        torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    with use_backend("reference"):
        (found,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    assert found.requires_grad


def test_autocast_leaves_results_and_gradients_as_they_are():
    for op in OPS[:3]:
        function, argument, _ = problem(op)
        with torch.autocast("cpu", torch.bfloat16):
            inside = gradient(function, argument)
        assert torch.equal(inside, gradient(function, argument))


def test_what_gets_no_gradient_is_not_in_the_graph():
    """A reference's own graph is not walked: its parameters' .grad stay None."""
    source = torch.randn(4, 6, requires_grad=True)
    for result in (
        diffusion_error(source * 1, torch.randn(4, 6, requires_grad=True), source * 2, mask=source * 3),
        preference_loss(torch.randn(24, requires_grad=True), source.flatten() * 1, torch.arange(0, 25, 6), 0.1)[0],
    ):
        result.sum().backward()
        assert source.grad is None
    assert not diffusion_error(source * 1, torch.randn(4, 6)).requires_grad


@pytest.mark.filterwarnings("ignore")
def test_dtensors_are_refused(op):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    function, argument, _ = problem(op)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        placed = distribute_tensor(argument, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises((RuntimeError, NotImplementedError), match=r"mixed torch.Tensor and DTensor|sharding"):
            function(placed)
    finally:
        dist.destroy_process_group()


def test_a_backend_is_resolved_once_and_a_forced_one_still_heard(monkeypatch):
    monkeypatch.delenv("SYSDAG_BACKEND", raising=False)
    function, argument, _ = problem("token_logprob")
    function(argument)
    before = _dispatch._chosen.cache_info()
    function(argument)
    assert _dispatch._chosen.cache_info().misses == before.misses
    for forced in ("env", "context"):
        with monkeypatch.context() as patched:
            if forced == "env":
                patched.setenv("SYSDAG_BACKEND", "cuda")
                with pytest.raises(BackendError, match="token_logprob: backend 'cuda' does not implement"):
                    function(argument)
            else:
                with use_backend("cuda"), pytest.raises(BackendError, match="backend 'cuda' does not implement"):
                    function(argument)
    function(argument)


@needs_cpp
@pytest.mark.parametrize("raises", [True, False])
def test_errors_are_the_same_where_the_extension_must_not_raise(raises, monkeypatch):
    """With torch 2.11 an error inside the extension ends the process, so everything is looked at before."""
    called = []
    for name in ("token_logprob", "diffusion_error"):
        module = importlib.import_module(f"sysdag.ops.{name}")
        monkeypatch.setattr(module, "extension_raises", lambda: raises)
        if not raises:
            monkeypatch.setattr(module, "_cpp_forward", lambda: called.append)
    logits, labels = torch.randn(3, 7), torch.tensor([0, -100, 9])
    with pytest.raises(ValueError, match="row 2 has the label 9, expected one of 0 to 6 or ignore_index=-100"):
        token_logprob(logits, labels)
    with pytest.raises(ValueError, match=r"needs logits \(N, V\) and int64 labels \(N,\)"):
        token_logprob(logits, labels[:2])
    with pytest.raises(ValueError, match="labels on their device"):
        token_logprob(logits, labels.to("meta"))
    with pytest.raises(ValueError, match="eps and reference of one shape"):
        diffusion_error(logits, logits, logits[:, :3])
    with pytest.raises(ValueError, match="eps and policy of one shape"):
        diffusion_error(logits, logits.to("meta"))
    assert not called


def test_any_strides_and_layouts():
    logits, labels = torch.randn(7, 5).t(), torch.stack([torch.arange(5)] * 2, 1)[:, 0]
    assert not logits.is_contiguous()
    assert not labels.is_contiguous()
    found = gradient(lambda x: token_logprob(x.t(), labels), logits.t())
    plain = gradient(lambda x: x.t().log_softmax(-1).gather(1, labels[:, None])[:, 0], logits.t())
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    eps, policy = torch.randn(2, 2, 3, 4, 5)
    last = policy.contiguous(memory_format=torch.channels_last).requires_grad_()
    result = diffusion_error(eps.transpose(2, 3).contiguous().transpose(2, 3), last, mask=torch.ones(5))
    (found,) = torch.autograd.grad(result.sum(), last)
    torch.testing.assert_close(result, (eps - policy).square().flatten(1).sum(1))
    torch.testing.assert_close(found, 2 * (policy - eps))
