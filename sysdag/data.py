"""Preference datasets: rows in TRL's format to pairs of partial traces, every mistake told by row and node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


def encode_pairs(plan: Plan, rows: Iterable[Mapping[str, Any]], objective: Objective) -> list[PreferencePair]:
    """Preference rows as pairs that can be scored.

    A row holds the inputs by name (or `prompt`, for a system with one input), `chosen` and `rejected` (the output's
    value, or a dict by node for several outputs), and for Direct `chosen_intermediates` and `rejected_intermediates`,
    dicts by node of every other random node. A plate's value is a list. Values may be given as they are, or as the
    `Draw` (list of draws for a plate) that a sampled trace holds, which keeps the token ids that were sampled.

    Raises:
        DataError: naming the row and the node.
    """
    return [_encode_row(plan, row, number, objective) for number, row in enumerate(rows)]


def _encode_row(plan: Plan, row: Mapping[str, Any], number: int, objective: Objective) -> PreferencePair:
    if not isinstance(row, Mapping):
        raise DataError(f"Row {number}: expected a dict, got {type(row).__name__}.")
    names = [given.name for given in plan.system.inputs]
    if len(names) == 1 and names[0] not in row and "prompt" in row:
        inputs = {names[0]: row["prompt"]}
    else:
        missing = [name for name in names if name not in row]
        if missing:
            raise DataError(f"Row {number}: input {missing[0]!r} is missing; the row has {sorted(row)}.")
        inputs = {name: row[name] for name in names}
    sides = {}
    for side in _SIDES:
        values = _outputs(plan, row, number, side)
        if objective == "direct":
            values |= _intermediates(plan, row, number, side, set(values))
        needed = plan.observed(objective)
        absent = [name for name in needed if name not in values]
        if absent:
            raise DataError(
                f"Row {number}: {side} has no value of node {absent[0]!r}; objective={objective!r} observes "
                f"{list(needed)}. Give it in {side}_intermediates."
            )
        sides[side] = {name: _encode_cell(plan, name, value, number, side) for name, value in values.items()}
    return PreferencePair(inputs, sides["chosen"], sides["rejected"])


def _outputs(plan: Plan, row: Mapping[str, Any], number: int, side: str) -> dict[str, Any]:
    if side not in row:
        raise DataError(f"Row {number}: {side!r} is missing; the row has {sorted(row)}.")
    outputs = plan.system.outputs
    if len(outputs) == 1:
        return {outputs[0]: row[side]}
    if not isinstance(row[side], Mapping) or set(row[side]) != set(outputs):
        got = sorted(row[side]) if isinstance(row[side], Mapping) else type(row[side]).__name__
        raise DataError(f"Row {number}: {side} must be a dict with one value for each of {list(outputs)}, got {got}.")
    return dict(row[side])


def _intermediates(plan: Plan, row: Mapping[str, Any], number: int, side: str, outputs: set[str]) -> dict[str, Any]:
    given = row.get(f"{side}_intermediates") or {}
    if not isinstance(given, Mapping):
        raise DataError(f"Row {number}: {side}_intermediates must be a dict by node, got {type(given).__name__}.")
    known = set(plan.order) - outputs
    for name in given:
        if name not in known:
            raise DataError(f"Row {number}: {side}_intermediates has {name!r}; the other nodes are {sorted(known)}.")
    return {name: value for name, value in given.items() if value is not None}


def _encode_cell(plan: Plan, name: str, value: Any, number: int, side: str) -> Cell:
    where = f"Row {number}, {side}, node {name!r}"
    if not plan.is_plate(name):
        return _encode_draws(plan, name, [value], where)[0]
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{where}: a plate needs a list with one value an element, got {value!r:.100}.")
    return tuple(_encode_draws(plan, name, list(value), where))


def _encode_draws(plan: Plan, name: str, values: list[Any], where: str) -> list[Draw]:
    component = plan.system[name].component
    if component is None:
        return [value if isinstance(value, Draw) else Draw(value) for value in values]
    given = [place for place, value in enumerate(values) if not isinstance(value, Draw)]
    try:
        observed = component.observe([values[place] for place in given]) if given else []
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    draws = dict(zip(given, observed, strict=True))
    return [draws.get(place, value) for place, value in enumerate(values)]
