"""What a packed row's tokens attend to, cut into pieces that attention kernels compute without a mask.

A run of tokens without branches (a stem) attends to itself causally, and all that stands below it, which is the columns
from its end to its subtree's, attends to all of it. These triangles and rectangles are every pair of a token and one of
its ancestors, once. What is small stays together: a tree, or all trees below a stem, may be one square with a mask.

The choice is by work, in pairs of a query and a key: a triangle of s tokens is s^2 / 2, a rectangle its area, a masked
square its area too, and each piece costs a call on top.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy

from sysdag.components.language.token_trie import TokenTrie

# What a call costs, forward and backward, in pairs times the width of the queries (heads times their size).
CALL = 400_000


class Kind(Enum):
    """Which keys of a piece its queries attend to: those not behind them, all, or what a mask says."""

    CAUSAL = "causal"
    ALL = "all"
    MASKED = "masked"


@dataclass(frozen=True)
class Piece:
    """Queries and keys of one row.

    Attributes:
        row: which one.
        queries, keys: their columns.
        kind: which of the keys are attended to.
        opens: whether no piece before it has these queries.
    """

    row: int
    queries: slice
    keys: slice
    kind: Kind
    opens: bool


def pieces(trie: TokenTrie, width: int, call: float | None = None) -> tuple[Piece, ...]:
    """The pieces of a trie's rows, padding included; none where one square for each whole row is no more work.

    Args:
        trie: in host memory.
        width: of the queries.
        call: instead of `CALL`. With 0 nothing has a mask.
    """
    call = CALL if call is None else call
    rows, columns = trie.tokens.shape
    price = call / width
    found: list[Piece] = []
    work = 0.0
    for row, length in enumerate(trie.lengths.tolist()):
        trees = _Trees(trie.parent[row, :length].numpy(), trie.end[row, :length].numpy(), price)
        work += trees.work
        found += trees.pieces(row)
        if length < columns:  # nobody reads padding; here it attends to padding
            padding = slice(length, columns)
            found.append(Piece(row, padding, padding, Kind.CAUSAL, True))
            work += _triangle(columns - length, price)
    return tuple(found) if work < price + rows * columns**2 or not call else ()


def one_branch(stem: int, tokens: int, rows: int = 1) -> tuple[Piece, ...]:
    """The pieces of rows that have, each, a stem of so many tokens and a branch with the rest."""
    first, rest = slice(0, max(stem, 1)), slice(max(stem, 1), tokens)
    found: list[Piece] = []
    for row in range(rows):
        found.append(Piece(row, first, first, Kind.CAUSAL, True))
        if rest.start < tokens:
            found += [Piece(row, rest, first, Kind.ALL, True), Piece(row, rest, rest, Kind.CAUSAL, False)]
    return tuple(found)


def _triangle(tokens: int, price: float) -> float:
    return price + tokens**2 / 2


def _rectangle(queries: int, keys: int, price: float) -> float:
    return price + queries * keys


@dataclass
class _Trees:
    """The stems of one row in preorder, and the least work for what is below each.

    Attributes:
        parent, end: (T,) see `TokenTrie`.
        price: of a call, in pairs.
        work: of the whole row.
    """

    parent: numpy.ndarray
    end: numpy.ndarray
    price: float
    work: float = field(init=False)

    def __post_init__(self) -> None:
        goes_on = numpy.zeros(len(self.parent), dtype=bool)
        goes_on[1:] = (self.parent[1:] == numpy.arange(len(self.parent) - 1)) & (self.end[1:] == self.end[:-1])
        starts = numpy.flatnonzero(~goes_on)
        above = numpy.where(self.parent[starts] < 0, -1, numpy.searchsorted(starts, self.parent[starts], "right") - 1)
        self._starts = starts.tolist()
        self._stops = [*self._starts[1:], len(self.parent)]
        self._ends = self.end[starts].tolist()
        count = len(self._starts)
        self._below: list[list[int]] = [[] for _ in range(count + 1)]  # the last: the trees of the row
        for stem, parent in enumerate(above.tolist()):
            self._below[parent].append(stem)
        self._together = [False] * (count + 1)  # whether all trees below a stem are one square
        self._whole = [False] * count  # whether a stem and all below it are
        apart = [0.0] * (count + 1)
        for stem in reversed(range(count)):
            start, stop, end = self._starts[stem], self._stops[stem], self._ends[stem]
            work = _triangle(stop - start, self.price)
            if stop < end:
                work += _rectangle(end - stop, stop - start, self.price) + self._forest(stem, stop, end, apart[stem])
            square = _rectangle(end - start, end - start, self.price)
            self._whole[stem] = square < work
            parent = int(above[stem])
            apart[parent] += min(square, work)
        self.work = self._forest(-1, 0, len(self.parent), apart[-1])

    def _forest(self, stem: int, start: int, end: int, apart: float) -> float:
        square = _rectangle(end - start, end - start, self.price)
        self._together[stem] = square < apart
        return min(square, apart)

    def pieces(self, row: int) -> list[Piece]:
        found = []
        forests = [(-1, 0, len(self.parent))]
        while forests:
            above, first, last = forests.pop()
            opens = above < 0
            if self._together[above]:
                columns = slice(first, last)
                found.append(Piece(row, columns, columns, Kind.MASKED, opens))
                continue
            for stem in self._below[above]:
                start, stop, end = self._starts[stem], self._stops[stem], self._ends[stem]
                if self._whole[stem]:
                    columns = slice(start, end)
                    found.append(Piece(row, columns, columns, Kind.MASKED, opens))
                    continue
                columns = slice(start, stop)
                found.append(Piece(row, columns, columns, Kind.CAUSAL, opens))
                if stop < end:
                    found.append(Piece(row, slice(stop, end), columns, Kind.ALL, opens))
                    forests.append((stem, stop, end))
        return found
