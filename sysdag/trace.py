"""A trace: what one batch of runs produced, with everything needed to score it again.

Token ids travel with text: a draw keeps the ids that were really sampled, so scoring never tokenises a completion
again. A trace may be partial: it then holds only what was observed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sysdag.encoding import decode_value, encode_value
from sysdag.errors import DataError


@dataclass(frozen=True, eq=False)
class Draw:
    """One value of one random node.

    Attributes:
        value: what the functions of its children receive.
        record: what its component needs to score it (`token_ids` of a language model, `latents` of a diffusion
            model); empty for a deterministic node.
        log_prob: natural logarithm of the probability under the distribution it was drawn from; None where that is
            unknown or the value was given.
    """

    value: Any
    record: Mapping[str, Any] = field(default_factory=dict)
    log_prob: float | None = None


Cell = Draw | tuple[Draw, ...]


def value_of(cell: Cell) -> Any:
    """What a child receives: the draw's value, or for a plate the list of its elements' values."""
    return [draw.value for draw in cell] if isinstance(cell, tuple) else cell.value


@dataclass(frozen=True, eq=False)
class Trace:
    """The values of one batch of runs.

    Attributes:
        inputs: for each input, one value a row.
        cells: for each node that has values, one `Draw` a row, or for a plate one tuple of draws a row.
    """

    inputs: Mapping[str, Sequence[Any]]
    cells: Mapping[str, Sequence[Cell]]

    def __post_init__(self) -> None:
        if both := self.inputs.keys() & self.cells.keys():
            raise DataError(f"{min(both)!r} is both an input and a node of the trace; names must be unique.")
        lengths = {name: len(column) for name, column in {**self.inputs, **self.cells}.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"A trace needs the same number of rows in every column, got {lengths}.")

    def __len__(self) -> int:
        return next((len(column) for column in (*self.inputs.values(), *self.cells.values())), 0)

    def __getitem__(self, name: str) -> list[Any]:
        """The values of one input or node, one a row (a list of elements' values for a plate)."""
        if name in self.inputs:
            return list(self.inputs[name])
        if name in self.cells:
            return [value_of(cell) for cell in self.cells[name]]
        raise DataError(f"The trace has no values of {name!r}; it holds {[*self.inputs, *self.cells]}.")

    def select(self, rows: Iterable[int]) -> Trace:
        """The trace of the given rows, in that order; rows may repeat."""
        rows = list(rows)
        return Trace(
            {name: [column[row] for row in rows] for name, column in self.inputs.items()},
            {name: [column[row] for row in rows] for name, column in self.cells.items()},
        )

    def only(self, names: Iterable[str]) -> Trace:
        """The trace with the cells of the named nodes alone."""
        return Trace(self.inputs, {name: self.cells[name] for name in names if name in self.cells})

    def updated(self, cells: Mapping[str, Sequence[Cell]]) -> Trace:
        """The trace with cells added or replaced."""
        return Trace(self.inputs, {**self.cells, **cells})

    @staticmethod
    def concatenate(traces: Sequence[Trace]) -> Trace:
        """The rows of several traces over the same names, one after the other."""
        if not traces:
            raise DataError("Trace.concatenate needs at least one trace.")
        first = traces[0]
        for other in traces[1:]:
            if other.inputs.keys() != first.inputs.keys() or other.cells.keys() != first.cells.keys():
                raise DataError(
                    f"Traces hold different names: {[*first.inputs, *first.cells]} and {[*other.inputs, *other.cells]}."
                )
        return Trace(
            {name: [value for trace in traces for value in trace.inputs[name]] for name in first.inputs},
            {name: [cell for trace in traces for cell in trace.cells[name]] for name in first.cells},
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each run as a JSON-ready dict: `{"inputs": {...}, "nodes": {name: draw or list of draws}}`."""
        for row in range(len(self)):
            yield {
                "inputs": {name: encode_value(column[row], name) for name, column in self.inputs.items()},
                "nodes": {name: _encode_cell(column[row], name) for name, column in self.cells.items()},
            }

    def to_jsonl(self, path: str | Path) -> None:
        """Writes one line a run, in strict JSON. Numbers, arrays and images keep their exact values.

        Raises:
            DataError: naming the node that holds a value which cannot be written without loss.
        """
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.rows())

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Trace:
        """Reads what `to_jsonl` wrote.

        Raises:
            DataError: naming the line that is no run, or whose names differ from the first line's.
        """
        traces: list[Trace] = []
        with Path(path).open("rb") as file:  # as bytes, so that only a line feed ends a line
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line.decode("utf-8"))
                    traces.append(
                        cls(
                            {name: [decode_value(value)] for name, value in row["inputs"].items()},
                            {name: [_decode_cell(cell)] for name, cell in row["nodes"].items()},
                        )
                    )
                    cls.concatenate([traces[0], traces[-1]])
                except Exception as error:  # whatever a damaged array or image raises, its line has to be named
                    raise DataError(f"{path}, line {number}: not a run that Trace.to_jsonl wrote ({error}).") from error
        if not traces:
            raise DataError(f"{path} holds no runs.")
        return cls.concatenate(traces)


def _encode_cell(cell: Cell, name: str) -> Any:
    if isinstance(cell, tuple):
        return [_encode_cell(draw, name) for draw in cell]
    return {
        "value": encode_value(cell.value, name),
        "record": {key: encode_value(value, name) for key, value in cell.record.items()},
        "log_prob": encode_value(cell.log_prob, name),
    }


def _decode_cell(data: Any) -> Cell:
    if isinstance(data, list):
        return tuple(_decode_draw(element) for element in data)
    return _decode_draw(data)


def _decode_draw(data: Any) -> Draw:
    record = {key: decode_value(value) for key, value in data["record"].items()}
    log_prob = decode_value(data["log_prob"])
    if log_prob is not None and not isinstance(log_prob, (int, float)):
        raise TypeError(f"log_prob is {log_prob!r}")
    return Draw(decode_value(data["value"]), record, log_prob)
