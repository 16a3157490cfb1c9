"""Preference datasets: rows in TRL's format to pairs of partial traces, every mistake told by row and node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.data.branches import Run, failed_node, same_value
from sysdag.data.columns import is_unicode, read_inputs, read_pair_columns
from sysdag.data.row_paths import whole_path
from sysdag.data.trl_prompts import explicit_prompt
from sysdag.errors import DataError, shown
from sysdag.files.encoding import encode_value
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.cells import ABSENT, Cell, Draw, draws_of
from sysdag.traces.trace import Trace

if TYPE_CHECKING:
    from sysdag.components.component import Component

_SIDES = ("chosen", "rejected")
_SHOWN = 60  # characters of an input in an error


@dataclass(frozen=True, eq=False)
class PreferencePair:
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

    def called(self, place: int) -> str:
        """What an error calls it: its row with the line, or its place in the batch where no row is known."""
        return f"pair {place} of the batch" if self.row_name is None else f"row {self.row_name}"

    @property
    def row_name(self) -> str | None:
        """The number of its row, with the line; None where no row is known."""
        return None if self.row is None else _with_line(self.row, self.source)

    def described(self, place: int) -> str:
        """`called`, with the inputs in short."""
        inputs = ", ".join(f"{name}={shown(value, _SHOWN)}" for name, value in self.inputs.items())
        return f"{self.called(place)} ({inputs})" if inputs else self.called(place)

    @cached_property
    def key(self) -> str:
        """SHA-256 of what is scored; pairs with equal inputs, values and records have the same.

        Raises:
            DataError: for a value that has no lossless JSON form (see `sysdag.files.encoding`).
        """
        content: dict[str, Any] = {"inputs": {name: encode_value(v, name) for name, v in self.inputs.items()}}
        for side in _SIDES:
            content[side] = {
                name: None
                if cell is ABSENT
                else [[encode_value(d.value, name), encode_value(dict(d.record), name)] for d in draws_of(cell)]
                for name, cell in getattr(self, side).items()
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _with_line(row: int, source: str) -> str:
    return f"{row} ({source})" if source not in ("", f"row {row}") else str(row)


def collate(pairs: Sequence[PreferencePair]) -> tuple[Trace, Trace]:
    """The winners and the losers of a batch as partial traces over the same inputs."""
    names = dict.fromkeys(name for pair in pairs for name in pair.inputs)  # some rows may lack options
    inputs = {name: [pair.inputs.get(name) for pair in pairs] for name in names}
    sides = []
    for side in _SIDES:
        rows = [getattr(pair, side) for pair in pairs]
        sides.append(Trace(inputs, {name: [row[name] for row in rows] for name in rows[0]}))
    return sides[0], sides[1]


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    Attributes:
        row: its number, from 0; None for a part of a file that is no row.
        kind: `missing`, `wrong type`, `unknown node`, `not taken`, `invalid value`; `malformed`, for what is no row;
            those of `sysdag.data.checks.DROPPED`, of rows that teach nothing, or something else than they say; and
            those of `sysdag.data.checks.NOTED`, of rows that are used all the same.
        node: the node's name, or "".
        side: `chosen`, `rejected`, or "".
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
) -> tuple[PreferencePair | None, list[Problem]]:
    """One row's pair, or None and all that is wrong with it.

    Args:
        plan, row, objective: see `sysdag.data.encoding.encode_pairs`.
        number: the row's, for its problems.
        loads: False checks values as far as that is possible without any weights; the pair then has no records.
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

    def read(self, row: Any) -> tuple[PreferencePair | None, list[Problem]]:
        if not isinstance(row, Mapping):
            self._problem("wrong type", f"expected a dict, got {type(row).__name__}.")
            return None, self.problems
        if reason := getattr(row, "unpaired", ""):
            self._problem("unpaired", f"it holds no preference: {reason}.")
            return None, self.problems
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
        beside, problems = read_pair_columns(self.plan, row)
        for kind, text in problems:
            self._problem(kind, text)
        sides = {side: self._side(row, side, inputs) for side in _SIDES}
        if self.problems:
            return None, self.problems
        cells = sides["chosen"], sides["rejected"]
        return PreferencePair(inputs, *cells, **beside, row=self.number, source=self.source), []

    def _problem(self, kind: str, text: str, node: str = "", side: str = "") -> None:
        self.problems.append(Problem(self.number, kind, node, side, text, self.source))

    def _inputs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found, problems = read_inputs(self.plan, row)
        for kind, text in problems:
            self._problem(kind, text)
        return found

    def _side(self, row: Mapping[str, Any], side: str, inputs: Mapping[str, Any]) -> dict[str, Cell]:
        given = self._outputs(row, side)
        skipped: frozenset[str] = frozenset()
        if self.plan.system.switches:
            given, skipped = self._by_branch(row, side, inputs, given)
        elif self.objective == "direct":
            given |= self._intermediates(row, side)
        for name in self.plan.observed(self.objective):
            if name not in given and side in row and name not in skipped:
                hint = f" Give it in {side}_intermediates." if name not in self.plan.system.outputs else ""
                self._problem("missing", f"{side} has no value of node {name!r}, which {self.objective} needs.{hint}")
        cells: dict[str, Cell | None] = {name: self._cell(name, value, side) for name, value in given.items()}
        cells |= {name: ABSENT for name in self.plan.observed(self.objective) if name in skipped and name not in given}
        return {name: cell for name, cell in cells.items() if cell is not None}

    def _by_branch(
        self, row: Mapping[str, Any], side: str, inputs: Mapping[str, Any], outputs: dict[str, Any]
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """What a row says of each node of a system with switches, and the nodes that did not run.

        For Sampling, which does not observe routers, an output is the value of whichever branch a candidate takes.
        """
        between = self._intermediates(row, side)
        if self.objective == "sampling":
            between = {name: value for name, value in between.items() if name in self.plan.results}
        known = {**between, **outputs}
        try:
            run = Run(self.plan, inputs, known)
        except Exception as error:  # noqa: BLE001 - a router may be computed by functions of the user's
            name = failed_node(error) or ""
            what = str(error) if name == "" else f"its function fails on this row: {type(error).__name__}: {error}"
            self._problem("invalid value", what.replace(", row 0:", ":"), name, side)
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
                    what = side if name in outputs else f"that of the switch {name!r}"
                    self._problem("invalid value", f"its value differs from {what}, which it is.", end, side)
                if self.objective == "sampling":
                    given.setdefault(end, known[name])
        return given, run.skipped | (run.undecided if self.objective == "direct" else frozenset())

    def _outputs(self, row: Mapping[str, Any], side: str) -> dict[str, Any]:
        outputs = self.plan.system.outputs
        if side not in row:
            self._problem("missing", f"{side!r} is missing; the row has {sorted(map(str, row))}.")
            return {}
        if len(outputs) == 1:
            return {outputs[0]: row[side]}
        if not isinstance(row[side], Mapping) or set(row[side]) != set(outputs):
            got = sorted(map(str, row[side])) if isinstance(row[side], Mapping) else type(row[side]).__name__
            self._problem("wrong type", f"{side} must be a dict with one value for each of {list(outputs)}, got {got}.")
            return {}
        return dict(row[side])

    def _intermediates(self, row: Mapping[str, Any], side: str) -> dict[str, Any]:
        column = f"{side}_intermediates"
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
