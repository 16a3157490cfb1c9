"""Where the values are from that a node's function is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sysdag.components.input_reader import Argument
from sysdag.graph.plan import Plan
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace


class Origins:
    """The origins of one node's arguments.

    Args:
        plan, name: the node.
        trace: the values of its parents, and of what these were computed of as far as they are known.
    """

    def __init__(self, plan: Plan, trace: Trace, name: str) -> None:
        known = trace.inputs.keys() | trace.cells.keys()
        self._of = {}
        self._cells = {edge.parameter: (trace.cells.get(edge.parent), edge.each) for edge in plan.arguments(name)}
        for edge in plan.arguments(name):
            behind = [(_origin(plan, each), trace[each]) for each in _computed_of(plan, edge.parent) if each in known]
            self._of[edge.parameter] = (_origin(plan, edge.parent), behind)

    def told(self, arguments: Mapping[str, Any], row: int, element: int = 0) -> dict[str, Argument]:
        """The arguments of one call, by parameter.

        Args:
            row: of the trace.
            element: of the plate, for a node that is one.
        """
        found = {}
        for parameter, value in arguments.items():
            origin, behind = self._of[parameter]
            sources = [Argument(column[row], source) for source, column in behind]
            found[parameter] = Argument(value, origin, sources, self._draw(parameter, row, element))
        return found

    def _draw(self, parameter: str, row: int, element: int) -> Draw | None:
        column, each = self._cells[parameter]
        cell = None if column is None else column[row]
        if isinstance(cell, tuple) and each:
            return cell[element]
        return cell if isinstance(cell, Draw) else None


def _origin(plan: Plan, name: str) -> Literal["input", "drawn", "computed"]:
    if any(given.name == name for given in plan.system.inputs):
        return "input"
    is_drawn = all(plan.system[end].is_random for end in plan.ends_of(name))
    return "drawn" if is_drawn else "computed"


def _computed_of(plan: Plan, name: str) -> list[str]:
    """The inputs and random nodes that a deterministic node is computed of; none for anything else.

    A switch has what its branches end in.
    """
    found: dict[str, str] = {}
    waiting = [name] if _origin(plan, name) == "computed" else []
    while waiting:
        made = plan.switch(below := waiting.pop())
        ends = [edge.parent for edge in plan.arguments(below)] if made is None else [case.end for case in made.cases]
        for source in ends:
            if source not in found:
                found[source] = _origin(plan, source)
                waiting += [source] if found[source] == "computed" else []
    return [source for source, origin in found.items() if origin != "computed"]
