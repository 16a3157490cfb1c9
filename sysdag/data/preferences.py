"""What a feedback dataset holds: pairs of partial traces, single ones, and the mistakes of its rows by row and node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from sysdag.errors import shown
from sysdag.files.encoding import encode_value
from sysdag.traces.cells import ABSENT, Cell, draws_of
from sysdag.traces.trace import Trace

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
