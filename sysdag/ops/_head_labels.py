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


def group(rows: Tensor, labels: Tensor, ignore_index: int, num_rows: int, vocabulary: int) -> Grouped:
    """Groups labels by row and leaves out those that are ignored.

    Raises:
        ValueError: for a row or label out of range.
    """
    places = (labels != ignore_index).nonzero()[:, 0]
    rows, labels = rows[places].long(), labels[places].long()
    if len(places):
        for what, values, end in (("rows", rows, num_rows), ("labels", labels, vocabulary)):
            low, high = torch.stack([values.min(), values.max()]).tolist()
            if low < 0 or high >= end:
                wrong = low if low < 0 else high
                raise ValueError(f"linear_logprob: {what} must be in [0, {end}), got {wrong}.")
    keys, order = (rows * vocabulary + labels).sort()
    rows, labels = rows[order], labels[order]
    distinct, counts = rows.unique_consecutive(return_counts=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return Grouped(distinct, Labels(offsets, labels), places[order], first)


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of the segments between offsets, in a fixed order and without atomics."""
    if len(values) == len(offsets) - 1:
        return values
    return F.pad(values.double().cumsum(0), (1, 0))[offsets].diff().to(values.dtype)
