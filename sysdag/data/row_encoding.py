"""One row of a feedback dataset as a pair of partial traces or a single one, with all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.data.branches import Run, same_value, told_failure
from sysdag.data.columns import (
    SIDES,
    is_unicode,
    is_unpaired,
    output_column,
    read_inputs,
    read_label,
    read_pair_columns,
)
from sysdag.data.parts import with_parts
from sysdag.data.preferences import Feedback, PreferencePair, Problem, UnpairedRun
from sysdag.data.row_paths import whole_path
from sysdag.data.trl_prompts import explicit_prompt
from sysdag.errors import DataError, shown
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.cells import ABSENT, Cell, Draw

if TYPE_CHECKING:
    from sysdag.components.component import Component


def encode_row(
    plan: Plan, row: Any, number: int, objective: Objective, *, loads: bool = True
) -> tuple[Feedback | None, list[Problem]]:
    """One row's pair or unpaired run, or None and all that is wrong with it.

    Args:
        plan, row, objective: see `sysdag.data.encoding.encode_rows`.
        number: the row's, for its problems.
        loads: False checks values as far as that is possible without any weights; draws then have no records.
    """
    return _Reading(plan, number, objective, loads, getattr(row, "place", ""), getattr(row, "folder", None)).read(row)


@dataclass
class _Reading:
    plan: Plan
    number: int
    objective: Objective
    loads: bool
    source: str
    folder: Path | None
    problems: list[Problem] = field(default_factory=list)

    def read(self, row: Any) -> tuple[Feedback | None, list[Problem]]:
        if not isinstance(row, Mapping):
            self._problem("wrong type", f"expected a dict, got {type(row).__name__}.")
            return None, self.problems
        if reason := getattr(row, "unpaired", ""):
            self._problem("unpaired", f"it holds no preference: {reason}.")
            return None, self.problems
        if is_unpaired(self.plan, row):
            return self._unpaired(row), self.problems
        told = explicit_prompt(self.plan, row)
        if told.identical:
            self._problem("identical", "chosen and rejected are the same.")
        if told.beginning:
            other = "rejected" if told.beginning == "chosen" else "chosen"
            text = f"{told.beginning} is the beginning of {other}, so where their prompt ends cannot be told."
            self._problem("beginning", f"{text} Give the prompt in a column of its own.")
        if self.problems:
            return None, self.problems
        row = told.row
        inputs = self._inputs(row)
        beside = self._told(read_pair_columns(self.plan, row))
        sides = {side: self._side(row, inputs, side, side, f"{side}_intermediates") for side in SIDES}
        if self.problems:
            return None, self.problems
        cells = sides["chosen"], sides["rejected"]
        return PreferencePair(inputs, *cells, **beside, row=self.number, source=self.source), []

    def _unpaired(self, row: Mapping[str, Any]) -> UnpairedRun | None:
        inputs = self._inputs(row)
        beside = self._told(read_pair_columns(self.plan, row))
        if beside.pop("margin", 0.0):
            self._problem("invalid value", "margin is by how much one run is better than another; this row has one.")
        label = self._told(read_label(row))
        column = output_column(self.plan, row)
        if column is None:
            text = "it has both output and completion, which are two names of one column; leave one of them out."
            self._problem("invalid value", text)
        run = {} if column is None else self._side(row, inputs, "", column, "intermediates")
        if self.problems:
            return None
        return UnpairedRun(inputs, run, label["label"], **beside, row=self.number, source=self.source)

    def _told(self, read: tuple[dict[str, Any], list[tuple[str, str]]]) -> dict[str, Any]:
        """What could be read; problems with the rest are kept."""
        found, problems = read
        for kind, text in problems:
            self._problem(kind, text)
        return found

    def _problem(self, kind: str, text: str, node: str = "", side: str = "") -> None:
        self.problems.append(Problem(self.number, kind, node, side, text, self.source))

    def _inputs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return self._told(read_inputs(self.plan, row))

    def _side(
        self, row: Mapping[str, Any], inputs: Mapping[str, Any], side: str, column: str, beside: str
    ) -> dict[str, Cell]:
        """The cells of one run: outputs of `column`, and for Direct the others of `beside`."""
        given = self._outputs(row, column)
        skipped: frozenset[str] = frozenset()
        if self.plan.system.switches:
            given, skipped = self._by_branch(self._intermediates(row, beside), side, inputs, given)
        elif self.objective == "direct":
            given |= self._intermediates(row, beside)
        observed = self.plan.observed(self.objective)
        given = {
            name: v
            for name, v in self._parted(given, row.get(beside), side).items()
            if name in given or name in observed
        }
        for name in self.plan.observed(self.objective):
            if name not in given and column in row and name not in skipped:
                hint = f" Give it in {beside}." if name not in self.plan.system.outputs else ""
                text = f"{side or 'the row'} has no value of node {name!r}, which {self.objective} needs.{hint}"
                self._problem("missing", text)
        cells: dict[str, Cell | None] = {name: self._cell(name, value, side) for name, value in given.items()}
        cells |= {name: ABSENT for name in self.plan.observed(self.objective) if name in skipped and name not in given}
        return {name: cell for name, cell in cells.items() if cell is not None}

    def _parted(self, given: dict[str, Any], beside: Any, side: str) -> dict[str, Any]:
        """The values with whole completions cut into their parts."""
        try:
            return with_parts(self.plan, given, beside)
        except DataError as error:
            self._problem("invalid value", str(error), "", side)
            return given

    def _by_branch(
        self, between: dict[str, Any], side: str, inputs: Mapping[str, Any], outputs: dict[str, Any]
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """What a row says of each node of a system with switches, and the nodes that did not run.

        For Sampling, which does not observe routers, an output is the value of whichever branch a candidate takes.
        """
        if self.objective == "sampling":
            between = {name: value for name, value in between.items() if name in self.plan.results}
        known = {**between, **outputs}
        try:
            run = Run(self.plan, inputs, known)
        except Exception as error:  # noqa: BLE001 - a router may be computed by functions of the user's
            name, text = told_failure(error)
            self._problem("invalid value", text, name, side)
            return {}, frozenset(self.plan.order)
        given = {name: value for name, value in run.given.items() if self.plan.switch(name) is None}
        given = {name: value for name, value in given.items() if name not in run.skipped}
        for name in run.contradicted():
            routers = " and ".join(repr(made.router) for made, _ in self.plan.switches_over(name))
            text = f"a value is given, but the branch that {routers} took is another; leave it out."
            self._problem("not taken", text, name, side)
        for name in [name for name in known if self.plan.switch(name)]:
            for end in run.possible_ends(name):
                if end in between and not same_value(between[end], known[name]):
                    what = side or "output" if name in outputs else f"that of the switch {name!r}"
                    self._problem("invalid value", f"its value differs from {what}, which it is.", end, side)
                if self.objective == "sampling":
                    given.setdefault(end, known[name])
        return given, run.skipped | (run.undecided if self.objective == "direct" else frozenset())

    def _outputs(self, row: Mapping[str, Any], column: str) -> dict[str, Any]:
        outputs = self.plan.system.outputs
        if column not in row:
            self._problem("missing", f"{column!r} is missing; the row has {sorted(map(str, row))}.")
            return {}
        value = row[column]
        if len(outputs) == 1:
            return {outputs[0]: value}
        if not isinstance(value, Mapping) or set(value) != set(outputs):
            got = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
            text = f"{column} must be a dict with one value for each of {list(outputs)}, got {got}."
            self._problem("wrong type", text)
            return {}
        return dict(value)

    def _intermediates(self, row: Mapping[str, Any], column: str) -> dict[str, Any]:
        given = {} if row.get(column) is None else row[column]
        if not isinstance(given, Mapping):
            self._problem("wrong type", f"{column} must be a dict by node, got {type(given).__name__}.")
            return {}
        known = set(self.plan.order) - set(self.plan.system.outputs)
        for name in given:
            if name not in known:
                self._problem("unknown node", f"{column} has {name!r}; the other nodes are {sorted(known)}.")
        return {name: value for name, value in given.items() if value is not None and name in known}

    def _cell(self, name: str, value: Any, side: str) -> Cell | None:
        if not self.plan.is_plate(name):
            draws = self._draws(name, [value], side)
            return draws[0] if draws else None
        if not isinstance(value, (list, tuple)) or not value:
            kind = "empty" if isinstance(value, (list, tuple)) else "wrong type"
            self._problem(kind, f"a plate needs a list with one value an element, got {shown(value)}.", name, side)
            return None
        return tuple(self._draws(name, list(value), side)) or None

    def _draws(self, name: str, values: list[Any], side: str) -> list[Draw]:
        component = self.plan.system[name].component
        if not all(is_unicode(value.value if isinstance(value, Draw) else value) for value in values):
            self._problem("invalid value", "half of a surrogate pair, which is no text.", name, side)
            return []
        if component is None:
            return [value if isinstance(value, Draw) else Draw(value) for value in values]
        made = {at: value for at, value in enumerate(values) if isinstance(value, Draw) and value.record}
        given = {at: self._given(component, value) for at, value in enumerate(values) if at not in made}
        try:
            component.check_draws(list(made.values()))
            observed = (component.observe if self.loads else component.check)(list(given.values())) if given else []
        except DataError as error:
            self._problem("invalid value", str(error), name, side)
            return []
        made |= zip(given, observed, strict=True)
        return [made[at] for at in range(len(values))]

    def _given(self, component: Component, value: Any) -> Any:
        """What is observed: a draw without a record is its value."""
        return whole_path(component, value.value if isinstance(value, Draw) else value, self.folder)
