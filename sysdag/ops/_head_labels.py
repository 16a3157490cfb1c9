"""Which rows `linear_logprob` computes, and the labels that each of them serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """The labels of R rows, grouped by row."""

    offsets: Tensor  # (R+1,)
    labels: Tensor  # (L,)

    def rows(self, start: int, end: int) -> Labels:
        """Those of some rows; `labels` stay all, so that places in them keep their meaning."""
        return Labels(self.offsets[start : end + 1], self.labels)


class Grouped(NamedTuple):
    """What is to be scored: the R rows that have labels, ascending, and their L labels sorted by row and token."""

    rows: Tensor  # (R,)
    targets: Labels
    places: Tensor  # (L,) of the labels, among the M that were given
    first: Tensor  # (L,) whether a label is the first of its row's equal ones
    of_label: Tensor  # (L,) the place of a label's row among the R
    distinct: bool  # whether no row has equal labels


class Layout(NamedTuple):
    """A `Grouped` in tensors whose sizes depend on those of the arguments alone, for a backward."""

    packed: Tensor  # its tensors one after the other, filled up to capacity rows and M labels
    counts: Tensor  # R, L, and how many of the L are the first of their row's equal ones; on the CPU

    def grouped(self, capacity: int, num_labels: int) -> Grouped:
        R, L, firsts = self.counts.tolist()
        sizes = [capacity, capacity + 1, *[num_labels] * 4]
        rows, offsets, labels, places, first, of_label = self.packed.split(sizes)
        targets = Labels(offsets[: R + 1], labels[:L])
        return Grouped(rows[:R], targets, places[:L], first[:L].bool(), of_label[:L], firsts == L)

    def to(self, device: torch.device) -> Layout:
        """The same with what kernels read on a device."""
        return Layout(self.packed.to(device, non_blocking=True), self.counts)

    @staticmethod
    def size(capacity: int, num_labels: int) -> int:
        return 2 * capacity + 1 + 4 * num_labels


def layout(rows: Tensor, labels: Tensor, ignore_index: int, num_rows: int, vocabulary: int) -> Layout:
    """Groups labels by row and leaves out those that are ignored, on the labels' device; a GPU is waited for once.

    Raises:
        ValueError: for a row or label out of range.
    """
    capacity, count = min(num_rows, len(labels)), len(labels)
    if count == 0:
        return Layout(rows.new_zeros(Layout.size(0, 0), dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    ignored, rows, labels = labels == ignore_index, rows.long(), labels.long()
    keys, places = (rows * vocabulary + labels).masked_fill(ignored, num_rows * vocabulary).sort()
    row_of = torch.div(keys, vocabulary, rounding_mode="floor")
    first, begins = torch.ones_like(keys, dtype=torch.bool), torch.ones_like(keys, dtype=torch.bool)
    first[1:], begins[1:] = keys[1:] != keys[:-1], row_of[1:] != row_of[:-1]
    of_label = begins.cumsum(0) - 1
    offsets = torch.searchsorted(of_label, torch.arange(capacity + 1, device=keys.device))
    ends = [*rows.masked_fill(ignored, 0).aminmax(), *labels.masked_fill(ignored, 0).aminmax()]
    kept = row_of < num_rows
    counts = torch.stack([(begins & kept).sum(), count - ignored.sum(), (first & kept).sum(), *ends]).cpu()
    if counts[1] > 0:
        for what, at, end in (("rows", 3, num_rows), ("labels", 5, vocabulary)):
            low, high = counts[at : at + 2].tolist()
            if low < 0 or high >= end:
                wrong = low if low < 0 else high
                raise ValueError(f"linear_logprob: {what} must be in [0, {end}), got {wrong}.")
    distinct = row_of[offsets[:-1].clamp(max=count - 1)]
    parts = [distinct, offsets, keys - row_of * vocabulary, places, first.long(), of_label]
    return Layout(torch.cat(parts), counts[:3].clone())


def sums_of_equals(values: Tensor, first: Tensor) -> Tensor:
    """(L,) for each label the sum over its row's equal ones, in a fixed order and without atomics."""
    run = first.cumsum(0)
    begin, end = torch.searchsorted(run, run), torch.searchsorted(run, run, right=True)
    sums = F.pad(values.double().cumsum(0), (1, 0))
    return torch.where(end - begin == 1, values, (sums[end] - sums[begin]).to(values.dtype))


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of the segments between offsets, in a fixed order and without atomics."""
    if len(values) == len(offsets) - 1:
        return values
    return F.pad(values.double().cumsum(0), (1, 0))[offsets].diff().to(values.dtype)
