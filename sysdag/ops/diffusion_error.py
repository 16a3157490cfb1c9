"""Squared error of a diffusion model's prediction, summed over each sample, minus that of a reference's prediction.

One pass over the tensors and no temporary of their size; the backward needs the inputs alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.ops._dispatch import (
    Backend,
    derives_eagerly,
    extension_raises,
    forced_backend,
    refuse_tangents,
    resolve,
    runs_eagerly,
    use_backend,
)  # fmt: skip

_CPP = (torch.float32, torch.float64)


def diffusion_error(
    eps: Float[Tensor, "B ..."],
    policy: Float[Tensor, "B ..."],
    reference: Float[Tensor, "B ..."] | None = None,
    *,
    mask: Tensor | None = None,
) -> Float[Tensor, " B"]:
    """sum_i mask_i (|eps_i - policy_i|^2 - |eps_i - reference_i|^2) over the elements i of each sample.

    The difference of errors in the margin of Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908), before its scale.
    Where policy and reference are close it is more accurate than two sums that cancel.

    Args:
        eps: (B, ...) what is to be predicted: the noise, or the target of another prediction type.
        policy: (B, ...) the prediction that is trained; the only argument that gets a gradient, -2 g (eps - policy).
        reference: (B, ...) the other prediction; None leaves its term out.
        mask: weights, or a bool mask of the elements that count, of a shape that broadcasts to (B, ...). Elements of
            weight 0 are not part of the sum even where they are nan.

    Returns:
        (B,) in fp32, summed in fp32 or better (both fp64 for fp64 predictions).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
        BackendError: if the forced backend cannot serve.
    """
    if not runs_eagerly(eps, policy, reference, mask):
        _check(eps, policy, reference, mask)
        refuse_tangents("diffusion_error", policy)
        arguments = _detached(eps), policy, _detached(reference), _detached(mask)
        return torch.ops.sysdag.diffusion_error(*arguments)
    try:
        backend = _backend(eps, policy, reference)
        if mask is not None or backend != "cpp" or not extension_raises():
            _check(eps, policy, reference, mask)
        return _DiffusionError.apply(policy, _detached(eps), _detached(reference), _detached(mask), backend)
    except RuntimeError:  # the extension looks first, at no cost; this says what is wrong
        _check(eps, policy, reference, mask)
        raise


def _detached(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or not tensor.requires_grad else tensor.detach()


def _check(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None) -> None:
    named = {"policy": policy, "reference": reference}
    for name, tensor in named.items():
        if tensor is not None and (tensor.shape != eps.shape or tensor.device != eps.device or not eps.dim()):
            raise ValueError(
                f"diffusion_error needs eps and {name} of one shape (B, ...) on one device, got {tuple(eps.shape)} on "
                f"{eps.device} and {tuple(tensor.shape)} on {tensor.device}."
            )
    if not all(tensor.is_floating_point() for tensor in (eps, policy, reference) if tensor is not None):
        raise ValueError(f"diffusion_error needs floating-point tensors, got {eps.dtype} and {policy.dtype}.")
    if mask is not None:
        try:
            fits = torch.broadcast_shapes(mask.shape, eps.shape) == eps.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"diffusion_error: mask {tuple(mask.shape)} does not broadcast to {tuple(eps.shape)}.")


def diffusion_error_reference(
    eps: Tensor, policy: Tensor, reference: Tensor | None = None, mask: Tensor | None = None
) -> Float[Tensor, " B"]:
    """The definition in plain torch."""
    dtype = _result_dtype(policy)
    eps, policy = eps.to(dtype), policy.to(dtype)
    error = (eps - policy).square()
    if reference is not None:
        error = error - (eps - reference.to(dtype)).square()
    if mask is not None:
        error = torch.where(mask == 0, 0, error * mask)
    return error.flatten(1).sum(1) if error.dim() > 1 else error


def _result_dtype(policy: Tensor) -> torch.dtype:
    return torch.float64 if policy.dtype == torch.float64 else torch.float32


def _backend(eps: Tensor, policy: Tensor, reference: Tensor | None) -> Backend:
    kind = policy.dtype
    in_cpp = kind in _CPP and eps.dtype == kind and (reference is None or reference.dtype == kind)
    preference: tuple[Backend, ...] = ("cpp", "triton") if in_cpp else ("triton",)
    return resolve("diffusion_error", policy.device, preference)


def _backend_as(forced: str | None, eps: Tensor, policy: Tensor) -> Backend:
    """The backend as the forward's was forced: threads of autograd, which run CUDA's backward, do not inherit that."""
    with use_backend(forced) if forced else contextlib.nullcontext():  # type: ignore[arg-type]
        return _backend(eps, policy, None)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(B, ...) as contiguous (B, elements of a sample)."""
    return None if tensor is None else tensor.contiguous().view(len(tensor), tensor[:1].numel())


def _weights(mask: Tensor | None, eps: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else mask.to(dtype).expand_as(eps)


@functools.cache
def _cpp_forward() -> Callable[..., Tensor]:
    return torch.ops.sysdag_C.diffusion_error.default


@functools.cache
def _cpp_backward() -> Callable[..., Tensor]:
    return torch.ops.sysdag_C.diffusion_error_backward.default


def _errors(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None, backend: Backend) -> Tensor:
    if backend == "cpp":
        return _cpp_forward()(eps, policy, reference, _weights(mask, eps, policy.dtype))
    if backend == "reference":
        return diffusion_error_reference(eps, policy, reference, mask).clone()
    from sysdag.kernels.diffusion_error import forward

    return forward(_rows(eps), _rows(policy), _rows(reference), _rows(_weights(mask, eps, _result_dtype(policy))))


def _gradient(grad: Tensor, eps: Tensor, policy: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
    """-2 g mask (eps - policy), in policy's dtype."""
    grad = grad.contiguous()
    if backend == "cpp":
        return _cpp_backward()(grad, eps, policy, _weights(mask, eps, policy.dtype))
    if backend == "reference":
        factor = -2 * grad.view(-1, *[1] * (policy.dim() - 1))
        gradient = factor * (eps.to(grad.dtype) - policy.to(grad.dtype))
        gradient = gradient if mask is None else torch.where(mask == 0, 0, gradient * mask)
        return gradient.to(policy.dtype, memory_format=torch.contiguous_format)
    from sysdag.kernels.diffusion_error import backward

    return backward(grad, _rows(eps), _rows(policy), _rows(_weights(mask, eps, grad.dtype))).view(policy.shape)


class _DiffusionError(torch.autograd.Function):
    """The eager path: a third of the overhead of the operator below, which tracing needs."""

    @staticmethod
    def forward(
        ctx: Any, policy: Tensor, eps: Tensor, reference: Tensor | None, mask: Tensor | None, backend: Backend
    ) -> Tensor:
        ctx.save_for_backward(eps, policy, mask)
        ctx.backend = backend
        return _errors(eps, policy, reference, mask, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        eps, policy, mask = ctx.saved_tensors
        if not derives_eagerly(grad, policy):  # the operator has an answer, or a refusal
            found = _backward(grad, eps, policy, mask, ctx.backend)
        else:
            found = _gradient(grad, eps, policy, mask, ctx.backend)
        return found, None, None, None, None


# The registered operators, for everything that traces.


@torch.library.custom_op("sysdag::diffusion_error", mutates_args=())
def _forward(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None) -> Tensor:
    return _errors(eps, policy, reference, mask, _backend(eps, policy, reference))


@_forward.register_fake
def _(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None) -> Tensor:
    return policy.new_empty(policy.shape[0], dtype=_result_dtype(policy))


@torch.library.custom_op("sysdag::diffusion_error_backward", mutates_args=())
def _backward(grad: Tensor, eps: Tensor, policy: Tensor, mask: Tensor | None, forced: str | None) -> Tensor:
    return _gradient(grad, eps, policy, mask, _backend_as(forced, eps, policy))


@_backward.register_fake
def _(grad: Tensor, eps: Tensor, policy: Tensor, mask: Tensor | None, forced: str | None) -> Tensor:
    return torch.empty_like(policy, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    eps, policy, _, mask = inputs
    ctx.forced = forced_backend()
    ctx.save_for_backward(eps, policy, mask)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
    eps, policy, mask = ctx.saved_tensors
    return None, _backward(grad, eps, policy, mask, ctx.forced), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
