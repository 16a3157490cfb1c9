"""Preference loss and its derivative: one program a pair.

A program walks over the candidates of its winner and of its loser twice. The first walk keeps, for policy x and
reference y, a running maximum and the sum of exponentials relative to it:

    r = (max x - max y) + (log sum exp(x - max x) - log sum exp(y - max y)),   m = beta (r_winner - r_loser)

The maxima cancel before the logarithms are added, so an offset that policy and reference share costs no digits. From m
come the loss and its slope, and the second walk writes c_i = slope (+-beta) exp(x_i - max x) / sum. A candidate of
probability 0 gets 0. Pairs are independent and each is summed in a fixed order: the same bits from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIGMOID, IPO, HINGE, ROBUST = (tl.constexpr(i) for i in range(4))  # the order of LOSS_TYPES in sysdag/ops
BLOCK = 128  # candidates of a segment at a time; few have more than 32


@triton.jit
def _exp(x):
    """exp(x) for x <= 0 to the last digits; the GPU's own rounds x log2(e), which costs digits where x is large.

    x = n log(2) + r with an integer n (Cody and Waite: log(2) in two parts), so |r| <= log(2) / 2.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    x = tl.where(x < -104.0, -104.0, x)  # below, exp(x) is 0 in fp32
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, tl.full((), -0.693359375, tl.float32), x)
    r = tl.fma(n, tl.full((), 2.12194440e-4, tl.float32), r)
    return tl.exp2(n) * tl.exp(r)


@triton.jit
def _maximum_and_sum(values, begin, end, BLOCK: tl.constexpr):
    """max v (0 where there is none above -inf) and sum exp(v - max v)."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full((), -float("inf"), values.dtype.element_ty)
    total = tl.zeros((), values.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        v = tl.load(values + start + lanes, mask=start + lanes < end, other=-float("inf"))
        higher = tl.maximum(top, tl.max(v, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * _exp(top - shift) + tl.sum(_exp(v - shift), 0)
        top = higher
    return tl.where(top == -float("inf"), 0.0, top), total


@triton.jit
def _write_coefficients(logps, coefficients, begin, end, top, scale, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        inside = start + lanes < end
        weight = _exp(tl.load(logps + start + lanes, mask=inside, other=-float("inf")) - top)
        tl.store(coefficients + start + lanes, tl.where(weight == 0.0, 0.0, weight * scale), mask=inside)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1; the quotient undoes the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * x / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def forward_kernel(
    logps, ref_logps, offsets, lengths, loss_out, coefficients, pairs,
    BETA: tl.constexpr, SMOOTHING: tl.constexpr, LOSS: tl.constexpr, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logps.dtype.element_ty
    beta, e = tl.full((), BETA, dtype), tl.full((), SMOOTHING, dtype)  # constants: a float argument would be fp32
    winner, winner_end = tl.load(offsets + pair), tl.load(offsets + pair + 1)
    loser, loser_end = tl.load(offsets + pairs + pair), tl.load(offsets + pairs + pair + 1)
    top_w, sum_w = _maximum_and_sum(logps, winner, winner_end, BLOCK)
    top_l, sum_l = _maximum_and_sum(logps, loser, loser_end, BLOCK)
    ref_top_w, ref_sum_w = _maximum_and_sum(ref_logps, winner, winner_end, BLOCK)
    ref_top_l, ref_sum_l = _maximum_and_sum(ref_logps, loser, loser_end, BLOCK)
    r_w = top_w - ref_top_w + (tl.log(sum_w) - tl.log(ref_sum_w))
    r_l = top_l - ref_top_l + (tl.log(sum_l) - tl.log(ref_sum_l))
    if LOSS == IPO:
        length_w, length_l = tl.full((), 1.0, dtype), tl.full((), 1.0, dtype)
        if HAS_LENGTHS:
            length_w = tl.maximum(tl.load(lengths + pair), 1.0)
            length_l = tl.maximum(tl.load(lengths + pairs + pair), 1.0)
        difference = r_w / length_w - r_l / length_l - 1.0 / (2.0 * beta)
        loss = difference * difference
        slope_w, slope_l = 2.0 * difference / length_w, -2.0 * difference / length_l
    else:
        m = beta * (r_w - r_l)
        if LOSS == HINGE:
            loss = tl.where(m >= 1.0, 0.0, 1.0 - m)
            slope = tl.where(m >= 1.0, 0.0, -1.0).to(dtype)
        else:
            small = _exp(-tl.abs(m))
            rest = _log1p(small)
            wrong = rest + tl.where(m < 0.0, -m, 0.0)  # -log sigmoid(m)
            flipped = tl.where(e == 0.0, 0.0, e * (rest + tl.where(m > 0.0, m, 0.0)))  # -e log sigmoid(-m)
            miss = tl.where(m < 0.0, 1.0, small) / (1.0 + small)
            hit = tl.where(m < 0.0, small, 1.0) / (1.0 + small)
            if LOSS == ROBUST:
                scale = 1.0 / (1.0 - 2.0 * e)
                loss = scale * ((1.0 - e) * wrong - flipped)
                slope = -scale * ((1.0 - e) * miss + e * hit)
            else:
                loss = (1.0 - e) * wrong + flipped
                slope = e * hit - (1.0 - e) * miss
        slope_w, slope_l = beta * slope, -beta * slope
    tl.store(loss_out + pair, loss)
    _write_coefficients(logps, coefficients, winner, winner_end, top_w, slope_w / sum_w, BLOCK)
    _write_coefficients(logps, coefficients, loser, loser_end, top_l, slope_l / sum_l, BLOCK)


@triton.jit
def backward_kernel(grad, coefficients, offsets, out, pairs, stride, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    g = tl.load(grad + segment % pairs * stride)
    end = tl.load(offsets + segment + 1)
    for start in range(tl.load(offsets + segment), end, BLOCK):
        inside = start + lanes < end
        tl.store(out + start + lanes, g * tl.load(coefficients + start + lanes, mask=inside), mask=inside)


def forward(
    logps: Tensor, ref_logps: Tensor, offsets: Tensor, lengths: Tensor | None, beta: float, loss_index: int, e: float
) -> tuple[Tensor, Tensor]:
    logps, ref_logps, offsets = logps.contiguous(), ref_logps.contiguous(), offsets.contiguous()
    pairs = (len(offsets) - 1) // 2
    loss, coefficients = logps.new_empty(pairs), torch.empty_like(logps)
    if pairs:
        with torch.cuda.device_of(logps):  # Triton launches on the current device
            forward_kernel[(pairs,)](
                logps, ref_logps, offsets, None if lengths is None else lengths.contiguous(), loss, coefficients, pairs,
                BETA=beta, SMOOTHING=e, LOSS=loss_index, HAS_LENGTHS=lengths is not None, BLOCK=BLOCK, num_warps=1,
            )  # fmt: skip
    return loss, coefficients


def backward(grad: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    out = torch.empty_like(coefficients)
    pairs = len(grad)
    if pairs:
        with torch.cuda.device_of(grad):
            backward_kernel[(2 * pairs,)](
                grad, coefficients, offsets.contiguous(), out, pairs, grad.stride(0), BLOCK=BLOCK, num_warps=1
            )
    return out


def aot_cases(arch: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    cases: list[tuple[Any, dict[str, Any], dict[str, int]]] = []
    for kind in ("*fp32", "*fp64"):
        for loss in range(4):
            arguments: dict[str, Any] = {
                "logps": kind, "ref_logps": kind, "offsets": "*i64", "lengths": kind, "loss_out": kind,
                "coefficients": kind, "pairs": "i32", "BETA": 0.1, "SMOOTHING": 0.1 * (loss in (0, 3)),
                "LOSS": loss, "HAS_LENGTHS": True, "BLOCK": BLOCK,
            }  # fmt: skip
            cases.append((forward_kernel, arguments, {"num_warps": 1}))
        arguments = {
            "grad": kind, "coefficients": kind, "offsets": "*i64", "out": kind, "pairs": "i32", "stride": "i32",
            "BLOCK": BLOCK,
        }  # fmt: skip
        cases.append((backward_kernel, arguments, {"num_warps": 1}))
    return cases
