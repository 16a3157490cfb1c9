"""Where the values are from that a node's function is called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sysdag.components.input_reader import Argument
from sysdag.graph.plan import Plan
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
        for edge in plan.arguments(name):
            behind = [(_origin(plan, each), trace[each]) for each in _computed_of(plan, edge.parent) if each in known]
            self._of[edge.parameter] = (_origin(plan, edge.parent), behind)

    def told(self, arguments: Mapping[str, Any], row: int) -> dict[str, Argument]:
        """The arguments of one call, by parameter.

        Args:
            row: of the trace.
        """
        found = {}
        for parameter, value in arguments.items():
            origin, behind = self._of[parameter]
            found[parameter] = Argument(value, origin, [Argument(column[row], source) for source, column in behind])
        return found


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
