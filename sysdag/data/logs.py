"""Runs out of plain logs: rows that hold a system's inputs, its output, perhaps intermediates, and other columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.data.branches import Run, told_failure, told_function
from sysdag.data.columns import OUTPUTS, input_column, is_unicode, read_inputs
from sysdag.data.given_runs import given_cell
from sysdag.data.parts import with_parts
from sysdag.errors import DataError, PlanError, shown
from sysdag.execution.execute import flat_draws, resolved, row_options
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT, Cell
from sysdag.traces.trace import Trace

NUMBERS = ("prompt", "run")
"""Columns that number sampled runs; a log's own of these names could not be told from them."""


@dataclass(frozen=True)
class LoggedRuns:
    """What became of a log's rows.

    Attributes:
        trace: the runs of the rows that can be used, in order; what is not known of inputs and nodes is in its columns.
        bad: of each other row, by its number, what is wrong with it.
        silent: random nodes that no row has a value of.
    """

    trace: Trace
    bad: Mapping[int, str]
    silent: tuple[str, ...]


def logged_runs(
    plan: Plan, rows: Sequence[Mapping[str, Any]], *, place: Callable[[int], str] | None = None, skip: bool = False
) -> LoggedRuns:
    """The runs that rows of a log tell of.

    A row holds the inputs by name (or `prompt`, for a system with one input); the output by its node's name, as
    `output` or as `completion` (of several outputs all by name, or a dict by node); the other nodes' values by name,
    or in `intermediates`, a dict by node, as far as they were logged. All other columns become columns of the trace.

    Args:
        plan: of the system that was run, or one with the same nodes.
        place: what an error calls a row, by its number; by default its number and line.
        skip: leaves out rows that cannot be used; by default the first of them is an error.

    Raises:
        PlanError: for a system without inputs.
        DataError: naming the row, its line and column; for a column that cannot stay beside the runs; or if no row is
            left.
    """
    if not plan.system.inputs:
        raise PlanError("The system has no inputs, so its runs cannot be told apart by them.")
    if not rows:
        raise DataError("There are no rows; expected one for each run.")
    read = [
        _Reading(plan, number, row, place(number) if place else _place(number, row)) for number, row in enumerate(rows)
    ]
    known = {name for each in read if not each.problems for name, cell in each.cells.items() if cell is not ABSENT}
    bad: dict[int, str] = {}
    for each in read:
        lacking = [name for name in plan.order if name in known and name not in each.cells]
        if not each.problems and lacking:
            each.problems.append(
                f"it has no value of node {lacking[0]!r}, which other rows have. Log it in every row, or rename the "
                f"column (--rename {lacking[0]}=logged_{lacking[0]}), so that it stays beside the runs."
            )
        if each.problems and not skip:
            raise DataError(f"{each.place}: {each.problems[0]}")
        if each.problems:
            bad[each.number] = each.problems[0]
    kept = [each for each in read if not each.problems]
    if not kept:
        raise DataError(f"None of the {len(rows)} rows can be used. {read[0].place}: {read[0].problems[0]}")
    columns = dict.fromkeys(name for each in kept for name in each.others)
    if numbers := [name for name in NUMBERS if name in columns]:
        raise DataError(
            f"Column {numbers[0]!r} is no input of the system, and runs that are sampled are numbered by columns of "
            f"that name. Give it another one: --rename {numbers[0]}=logged_{numbers[0]}."
        )
    inputs = dict.fromkeys(name for each in kept for name in each.inputs)
    trace = Trace(
        {name: [each.inputs.get(name) for each in kept] for name in inputs},
        {name: [each.cells[name] for each in kept] for name in plan.order if name in known},
        {name: [each.others.get(name) for each in kept] for name in columns},
    )
    return LoggedRuns(trace, bad, tuple(name for name in plan.random_nodes if name not in known))


def _place(number: int, row: Mapping[str, Any]) -> str:
    place = getattr(row, "place", "")
    return f"Row {number}{f' ({place})' if place else ''}"


class _Reading:
    """One row: its inputs, cells and other columns, and what is wrong with them."""

    def __init__(self, plan: Plan, number: int, row: Mapping[str, Any], place: str) -> None:
        self.plan, self.number, self.row, self.place = plan, number, row, place
        self.folder = getattr(row, "folder", None)
        self.problems: list[str] = []
        self.inputs: dict[str, Any] = {}
        self.cells: dict[str, Cell] = {}
        self.others: dict[str, Any] = {}
        if damage := getattr(row, "damage", ""):
            self.problems.append(damage)
            return
        self.inputs, problems = read_inputs(plan, row)
        self.problems += [text for _, text in problems]
        taken = {input_column(plan, row, given.name) for given in plan.system.inputs} | set(row_options(plan))
        values = self._by_branch(self._values())
        self.cells = {name: cell for name, value in values.items() if (cell := self._cell(name, value)) is not None}
        self._resolve()
        own = {*taken, *plan.order, "intermediates", *(OUTPUTS if self._has_output_column else ())}
        self.others = {name: value for name, value in row.items() if name not in own}

    def _by_branch(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values with those of the branches that switches took; what did not run has a None."""
        if not self.plan.system.switches or self.problems:
            return values
        try:
            run = Run(self.plan, self.inputs, values)
        except Exception as error:  # noqa: BLE001 - a router may be computed by functions of the user's
            name, text = told_failure(error)
            self.problems.append(f"node {name!r}: {text}" if name else text)
            return values
        if both := run.contradicted():
            self.problems.append(f"node {both[0]!r} has a value, but another branch was taken.")
        return {**run.given, **dict.fromkeys(run.skipped)}

    def _resolve(self) -> None:
        """Has values that stand for others, as the number of an option does, be these, where its inputs are logged."""
        if self.problems:
            return
        trace = Trace({name: [v] for name, v in self.inputs.items()}, {name: [c] for name, c in self.cells.items()})
        for name in self.plan.order:
            try:
                trace = resolved(self.plan, trace, name)
            except DataError as error:
                self.problems.append(f"node {name!r}: {str(error).partition(', row 0: ')[2] or error}")
                return
            except Exception as error:  # noqa: BLE001 - a user's function may raise anything
                self.problems.append(f"node {name!r}: {told_function(error)}")
                return
        self.cells = {name: column[0] for name, column in trace.cells.items()}

    @property
    def _has_output_column(self) -> bool:
        return not {name for name in OUTPUTS if name in {*self.plan.order, *self.inputs}}

    def _values(self) -> dict[str, Any]:
        """Of each node that the row tells of, its value."""
        plan, row = self.plan, self.row
        values = {name: row[name] for name in plan.order if row.get(name) is not None}
        given = row.get("intermediates")
        if given is not None and not isinstance(given, Mapping):
            self.problems.append(f"column 'intermediates' must be a dict by node, got {shown(given)}.")
        elif given is not None:
            self._add(values, given, "intermediates", set(plan.order) - set(plan.system.outputs))
        for column in OUTPUTS if self._has_output_column else ():
            value = row.get(column)
            if value is None:
                continue
            if len(plan.system.outputs) == 1:
                value = {plan.system.outputs[0]: value}
            elif not isinstance(value, Mapping):
                names = list(plan.system.outputs)
                self.problems.append(f"column {column!r} must be a dict with one value for each of {names}.")
                continue
            self._add(values, value, column, set(plan.system.outputs))
        for name in plan.system.outputs:
            if name not in values:
                self.problems.append(self._no_output(name))
        try:
            return with_parts(plan, values)
        except DataError as error:
            self.problems.append(str(error))
            return values

    def _add(self, values: dict[str, Any], given: Mapping[str, Any], column: str, known: set[str]) -> None:
        for name, value in given.items():
            if name not in known:
                self.problems.append(f"column {column!r} has {shown(name)}; the nodes there are {sorted(known)}.")
            elif name in values and value is not None:
                other = next(other for other in (name, *OUTPUTS) if self.row.get(other) is not None)
                self.problems.append(
                    f"node {name!r} has two values, in columns {other!r} and {column!r}; rename one (--rename), "
                    "so that it stays beside the runs."
                )
            elif value is not None:
                values[name] = value

    def _no_output(self, name: str) -> str:
        columns = sorted(map(shown, (column for column in self.row if self.row[column] is not None)))
        text = f"there is no value of the output {name!r}; the row has [{', '.join(columns)}]."
        if {"chosen", "rejected"} <= self.row.keys():
            return f"{text} These are preferences, which sysdag train takes as they are."
        single = " (or 'output')" if len(self.plan.system.outputs) == 1 else ""
        return f"{text} Expected a column {name!r}{single}; --rename OLD={name} gives a column that name."

    def _cell(self, name: str, value: Any) -> Cell | None:
        """The node's cell, as far as it can be checked without weights."""
        component = self.plan.system[name].component
        if value is None:
            return ABSENT
        if not is_unicode(value):
            self.problems.append(f"node {name!r} holds half of a surrogate pair, which is no text.")
            return None
        try:
            cell = given_cell(self.plan, name, value, self.place, self.folder)
            if component is None:
                return cell
            draws = flat_draws([cell])
            component.check_draws([draw for draw in draws if draw.record])
            observed = iter(component.check([draw.value for draw in draws if not draw.record]))
            draws = [draw if draw.record else next(observed) for draw in draws]
        except DataError as error:
            text = str(error).removeprefix(self.place).lstrip(":, ")
            self.problems.append(text if text.startswith("node ") else f"node {name!r}: {text}")
            return None
        return tuple(draws) if isinstance(cell, tuple) else draws[0]
