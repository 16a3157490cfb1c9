"""The walk over tiles of the head's logits, forward and backward, that `linear_logprob` is made of.

A tile is some rows by some tokens: one product of the BLAS fills it, one fold reads it. On a CPU it stays in the last
cache; on a GPU it is larger, so that launches and the sums of tiles take little of a product's time. Tokens are the
outer loop, so a slice of the weight is read (or its gradient written) while it is at hand.

Three modes, by what needs a gradient (N rows, hidden size H, V tokens; a product is 2NHV operations):
  - nothing: 1 product, by the walk or by one fused kernel (`_head_fused.py`);
  - only `hidden` (the head is frozen): d/dh sum_m g_m logp_m = sum_m g_m W[y_m] - G sum_v p_v W_v is separable by row,
    so the forward already computes each row's p W (a running softmax, rescaled as its maximum rises) and the backward
    scales: 2 products in all, nothing of the weight's size is made. A row's own labels are left out of p W and added
    in the backward as (g_m - G p_m) W[y_m]: where p_m is near 1 the two would cancel, and in half precision nothing
    but rounding would be left;
  - the head too: the forward keeps the first tiles, as many as the budget allows, the backward recomputes the others:
    between 3 products and 4.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sysdag.ops._dispatch import Backend
from sysdag.ops._head_folds import Folds, Tile, folds
from sysdag.ops._head_fused import Problem, statistics
from sysdag.ops._head_labels import Grouped, Layout, layout, segment_sums, sums_of_equals

_ROWS = {"cpu": 1024, "cuda": 4096}
_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 25}  # of a tile: 8 MiB, and 128 MiB, of fp32
_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 18}
KEEP_VARIABLE = "SYSDAG_KEPT_LOGITS_MB"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_shape(capacity: int, vocabulary: int, device_type: str) -> tuple[int, int]:
    """Rows and tokens of a tile, for at most `capacity` rows."""
    kind = "cpu" if device_type == "cpu" else "cuda"
    rows = max(1, min(capacity, _ROWS[kind]))
    tokens = max(1024, min(_ELEMENTS[kind] // rows, _TOKENS[kind]) // 256 * 256)
    return rows, max(1, min(tokens, vocabulary))


def keep_budget(weight: Tensor, capacity: int) -> int:
    """Bytes of logits that the forward may keep for a trained head's backward, of at most `capacity` rows.

    `SYSDAG_KEPT_LOGITS_MB` says it; by default 2.25 (1 + H / capacity) times the weight's gradient in fp32 on a CPU,
    where the tiles give way to the gradient, and a sixteenth of the device's memory on a GPU.
    """
    index = weight.device.index if weight.device.type == "cuda" else None
    budget = _keep_budget(weight.device.type, index)
    if budget is None:
        rows, (vocabulary, width) = max(capacity, 1), weight.shape
        budget = 9 * vocabulary * width * (rows + width) // rows
    return budget


@functools.cache
def _keep_budget(device_type: str, index: int | None) -> int | None:
    named = os.environ.get(KEEP_VARIABLE)
    if named is not None:
        return int(float(named) * 2**20)
    return torch.cuda.get_device_properties(index).total_memory // 16 if device_type == "cuda" else None


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo and triton here.
_keep_budget._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tiles_kept(capacity: int, vocabulary: int, device_type: str, element_size: int, budget: int) -> int:
    """How many tiles of logits fit the budget."""
    rows, tokens = tile_shape(capacity, vocabulary, device_type)
    every = -(-max(capacity, 1) // rows) * -(-vocabulary // tokens)
    return min(every, budget // (rows * tokens * element_size))


@dataclass(frozen=True)
class Head:
    """The head's weight (V, H) and what follows its product."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float


class _Span(NamedTuple):
    place: int  # of the tile
    rows: slice
    tokens: slice


def _spans(num_rows: int, capacity: int, vocabulary: int, device_type: str) -> Iterator[_Span]:
    rows, tokens = tile_shape(capacity, vocabulary, device_type)
    index = 0
    for start in range(0, vocabulary, tokens):
        for row in range(0, num_rows, rows):
            yield _Span(index, slice(row, min(row + rows, num_rows)), slice(start, min(start + tokens, vocabulary)))
            index += 1


class _Walk:
    """Hidden rows, weight slices and tile buffers in the dtypes that the products need."""

    def __init__(self, hidden: Tensor, head: Head, grouped: Grouped, capacity: int, backend: Backend) -> None:
        self.head, self.grouped, self.capacity, self.backend = head, grouped, capacity, backend
        self.dtype = compute_dtype(hidden.dtype)
        self.tensor_cores = hidden.is_cuda and hidden.dtype != self.dtype  # half in, fp32 out
        every = len(grouped.rows) == len(hidden)
        self.hidden = hidden if every else hidden[grouped.rows]
        self.operand_dtype = hidden.dtype if self.tensor_cores else self.dtype
        self.hidden = self.hidden.to(self.operand_dtype)
        self.rows, self.tokens = tile_shape(capacity, head.weight.shape[0], hidden.device.type)
        self.elements = self.rows * self.tokens
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._slice: tuple[int, Tensor] = (-1, hidden)

    def spans(self) -> Iterator[_Span]:
        return _spans(len(self.hidden), self.capacity, self.head.weight.shape[0], self.hidden.device.type)

    def weight(self, tokens: slice) -> Tensor:
        if self._slice[0] != tokens.start:
            self._slice = (tokens.start, self.head.weight[tokens].to(self.operand_dtype))
        return self._slice[1]

    def tile(self, span: _Span, kept: Tensor | None, known: bool = False) -> Tile:
        """The tile's product, computed into `kept` or a buffer that the next tile reuses, or `known` already."""
        kept = self.buffer(self.dtype) if kept is None else kept
        rows, tokens = span.rows.stop - span.rows.start, span.tokens.stop - span.tokens.start
        z = kept[: rows * tokens].view(rows, tokens)
        if not known:
            self.product(self.hidden[span.rows], self.weight(span.tokens).t(), z, add=False)
        bias = self.head.bias
        bias = None if bias is None else bias[span.tokens].to(self.dtype)
        targets = self.grouped.targets.rows(span.rows.start, span.rows.stop)
        return Tile(z, span.tokens.start, self.head.scale, bias, self.head.softcap, targets)

    def output(self, tile: Tile, kept: bool) -> Tensor:
        """Where what a tile is folded into goes: its own memory, or beside it if that is to be kept or too wide."""
        if not self.tensor_cores and not kept:
            return tile.z
        return self.buffer(self.operand_dtype)[: tile.z.numel()].view_as(tile.z)

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """One tile's memory for each dtype: a tile of logits that is kept elsewhere leaves it to what comes of them."""
        if dtype not in self._buffers:
            self._buffers[dtype] = _large(self.hidden.new_empty(self.elements, dtype=dtype), self.backend)
        return self._buffers[dtype]

    def product(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """out <- a b, plus out; sums are in out's dtype, whatever the operands'."""
        if self.tensor_cores and out.dtype == torch.float32:
            if add:
                torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
            else:
                torch.mm(a, b, out_dtype=torch.float32, out=out)
        elif add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)


class Forward(NamedTuple):
    """What the forward leaves; sizes depend on the arguments' shapes alone, so places past R or L are filled up."""

    log_probs: Tensor  # (M,)
    top: Tensor  # (capacity,)
    total: Tensor  # (capacity,)
    chosen: Tensor  # (M,) logits of the grouped labels
    unit: Tensor  # (capacity, H) sum_v p_v slope_v W_v over tokens that are no labels of the row; or (0, H)
    kept: Tensor  # (tiles, elements)
    packed: Tensor  # of the layout, as `counts`
    counts: Tensor


def forward(
    hidden: Tensor, head: Head, rows: Tensor, labels: Tensor, ignore_index: int, backend: Backend, *, unit: bool,
    keep: int,
) -> Forward:  # fmt: skip
    """Log-probabilities; with `unit` each row's derivative, with `keep` that many tiles."""
    capacity = min(len(hidden), len(labels))
    arranged = layout(rows, labels, ignore_index, len(hidden), len(head.weight)).to(hidden.device)
    grouped = arranged.grouped(capacity, len(labels))
    walk = _Walk(hidden, head, grouped, capacity, backend)
    steps = folds(backend)
    top, total = (hidden.new_empty(capacity, dtype=walk.dtype) for _ in range(2))
    if unit or keep or len(grouped.rows) < capacity:  # else the statistics fill them
        top.fill_(-torch.inf)
        total.zero_()
    of_label = grouped.of_label
    # Places past those of the labels that are scored have to be filled up.
    labels_filled = hidden.new_empty if len(of_label) == len(labels) else hidden.new_zeros
    chosen = labels_filled(len(labels), dtype=walk.dtype)
    acc = hidden.new_zeros(capacity if unit else 0, hidden.shape[1], dtype=walk.dtype)
    kept = _large(hidden.new_empty(keep, walk.elements if keep else 0, dtype=walk.dtype), backend)
    seen = 0
    if unit or keep:
        for span in walk.spans():
            tile = walk.tile(span, kept[span.place] if span.place < keep else None)
            at = span.rows
            if unit:
                p = walk.output(tile, kept=False)
                steps.unit(tile, top[at], total[at], chosen, acc[at], p)
                walk.product(p, walk.weight(span.tokens), acc[at], add=True)
            else:
                steps.stats(tile, top[at], total[at], chosen)
            if span.place < keep:
                kept[span.place, tile.z.numel() :].zero_()
            seen = span.place + 1
        if seen < keep:
            kept[seen:].zero_()
    else:
        count = len(grouped.rows)
        problem = Problem(walk.hidden.contiguous(), head.weight, head.bias, head.scale, head.softcap, grouped.targets)
        statistics(problem, backend, functools.partial(_chunked, walk, steps), top[:count], total[:count], chosen)
    log_total = total.log()
    if unit:
        means, sums = acc[: len(grouped.rows)], total[: len(grouped.rows), None]
        means.div_(sums) if head.scale == 1 else means.mul_(head.scale / sums)
    found = chosen[: len(of_label)] - top[of_label] - log_total[of_label]
    log_probs = labels_filled(len(labels), dtype=walk.dtype)
    log_probs[grouped.places] = found
    return Forward(log_probs, top, total, chosen, acc, kept, *arranged)


def _chunked(walk: _Walk, steps: Folds, top: Tensor, total: Tensor, chosen: Tensor) -> None:
    """Statistics alone, tile by tile."""
    top.fill_(-torch.inf)
    total.zero_()
    for span in walk.spans():
        steps.stats(walk.tile(span, None), top[span.rows], total[span.rows], chosen)


class Needs(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def backward(
    grad: Tensor, hidden: Tensor, head: Head, saved: Forward, backend: Backend, needs: Needs, release: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; of what needs none, a tensor without elements.

    With `release` the kept tiles' memory is given back once they are used, on a CPU tile by tile, so that dW takes
    their place; another backward computes them again.
    """
    capacity, dtype = len(saved.top), compute_dtype(hidden.dtype)
    grouped = Layout(saved.packed, saved.counts).grouped(capacity, len(grad))
    grads = grad[grouped.places].to(dtype)
    row_grads = segment_sums(grads, grouped.targets.offsets)
    grads = grads if grouped.distinct else sums_of_equals(grads, grouped.first)
    if len(saved.unit) or not (needs.weight or needs.bias):
        found = _scale_units(grouped, head, saved, grads, row_grads, folds(backend), hidden.dtype)
        return _spread(found, grouped.rows, hidden), hidden.new_empty(0, dtype=dtype), hidden.new_empty(0, dtype=dtype)
    return _retrace(hidden, head, grouped, capacity, saved, grads, row_grads, backend, needs, release)


def _large(memory: Tensor, backend: Backend) -> Tensor:
    """Fresh memory, on huge pages where a CPU's system gives them."""
    if backend == "cpp" and memory.nbytes >= 1 << 22:
        torch.ops.sysdag_C.advise_huge_pages(memory)
    return memory


def _scale_units(
    grouped: Grouped, head: Head, saved: Forward, grads: Tensor, row_grads: Tensor, steps: Folds, dtype: torch.dtype
) -> Tensor:
    """A frozen head: (R, H) from what the forward left."""
    of_label = grouped.of_label
    chosen = saved.chosen[: len(of_label)]
    p = (chosen - saved.top[of_label]).exp() / saved.total[of_label]
    coefficients = grads - row_grads[of_label] * p
    if head.scale != 1:
        coefficients = coefficients * head.scale
    if not grouped.distinct:
        coefficients = coefficients.where(grouped.first, 0.0)
    if head.softcap:
        coefficients = coefficients * (1 - (chosen / head.softcap) ** 2)
    count = len(grouped.rows)
    out = torch.empty(count, head.weight.shape[1], dtype=dtype, device=grads.device)
    steps.combine(saved.unit[:count], head.weight, grouped.targets, coefficients, row_grads, out)
    return out


def _retrace(
    hidden: Tensor, head: Head, grouped: Grouped, capacity: int, saved: Forward, grads: Tensor, row_grads: Tensor,
    backend: Backend, needs: Needs, release: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A trained head: tile by tile from the logits, kept or computed again."""
    walk, steps = _Walk(hidden, head, grouped, capacity, backend), folds(backend)
    count, (vocabulary, width) = len(grouped.rows), head.weight.shape
    dh = hidden.new_zeros(count if needs.hidden else 0, width, dtype=walk.dtype)
    dw = _large(hidden.new_empty(vocabulary if needs.weight else 0, width, dtype=head.weight.dtype), backend)
    # A slice of dw is rounded once: in the product where one tile has all rows, else after the last tile's.
    one_tile = count <= walk.rows and head.scale == 1 and dw.dtype == walk.operand_dtype
    direct = one_tile or dw.dtype == walk.dtype
    summed = hidden.new_empty(0 if direct or not needs.weight else walk.tokens, width, dtype=walk.dtype)
    db = hidden.new_zeros(vocabulary if needs.bias else 0, dtype=walk.dtype)
    if count == 0:
        dw.zero_()
    held = len(saved.kept) if saved.kept.untyped_storage().nbytes() else 0  # 0: an earlier backward released them
    consumes = release and backend == "cpp"
    try:
        for span in walk.spans():
            known = span.place < held
            if release and not known and held:
                saved.kept.untyped_storage().resize_(0)  # the rest of dw may have their place
                held = 0
            tile = walk.tile(span, saved.kept[span.place] if known else None, known)
            at = span.rows
            dz = walk.output(tile, known and not consumes)
            steps.slope(tile, saved.top[at], saved.total[at], saved.chosen, grads, row_grads[at], dz)
            if needs.hidden:
                walk.product(dz, walk.weight(span.tokens), dh[at], add=True)
            if needs.weight:
                into = dw[span.tokens] if direct else summed[: span.tokens.stop - span.tokens.start]
                walk.product(dz.t(), walk.hidden[at], into, add=at.start > 0)
                if at.stop == count and head.scale != 1:
                    into.mul_(head.scale)
                if at.stop == count and not direct:
                    dw[span.tokens] = into
            if needs.bias:
                db[span.tokens] += dz.sum(0, dtype=walk.dtype)
            if known and consumes:
                torch.ops.sysdag_C.discard_pages(saved.kept[span.place])
    finally:
        if consumes and held:  # what is gone must not be read again, whatever ended the walk
            saved.kept.untyped_storage().resize_(0)
    if head.scale != 1:
        dh.mul_(head.scale)
    found = _spread(dh.to(hidden.dtype), grouped.rows, hidden) if needs.hidden else hidden.new_empty(0)
    dw = dw if needs.weight else hidden.new_empty(0, dtype=walk.dtype)
    return found, dw, db.to(head.bias.dtype) if head.bias is not None and needs.bias else db


def _spread(found: Tensor, rows: Tensor, hidden: Tensor) -> Tensor:
    """Rows that were scored among all: the others have no gradient."""
    if len(rows) == len(hidden):
        return found
    out = torch.zeros_like(hidden)
    out[rows] = found
    return out
