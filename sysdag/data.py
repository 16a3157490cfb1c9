"""Preference datasets: rows in TRL's format to pairs of partial traces, every mistake told by row and node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sysdag.encoding import encode_value
from sysdag.errors import DataError
from sysdag.plan import Objective, Plan
from sysdag.trace import Cell, Draw, Trace

_SIDES = ("chosen", "rejected")


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """One preference: a winner and a loser for the same inputs.

    Attributes:
        inputs: the value of each input.
        chosen, rejected: the observed cells, by node.
    """

    inputs: Mapping[str, Any]
    chosen: Mapping[str, Cell]
    rejected: Mapping[str, Cell]

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content; pairs with equal inputs, values and records have the same.

        Raises:
            DataError: for a value that has no lossless JSON form (see `sysdag.encoding`).
        """
        content: dict[str, Any] = {"inputs": {name: encode_value(v, name) for name, v in self.inputs.items()}}
        for side in _SIDES:
            content[side] = {
                name: [[encode_value(d.value, name), encode_value(dict(d.record), name)] for d in _draws(cell)]
                for name, cell in getattr(self, side).items()
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _draws(cell: Cell) -> tuple[Draw, ...]:
    return cell if isinstance(cell, tuple) else (cell,)


def collate(pairs: Sequence[PreferencePair]) -> tuple[Trace, Trace]:
    """The winners and the losers of a batch as partial traces over the same inputs."""
    inputs = {name: [pair.inputs[name] for pair in pairs] for name in pairs[0].inputs}
    sides = []
    for side in _SIDES:
        rows = [getattr(pair, side) for pair in pairs]
        sides.append(Trace(inputs, {name: [row[name] for row in rows] for name in rows[0]}))
    return sides[0], sides[1]


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used.

    Attributes:
        row: its number, from 0.
        kind: `missing`, `wrong type`, `unknown node`, `invalid value`; and of rows that could be scored but should not
            be (see `sysdag.validation`) `empty`, `identical`, `over-long`.
        place: the side and node, or "".
        text: what is wrong with it.
    """

    row: int
    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"Row {self.row}{', ' if self.place else ''}{self.place}: {self.text}"


def encode_pairs(plan: Plan, rows: Iterable[Mapping[str, Any]], objective: Objective) -> list[PreferencePair]:
    """Preference rows as pairs that can be scored.

    A row holds the inputs by name (or `prompt`, for a system with one input), `chosen` and `rejected` (the output's
    value, or a dict by node for several outputs), and for Direct `chosen_intermediates` and `rejected_intermediates`,
    dicts by node of every other random node. A plate's value is a list. Values may be given as they are, or as the
    `Draw` (list of draws for a plate) that a sampled trace holds, which keeps the token ids that were sampled.

    TRL's formats are taken too: a text may be a list of one assistant message, a prompt a list of messages, which the
    node's function gets as it is; and a prompt may be implicit, the beginning that `chosen` and `rejected` share.

    Raises:
        DataError: naming the row and the node.
    """
    pairs = []
    for number, row in enumerate(rows):
        pair, problems = encode_row(plan, row, number, objective)
        if pair is None:
            raise DataError(str(problems[0]))
        pairs.append(pair)
    return pairs


def encode_row(
    plan: Plan, row: Any, number: int, objective: Objective, *, loads: bool = True
) -> tuple[PreferencePair | None, list[Problem]]:
    """One row's pair, or None and all that is wrong with it.

    Args:
        plan, row, objective: see `encode_pairs`.
        number: the row's, for its problems.
        loads: False checks values as far as that is possible without any weights; the pair then has no records.
    """
    return _Row(plan, number, objective, loads).read(row)


@dataclass
class _Row:
    plan: Plan
    number: int
    objective: Objective
    loads: bool
    problems: list[Problem] = field(default_factory=list)

    def read(self, row: Any) -> tuple[PreferencePair | None, list[Problem]]:
        if not isinstance(row, Mapping):
            self._problem("wrong type", f"expected a dict, got {type(row).__name__}.")
            return None, self.problems
        row = explicit_prompt(self.plan, row)
        inputs = self._inputs(row)
        sides = {side: self._side(row, side) for side in _SIDES}
        if self.problems:
            return None, self.problems
        return PreferencePair(inputs, sides["chosen"], sides["rejected"]), []

    def _problem(self, kind: str, text: str, place: str = "") -> None:
        self.problems.append(Problem(self.number, kind, place, text))

    def _inputs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        names = [given.name for given in self.plan.system.inputs]
        for given in self.plan.system.inputs:
            name = "prompt" if len(names) == 1 and given.name not in row and "prompt" in row else given.name
            if name not in row:
                self._problem("missing", f"input {given.name!r} is missing; the row has {sorted(map(str, row))}.")
            elif given.value_type is not None and not isinstance(row[name], given.value_type):
                expected, got = given.value_type.__name__, type(row[name]).__name__
                self._problem("wrong type", f"input {given.name!r} must be {expected}, got {got}.")
            elif not _is_unicode(row[name]):
                self._problem(
                    "invalid value", f"input {given.name!r} holds half of a surrogate pair, which is no text."
                )
            else:
                found[given.name] = row[name]
        return found

    def _side(self, row: Mapping[str, Any], side: str) -> dict[str, Cell]:
        given = self._outputs(row, side)
        if self.objective == "direct":
            given |= self._intermediates(row, side)
        before = len(self.problems)
        for name in self.plan.observed(self.objective):
            if name not in given and side in row:
                hint = f" Give it in {side}_intermediates." if name not in self.plan.system.outputs else ""
                self._problem("missing", f"{side} has no value of node {name!r}, which {self.objective} needs.{hint}")
        if len(self.problems) > before:
            return {}
        cells = {name: self._cell(name, value, side) for name, value in given.items()}
        return {name: cell for name, cell in cells.items() if cell is not None}

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
        given = row.get(column) or {}
        if not isinstance(given, Mapping):
            self._problem("wrong type", f"{column} must be a dict by node, got {type(given).__name__}.")
            return {}
        known = set(self.plan.order) - set(self.plan.system.outputs)
        for name in given:
            if name not in known:
                self._problem("unknown node", f"{column} has {name!r}; the other nodes are {sorted(known)}.")
        return {name: value for name, value in given.items() if value is not None and name in known}

    def _cell(self, name: str, value: Any, side: str) -> Cell | None:
        place = f"{side}, node {name!r}"
        if not self.plan.is_plate(name):
            draws = self._draws(name, [value], place)
            return draws[0] if draws else None
        if not isinstance(value, (list, tuple)) or not value:
            self._problem("wrong type", f"a plate needs a list with one value an element, got {value!r:.100}.", place)
            return None
        return tuple(self._draws(name, list(value), place)) or None

    def _draws(self, name: str, values: list[Any], place: str) -> list[Draw]:
        component = self.plan.system[name].component
        given = [index for index, value in enumerate(values) if not isinstance(value, Draw)]
        if not all(_is_unicode(values[index]) for index in given):
            self._problem("invalid value", "half of a surrogate pair, which is no text.", place)
            return []
        if component is None or not given:
            return [value if isinstance(value, Draw) else Draw(value) for value in values]
        try:
            if self.loads:
                observed = component.observe([values[index] for index in given])
            else:
                component.check([values[index] for index in given])
                observed = [Draw(values[index]) for index in given]
        except DataError as error:
            self._problem("invalid value", str(error), place)
            return []
        draws = dict(zip(given, observed, strict=True))
        return [draws.get(index, value) for index, value in enumerate(values)]


def explicit_prompt(plan: Plan, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its implicit prompt told apart: what `chosen` and `rejected` begin with alike, as in TRL.

    A row whose prompt is a text beside whole conversations has an implicit one too. Rows of a system with several
    inputs or outputs, and rows that are not so, come back as they are.
    """
    names = [given.name for given in plan.system.inputs]
    chosen: Any = row.get("chosen")
    rejected: Any = row.get("rejected")
    if len(names) != 1 or len(plan.system.outputs) != 1 or type(chosen) is not type(rejected):
        return row
    conversational = _is_conversation(chosen) and _is_conversation(rejected)
    prompts = [row[name] for name in (names[0], "prompt") if name in row]
    if not (conversational or (isinstance(chosen, str) and not prompts)):
        return row
    if prompts and (_is_conversation(prompts[0]) or len(chosen) == len(rejected) == 1):
        return row
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not conversational and shared > 0 and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the completion
    if not shared or shared in (len(chosen), len(rejected)):
        return row
    return {**row, names[0]: chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _is_unicode(value: Any) -> bool:
    """Whether all text in a value can be written down; JSON may hold half of a surrogate pair."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, Mapping):
        return all(_is_unicode(key) and _is_unicode(element) for key, element in value.items())
    return not isinstance(value, (list, tuple)) or all(map(_is_unicode, value))
