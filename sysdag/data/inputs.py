"""A system's inputs out of the rows of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sysdag.data.preferences import input_column, read_inputs
from sysdag.errors import DataError, PlanError
from sysdag.graph.plan import Plan


def inputs_of(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], list[str]]:
    """The columns that the system reads: those of its inputs' names, or `prompt` for a system with one input.

    Returns:
        For each input one value a row, and the names of the columns that are no inputs.

    Raises:
        PlanError: for a system without inputs.
        DataError: for no rows, or one whose inputs cannot be used; naming the row and its line.
    """
    names = [given.name for given in plan.system.inputs]
    if not names:
        raise PlanError("The system has no inputs, so there is nothing to run it on; see Plan.sample.")
    if not rows:
        raise DataError(f"There are no rows of inputs; expected one for each run, with {names}.")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    ignored: set[str] = set()
    for number, row in enumerate(rows):
        found, problems = read_inputs(plan, row)
        if problems:
            line = getattr(row, "place", "")
            raise DataError(f"Row {number}{f' ({line})' if line else ''}: {problems[0][1]}")
        for name, column in columns.items():
            column.append(found[name])
        ignored |= {str(key) for key in row} - {input_column(plan, row, name) for name in names}
    return columns, sorted(ignored)
