"""The head's product and its statistics in one pass, for `sysdag.ops._head_fused`: no logit reaches memory.

Grid (row blocks x splits). A program owns R rows and a slice of the vocabulary. It walks over its tiles of R x C logits
in one loop over all of their K-deep steps, so that the copy engine (TMA, through tensor descriptors) fetches the next
tile's operands while a tile is folded:

    x = cap(scale z + b);   top' = max(top, max x);   total' = total exp(top - top') + sum exp(x - top')

and writes its (top, total) to (splits, rows). A second kernel combines the splits in their order: no locks, no atomics,
the same bits from run to run. Programs run side by side in groups of GROUP row blocks times all slices, which keeps the
group's rows, and the tiles of the weight that they are at, in the L2 cache.

A label's logit is taken from the tile that holds it. A dot product of its own would add in another order than the
tensor cores; then a label that is nearly certain (x = top, total = 1) would get a log-probability of a rounding error,
of either sign, where this gives exactly 0. Labels of a row are sorted, so each row keeps a cursor, and columns without
labels cost one reduction over R numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from sysdag.kernels.linear_logprob import logits_of
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from sysdag.ops._head_fused import Problem

FAR = tl.constexpr(1 << 30)  # above every token
COMBINED = 128  # rows of a program of the second kernel
GROUP = 8


class Config(NamedTuple):
    """Tile R x C, steps of depth K, and how they are compiled."""

    R: int
    C: int
    K: int
    num_warps: int
    num_stages: int


# By the GPU's major capability, for few rows and for many. The accumulators of 128 x 256 take 128 registers a thread on
# sm_90 with 8 warps; four stages take 192 of its 227 KiB. On sm_100 they lie in tensor memory.
CONFIGS = {
    9: (Config(64, 256, 64, 4, 4), Config(128, 256, 64, 8, 4)),
    10: (Config(64, 128, 64, 4, 4), Config(128, 256, 64, 8, 4)),
}
INTERPRETED = (Config(16, 64, 16, 4, 1), Config(32, 128, 64, 4, 1))


@triton.jit
def _next_label(labels, cursor, stop):
    return tl.load(labels + cursor, mask=cursor < stop, other=FAR).to(tl.int32)


@triton.jit
def _halves(z):
    """The left and the right columns of a tile; each stays in the threads' registers that it is in."""
    R: tl.constexpr = z.shape[0]
    C: tl.constexpr = z.shape[1]
    return z.reshape((R, 2, C // 2)).permute((0, 2, 1)).split()


@triton.jit
def _fold(
    z, start, columns, bias, labels, chosen, stop, cursor, label, largest, sum_exp,
    SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Running statistics and label cursors after some more columns."""
    C: tl.constexpr = z.shape[1]
    token = start + tl.arange(0, C)
    inside = token < columns
    added = tl.load(bias + token, mask=inside, other=0.0) if BIAS else tl.zeros((C,), tl.float32)
    x = tl.where(inside[None, :], logits_of(z, added[None, :], SCALE, CAP), -float("inf"))
    now = tl.maximum(largest, tl.max(x, 1))
    base = tl.where(now == -float("inf"), 0.0, now)
    sum_exp = sum_exp * tl.exp(largest - base) + tl.sum(tl.exp(x - base[:, None]), 1)
    while tl.min(label, 0) < start + C:
        here = label < start + C
        value = tl.sum(tl.where(token[None, :] == label[:, None], x, 0.0), 1)
        tl.store(chosen + cursor, value, mask=here)
        cursor += here.to(tl.int64)
        label = _next_label(labels, cursor, stop)
    return cursor, label, now, sum_exp


@triton.jit(do_not_specialize=["rows", "columns", "tiles_each"])  # one binary for every N
def statistics_kernel(
    hidden, weight, bias, offsets, labels, top, total, chosen, rows, columns, tiles_each,
    H: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    blocks, tiles = tl.cdiv(rows, R), tl.cdiv(columns, C)
    splits = tl.num_programs(0) // blocks
    first = tl.program_id(0) // (GROUP * splits) * GROUP
    within = tl.program_id(0) - first * splits
    height = tl.minimum(blocks - first, GROUP)
    block, split = first + within % height, within // height
    tile = split * tiles_each
    count = tl.minimum(tiles_each, tiles - tile)

    row = block * R + tl.arange(0, R)
    cursor = tl.load(offsets + row, mask=row < rows, other=0)
    stop = tl.load(offsets + row + 1, mask=row < rows, other=0)
    high = stop
    while tl.max(high - cursor, 0) > 0:  # the first label that is not before this slice
        middle = (cursor + high) // 2
        open_ = cursor < high
        before = tl.load(labels + middle, mask=open_, other=0) < tile * C
        cursor = tl.where(open_ & before, middle + 1, cursor)
        high = tl.where(open_ & ~before, middle, high)
    label = _next_label(labels, cursor, stop)

    DEPTH: tl.constexpr = (H + K - 1) // K
    largest = tl.full((R,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((R,), tl.float32)
    z = tl.zeros((R, C), tl.float32)
    for step in tl.range(0, count * DEPTH):
        start = (tile + step // DEPTH) * C
        k = step % DEPTH * K
        z = tl.dot(hidden.load([block * R, k]), weight.load([start, k]).T, z, input_precision="ieee")
        if step % DEPTH == DEPTH - 1:
            left, right = _halves(z)
            for side in tl.static_range(2):
                for part in tl.static_range(2):
                    quarter = _halves(left if side == 0 else right)[part]
                    cursor, label, largest, sum_exp = _fold(
                        quarter, start + (2 * side + part) * (C // 4), columns, bias, labels, chosen, stop, cursor,
                        label, largest, sum_exp, SCALE, CAP, BIAS,
                    )  # fmt: skip
            z = tl.zeros((R, C), tl.float32)
    at = split.to(tl.int64) * rows + row
    tl.store(top + at, largest, mask=row < rows)
    tl.store(total + at, sum_exp, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_splits_kernel(tops, totals, top, total, rows, splits, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, at = row < rows, row
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        one = tl.load(tops + at, mask=inside, other=-float("inf"))
        now = tl.maximum(largest, one)
        base = tl.where(now == -float("inf"), 0.0, now)
        sum_exp = sum_exp * tl.exp(largest - base) + tl.load(totals + at, mask=inside, other=0.0) * tl.exp(one - base)
        largest = now
        at += rows
    tl.store(top + row, largest, mask=inside)
    tl.store(total + row, sum_exp, mask=inside)


def splits_of(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """Slices of the vocabulary and the tiles of each, so that the programs fill whole waves; one runs on a processor.

    The time is that of the waves times the longest slice; a program's start and end cost about a tenth of a tile.
    """

    def time(splits: int) -> float:
        return -(-blocks * splits // processors) * (-(-tiles // splits) + 0.1)

    splits = min(range(1, min(tiles, 4 * processors) + 1), key=time)
    each = -(-tiles // splits)
    return -(-tiles // each), each


def statistics(problem: Problem, top: Tensor, total: Tensor, chosen: Tensor) -> None:
    """The statistics of R rows and the logits of their labels, written in place."""
    hidden, weight = problem.hidden, problem.weight
    (rows, width), columns = hidden.shape, len(weight)
    few, many = INTERPRETED
    processors = 8
    if hidden.is_cuda:
        properties = torch.cuda.get_device_properties(hidden.device)
        few, many = CONFIGS[properties.major]
        processors = properties.multi_processor_count
    config = few if rows <= few.R else many
    blocks = triton.cdiv(rows, config.R)
    splits, tiles_each = splits_of(blocks, triton.cdiv(columns, config.C), processors)
    tops = torch.empty(splits, rows, dtype=torch.float32, device=hidden.device)
    totals = torch.empty_like(tops)
    bias = top if problem.bias is None else problem.bias.to(torch.float32).contiguous()
    statistics_kernel[(blocks * splits,)](
        TensorDescriptor.from_tensor(hidden, [config.R, config.K]),
        TensorDescriptor.from_tensor(weight, [config.C, config.K]),
        bias, problem.targets.offsets, problem.targets.labels, tops, totals, chosen, rows, columns, tiles_each,
        H=width, SCALE=problem.scale, CAP=problem.softcap, BIAS=problem.bias is not None, GROUP=GROUP,
        **config._asdict(),
    )  # fmt: skip
    combine_splits_kernel[(triton.cdiv(rows, COMBINED),)](
        tops, totals, top, total, rows, splits, BLOCK=COMBINED, num_warps=4
    )


def aot_cases(arch: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """For tests/ops/aot_compile.py: every configuration, plain bf16 and everything on. sm_80 has no TMA."""
    pairs = dict.fromkeys(("tops", "totals", "top", "total"), "*fp32")
    cases: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
        (combine_splits_kernel, {**pairs, "rows": "i32", "splits": "i32", "BLOCK": COMBINED}, {"num_warps": 4})
    ]
    for config in CONFIGS.get(arch // 10, ()):
        for kind, scale, cap, bias in (("bf16", 1.0, 0.0, False), ("fp16", 0.0625, 30.0, True)):
            shape = config._asdict()
            options = {name: shape.pop(name) for name in ("num_warps", "num_stages")}
            arguments: dict[str, Any] = {
                "hidden": f"tensordesc<{kind}[{config.R}, {config.K}]>",
                "weight": f"tensordesc<{kind}[{config.C}, {config.K}]>",
                "bias": "*fp32:16", "offsets": "*i64", "labels": "*i64", "top": "*fp32", "total": "*fp32",
                "chosen": "*fp32", "rows": "i32", "columns": "i32", "tiles_each": "i32",
                "H": 4096, "SCALE": scale, "CAP": cap, "BIAS": bias, "GROUP": GROUP, **shape,
            }  # fmt: skip
            cases.append((statistics_kernel, arguments, options))
    return cases
