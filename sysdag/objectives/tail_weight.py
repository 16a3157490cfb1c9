"""Weights of the tokens behind the length that both sides of a pair have.

LD-DPO (Liu et al. 2024, arXiv 2409.06411), node by node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sysdag.components.component import Component
from sysdag.execution.execute import flat_draws
from sysdag.traces.cells import ABSENT, Cell


@dataclass(frozen=True)
class TailWeight:
    """What the terms of one node's draws weigh; in a term it has the place that a bound's noise has.

    Attributes:
        heads: for each draw, how many of its first terms count whole.
        tail: the weight of those behind them, in [0, 1].
    """

    heads: tuple[int, ...]
    tail: float

    def select(self, elements: Sequence[int]) -> TailWeight:
        """Those of some of the draws."""
        return replace(self, heads=tuple(self.heads[element] for element in elements))


def shared_lengths(component: Component, cells: Sequence[Cell], tail: float) -> TailWeight:
    """Of winners followed by losers: each draw's length that the other side has too, element by element of a plate.

    A draw counts whole where the other side takes another branch.
    """
    lengths = [component.lengths(flat_draws([cell])) for cell in cells]
    count = len(cells) // 2
    heads = []
    for row, own in enumerate(lengths):
        other = lengths[(row + count) % (2 * count)]
        if cells[(row + count) % (2 * count)] is ABSENT:
            heads += own
            continue
        heads += [min(length, other[place]) if place < len(other) else 0 for place, length in enumerate(own)]
    return TailWeight(tuple(heads), tail)
