"""What a tile of the head's logits is folded into, in plain torch, C++ or Triton: the inner steps of `linear_logprob`.

A tile `z` (R, C) is the head's product for R rows and the tokens [start, start + C). With b the bias and c the softcap,
a row's logits are x = cap(scale z + b), cap(u) = c tanh(u / c), slope(x) = dx/du = 1 - (x / c)^2.

Running statistics of each row are `top` (the largest logit) and `total` (the sum of exp(x - top)), apart: their sum
lse = top + log(total) would round away what a large common offset leaves. The labels of row r are
`labels[offsets[r] : offsets[r + 1]]`, sorted, and `chosen` holds their logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sysdag.ops._dispatch import Backend
from sysdag.ops._head_labels import Labels


@dataclass(frozen=True)
class Tile:
    """A tile of logits and what it needs to know of the head."""

    z: Tensor  # (R, C)
    start: int
    scale: float
    bias: Tensor | None  # (C,) of these tokens, in z's dtype
    softcap: float  # 0: none
    targets: Labels  # of these rows

    def logits(self) -> Tensor:
        """x (R, C)."""
        x = self.z * self.scale
        if self.bias is not None:
            x += self.bias
        return x if self.softcap == 0 else self.softcap * torch.tanh(x / self.softcap)

    def slope(self, x: Tensor) -> Tensor:
        return torch.ones_like(x) if self.softcap == 0 else 1 - (x / self.softcap) ** 2

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """The labels in this tile: their places among all labels, rows and columns."""
        offsets, labels = self.targets.offsets, self.targets.labels
        first = offsets[0]
        rows = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=labels.device), offsets.diff())
        columns = labels[int(first) : int(offsets[-1])] - self.start
        inside = ((columns >= 0) & (columns < self.z.shape[1])).nonzero()[:, 0]
        return inside + first, rows[inside], columns[inside]


class Folds(NamedTuple):
    """The steps of one backend.

    stats(tile, top, total, chosen): updates the three in place.
    unit(tile, top, total, chosen, acc, out): the same; out (R, C) <- exp(x - top) slope(x), with 0 at the rows' labels,
        and `acc` (R, H) is rescaled to the new top.
    slope(tile, top, total, chosen, grads, row_grads, out): out <- -G p slope(x), and (g_m - G p) slope(x) at label m,
        with p = exp(x - top) / total. Equal labels of a row have the same g: the sum of theirs.
    combine(unit, weight, targets, coefficients, row_grads, out): out <- -G unit + sum_m coefficient_m weight[label_m].

    `out` of unit and slope has the dtype of the next product's operands; where that is z's, it may be z.
    """

    stats: Callable[[Tile, Tensor, Tensor, Tensor], None]
    unit: Callable[[Tile, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    slope: Callable[[Tile, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    combine: Callable[[Tensor, Tensor, Labels, Tensor, Tensor, Tensor], None]


def _running(x: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Updates `top` and `total`; returns exp(x - top) and what earlier sums were multiplied by."""
    now = torch.maximum(top, x.amax(-1))
    base = now.masked_fill(now == -torch.inf, 0.0)
    rescale = (top - base).exp()
    e = (x - base[:, None]).exp()
    total.mul_(rescale).add_(e.sum(-1))
    top.copy_(now)
    return e, rescale


def torch_stats(tile: Tile, top: Tensor, total: Tensor, chosen: Tensor) -> None:
    x = tile.logits()
    places, rows, columns = tile.found()
    chosen[places] = x[rows, columns]
    _running(x, top, total)


def torch_unit(tile: Tile, top: Tensor, total: Tensor, chosen: Tensor, acc: Tensor, out: Tensor) -> None:
    x = tile.logits()
    places, rows, columns = tile.found()
    chosen[places] = x[rows, columns]
    e, rescale = _running(x, top, total)
    if tile.softcap:
        e *= tile.slope(x)
    e[rows, columns] = 0
    acc.mul_(rescale[:, None])
    out.copy_(e)


def torch_slope(
    tile: Tile, top: Tensor, total: Tensor, chosen: Tensor, grads: Tensor, row_grads: Tensor, out: Tensor
) -> None:
    x = tile.logits()
    dz = (x - top[:, None]).exp_().mul_((-row_grads / total)[:, None])
    if tile.softcap:
        dz *= tile.slope(x)
    places, rows, columns = tile.found()
    p = (chosen[places] - top[rows]).exp() / total[rows]
    dz[rows, columns] = (grads[places] - row_grads[rows] * p) * tile.slope(chosen[places])
    out.copy_(dz)


def torch_combine(
    unit: Tensor, weight: Tensor, targets: Labels, coefficients: Tensor, row_grads: Tensor, out: Tensor
) -> None:
    rows = torch.repeat_interleave(torch.arange(len(out), device=out.device), targets.offsets.diff())
    total = unit * -row_grads[:, None]
    for part in torch.arange(len(rows), device=out.device).split(4096):
        added = weight[targets.labels[part]].to(total.dtype) * coefficients[part, None]
        total.index_put_((rows[part],), added, accumulate=True)
    out.copy_(total)


def _cpp_tile(tile: Tile) -> tuple[Tensor, float, Tensor | None, float, int, Tensor, Tensor]:
    return tile.z, tile.scale, tile.bias, tile.softcap, tile.start, tile.targets.offsets, tile.targets.labels


def cpp_stats(tile: Tile, top: Tensor, total: Tensor, chosen: Tensor) -> None:
    torch.ops.sysdag_C.linear_logprob_stats(*_cpp_tile(tile), top, total, chosen)


def cpp_unit(tile: Tile, top: Tensor, total: Tensor, chosen: Tensor, acc: Tensor, out: Tensor) -> None:
    torch.ops.sysdag_C.linear_logprob_unit(*_cpp_tile(tile), top, total, chosen, acc)
    if out is not tile.z:
        out.copy_(tile.z)


def cpp_slope(
    tile: Tile, top: Tensor, total: Tensor, chosen: Tensor, grads: Tensor, row_grads: Tensor, out: Tensor
) -> None:
    torch.ops.sysdag_C.linear_logprob_slope(*_cpp_tile(tile), top, total, chosen, grads, row_grads, out)


def cpp_combine(
    unit: Tensor, weight: Tensor, targets: Labels, coefficients: Tensor, row_grads: Tensor, out: Tensor
) -> None:
    if not out.dtype == weight.dtype == unit.dtype or not weight.is_contiguous():
        return torch_combine(unit, weight, targets, coefficients, row_grads, out)
    torch.ops.sysdag_C.linear_logprob_combine(
        unit, weight, targets.offsets, targets.labels, coefficients, row_grads, out
    )


def folds(backend: Backend) -> Folds:
    """The steps of a backend that `resolve` chose."""
    if backend == "triton":
        from sysdag.kernels.linear_logprob import combine, slope, stats, unit

        return Folds(stats, unit, slope, combine)
    if backend == "cpp":
        return Folds(cpp_stats, cpp_unit, cpp_slope, cpp_combine)
    return Folds(torch_stats, torch_unit, torch_slope, torch_combine)
