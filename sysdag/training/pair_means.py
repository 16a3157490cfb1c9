"""Means over preference pairs of what steps measured, whatever the sizes of their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class PairMeans:
    """Adds up values of pairs, by name, until their means are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values of one batch, (P,) each."""
        for name, column in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(column.double().sum())
            self._counts[name] = self._counts.get(name, 0) + len(column)

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def take(self, add_up: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means since they were last taken.

        Args:
            add_up: sums a tensor over processes, which have added the same names.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.tensor([[self._sums[name], self._counts[name]] for name in names])
        total, count = add_up(sums).T
        self.clear()
        return dict(zip(names, (total / count).tolist(), strict=True))
