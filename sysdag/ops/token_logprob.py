"""Log-probability of one label for each row of logits: log_softmax and gather, without the (N, V) log-probabilities.

The forward reads the logits once and keeps two numbers a row; the backward makes the logits' gradient from the logits
and those, in the logits' own memory if asked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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

_CPP = (torch.float32, torch.float64, torch.bfloat16)


def token_logprob(
    logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Float[Tensor, " N"]:
    """log softmax(logits)[n, labels[n]], in nats.

    Args:
        logits: (N, V) in fp16, bf16, fp32 or fp64.
        labels: (N,) int64 in [0, V), or `ignore_index`: such a row's result and gradient are 0, and it is not read.
        ignore_index: the label of rows that predict nothing.
        inplace_backward: the backward writes the gradient over the logits, which spares (N, V) of memory and is
            faster; the logits are destroyed. Nothing else may need them later: autograd raises where its own backward
            would, and cannot see other readers. For logits that were computed (not leaves) and are contiguous; not
            under `torch.compile`, whose memory planning decides what is reused.

    Returns:
        (N,) in fp32, from statistics in fp32 (both fp64 for fp64 logits).

    Raises:
        ValueError: for shapes or dtypes that do not fit, labels out of range (checked on the CPU; on a GPU such a
            label's result is nan, and torch's own kernels assert), or logits that `inplace_backward` cannot take.
        BackendError: if the forced backend cannot serve.
    """
    if not runs_eagerly(logits, labels):
        _check(logits, labels, inplace_backward)
        refuse_tangents("token_logprob", logits)
        return torch.ops.sysdag.token_logprob(logits, labels, ignore_index, inplace_backward)[0]
    try:
        backend = _backend(logits)
        if inplace_backward or backend != "cpp" or not extension_raises():
            _check(logits, labels, inplace_backward)
        return _TokenLogprob.apply(logits, labels, ignore_index, inplace_backward, backend)
    except RuntimeError:  # the extension looks first, at no cost; this says what is wrong
        _check(logits, labels, inplace_backward)
        _check_labels(labels, logits.shape[1], ignore_index)
        raise


def _check(logits: Tensor, labels: Tensor, inplace_backward: bool) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"token_logprob needs logits (N, V) and int64 labels (N,), got {tuple(logits.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    if not logits.is_floating_point() or labels.device != logits.device:
        raise ValueError(
            f"token_logprob needs floating-point logits and labels on their device, got {logits.dtype} on "
            f"{logits.device} and labels on {labels.device}."
        )
    if inplace_backward and logits.requires_grad:
        _check_inplace(logits)


def _check_inplace(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace_backward=True does not work under torch.compile; leave it out there.")
    if logits.is_leaf:
        raise ValueError("inplace_backward=True would overwrite a leaf that requires grad; pass computed logits.")
    if not logits.is_contiguous():
        raise ValueError("inplace_backward=True needs contiguous logits; pass logits.contiguous().")


def token_logprob_reference(
    logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"], ignore_index: int = -100
) -> Float[Tensor, " N"]:
    """The definition in plain torch."""
    kept = labels != ignore_index
    logp = F.log_softmax(logits, dim=-1, dtype=_statistics_dtype(logits))
    return logp.gather(1, labels.where(kept, 0)[:, None])[:, 0].where(kept, 0)


def _statistics_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _backend(logits: Tensor) -> Backend:
    preference: tuple[Backend, ...] = ("cpp", "triton") if logits.dtype in _CPP else ("triton",)
    return resolve("token_logprob", logits.device, preference)


def _statistics(logits: Tensor, labels: Tensor, ignore_index: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and for each row the largest logit m and sum_v exp(x_v - m)."""
    if backend != "cpp" or not extension_raises():
        _check_labels(labels, logits.shape[1], ignore_index)
    if backend == "cpp":
        return _cpp_forward()(logits, labels, ignore_index)
    logits, labels = logits.contiguous(), labels.contiguous()
    if backend == "triton":
        from sysdag.kernels.token_logprob import forward

        return forward(logits, labels, ignore_index)
    logp = token_logprob_reference(logits, labels, ignore_index)
    wide = logits.to(logp.dtype)
    if not logits.shape[1]:  # then every row is ignored
        return logp, wide.new_ones(len(logits), 2)
    largest = wide.amax(1)
    return logp, torch.stack([largest, (wide - largest[:, None]).exp().sum(1)], dim=1)


def _check_labels(labels: Tensor, width: int, ignore_index: int) -> None:
    if labels.device.type != "cpu" or not len(labels):
        return
    wrong = ((labels < 0) | (labels >= width)) & (labels != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"token_logprob: row {row} has the label {int(labels[row])}, expected one of 0 to {width - 1} or "
            f"ignore_index={ignore_index}."
        )


def _gradient(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, backend: Backend, out: Tensor
) -> Tensor:
    """g ([v = y] - softmax(x)_v), written to `out`, which may be the logits."""
    logits, grad, labels = logits.contiguous(), grad.contiguous(), labels.contiguous()
    if backend == "cpp":
        _cpp_backward()(grad, logits, labels, stats, ignore_index, out)
    elif backend == "triton":
        from sysdag.kernels.token_logprob import backward

        backward(grad, logits, labels, stats, ignore_index, out)
    else:
        kept = labels != ignore_index
        factor = grad.where(kept, 0)[:, None]
        probabilities = (logits.to(grad.dtype) - stats[:, :1]).exp() / stats[:, 1:]
        onehot = torch.zeros_like(probabilities)
        if logits.shape[1]:
            onehot.scatter_(1, labels.where(kept, 0)[:, None], 1)
        out.copy_(((onehot - probabilities) * factor).where(kept[:, None], 0))
    return out


@functools.cache
def _cpp_forward() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.ops.sysdag_C.token_logprob_forward.default


@functools.cache
def _cpp_backward() -> Callable[..., None]:
    return torch.ops.sysdag_C.token_logprob_backward.default


def _empty(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _TokenLogprob(torch.autograd.Function):
    """The eager path: a third of the overhead of the operator below, which tracing needs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, inplace: bool, backend: Backend) -> Tensor:
        logp, stats = _statistics(logits, labels, ignore_index, backend)
        ctx.save_for_backward(logits, labels, stats)
        ctx.options = ignore_index, inplace, backend
        return logp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        logits, labels, stats = ctx.saved_tensors
        ignore_index, inplace, backend = ctx.options
        if not derives_eagerly(grad, logits):  # the operator has an answer, or a refusal
            found = _differentiated(grad, logits, labels, stats, ignore_index, backend, inplace)
        elif inplace:
            found = _gradient(grad, logits, labels, stats, ignore_index, backend, logits.detach())
            torch.autograd.graph.increment_version(logits)
        else:
            found = _gradient(grad, logits, labels, stats, ignore_index, backend, _empty(logits))
        return found, None, None, None, None


# The registered operators, for everything that traces.


@torch.library.custom_op("sysdag::token_logprob", mutates_args=())
def _forward(logits: Tensor, labels: Tensor, ignore_index: int, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    try:
        return _statistics(logits, labels, ignore_index, _backend(logits))
    except RuntimeError:
        _check_labels(labels, logits.shape[1], ignore_index)
        raise


@_forward.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    rows, dtype = logits.shape[0], _statistics_dtype(logits)
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, 2, dtype=dtype)


@torch.library.custom_op("sysdag::token_logprob_backward", mutates_args=())
def _backward(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, forced: str | None
) -> Tensor:
    return _gradient(grad, logits, labels, stats, ignore_index, _backend_as(forced, logits), _empty(logits))


@_backward.register_fake
def _(grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, forced: str | None) -> Tensor:
    return _empty(logits)


@torch.library.custom_op("sysdag::token_logprob_backward_", mutates_args=("logits",))
def _backward_inplace(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, forced: str | None
) -> None:
    _gradient(grad, logits, labels, stats, ignore_index, _backend_as(forced, logits), logits)


def _backend_as(forced: str | None, logits: Tensor) -> Backend:
    """The backend as the forward's was forced: threads of autograd, which run CUDA's backward, do not inherit that."""
    with use_backend(forced) if forced else contextlib.nullcontext():  # type: ignore[arg-type]
        return _backend(logits)


def _differentiated(
    grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, forced: str | None, inplace: bool
) -> Tensor:
    if not inplace:
        return _backward(grad, logits, labels, stats, ignore_index, forced)
    _backward_inplace(grad, logits, labels, stats, ignore_index, forced)
    return logits.detach()


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index, ctx.inplace = inputs
    ctx.forced = forced_backend()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, labels, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    logits, labels, stats = ctx.saved_tensors
    return (
        _differentiated(grad, logits, labels, stats, ctx.ignore_index, ctx.forced, ctx.inplace),
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)
