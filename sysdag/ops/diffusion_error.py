"""Squared error of a diffusion model's prediction, summed over each sample, minus that of a reference's prediction.

One pass over the tensors and no temporary of their size; the backward needs the inputs alone.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.ops._dispatch import Backend, forced_backend, resolve, use_backend


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
    eps, reference = eps.detach(), None if reference is None else reference.detach()
    return torch.ops.sysdag.diffusion_error(eps, policy, reference, None if mask is None else mask.detach())


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
    kinds = {tensor.dtype for tensor in (eps, policy, reference) if tensor is not None}
    in_cpp = kinds in ({torch.float32}, {torch.float64})
    preference: tuple[Backend, ...] = ("cpp", "triton") if in_cpp else ("triton",)
    return resolve("diffusion_error", policy.device, preference)


def _rows(tensor: Tensor) -> Tensor:
    """(B, ...) as contiguous (B, elements of a sample)."""
    return tensor.contiguous().view(len(tensor), tensor[:1].numel())


def _mask_rows(mask: Tensor | None, eps: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else _rows(mask.to(dtype).expand_as(eps))


@torch.library.custom_op("sysdag::diffusion_error", mutates_args=())
def _forward(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None) -> Tensor:
    backend = _backend(eps, policy, reference)
    if backend == "reference":
        return diffusion_error_reference(eps, policy, reference, mask).clone()
    weights = _mask_rows(mask, eps, _result_dtype(policy))
    rows = _rows(eps), _rows(policy), None if reference is None else _rows(reference)
    if backend == "cpp":
        return torch.ops.sysdag_C.diffusion_error(*rows, weights)
    from sysdag.kernels.diffusion_error import forward

    return forward(*rows, weights)


@_forward.register_fake
def _(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None) -> Tensor:
    return policy.new_empty(policy.shape[0], dtype=_result_dtype(policy))


@torch.library.custom_op("sysdag::diffusion_error_backward", mutates_args=())
def _backward(grad: Tensor, eps: Tensor, policy: Tensor, mask: Tensor | None, forced: str | None) -> Tensor:
    """-2 g mask (eps - policy), in policy's dtype."""
    # Autograd runs the backward of CUDA tensors in threads of its own, which do not inherit the forced backend.
    with use_backend(forced) if forced else contextlib.nullcontext():  # type: ignore[arg-type]
        backend = _backend(eps, policy, None)
    grad = grad.contiguous()
    if backend == "reference":
        factor = -2 * grad.view(-1, *[1] * (policy.dim() - 1))
        gradient = factor * (eps.to(grad.dtype) - policy.to(grad.dtype))
        gradient = gradient if mask is None else torch.where(mask == 0, 0, gradient * mask)
        return gradient.to(policy.dtype, memory_format=torch.contiguous_format)
    weights = _mask_rows(mask, eps, grad.dtype)
    if backend == "cpp":
        gradient = torch.ops.sysdag_C.diffusion_error_backward(grad, _rows(eps), _rows(policy), weights)
    else:
        from sysdag.kernels.diffusion_error import backward

        gradient = backward(grad, _rows(eps), _rows(policy), weights)
    return gradient.view(policy.shape)


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
