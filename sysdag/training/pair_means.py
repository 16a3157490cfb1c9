"""Means over pairs or unpaired runs of what steps measured, whatever the sizes of their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class PairMeans:
    """Adds up values by name until their means are taken; nan is no value."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values of one batch, (P,) each."""
        for name, column in values.items():
            known = column[~column.isnan()]
            self._sums[name] = self._sums.get(name, 0.0) + float(known.double().sum())
            self._counts[name] = self._counts.get(name, 0) + len(known)

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def state(self, add_up: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, list[float]]:
        """Sum and number of what was added by all processes, by name."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = add_up(torch.tensor([[self._sums[name], self._counts[name]] for name in names], dtype=torch.float64))
        return dict(zip(names, sums.tolist(), strict=True))

    def load(self, state: Mapping[str, Sequence[float]], *, of_all: bool) -> None:
        """Goes on from a `state`, which one of the processes takes (`of_all`), and the others as zeros."""
        self.clear()
        for name, (total, count) in state.items():
            self._sums[name], self._counts[name] = (total, int(count)) if of_all else (0.0, 0)

    def take(self, add_up: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The means since they were last taken, of all that have a value.

        Where the two sides of a margin have means and it has none, as of unpaired runs, it is their difference.

        Args:
            add_up: sums a tensor over processes, which have added the same names.
        """
        found = self.state(add_up)
        self.clear()
        means = {name: total / count for name, (total, count) in found.items() if count}
        return {**means, **_margins(means)}


def _margins(means: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for name, chosen in means.items():
        whose, rewards, side = name.rpartition("rewards/")
        margin, other = f"{whose}rewards/margins", f"{whose}rewards/rejected"
        if rewards and side == "chosen" and margin not in means and other in means:
            found[margin] = chosen - means[other]
    return found
