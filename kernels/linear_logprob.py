"""Triton folds of a tile of logits for `sysdag.ops.linear_logprob`; sysdag/ops/_head_folds.py says what each one means.

A tile z (R, C) is the head's product for R rows and the tokens [start, start + C), in fp32 or fp64. With b the bias and
c the softcap, for one program a row:

    x = cap(scale z + b),   cap(u) = c tanh(u / c),   slope(x) = dx/du = 1 - (x / c)^2

    stats:  top' = max(top, max x);  total' = total exp(top - top') + sum exp(x - top')
    unit:   the same;  out = exp(x - top') slope(x), 0 at the row's labels;  acc *= exp(top - top')
    slope:  out = -G p slope(x), (g - G p) slope(x) at a label;  p = exp(x - top) / total
    combine: out = -G unit + sum_m coefficient_m W[label_m]

tanh(u) = 1 - 2 / (exp(2u) + 1) away from 0 and an odd polynomial (Cephes) near 0, where that would cancel. Every value
is computed by one program in a fixed order: no atomics, the same bits from run to run. The products are left to the
BLAS: a fused forward would replace `stats` and its product, with the same running statistics as its outcome.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from sysdag.ops._head_folds import Tile
    from sysdag.ops._head_labels import Labels


@triton.jit
def _tanh(u):
    a = tl.abs(u)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(a, 20.0)) + 1.0)
    s = u * u
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    near = p * s * u + u
    if u.dtype == tl.float64:  # the polynomial is good to fp32
        near = tl.where(u < 0, -far, far)
    return tl.where(a < 0.625, near, tl.where(u < 0, -far, far))


@triton.jit
def logits_of(z, bias, SCALE: tl.constexpr, CAP: tl.constexpr):
    x = z * SCALE + bias
    if CAP != 0.0:
        x = CAP * _tanh(x * (1.0 / CAP))
    return x


@triton.jit
def _slope(x, CAP: tl.constexpr):
    t = x * 0.0
    if CAP != 0.0:
        t = x * (1.0 / CAP)
    return 1.0 - t * t


@triton.jit
def _row(
    z, bias, row, columns, offset, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of a row's logits, -inf past its end."""
    at = offset + tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(z + row * columns + at, mask=inside, other=0.0)
    added = tl.load(bias + at, mask=inside, other=0.0) if BIAS else tl.zeros_like(value)
    return at, inside, tl.where(inside, logits_of(value, added, SCALE, CAP), -float("inf"))


@triton.jit
def _take_labels(
    z, bias, offsets, labels, chosen, row, columns, start, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr
):
    for m in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        column = tl.load(labels + m) - start
        if (column >= 0) & (column < columns):
            value = tl.load(z + row * columns + column)
            added = tl.load(bias + column) if BIAS else value * 0.0
            tl.store(chosen + m, logits_of(value, added, SCALE, CAP))


@triton.jit
def stats_kernel(
    z, bias, offsets, labels, top, total, chosen, columns, start,
    SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest, sum_exp = tl.load(top + row), tl.load(total + row)
    for offset in range(0, columns, BLOCK):
        _at, _inside, x = _row(z, bias, row, columns, offset, SCALE, CAP, BIAS, BLOCK)
        now = tl.maximum(largest, tl.max(x, 0))
        base = tl.where(now == -float("inf"), 0.0, now)
        sum_exp = sum_exp * tl.exp(largest - base) + tl.sum(tl.exp(x - base), 0)
        largest = now
    tl.store(top + row, largest)
    tl.store(total + row, sum_exp)
    _take_labels(z, bias, offsets, labels, chosen, row, columns, start, SCALE, CAP, BIAS)


@triton.jit
def _store_unit(x, base, out, at, inside, CAP: tl.constexpr):
    """Writes exp(x - base) slope(x) and returns the sum of exp(x - base)."""
    e = tl.exp(x - base)
    total = tl.sum(e, 0)
    e = tl.where(inside, e * _slope(tl.where(inside, x, 0.0), CAP), 0.0) if CAP != 0.0 else e
    tl.store(out + at, e.to(out.dtype.element_ty), mask=inside)
    return total


@triton.jit
def unit_kernel(
    z, bias, offsets, labels, top, total, chosen, acc, out, columns, start, width,
    SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _take_labels(z, bias, offsets, labels, chosen, row, columns, start, SCALE, CAP, BIAS)
    before = tl.load(top + row)
    at, inside, x = _row(z, bias, row, columns, 0, SCALE, CAP, BIAS, BLOCK)  # is kept: few blocks are read again
    now = tl.maximum(before, tl.max(x, 0))
    for offset in range(BLOCK, columns, BLOCK):
        _at, _inside, others = _row(z, bias, row, columns, offset, SCALE, CAP, BIAS, BLOCK)
        now = tl.maximum(now, tl.max(others, 0))
    base = tl.where(now == -float("inf"), 0.0, now)
    rescale = tl.exp(before - base)
    sum_exp = tl.load(total + row) * rescale
    tl.debug_barrier()  # all have read the labels' logits and statistics: z may be overwritten
    sum_exp += _store_unit(x, base, out, row * columns + at, inside, CAP)
    for offset in range(BLOCK, columns, BLOCK):
        at, inside, x = _row(z, bias, row, columns, offset, SCALE, CAP, BIAS, BLOCK)
        sum_exp += _store_unit(x, base, out, row * columns + at, inside, CAP)
    tl.debug_barrier()  # the zeros come after the row
    for m in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        column = tl.load(labels + m) - start
        if (column >= 0) & (column < columns):
            tl.store(out + row * columns + column, tl.zeros((), out.dtype.element_ty))
    tl.store(top + row, now)
    tl.store(total + row, sum_exp)
    if rescale != 1.0:  # the maximum rises in few tiles
        for offset in range(0, width, BLOCK):
            at = offset + tl.arange(0, BLOCK)
            inside = at < width
            value = tl.load(acc + row * width + at, mask=inside, other=0.0)
            tl.store(acc + row * width + at, value * rescale, mask=inside)


@triton.jit
def slope_kernel(
    z, bias, offsets, labels, top, total, chosen, grads, row_grads, out, columns, start,
    SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest, g = tl.load(top + row), tl.load(row_grads + row) / tl.load(total + row)
    for offset in range(0, columns, BLOCK):
        at, inside, x = _row(z, bias, row, columns, offset, SCALE, CAP, BIAS, BLOCK)
        dz = -g * tl.exp(x - largest)
        dz = dz * _slope(tl.where(inside, x, 0.0), CAP) if CAP != 0.0 else dz
        tl.store(out + row * columns + at, dz.to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # the labels come after the row
    for m in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        column = tl.load(labels + m) - start
        if (column >= 0) & (column < columns):
            x = tl.load(chosen + m)
            dz = tl.load(grads + m) - g * tl.exp(x - largest)
            dz = dz * _slope(x, CAP) if CAP != 0.0 else dz
            tl.store(out + row * columns + column, dz.to(out.dtype.element_ty))


@triton.jit
def combine_kernel(unit, weight, offsets, labels, coefficients, row_grads, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = -tl.load(row_grads + row) * tl.load(unit + row * width + at, mask=inside, other=0.0)
    for m in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        w = tl.load(weight + tl.load(labels + m) * width + at, mask=inside, other=0.0)
        total += tl.load(coefficients + m) * w.to(total.dtype)
    tl.store(out + row * width + at, total.to(out.dtype.element_ty), mask=inside)


_WARPS = 8


def _block(wide: bool) -> int:
    """Columns a program takes at a time: what its registers hold without spilling."""
    return 512 if wide else 4096


def _of(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = tile.z if tile.bias is None else tile.bias
    return tile.z, bias, tile.targets.offsets, tile.targets.labels


def _options(tile: Tile) -> dict[str, Any]:
    block = min(_block(tile.z.element_size() == 8), triton.next_power_of_2(tile.z.shape[1]))
    options = {"SCALE": tile.scale, "CAP": tile.softcap, "BIAS": tile.bias is not None}
    return {**options, "BLOCK": block, "num_warps": _WARPS}


def stats(tile: Tile, top: Tensor, total: Tensor, chosen: Tensor) -> None:
    rows, columns = tile.z.shape
    stats_kernel[(rows,)](*_of(tile), top, total, chosen, columns, tile.start, **_options(tile))


def unit(tile: Tile, top: Tensor, total: Tensor, chosen: Tensor, acc: Tensor, out: Tensor) -> None:
    (rows, columns), width = tile.z.shape, acc.shape[1]
    unit_kernel[(rows,)](*_of(tile), top, total, chosen, acc, out, columns, tile.start, width, **_options(tile))


def slope(
    tile: Tile, top: Tensor, total: Tensor, chosen: Tensor, grads: Tensor, row_grads: Tensor, out: Tensor
) -> None:
    rows, columns = tile.z.shape
    slope_kernel[(rows,)](*_of(tile), top, total, chosen, grads, row_grads, out, columns, tile.start, **_options(tile))


def combine(
    unit: Tensor, weight: Tensor, targets: Labels, coefficients: Tensor, row_grads: Tensor, out: Tensor
) -> None:
    rows, width = out.shape
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    combine_kernel[grid](
        unit, weight.contiguous(), targets.offsets, targets.labels, coefficients, row_grads, out, width, BLOCK=block
    )


def aot_cases(arch: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """For tests/ops/aot_compile.py: plain bf16, and everything on; fp64."""
    cases: list[tuple[Any, dict[str, Any], dict[str, int]]] = []
    for wide, half, scale, cap, bias in (
        ("fp32", "bf16", 1.0, 0.0, False), ("fp32", "fp16", 0.0625, 30.0, True), ("fp64", "fp64", 1.0, 30.0, True)
    ):  # fmt: skip
        full, ids = f"*{wide}:16", "*i64"
        head: dict[str, Any] = {"z": full, "bias": full, "offsets": ids, "labels": ids}
        options = {"SCALE": scale, "CAP": cap, "BIAS": bias, "BLOCK": _block(wide == "fp64")}
        sizes = {"columns": "i32", "start": "i32"}
        out = {"out": f"*{half}:16"}
        state = dict.fromkeys(("top", "total", "chosen"), f"*{wide}")
        solved = dict.fromkeys(("top", "total", "chosen", "grads", "row_grads"), f"*{wide}")
        warps = {"num_warps": _WARPS}
        cases.append((stats_kernel, {**head, **state, **sizes, **options}, warps))
        cases.append((unit_kernel, {**head, **state, "acc": full, **out, **sizes, "width": "i32", **options}, warps))
        cases.append((slope_kernel, {**head, **solved, **out, **sizes, **options}, warps))
        combine_types = {"unit": full, "weight": f"*{half}:16", "offsets": ids, "labels": ids}
        scalars = {"coefficients": f"*{wide}", "row_grads": f"*{wide}", **out, "width": "i32", "BLOCK": 1024}
        cases.append((combine_kernel, {**combine_types, **scalars}, {}))
    return cases
