"""Where a graph's boxes and arrows go: levels from top to bottom, arrows around the boxes of the levels they pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sysdag.reporting.formats import breadth, fitted
from sysdag.reporting.topology import Topology

BOX_HEIGHT, GAP_X, GAP_Y, MARGIN, LANE = 62, 26, 44, 12, 18
LETTER = 7.6
"""Width of a letter of the boxes' names, about."""
SMALL_LETTER = 6.2
"""And of their small texts."""
LEAST_WIDTH, MOST_WIDTH = 184, 300
SWEEPS = 8


@dataclass(frozen=True)
class Box:
    """A box's centre and size."""

    name: str
    x: float
    y: float
    width: float
    height: float

    @property
    def title(self) -> str:
        """The name, as far as there is room for it."""
        return fitted(self.name, (self.width - 12) / LETTER)

    def squeezes(self, text: str) -> bool:
        """Whether a small text has to be set closer to stay within."""
        return SMALL_LETTER * breadth(text) > self.width - 12


@dataclass(frozen=True)
class Arrow:
    """An arrow as SVG path data; `each` of a plate, `beside` what stands at its head, the place (x, y)."""

    parent: str
    child: str
    path: str
    each: bool
    beside: str = ""
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A picture of a graph, in pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


def lay_out(topology: Topology) -> Layout:
    """Boxes of one level side by side, in an order with few crossings; an arrow has a lane in each level it passes."""
    level = {name: depth for depth, names in enumerate(topology.levels) for name in names}
    rows: list[list[str]] = [list(names) for names in topology.levels]
    width = {name: min(MOST_WIDTH, max(LEAST_WIDTH, LETTER * breadth(name) + 28)) for name in level}
    routes = {}
    for number, (parent, child, _) in enumerate(topology.edges):
        lanes = [f"{number} {depth}" for depth in range(level[parent] + 1, level[child])]  # no name has a space
        for depth, lane in enumerate(lanes, start=level[parent] + 1):
            rows[depth].append(lane)
            width[lane] = LANE
        routes[number] = [parent, *lanes, child]
    links = [pair for route in routes.values() for pair in itertools.pairwise(route)]
    _order(rows, links)
    whole = max(sum(width[name] + GAP_X for name in row) - GAP_X for row in rows) + 2 * MARGIN
    x = _columns(rows, width, links, whole)
    row_of = {name: depth for depth, row in enumerate(rows) for name in row}
    y = {name: MARGIN + BOX_HEIGHT / 2 + depth * (BOX_HEIGHT + GAP_Y) for name, depth in row_of.items()}
    boxes = tuple(
        Box(n, round(x[n], 1), y[n], round(width[n], 1), BOX_HEIGHT) for names in topology.levels for n in names
    )

    def arrow(number: int, parent: str, child: str, each: bool) -> Arrow:
        path, beside = _path([(x[n], y[n]) for n in routes[number]]), topology.beside.get((parent, child), "")
        return Arrow(parent, child, path, each, beside, round(x[child], 1), round(y[child] - BOX_HEIGHT / 2 - 10, 1))

    arrows = tuple(arrow(number, *edge) for number, edge in enumerate(topology.edges))
    height = 2 * MARGIN + len(rows) * BOX_HEIGHT + (len(rows) - 1) * GAP_Y
    return Layout(round(whole, 1), height, boxes, arrows)


def _order(rows: list[list[str]], links: Sequence[tuple[str, str]]) -> None:
    """Sorts each row by the mean place of its neighbours above, then below, and so on."""
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for parent, child in links:
        above.setdefault(child, []).append(parent)
        below.setdefault(parent, []).append(child)
    for sweep in range(SWEEPS):
        neighbours = above if sweep % 2 == 0 else below
        place = {name: (at + 0.5) / len(row) for row in rows for at, name in enumerate(row)}
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            row.sort(key=lambda name: _mean([place[n] for n in neighbours.get(name, [])], place[name]))
            place |= {name: (at + 0.5) / len(row) for at, name in enumerate(row)}


def _columns(
    rows: Sequence[Sequence[str]], width: Mapping[str, float], links: Sequence[tuple[str, str]], whole: float
) -> dict[str, float]:
    """Centres of boxes and lanes: near the mean of their neighbours, without overlap, within the picture."""
    x: dict[str, float] = {}
    for row in rows:
        left = (whole - sum(width[name] + GAP_X for name in row) + GAP_X) / 2
        for name in row:
            x[name] = left + width[name] / 2
            left += width[name] + GAP_X
    around: dict[str, list[str]] = {}
    for parent, child in links:
        around.setdefault(parent, []).append(child)
        around.setdefault(child, []).append(parent)
    for _ in range(SWEEPS):
        for row in rows:
            wanted = [_mean([x[n] for n in around.get(name, [])], x[name]) for name in row]
            x |= dict(zip(row, _apart(wanted, [width[name] for name in row], whole), strict=True))
    return x


def _apart(wanted: Sequence[float], widths: Sequence[float], whole: float) -> list[float]:
    """Centres in the given order, apart from each other and from the borders, near the wanted ones."""
    left: list[float] = []
    for at, (want, width) in enumerate(zip(wanted, widths, strict=True)):
        least = MARGIN + width / 2 if at == 0 else left[-1] + widths[at - 1] / 2 + GAP_X + width / 2
        left.append(max(want, least))
    right: list[float] = []
    for at in range(len(wanted) - 1, -1, -1):
        width = widths[at]
        most = whole - MARGIN - width / 2 if not right else right[-1] - widths[at + 1] / 2 - GAP_X - width / 2
        right.append(min(left[at], most))
    return right[::-1]


def _path(places: Sequence[tuple[float, float]]) -> str:
    """From the lower edge of the first box to the upper edge of the last, straight through the lanes between."""
    (x, y), half = places[0], BOX_HEIGHT / 2
    start = (x, y + half)
    parts = [f"M{start[0]:.1f} {start[1]:.1f}"]
    for at, (x, y) in enumerate(places[1:], start=1):
        end = (x, y - half - (3 if at == len(places) - 1 else 0))  # room for the arrow's head
        middle = (start[1] + end[1]) / 2
        parts.append(f"C{start[0]:.1f} {middle:.1f} {end[0]:.1f} {middle:.1f} {end[0]:.1f} {end[1]:.1f}")
        if at < len(places) - 1:
            start = (x, y + half)
            parts.append(f"L{start[0]:.1f} {start[1]:.1f}")
    return "".join(parts)


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
