"""Which nodes run in which rows: what the switches of a system say of a trace."""

from __future__ import annotations

from collections.abc import Sequence

from sysdag.errors import DataError, PlanError, shown
from sysdag.execution.rows import at_row, row_names
from sysdag.graph.plan import Plan
from sysdag.graph.switches import Branching
from sysdag.traces.cells import ABSENT, Cell
from sysdag.traces.trace import Trace


def cases_taken(plan: Plan, trace: Trace, made: Branching) -> list[int | None]:
    """The place of the case that each row takes; None where the switch is in a branch that was not taken.

    Raises:
        PlanError: if the trace has no values of the router.
        DataError: for a value that names no branch, naming router and row.
    """
    names = row_names(trace)
    skipped = skipped_rows(plan, trace, made.name)
    if made.router not in trace.inputs and made.router not in trace.cells:
        raise PlanError(f"The switch {made.name!r} asks its router {made.router!r}, of which the trace has no values.")
    kind = "Input" if made.router in trace.inputs else "Node"
    found: list[int | None] = []
    for row, value in enumerate(trace[made.router]):
        found.append(None if row in skipped else made.case_of(value))
        if row not in skipped and found[-1] is None:
            with at_row(row):
                raise DataError(
                    f"{kind} {made.router!r}, row {names[row]}: {shown(value, 80)} names no branch of the switch "
                    f"{made.name!r}; expected one of {made.known}. Give the switch a default=..., or put a node "
                    "between that turns every value into one of these."
                )
    return found


def skipped_rows(plan: Plan, trace: Trace, name: str) -> frozenset[int]:
    """The rows in which a node does not run, as another branch of a switch was taken.

    Raises:
        as `cases_taken`.
    """
    return frozenset(
        row
        for made, places in plan.switches_over(name)
        for row, case in enumerate(cases_taken(plan, trace, made))
        if case not in places
    )


def without_skipped(plan: Plan, trace: Trace) -> Trace:
    """The trace with the cells of nodes that do not run taken out, such as a value that stands for every branch's."""
    for name in plan.order:
        if name in trace.cells and (skipped := skipped_rows(plan, trace, name)):
            cells = [ABSENT if row in skipped else cell for row, cell in enumerate(trace.cells[name])]
            trace = trace.updated({name: cells})
    return trace


def values_taken(plan: Plan, trace: Trace, made: Branching) -> list[Cell]:
    """The cell of the last node of the branch that each row takes; absent where it takes none.

    Raises:
        PlanError: if the trace has no values of that node, naming it and the row.
    """
    found: list[Cell] = []
    for row, case in enumerate(cases_taken(plan, trace, made)):
        end = None if case is None else made.cases[case].end
        if end is not None and end not in trace.cells:
            raise PlanError(f"The switch {made.name!r} takes the value of {end!r}, of which the trace has none.")
        found.append(ABSENT if end is None else trace.cells[end][row])
        if end is not None and found[-1] is ABSENT:
            raise PlanError(
                f"Row {row_names(trace)[row]}: the switch {made.name!r} takes the value of {end!r}, and there is none."
            )
    return found


def check_presence(trace: Trace, name: str, cells: Sequence[Cell], skipped: frozenset[int]) -> None:
    """Refuses values of nodes that do not run, and holes where they do.

    Raises:
        PlanError: naming the node and the row.
    """
    for row, cell in enumerate(cells):
        if (cell is ABSENT) != (row in skipped):
            what = "has no value, but runs" if cell is ABSENT else "has a value, but another branch is taken"
            raise PlanError(f"Node {name!r}, row {row_names(trace)[row]}: it {what} there.")
