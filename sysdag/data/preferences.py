"""Feedback datasets: rows in TRL's formats to pairs of partial traces or single ones, every mistake told by row and
node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
from sysdag.data.row_paths import whole_path
from sysdag.data.trl_prompts import explicit_prompt
from sysdag.errors import DataError, shown
from sysdag.files.encoding import encode_value
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.cells import ABSENT, Cell, Draw, draws_of
from sysdag.traces.trace import Trace

if TYPE_CHECKING:
    from sysdag.components.component import Component

_SHOWN = 60  # characters of an input in an error


class _OfARow:
    """What errors call feedback, by the row that it was read from."""

    inputs: Mapping[str, Any]
    row: int | None
    source: str
    _noun: ClassVar[str]

    def called(self, place: int) -> str:
        """What an error calls it: its row with the line, or its place in the batch where no row is known."""
        return f"{self._noun} {place} of the batch" if self.row_name is None else f"row {self.row_name}"

    @property
    def row_name(self) -> str | None:
        """The number of its row, with the line; None where no row is known."""
        return None if self.row is None else _with_line(self.row, self.source)

    def described(self, place: int) -> str:
        """`called`, with the inputs in short."""
        inputs = ", ".join(f"{name}={shown(value, _SHOWN)}" for name, value in self.inputs.items())
        return f"{self.called(place)} ({inputs})" if inputs else self.called(place)


@dataclass(frozen=True, eq=False)
class PreferencePair(_OfARow):
    """One preference: a winner and a loser for the same inputs.

    Attributes:
        inputs: the value of each input, and what its row holds of `row_options` (see `sysdag.execution.execute`).
        chosen, rejected: the observed cells, by node.
        weight: what multiplies its loss.
        margin: by how much the winner's reward should exceed the loser's, in nats times beta.
        group: of pairs that belong together (see `sysdag.objectives.group_weights`), or None.
        row: its number in the data set, for errors; None where it is not known.
        source: where that row stands in its file, as `line 7`; or "".
    """

    inputs: Mapping[str, Any]
    chosen: Mapping[str, Cell]
    rejected: Mapping[str, Cell]
    weight: float = 1.0
    margin: float = 0.0
    group: str | None = None
    row: int | None = None
    source: str = ""
    _noun = "pair"

    @property
    def sides(self) -> Mapping[str, Mapping[str, Cell]]:
        """The runs that are compared, by name."""
        return {"chosen": self.chosen, "rejected": self.rejected}

    @cached_property
    def key(self) -> str:
        """SHA-256 of what is scored; pairs with equal inputs, values and records have the same.

        Raises:
            DataError: for a value that has no lossless JSON form (see `sysdag.files.encoding`).
        """
        return _key(self)


@dataclass(frozen=True, eq=False)
class UnpairedRun(_OfARow):
    """One run and whether it is desirable, as in TRL's format for KTO.

    Attributes:
        inputs: see `PreferencePair`.
        run: the observed cells, by node.
        label: whether it is desirable.
        weight, group, row, source: see `PreferencePair`.
        mismatched: its inputs with the cells of another run, which `kto` estimates a KL divergence by (see
            `mismatched`); None where the run's batch decides on it.
    """

    inputs: Mapping[str, Any]
    run: Mapping[str, Cell]
    label: bool
    weight: float = 1.0
    group: str | None = None
    mismatched: UnpairedRun | None = None
    row: int | None = None
    source: str = ""
    _noun = "run"

    @property
    def margin(self) -> float:
        """Of a pair alone: 0."""
        return 0.0

    @property
    def sides(self) -> Mapping[str, Mapping[str, Cell]]:
        """The one run, under the name that messages have for it."""
        return {"": self.run}

    @cached_property
    def key(self) -> str:
        """SHA-256 of what is scored, as of a pair; without the label, and without what it is mismatched with."""
        return _key(self)


Feedback = PreferencePair | UnpairedRun
"""What one row says: of two runs which is better, or of one whether it is desirable."""


def _key(feedback: Feedback) -> str:
    content: dict[str, Any] = {"inputs": {name: encode_value(v, name) for name, v in feedback.inputs.items()}}
    for side, cells in feedback.sides.items():
        content[side] = {
            name: None
            if cell is ABSENT
            else [[encode_value(d.value, name), encode_value(dict(d.record), name)] for d in draws_of(cell)]
            for name, cell in cells.items()
        }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_line(row: int, source: str) -> str:
    return f"{row} ({source})" if source not in ("", f"row {row}") else str(row)


def collate(batch: Sequence[Feedback]) -> tuple[Trace, ...]:
    """A batch as partial traces over the same inputs: of pairs the winners and the losers, of unpaired runs one."""
    names = dict.fromkeys(name for each in batch for name in each.inputs)  # some rows may lack options
    inputs = {name: [each.inputs.get(name) for each in batch] for name in names}
    sides = []
    for side in batch[0].sides:
        rows = [each.sides[side] for each in batch]
        sides.append(Trace(inputs, {name: [row[name] for row in rows] for name in rows[0]}))
    return tuple(sides)


def mismatched(runs: Sequence[UnpairedRun], before: UnpairedRun | None = None) -> list[UnpairedRun]:
    """The runs, each with what it is mismatched with: its inputs, and all cells of the run before it.

    Of the first that is the last one, as TRL's `KTOTrainer` rotates completions within a batch. Runs that have it
    already stay as they are.

    Args:
        before: in place of the last one, for a run that is alone.
    """
    others = [runs[-1] if before is None else before, *runs[:-1]]
    return [
        run if run.mismatched is not None else replace(run, mismatched=replace(run, run=other.run))
        for run, other in zip(runs, others, strict=True)
    ]


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    Attributes:
        row: its number, from 0; None for a part of a file that is no row.
        kind: `missing`, `wrong type`, `unknown node`, `not taken`, `invalid value`, `other kind` (a pair where unpaired
            rows are expected, or the reverse); `malformed`, for what is no row; those of
            `sysdag.data.checks.DROPPED`, of rows that teach nothing, or something else than they say; and those of
            `sysdag.data.checks.NOTED`, of rows that are used all the same.
        node: the node's name, or "".
        side: `chosen`, `rejected`, or "" (of an unpaired row, too).
        text: what is wrong with it.
        source: where it stands in its file, as `line 7`; "" where its number says it all.
    """

    row: int | None
    kind: str
    node: str
    side: str
    text: str
    source: str = ""

    def __str__(self) -> str:
        where = self.source.capitalize() if self.row is None else f"Row {_with_line(self.row, self.source)}"
        where += f", {self.side}" if self.side else ""
        where += f", node {self.node!r}" if self.node else ""
        return f"{where}: {self.text}"


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
