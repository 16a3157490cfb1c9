"""Preference loss of pairs whose sides are sums over candidates, and its derivative, in one launch.

    r_s = log sum_i exp(logps_i) - log sum_i exp(ref_logps_i)       over the candidates i of segment s
    m_p = beta * (r of the winner - r of the loser)
    c_i = d loss_p / d logps_i = f'(m_p) * (+-beta) * exp(logps_i) / sum_j exp(logps_j)

A side of one candidate makes it SysDPO-Direct (Wang et al. 2025, arXiv 2502.17721), several make it SysDPO-Sampling.
The losses are those of `sysdag.objectives.losses`. The coefficients are what a second pass over the models needs: the
gradient of the mean loss is the sum over candidates of c_i / P times that of logps_i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sysdag.ops._dispatch import (
    IMPLEMENTATIONS,
    Backend,
    derives_eagerly,
    extension_raises,
    refuse_tangents,
    resolve,
    runs_eagerly,
)  # fmt: skip

LossType = Literal["sigmoid", "ipo", "hinge", "robust"]
LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust")  # kernels get the position
SMOOTHED = ("sigmoid", "robust")


def preference_loss(
    logps: Float[Tensor, " S"],
    ref_logps: Float[Tensor, " S"],
    offsets: Int[Tensor, " O"],
    beta: float,
    *,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: Float[Tensor, " L"] | None = None,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " S"]]:
    """Loss of each of P pairs and its exact derivative with respect to every candidate's log-probability.

    The loss is differentiable with respect to `logps`, once; the coefficients are numbers. Half-precision inputs are
    computed, and returned, in fp32.

    Args:
        logps: log-probabilities of all candidates under the policy, nats; -inf is a candidate of probability 0, and its
            coefficient is 0.
        ref_logps: the same under the reference; no gradient reaches them.
        offsets: (2P+1,) where each segment of candidates begins, rising from 0 to S. Segments 0..P-1 are the winners',
            P..2P-1 the losers': `loss[p]` compares segment p with segment P+p. An empty segment's loss is nan.
        beta: strength of the regularisation towards the reference, positive.
        loss_type: a name of `sysdag.objectives.losses.LOSSES` that is a function of the margin.
        label_smoothing: e, the probability that a preference is flipped, in [0, 0.5); for `sigmoid` and `robust`.
        lengths: (2P,) number of terms in each side's log-likelihood, for `ipo`: log-ratios are averaged over them
            (at least 1). None: they are not averaged.

    Returns:
        loss (P,) and coefficients (S,) = d loss[p] / d logps[s], in the dtype of the computation.

    Raises:
        ValueError: a shape, an option or the offsets do not fit. Offsets on a GPU are not read, so not checked.
        BackendError: the forced backend does not serve.
    """
    loss_index = _checked_options(beta, loss_type, label_smoothing, lengths)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    logps = logps if logps.dtype == dtype else logps.to(dtype)
    ref_logps = ref_logps if ref_logps.dtype == dtype else ref_logps.to(dtype)
    offsets = offsets if offsets.dtype == torch.int64 else offsets.to(torch.int64)
    lengths = lengths if lengths is None or lengths.dtype == dtype else lengths.to(dtype)
    ref_logps = ref_logps.detach() if ref_logps.requires_grad else ref_logps
    eager = runs_eagerly(logps, ref_logps, offsets, lengths)
    backend = None if torch.compiler.is_compiling() else _backend(logps)
    if backend == "cpp" and eager and extension_raises():
        try:
            return _PreferenceLoss.apply(logps, ref_logps, offsets, lengths, beta, loss_index, label_smoothing, backend)
        except RuntimeError:  # the extension looks first, at no cost; this says what is wrong
            _check_shapes(logps, ref_logps, offsets, lengths)
            _check_offsets(offsets, len(logps))
            raise
    _check_shapes(logps, ref_logps, offsets, lengths)
    if backend == "reference":
        return preference_loss_reference(
            logps, ref_logps, offsets, beta, loss_type=loss_type, label_smoothing=label_smoothing, lengths=lengths
        )
    if not eager:
        refuse_tangents("preference_loss", logps)
        return _op(logps, ref_logps, offsets, lengths, beta, loss_index, label_smoothing)
    if backend == "cpp":
        _check_offsets(offsets, len(logps))
    return _PreferenceLoss.apply(logps, ref_logps, offsets, lengths, beta, loss_index, label_smoothing, backend)


def preference_loss_reference(
    logps: Float[Tensor, " S"],
    ref_logps: Float[Tensor, " S"],
    offsets: Int[Tensor, " O"],
    beta: float,
    *,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: Float[Tensor, " L"] | None = None,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " S"]]:
    """`preference_loss` in plain torch, its gradient by autograd; what every backend is tested against."""
    if logps.device.type == "cpu":
        _check_offsets(offsets, len(logps))
    count = len(offsets) - 1
    segments = torch.arange(count, device=offsets.device)
    segment = segments.repeat_interleave(offsets.diff(), output_size=len(logps))
    log_sum = _segment_log_sum(logps, segment, count)
    ratios = log_sum - _segment_log_sum(ref_logps.detach(), segment, count)
    winner, loser = ratios.chunk(2) if count else (ratios, ratios)
    if loss_type == "ipo":
        terms = ratios.new_ones(count) if lengths is None else lengths.clamp(min=1)
        difference = (ratios / terms)[: count // 2] - (ratios / terms)[count // 2 :] - 1 / (2 * beta)
        loss, slope = difference**2, 2 * difference.detach()
        slopes = torch.cat([slope, -slope]) / terms
    else:
        loss, slope = _MARGIN_LOSSES[loss_type](beta * (winner - loser), label_smoothing)
        slopes = beta * torch.cat([slope, -slope])
    weights = (logps.detach() - log_sum.detach()[segment]).exp()
    return loss, (slopes[segment] * weights).masked_fill(logps.detach() == -torch.inf, 0.0)


def _segment_log_sum(values: Tensor, segment: Tensor, count: int) -> Tensor:
    """log sum exp of each segment; -inf without gradient where it has no probability."""
    top = values.new_full((count,), -torch.inf).scatter_reduce(0, segment, values.detach(), "amax")
    shift = top.masked_fill(top.isinf(), 0.0)
    total = values.new_zeros(count).index_add(0, segment, (values - shift[segment]).exp())
    empty = total == 0
    return total.masked_fill(empty, 1.0).log().masked_fill(empty, -torch.inf) + shift


def _sigmoid(margin: Tensor, e: float) -> tuple[Tensor, Tensor]:
    """Loss and derivative; with e = 0 the flipped term is left out, since 0 times its infinity is nan."""
    loss, slope = -(1 - e) * F.logsigmoid(margin), -(1 - e) * (-margin.detach()).sigmoid()
    return (loss - e * F.logsigmoid(-margin), slope + e * margin.detach().sigmoid()) if e else (loss, slope)


def _robust(margin: Tensor, e: float) -> tuple[Tensor, Tensor]:
    loss, slope = -(1 - e) * F.logsigmoid(margin), -(1 - e) * (-margin.detach()).sigmoid()
    if e:
        loss, slope = loss + e * F.logsigmoid(-margin), slope - e * margin.detach().sigmoid()
    return loss / (1 - 2 * e), slope / (1 - 2 * e)


def _hinge(margin: Tensor, e: float) -> tuple[Tensor, Tensor]:
    return torch.relu(1 - margin), torch.where(margin.detach() >= 1, 0.0, -1.0).to(margin.dtype)


_MARGIN_LOSSES = {"sigmoid": _sigmoid, "robust": _robust, "hinge": _hinge}


def _backend(logps: Tensor) -> Backend:
    return resolve("preference_loss", logps.device, IMPLEMENTATIONS["preference_loss"])


# What a backend computes without autograd: arguments as of the op below.


@functools.cache
def _forward(backend: Backend) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "cpp":
        return torch.ops.sysdag_C.preference_loss.default
    if backend == "triton":
        import sysdag.kernels.preference_loss as kernel

        return kernel.forward
    return _reference_forward


@functools.cache
def _backward(backend: Backend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if backend == "cpp":
        return torch.ops.sysdag_C.preference_loss_backward.default
    if backend == "triton":
        import sysdag.kernels.preference_loss as kernel

        return kernel.backward
    return _reference_backward


def _reference_forward(
    logps: Tensor, ref_logps: Tensor, offsets: Tensor, lengths: Tensor | None, beta: float, loss_index: int, e: float
) -> tuple[Tensor, Tensor]:
    name: Any = LOSS_TYPES[loss_index]
    return preference_loss_reference(
        logps, ref_logps, offsets, beta, loss_type=name, label_smoothing=e, lengths=lengths
    )


def _reference_backward(grad: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    return coefficients * grad.repeat(2).repeat_interleave(offsets.diff(), output_size=len(coefficients))


class _PreferenceLoss(torch.autograd.Function):
    """The eager path: half the overhead of the op below, which tracing needs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        values, ctx.backend = arguments[:-1], arguments[-1]
        loss, coefficients = _forward(ctx.backend)(*values)
        ctx.save_for_backward(coefficients, values[2])
        ctx.mark_non_differentiable(coefficients)
        ctx.set_materialize_grads(False)
        return loss, coefficients

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "preference_loss: its gradient cannot be differentiated again (create_graph=True); plain torch can: "
                "`with use_backend('reference')`."
            )
        if grad is None:
            found = None
        elif derives_eagerly(grad):
            found = _backward(ctx.backend)(grad, *ctx.saved_tensors)
        else:
            found = _backward_op(grad, *ctx.saved_tensors)
        return found, None, None, None, None, None, None, None


@torch.library.custom_op(
    "sysdag::preference_loss",
    mutates_args=(),
    schema="(Tensor logps, Tensor ref_logps, Tensor offsets, Tensor? lengths, float beta, int loss_index, "
    "float label_smoothing) -> (Tensor, Tensor)",
)
def _op(
    logps: Tensor, ref_logps: Tensor, offsets: Tensor, lengths: Tensor | None, beta: float, loss_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(_backend(logps))(logps, ref_logps, offsets, lengths, beta, loss_index, label_smoothing)


@torch.library.custom_op(
    "sysdag::preference_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor coefficients, Tensor offsets) -> Tensor",
)
def _backward_op(grad: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    return _backward(_backend(grad))(grad, coefficients, offsets)


def _fake(logps: Tensor, ref_logps: Tensor, offsets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logps.new_empty((offsets.shape[0] - 1) // 2), torch.empty_like(logps, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(coefficients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return _backward_op(grad, *ctx.saved_tensors), None, None, None, None, None, None


_op.register_fake(_fake)
_op.register_autograd(_op_backward, setup_context=_setup_context)
_backward_op.register_fake(_fake_backward)


def _checked_options(beta: float, loss_type: str, e: float, lengths: Tensor | None) -> int:
    """The position of the loss in `LOSS_TYPES`."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type: expected one of {list(LOSS_TYPES)}, got {loss_type!r}.")
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}.")
    if not 0 <= e < 0.5 or (e and loss_type not in SMOOTHED):
        expected = f"a number in [0, 0.5), and 0 unless loss_type is one of {list(SMOOTHED)}"
        raise ValueError(f"label_smoothing: expected {expected}, got {e} for {loss_type!r}.")
    if lengths is not None and loss_type != "ipo":
        raise ValueError(f"lengths: expected None unless loss_type is 'ipo', got a tensor for {loss_type!r}.")
    return LOSS_TYPES.index(loss_type)


def _check_shapes(logps: Tensor, ref_logps: Tensor, offsets: Tensor, lengths: Tensor | None) -> None:
    if logps.dim() != 1 or ref_logps.shape != logps.shape:
        raise ValueError(
            f"logps and ref_logps: expected one shape (S,), got {tuple(logps.shape)} and {tuple(ref_logps.shape)}."
        )
    if offsets.dim() != 1 or len(offsets) % 2 == 0:
        raise ValueError(f"offsets: expected shape (2P+1,) for P pairs, got {tuple(offsets.shape)}.")
    if lengths is not None and lengths.shape != (len(offsets) - 1,):
        raise ValueError(f"lengths: expected shape ({len(offsets) - 1},), got {tuple(lengths.shape)}.")


def _check_offsets(offsets: Tensor, total: int) -> None:
    if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
        expected = f"them to rise from 0 to {total}, the number of candidates"
        raise ValueError(f"offsets: expected {expected}, got {offsets.tolist()}.")
