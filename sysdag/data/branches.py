"""Rows of systems with switches: which branches a run took, and what its output says of their last nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sysdag.errors import DataError
from sysdag.execution.branching import skipped_rows
from sysdag.execution.execute import draw
from sysdag.files.encoding import encode_value
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT, Cell, Draw, value_of
from sysdag.traces.trace import Trace


class Run:
    """One run of which some nodes' values are known.

    Attributes:
        given: by node, what is known: for the last node of the branch that a switch took, the switch's value, too.
        skipped: nodes that did not run.
        undecided: nodes of which the routers do not say whether they ran.

    Raises:
        DataError: for a router's value that names no branch.
        Exception: whatever the function of a node raises that a router is computed by, with the node in `failed_node`.
    """

    def __init__(self, plan: Plan, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.plan = plan
        self.given = dict(given)
        routers = {made.router for made in plan.system.switches}
        self._computed = routers.union(*(plan.ancestors(router) for router in routers))
        self._inputs = {name: [value] for name, value in inputs.items()}
        while True:
            self._settle()
            known = len(self.given)
            for name in [name for name in self.given if plan.switch(name)]:
                if (end := self.end_of(name)) is not None:
                    self.given.setdefault(end, self.given[name])
            if len(self.given) == known:
                break
        self.undecided = frozenset(name for name in plan.order if not self._is_decided(name))
        self.skipped = frozenset(name for name, (cell,) in self._trace.cells.items() if cell is ABSENT)

    def contradicted(self) -> list[str]:
        """Nodes that did not run, and of which a value is given; an empty text is none, as CSV has no null."""
        return sorted(name for name in self.skipped if self.given.get(name) is not None and self.given[name] != "")

    def end_of(self, output: str) -> str | None:
        """The node whose value an output has in this run; None where that is not known."""
        name = output
        while (made := self.plan.switch(name)) is not None:
            if (case := self._case(name)) is None:
                return None
            name = made.cases[case].end
        return name

    def possible_ends(self, output: str) -> list[str]:
        """The nodes whose value an output may have in this run, as far as routers are known."""
        found, waiting = [], [output]
        while waiting:
            name = waiting.pop(0)
            made = self.plan.switch(name)
            if made is None:
                found += [] if name in found or name in self.skipped else [name]
            else:
                case = self._case(name)
                waiting += [each.end for at, each in enumerate(made.cases) if case in (None, at)]
        return found

    def _case(self, name: str) -> int | None:
        made = self.plan.switch(name)
        assert made is not None
        if not self._has(made.router) or self._trace.cells.get(made.router, [None])[0] is ABSENT:
            return None
        return made.case_of(self._trace[made.router][0])

    def _is_decided(self, name: str) -> bool:
        return all(self._has(made.router) for made, _ in self.plan.switches_over(name))

    def _has(self, name: str) -> bool:
        return name in self._trace.inputs or name in self._trace.cells

    def _settle(self) -> None:
        """Makes the trace of what is known: what is given, what it says of branches, what routers are computed by."""
        self._trace = Trace(self._inputs, {})
        for name in self.plan.order:
            if not self._is_decided(name):
                continue
            if skipped_rows(self.plan, self._trace, name):
                cells: list[Cell] = [ABSENT]
            elif self.plan.switch(name) is None and name in self.given:
                cells = [_cell(self.given[name])]
            elif name in self._computed and not self.plan.system[name].is_random and self._is_known(name):
                try:
                    cells = draw(self.plan, self._trace, name)
                except Exception as error:
                    error.__dict__[_FAILED_NODE] = name
                    raise
            else:
                continue
            self._trace = self._trace.updated({name: cells})

    def _is_known(self, name: str) -> bool:
        """Whether there is all that a node is computed of."""
        if (made := self.plan.switch(name)) is None:
            return all(self._has(edge.parent) for edge in self.plan.parents(name))
        case = self._case(name)
        return case is not None and self._has(made.cases[case].end)


_FAILED_NODE = "_sysdag_failed_node"


def failed_node(error: BaseException) -> str | None:
    """The node whose function raised an error while a `Run` was settled."""
    return getattr(error, _FAILED_NODE, None)


def told_failure(error: Exception) -> tuple[str, str]:
    """The node at which a `Run` could not be settled, "" where it is none's function, and what there is to say."""
    name = failed_node(error) or ""
    text = told_function(error) if name else str(error)
    return name, text.replace(", row 0:", ":")  # of a trace of one row, whose number says nothing


def told_function(error: Exception) -> str:
    """What is said of a node whose function raised an error on a row."""
    return f"its function fails on this row: {type(error).__name__}: {error}"


def _cell(value: Any) -> Cell:
    """A given value as a cell, as it is."""
    if isinstance(value, Draw):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(element, Draw) for element in value):
        return tuple(element if isinstance(element, Draw) else Draw(element) for element in value)
    return Draw(value)


def same_value(first: Any, second: Any) -> bool:
    """Whether two given values of a node are equal, whatever their records."""
    ours, theirs = (value_of(_cell(value)) for value in (first, second))
    try:
        return bool(encode_value(ours, "value") == encode_value(theirs, "value"))
    except DataError:  # a type that only the component knows
        return ours is theirs
