"""Log-probabilities of labels straight from hidden states and the head's weight, without the (N, V) logits.

log_softmax(softcap(logit_scale * hidden @ weight.T + bias))[rows, labels]. Statistics are in fp32 from fp32 logits:
with logits rounded to bf16 the log-likelihood of a sequence of 256 tokens is off by 0.1 to 0.4 nats. How the tiles are
walked, and what the backward costs, is in `_head_walk.py`; what happens inside a tile in `_head_folds.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sysdag.ops import _head_walk as walk
from sysdag.ops._dispatch import (
    IMPLEMENTATIONS,
    Backend,
    derives_eagerly,
    forced_backend,
    refuse_tangents,
    resolve,
    runs_eagerly,
    use_backend,
)  # fmt: skip
from sysdag.ops._head_labels import Layout

_HOST = torch.device("cpu")


def linear_logprob(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    rows: Int[Tensor, " M"],
    labels: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, " M"]:
    """log softmax(softcap(logit_scale * hidden @ weight.T + bias))[rows[m], labels[m]], in nats.

    Operations, with 2NHV for one product: 1 product without gradients, 2 in all if only `hidden` needs one, 3 to 4 in
    all if the head needs one (`SYSDAG_KEPT_LOGITS_MB` is the memory that buys the lower figure; by default
    2.25 (1 + H/N) times the weight in fp32 on a CPU, a sixteenth of the device's memory on a GPU). There
    `SYSDAG_HEAD_FORWARD` may ask for a fused kernel where the forward keeps nothing for a backward (`_head_fused.py`).
    Under autocast the operands are cast as nn.Linear's are.

    Args:
        hidden: (N, H) in fp16, bf16, fp32 or fp64.
        weight: (V, H), the output embedding, in hidden's dtype.
        rows: (M,) the row of `hidden` that predicts each label, in [0, N). One row may serve several labels, as the end
            of a shared prefix does; rows that serve none are not computed.
        labels: (M,) in [0, V), or `ignore_index`: such a result and its gradient are 0. With rows and labels on the CPU
            the host need not wait for a GPU.
        bias: (V,).
        softcap: c of c * tanh(logits / c), as in Gemma 2.
        logit_scale: multiplies the product, before the bias.
        ignore_index: the label of what is not to be scored.

    Returns:
        (M,) in fp32; in fp64 for fp64 arguments. Differentiable once.

    Raises:
        ValueError: for shapes or dtypes that do not fit, rows or labels out of range, a softcap that is not positive.
        BackendError: if the forced backend, or the forced forward, cannot serve.
    """
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, rows, labels, bias, softcap)
    wanted = torch.is_grad_enabled()
    head = wanted and (weight.requires_grad or (bias is not None and bias.requires_grad))
    capacity = min(len(hidden), len(labels))
    keep = 0
    if head:
        size = walk.compute_dtype(hidden.dtype).itemsize
        keep = walk.tiles_kept(capacity, len(weight), hidden.device.type, size, walk.keep_budget(weight, capacity))
    unit = wanted and hidden.requires_grad and not head
    arguments = hidden, weight, bias, rows, labels, softcap or 0.0, logit_scale, ignore_index, unit, keep
    if runs_eagerly(hidden, weight, bias, rows, labels):
        return _LinearLogprob.apply(*arguments, _backend(hidden))
    refuse_tangents("linear_logprob", hidden, weight, bias)
    return torch.ops.sysdag.linear_logprob(*arguments)[0]


def _check(
    hidden: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob needs hidden (N, H) and weight (V, H), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}."
        )
    if rows.dim() != 1 or rows.shape != labels.shape:
        raise ValueError(
            f"linear_logprob needs rows (M,) and labels (M,), got {tuple(rows.shape)} and {tuple(labels.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_logprob needs a bias ({len(weight)},), got {tuple(bias.shape)}.")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"linear_logprob needs hidden and weight in one floating dtype, got {hidden.dtype} and {weight.dtype}."
        )
    for name, ids in (("rows", rows), ("labels", labels)):
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"linear_logprob needs integer {name}, got {ids.dtype}.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"linear_logprob needs softcap > 0 or None, got {softcap}.")
    if weight.device != hidden.device or rows.device != labels.device or rows.device not in (hidden.device, _HOST):
        raise ValueError(
            f"linear_logprob needs its tensors on one device, or rows and labels on the CPU, got hidden on "
            f"{hidden.device}, weight on {weight.device}, rows on {rows.device}, labels on {labels.device}."
        )


def linear_logprob_reference(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    rows: Int[Tensor, " M"],
    labels: Int[Tensor, " M"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, " M"]:
    """The definition in plain torch; holds (N, V)."""
    logits = (hidden @ weight.T).to(walk.compute_dtype(hidden.dtype)) * logit_scale
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = labels != ignore_index
    logp = F.log_softmax(logits, dim=-1)
    return logp[rows.where(kept, 0).long(), labels.where(kept, 0).long()].where(kept, 0)


def _backend(hidden: Tensor) -> Backend:
    return resolve("linear_logprob", hidden.device, IMPLEMENTATIONS["linear_logprob"])


Options = tuple[float, float]  # softcap, logit_scale


def _scored(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, options: Options,
    ignore_index: int, unit: bool, keep: int, backend: Backend,
) -> walk.Forward:  # fmt: skip
    softcap, logit_scale = options
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        head = walk.Head(weight, bias, logit_scale, softcap)
        return walk.forward(hidden, head, rows, labels, ignore_index, backend, unit=unit, keep=keep)


def _gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, left: Sequence[Tensor], options: Options,
    needs: Sequence[bool], backend: Backend, release: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; without elements where they are not needed.

    Args:
        left: the fields of `_head_walk.Forward` after the first.
    """
    softcap, logit_scale = options
    with torch.cuda.device_of(hidden):
        head = walk.Head(weight, bias, logit_scale, softcap)
        saved = walk.Forward(grad, *left)
        return walk.backward(grad, hidden, head, saved, backend, walk.Needs(*needs), release)


class _LinearLogprob(torch.autograd.Function):
    """The eager path; the operator below is for what traces."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, softcap: float,
        logit_scale: float, ignore_index: int, unit: bool, keep: int, backend: Backend,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.backend = (softcap, logit_scale), backend
        found = _scored(hidden, weight, bias, rows, labels, ctx.options, ignore_index, unit, keep, backend)
        ctx.save_for_backward(hidden, weight, bias, *found[1:])
        return found.log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, *left = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if not derives_eagerly(grad, hidden, weight, *left):  # the operator has an answer, or a refusal
            found = torch.ops.sysdag.linear_logprob_backward(
                grad, hidden, weight, bias, *left, *ctx.options, *needs, ctx.backend
            )
        else:
            found = _gradients(grad, hidden, weight, bias, left, ctx.options, needs, ctx.backend, release=True)
        return (*(each if needed else None for each, needed in zip(found, needs, strict=True)), *[None] * 8)


# The registered operators, for everything that traces.


@torch.library.custom_op("sysdag::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor, softcap: float,
    logit_scale: float, ignore_index: int, unit: bool, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `_head_walk.Forward`; `unit` and `keep` say what is left for the backward."""
    options = softcap, logit_scale
    return _scored(hidden, weight, bias, rows, labels, options, ignore_index, unit, keep, _backend(hidden))


@_forward.register_fake
def _(hidden, weight, bias, rows, labels, softcap, logit_scale, ignore_index, unit, keep):  # type: ignore[no-untyped-def]
    dtype = walk.compute_dtype(hidden.dtype)
    capacity = min(hidden.shape[0], labels.shape[0])
    tile = walk.tile_shape(capacity, weight.shape[0], hidden.device.type)
    return (
        hidden.new_empty(labels.shape[0], dtype=dtype),
        hidden.new_empty(capacity, dtype=dtype),
        hidden.new_empty(capacity, dtype=dtype),
        hidden.new_empty(labels.shape[0], dtype=dtype),
        hidden.new_empty(capacity if unit else 0, hidden.shape[1], dtype=dtype),
        hidden.new_empty(keep, tile[0] * tile[1] if keep else 0, dtype=dtype),
        hidden.new_empty(Layout.size(capacity, labels.shape[0]), dtype=torch.int64),
        torch.empty(3, dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("sysdag::linear_logprob_backward", mutates_args=())
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, top: Tensor, total: Tensor, chosen: Tensor,
    unit: Tensor, kept: Tensor, packed: Tensor, counts: Tensor, softcap: float, logit_scale: float, needs_hidden: bool,
    needs_weight: bool, needs_bias: bool, forced: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Autograd runs the backward of CUDA tensors in threads of its own, which do not inherit the forced backend.
    with use_backend(forced) if forced else contextlib.nullcontext():  # type: ignore[arg-type]
        backend = _backend(hidden)
    left, needs = (top, total, chosen, unit, kept, packed, counts), (needs_hidden, needs_weight, needs_bias)
    return _gradients(grad, hidden, weight, bias, left, (softcap, logit_scale), needs, backend, release=False)


@_backward.register_fake
def _(grad, hidden, weight, bias, top, total, chosen, unit, kept, packed, counts, softcap, logit_scale, needs_hidden,
      needs_weight, needs_bias, forced):  # type: ignore[no-untyped-def] # fmt: skip
    dtype = walk.compute_dtype(hidden.dtype)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else hidden.new_empty(0, dtype=dtype),
        bias.new_empty(bias.shape) if needs_bias else hidden.new_empty(0, dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _rows, _labels, *ctx.options, _ignored, _unit, _keep = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept
    ctx.save_for_backward(hidden, weight, bias, *output[1:])
    ctx.forced = forced_backend()


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    hidden, weight, bias, *left = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    found = torch.ops.sysdag.linear_logprob_backward(
        grad, hidden, weight, bias, *left, *ctx.options, *needs, ctx.forced
    )
    return (*(each if needed else None for each, needed in zip(found, needs, strict=True)), *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_setup)
