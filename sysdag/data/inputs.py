"""A system's inputs out of the rows of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sysdag.data.columns import OUTPUTS, SIDES, advice_on, input_column, read_inputs
from sysdag.data.trl_prompts import explicit_prompt
from sysdag.errors import DataError, PlanError
from sysdag.execution.execute import row_options
from sysdag.graph.plan import Plan


def inputs_of(
    plan: Plan, rows: Sequence[Mapping[str, Any]], bad: dict[int, str] | None = None
) -> tuple[dict[str, list[Any]], list[str]]:
    """The columns that the system reads: those of its inputs' names, or `prompt` for a system with one input.

    The prompt of preference rows may be implicit (see `sysdag.data.encode_rows`).

    Args:
        bad: gets what is wrong with each row that cannot be used, by its number, which is no error then; its inputs
            are None.

    Returns:
        For each input one value a row, the same for options that rows hold for components (`row_options` of
        `sysdag.execution.execute`; None where a row has none), and the names of the columns that are neither.

    Raises:
        PlanError: for a system without inputs.
        DataError: for no rows, or one whose inputs cannot be used; naming the row and its line.
    """
    names = [given.name for given in plan.system.inputs]
    if not names:
        raise PlanError("The system has no inputs, so there is nothing to run it on; see Plan.sample.")
    if not rows:
        raise DataError(f"There are no rows of inputs; expected one for each run, with {names}.")
    options = [name for name in row_options(plan) if any(row.get(name) is not None for row in rows)]
    columns: dict[str, list[Any]] = {name: [] for name in [*names, *options]}
    ignored: set[str] = set()
    for number, row in enumerate(rows):
        row = explicit_prompt(plan, row).row
        found, problems = read_inputs(plan, row)
        damage = getattr(row, "damage", "") or (problems[0][1] if problems else "")
        if damage and bad is None:
            raise DataError(f"Row {number}{_place(row)}: {damage} {advice_on(plan, rows, ())}".rstrip())
        if damage and bad is not None:
            bad[number] = damage
        for name, column in columns.items():
            column.append(None if damage else found.get(name))
        ignored |= {str(key) for key in row} - {input_column(plan, row, name) for name in names} - set(options)
    if bad and len(bad) == len(rows):
        raise DataError(f"None of the {len(rows)} rows can be used. Row 0{_place(rows[0])}: {bad[0]}")
    return columns, sorted(ignored)


OF_FEEDBACK = frozenset({*SIDES, *(f"{side}_intermediates" for side in SIDES), *OUTPUTS, "intermediates"})
"""Columns of answers that rows of feedback hold, which say nothing of a new run of the same inputs."""


def columns_beside(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows' columns that are known of a run of them whatever it says, as a reference answer; None where a row has
    none.

    Left out are the inputs, what has the name of a node or of `OF_FEEDBACK`, `prompt` and `run`, which number runs, and
    the label of unpaired rows.
    """
    taken = {given.name for given in plan.system.inputs} | {*plan.order, *row_options(plan), "prompt", "run"}
    if any(name in row for row in rows for name in OUTPUTS):
        taken.add("label")
    names = dict.fromkeys(name for row in rows for name in row if name not in taken | OF_FEEDBACK)
    return {name: [row.get(name) for row in rows] for name in names}


def _place(row: Mapping[str, Any]) -> str:
    place = getattr(row, "place", "")
    return f" ({place})" if place else ""
