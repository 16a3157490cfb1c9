"""A trace: what one batch of runs produced, with everything needed to score it again.

Token ids travel with text: a draw keeps the ids that were really sampled, so scoring never tokenises a completion
again. A trace may be partial: it then holds only what was observed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.files.atomic import replacing_file
from sysdag.files.encoding import decode_json, decode_value, encode_json, encode_value
from sysdag.traces import trace_parquet
from sysdag.traces.cells import Cell, check_names, decode_cell, encode_cell, value_of


@dataclass(frozen=True, eq=False)
class Trace:
    """The values of one batch of runs.

    Attributes:
        inputs: for each input, one value a row.
        cells: for each node that has values, one `Draw` a row, or for a plate one tuple of draws a row, or `ABSENT`
            where it did not run; in topological order, so that the last node is an output.
        columns: what else is known of each run, by name: a score, the numbers of its prompt and run; one value a row,
            of any kind that `sysdag.files.encoding` knows. They have names of their own, which may be those of inputs.
    """

    inputs: Mapping[str, Sequence[Any]]
    cells: Mapping[str, Sequence[Cell]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if both := self.inputs.keys() & self.cells.keys():
            raise DataError(f"{min(both)!r} is both an input and a node of the trace; names must be unique.")
        lengths = {name: len(column) for name, column in {**self.inputs, **self.cells}.items()}
        lengths |= {f"column {name}": len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"A trace needs the same number of rows in every column, got {lengths}.")

    def __len__(self) -> int:
        parts = (self.inputs, self.cells, self.columns)
        return next((len(column) for part in parts for column in part.values()), 0)

    def __getitem__(self, name: str) -> list[Any]:
        """The values of one input or node, one a row: of a plate a list of its elements', None where it did not run."""
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
            {name: [column[row] for row in rows] for name, column in self.columns.items()},
        )

    def only(self, names: Iterable[str]) -> Trace:
        """The trace with the cells of the named nodes alone."""
        return replace(self, cells={name: self.cells[name] for name in names if name in self.cells})

    def updated(self, cells: Mapping[str, Sequence[Cell]]) -> Trace:
        """The trace with cells added or replaced."""
        return replace(self, cells={**self.cells, **cells})

    @staticmethod
    def concatenate(traces: Sequence[Trace]) -> Trace:
        """The rows of several traces over the same names, one after the other."""
        if not traces:
            raise DataError("Trace.concatenate needs at least one trace.")
        first = traces[0]
        for other in traces[1:]:
            if other._names() != first._names():
                raise DataError(f"Traces hold different names: {first._described()} and {other._described()}.")
        return Trace(
            {name: [value for trace in traces for value in trace.inputs[name]] for name in first.inputs},
            {name: [cell for trace in traces for cell in trace.cells[name]] for name in first.cells},
            {name: [value for trace in traces for value in trace.columns[name]] for name in first.columns},
        )

    def _names(self) -> tuple[Set[str], ...]:
        return self.inputs.keys(), self.cells.keys(), self.columns.keys()

    def _described(self) -> str:
        return f"{[*self.inputs, *self.cells]}" + (f" with columns {[*self.columns]}" if self.columns else "")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each run as a JSON-ready dict: `{"inputs": {...}, "nodes": {name: draw or list of draws}, "columns": {...}}`.

        `columns` is there if the trace has any.
        """
        for row in range(len(self)):
            found = {
                "inputs": {name: encode_value(column[row], name) for name, column in self.inputs.items()},
                "nodes": {name: encode_cell(column[row], name) for name, column in self.cells.items()},
            }
            if self.columns:
                found["columns"] = {name: encode_json(column[row], name) for name, column in self.columns.items()}
            yield found

    def save(self, path: str | Path) -> None:
        """Writes JSON lines or Parquet (see `sysdag.traces.trace_parquet`), by the file's ending; both keep everything.

        The file is replaced as a whole; after an error an old one is as it was.

        Raises:
            DataError: naming the node that holds a value which cannot be written without loss; or for another ending.
        """
        if _form_of(path) == ".parquet":
            trace_parquet.write(Path(path), self.inputs, self.cells, self.columns)
        else:
            self.to_jsonl(path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads what `save` wrote.

        Raises:
            DataError: naming the file, and the line or row that is no run; or for another ending.
        """
        if _form_of(path) == ".parquet":
            return trace_parquet.read(Path(path), cls)
        return cls.from_jsonl(path)

    def to_jsonl(self, path: str | Path) -> None:
        """Writes one line a run, in strict JSON. Numbers, arrays and images keep their exact values.

        The file is replaced as a whole; after an error an old one is as it was.

        Raises:
            DataError: naming the node that holds a value which cannot be written without loss.
        """
        with replacing_file(Path(path)) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
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
                    check_names([*row["inputs"], *row["nodes"], *row.get("columns", {})])
                    traces.append(
                        cls(
                            {name: [decode_value(value)] for name, value in row["inputs"].items()},
                            {name: [decode_cell(cell)] for name, cell in row["nodes"].items()},
                            {name: [decode_json(value)] for name, value in row.get("columns", {}).items()},
                        )
                    )
                    cls.concatenate([traces[0], traces[-1]])
                except Exception as error:  # whatever a damaged array or image raises, its line has to be named
                    why = f"it has no {error}" if isinstance(error, KeyError) else error
                    raise DataError(
                        f"{path}, line {number}: not a run that `sysdag sample` or Trace.to_jsonl wrote ({why})."
                    ) from error
        if not traces:
            raise DataError(f"{path} holds no runs.")
        return cls.concatenate(traces)


def _form_of(path: str | Path) -> str:
    ending = Path(path).suffix.lower()
    if ending not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: traces are stored in files that end in .jsonl or .parquet.")
    return ending
