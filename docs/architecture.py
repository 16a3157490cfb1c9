"""The packages of sysdag as their imports show them.

`ROOMS` is the order from the bottom up, which tests/test_architecture.py holds: a package imports from those before it,
never from those after it. `python docs/architecture.py` draws them into images/architecture.svg and writes the table of
architecture.md.
"""

from __future__ import annotations

import ast
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sysdag"
PAGE = Path(__file__).with_name("architecture.md")
PICTURE = Path(__file__).parent / "images" / "architecture.svg"
START, END = "<!-- rooms -->", "<!-- /rooms -->"
STOREY, HALF = 0.72, 0.2  # inches from floor to floor, and half a room's height

# From the bottom up, each with what it is for.
ROOMS = {
    "errors": "what sysdag raises on purpose: every error names node, row or option and what to do",
    "versions": "the versions that a run was made with",
    "files": "what lies on a disk, and how it gets there whole",
    "endpoints": "services behind a URL: requests, retries, keys",
    "graph": "the language: variables, arrows, plates, loops; the plan. No torch",
    "traces": "what a run leaves behind: draws, traces, and rows in files. No torch",
    "kernels": "Triton kernels, one file an op",
    "ops": "tensor operations, one file an op: reference in torch, autograd, the choice of the backend",
    "components": "what a node draws from: the protocol, adapters, and what models share",
    "components.discrete": "one of finitely many values, and what has no likelihood",
    "components.language": "language models: prompts, decoding, packed scoring",
    "components.diffusion": "diffusion and flow matching: conditioning, noise, images, pipelines",
    "components.selection": "choices among options that come with the input: scorers, one option or an ordered few",
    "saving": "a system as a folder that its models' own libraries read",
    "execution": "running a plan, here or on Ray; its likelihood",
    "data": "preference rows, checked, as pairs",
    "evaluation": "judging runs, comparing systems, statistics",
    "labelling": "people's preferences, on a page that the machine serves to itself",
    "objectives": "what is optimised: candidates, comparisons, losses, their options",
    "engine": "one step: score, differentiate, replay; its memory",
    "training": "the trainer around the engine: config, references, checkpoints, record; rounds and sweeps of it",
    "reporting": "one HTML file about a training",
    "theory": "Theorem 1 on systems that can be enumerated",
    "commands": "the commands of `sysdag`, one file each",
    "cli": "the `sysdag` program",
}


@dataclass(frozen=True)
class Import:
    """One module of sysdag importing another, by their full names.

    Attributes:
        scope: the enclosing functions and classes, joined by dots; "" at module level.
    """

    importer: str
    imported: str
    scope: str


def room_of(module: str) -> str:
    """The package that a module of sysdag is in: the longest of `ROOMS` that its name begins with.

    Raises:
        KeyError: for a module that is in none.
    """
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (room := ".".join(parts[:length])) in ROOMS:
            return room
    raise KeyError(module)


def modules() -> dict[str, Path]:
    """Every module that is no `__init__`, by its full name; Triton's kernels under the name they are imported by."""
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py" and path != PACKAGE / "kernels.py"
    }
    return found | {f"sysdag.kernels.{path.stem}": path for path in sorted((ROOT / "kernels").glob("*.py"))}


def imports() -> list[Import]:
    """Every import of sysdag by itself, those inside functions too; those under `if TYPE_CHECKING` are left out.

    So is `sysdag` itself: its `__init__` has nothing but the version and the names that packages hand on.
    """
    known = set(modules())
    return [found for name, path in modules().items() for found in _imports_of(name, path, known)]


def _imports_of(importer: str, path: Path, known: set[str]) -> Iterator[Import]:
    def visit(node: ast.AST, scope: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("sysdag."):
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(importer, whole if whole in known else child.module or "", scope)
            if isinstance(child, ast.Import):
                yield from (Import(importer, a.name, scope) for a in child.names if a.name.startswith("sysdag."))
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            yield from visit(child, f"{scope}.{child.name}".strip(".") if named else scope)

    return visit(ast.parse(path.read_text(encoding="utf-8")), "")


def arrows() -> networkx.DiGraph:
    """Which room imports which, as few arrows as say so: what a path of others says is left out.

    The façades' imports, which point up, are no arrows.
    """
    order = list(ROOMS)
    graph = networkx.DiGraph()
    graph.add_nodes_from(order)
    for found in imports():
        importer, imported = room_of(found.importer), room_of(found.imported)
        if order.index(imported) < order.index(importer):
            graph.add_edge(importer, imported)
    return networkx.transitive_reduction(graph)


def floors(graph: networkx.DiGraph) -> list[list[str]]:
    """The rooms by height, from the ground up: every arrow goes to a floor below.

    A room stands as low as it can; or just below what imports it, where that makes its arrows shorter.
    """
    downwards = sorted(graph, key=list(ROOMS).index, reverse=True)
    height: dict[str, int] = {}
    for room in reversed(downwards):
        height[room] = 1 + max((height[below] for below in graph[room]), default=-1)
    for room in downwards:
        above = [height[importer] for importer in graph.predecessors(room)]
        if above and graph.out_degree(room) < len(above):
            height[room] = min(above) - 1
    return [[room for room in ROOMS if height[room] == at] for at in range(max(height.values()) + 1)]


Stop = str | tuple[str, str, int]
"""What stands on a floor: a room, or an arrow that passes it (importer, imported, floor)."""


def _routes(graph: networkx.DiGraph) -> dict[tuple[str, str], list[Stop]]:
    """The stops of each arrow, floor by floor downwards."""
    height = {room: at for at, rooms in enumerate(floors(graph)) for room in rooms}
    return {
        (top, below): [top, *((top, below, at) for at in range(height[top] - 1, height[below], -1)), below]
        for top, below in sorted(graph.edges, key=lambda edge: [list(ROOMS).index(room) for room in edge])
    }


def ordered(graph: networkx.DiGraph) -> list[list[Stop]]:
    """The stops of each floor from left to right, by the middle of their neighbours: the best of 24 sweeps."""
    plan = floors(graph)
    routes = _routes(graph)
    pairs = [pair for stops in routes.values() for pair in itertools.pairwise(stops)]
    floor_of: dict[Stop, int] = {room: at for at, rooms in enumerate(plan) for room in rooms}
    floor_of |= {stop: stop[2] for stops in routes.values() for stop in stops[1:-1]}
    found: list[list[Stop]] = [[stop for stop in floor_of if floor_of[stop] == at] for at in range(len(plan))]
    neighbours: dict[Stop, list[Stop]] = {stop: [] for stop in floor_of}
    for top, below in pairs:
        neighbours[top].append(below)
        neighbours[below].append(top)

    def crossings(floors_: list[list[Stop]]) -> int:
        place = {stop: at for floor in floors_ for at, stop in enumerate(floor)}
        return sum(
            floor_of[a] == floor_of[c] and (place[a] - place[c]) * (place[b] - place[d]) < 0
            for (a, b), (c, d) in itertools.combinations(pairs, 2)
        )

    best = found
    for sweep in range(24):
        upwards = sweep % 2 == 0
        found = [list(floor) for floor in found]
        for at in range(len(found)) if upwards else range(len(found) - 1, -1, -1):
            place = {stop: (i + 0.5) / len(floor) for floor in found for i, stop in enumerate(floor)}

            def middle(stop: Stop, place: dict[Stop, float] = place, at: int = at, upwards: bool = upwards) -> float:
                asked = [place[n] for n in neighbours[stop] if (floor_of[n] < at) == upwards]
                return sum(asked) / len(asked) if asked else place[stop]

            found[at].sort(key=middle)
        best = min(best, found, key=crossings)
    return best


def _columns(
    house: Sequence[Sequence[Stop]], routes: Mapping[tuple[str, str], list[Stop]], widths: Mapping[Stop, float]
) -> dict[Stop, float]:
    """The middle of every stop, such that arrows lean as little as can be: a linear program over the distances."""
    import numpy
    from scipy.optimize import linprog

    stops = [stop for floor in house for stop in floor]
    column = {stop: number for number, stop in enumerate(stops)}
    pairs = [pair for route in routes.values() for pair in itertools.pairwise(route)]
    rows, bounds = [], []
    for number, (top, below) in enumerate(pairs):  # |x_top - x_below| <= distance, the variables after the columns
        for sign in (1, -1):
            row = numpy.zeros(len(stops) + len(pairs))
            row[column[top]], row[column[below]], row[len(stops) + number] = sign, -sign, -1
            rows.append(row)
            bounds.append(0.0)
    for floor in house:
        for left, right in itertools.pairwise(floor):
            row = numpy.zeros(len(stops) + len(pairs))
            row[column[left]], row[column[right]] = 1, -1
            rows.append(row)
            bounds.append(-(widths[left] + widths[right]) / 2)
    inner = [sum(not isinstance(stop, str) for stop in pair) for pair in pairs]
    cost = [*[0.0] * len(stops), *(1.0 + 2 * passing for passing in inner)]
    solved = linprog(cost, A_ub=numpy.array(rows), b_ub=bounds, bounds=(0, None))
    return dict(zip(stops, solved.x.tolist(), strict=False))


def draw(path: Path) -> None:
    """The rooms as a house: every arrow goes from a room to one that it imports, on a floor below.

    Args:
        path: of the picture; its ending chooses the format.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Line

    matplotlib.rcParams["svg.hashsalt"] = "sysdag"  # the same file each time
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    graph = arrows()
    house, routes = ordered(graph), _routes(graph)
    height = {stop: STOREY * at for at, floor in enumerate(house) for stop in floor}
    half = {stop: 0.048 * len(stop) + 0.15 if isinstance(stop, str) else 0.0 for stop in height}
    x = _columns(house, routes, {stop: 2 * half[stop] + 0.3 for stop in height})
    left = min(x[stop] - half[stop] for stop in x) - 0.1
    right = max(x[stop] + half[stop] for stop in x) + 0.1
    size = (right - left, STOREY * len(house))
    figure = Figure(figsize=size, dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(-STOREY / 2, size[1] - STOREY / 2))
    axes.set_axis_off()
    for (top, below), stops in routes.items():
        points, codes = [(x[top], height[top] - HALF)], [Line.MOVETO]
        for stop in stops[1:]:
            end = (x[stop], height[stop] + HALF)
            middle = (points[-1][1] + end[1]) / 2
            points += [(points[-1][0], middle), (end[0], middle), end]
            codes += [Line.CURVE4] * 3
            if stop != below:  # straight down between the rooms of that floor
                points.append((x[stop], height[stop] - HALF))
                codes.append(Line.LINETO)
        arrow = FancyArrowPatch(path=Line(points, codes), arrowstyle="-|>", mutation_scale=9, color="#777777")
        arrow.set_gid(f"arrow:{top}:{below}")
        axes.add_patch(arrow)
    for room in (stop for floor in reversed(house) for stop in floor if isinstance(stop, str)):
        corner = (x[room] - half[room], height[room] - HALF)
        box = FancyBboxPatch(
            corner, 2 * half[room], 2 * HALF, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor="#fbe3c8" if "components" in room else "#dce9f7", edgecolor="#333333",
        )  # fmt: skip
        box.set_gid(f"room:{room}")
        axes.add_patch(box)
        axes.text(x[room], height[room], room, ha="center", va="center", fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, facecolor="white")


def table() -> str:
    """The rooms from the top down, one line each."""
    lines = [f"| `{_home(room)}` | {what} |" for room, what in reversed(ROOMS.items())]
    return "\n".join(["| room | what it is for |", "|---|---|", *lines])


def _home(room: str) -> str:
    """The path of a room in the checkout: a folder, or one file."""
    if room == "kernels":
        return "kernels/"
    path = PACKAGE / room.replace(".", "/")
    return f"sysdag/{path.relative_to(PACKAGE)}/" if path.is_dir() else f"sysdag/{room}.py"


def written(text: str) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    draw(PICTURE)
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
