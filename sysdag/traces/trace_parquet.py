"""Traces as Parquet: readable by pandas and DuckDB, and without loss.

One row a run. Each input is a column of its name, and so is each node, holding its values; what else is known of a run
is a column `columns.<name>`. A column of texts, whole numbers, numbers, truth values or bytes (None among them) has
that type, a plate of such values is a list of them:

    SELECT question, answer, "answer.log_prob" FROM 'runs.parquet' WHERE "columns.score" > 0.5

Values of any other kind, or of several, are JSON text as in the lines of `Trace.to_jsonl`. Beside a node's values stand
its `<node>.log_prob` (natural logarithm), where any is known, and its `<node>.record`, where there is any: JSON text
again, which has the sampled token ids. A node that did not run everywhere has a column `<node>.absent`, which says
where; its value is null there. The file's metadata say under `sysdag.trace` which column is what, and in which
form; a table that another program wrote anew has lost them, and is no trace.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sysdag.errors import DataError
from sysdag.files.arrow import is_plain, load_pyarrow, plain_type, read_parquet, text_column, write_parquet
from sysdag.files.atomic import replacing_file
from sysdag.files.encoding import decode_json, decode_value, encode_json, encode_value
from sysdag.traces.cells import ABSENT, Cell, Draw, decode_cell, encode_cell

Made = TypeVar("Made")
FORMAT_VERSION = 1
_WITH_ABSENT = 2  # where there are absent cells, which readers of the first version would take for nulls
_METADATA = b"sysdag.trace"


def write(
    path: Path,
    inputs: Mapping[str, Sequence[Any]],
    cells: Mapping[str, Sequence[Cell]],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    """Writes a trace's parts; the file is replaced as a whole.

    Raises:
        DataError: naming the node that holds a value which cannot be written without loss.
    """
    load_pyarrow(path)
    writer = _Writer()
    absent = any(cell is ABSENT for column in cells.values() for cell in column)
    layout = {
        "format_version": _WITH_ABSENT if absent else FORMAT_VERSION,
        "inputs": {name: writer.values(name, name, column, encode_value) for name, column in inputs.items()},
        "nodes": {name: writer.node(name, column) for name, column in cells.items()},
        "columns": {
            name: writer.values(f"columns.{name}", name, column, encode_json) for name, column in columns.items()
        },
    }
    with replacing_file(path) as unfinished:
        write_parquet(unfinished, writer.arrays, {_METADATA: json.dumps(layout)})


def read(path: Path, made: Callable[..., Made]) -> Made:
    """What `made` makes of the parts that `write` wrote.

    Raises:
        DataError: naming the file, and the column and row that is damaged.
    """
    table = read_parquet(path)
    try:
        layout = json.loads(table.schema.metadata[_METADATA])
        if layout["format_version"] not in (FORMAT_VERSION, _WITH_ABSENT):
            raise ValueError(f"its format is version {layout['format_version']}, this sysdag reads {_WITH_ABSENT}")
        reader = _Reader(table)
        return made(
            {name: reader.values(place, decode_value) for name, place in layout["inputs"].items()},
            {name: reader.node(place) for name, place in layout["nodes"].items()},
            {name: reader.values(place, decode_json) for name, place in layout["columns"].items()},
        )
    except Exception as error:  # whatever damaged metadata or values raise, the file has to be named
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        what = "it has no metadata of a trace" if table.schema.metadata is None else what
        raise DataError(f"{path}: not the runs that Trace.save wrote ({what}).") from error


class _Writer:
    """Collects Arrow columns. What describes one in the metadata is its `form` (`plain`, `json`) and its `column`."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}

    def _add(self, column: str, array: Any, form: str) -> dict[str, str]:
        while column in self.arrays:
            column += "_"
        self.arrays[column] = array
        return {"form": form, "column": column}

    def values(
        self, column: str, name: str, values: Sequence[Any], encode: Callable[[Any, str], Any]
    ) -> dict[str, str]:
        """One value a row; `name` is what an error calls it."""
        import pyarrow

        kind = plain_type(values)
        if kind is not None:
            return self._add(column, pyarrow.array(values, kind), "plain")
        return self._add(column, text_column([_text(encode(value, name)) for value in values]), "json")

    def lists(self, column: str, name: str, lists: Sequence[Sequence[Any]]) -> dict[str, str]:
        """One list of values a row."""
        import pyarrow

        kind = plain_type(itertools.chain.from_iterable(lists))
        if kind is not None:
            return self._add(column, pyarrow.array(list(map(list, lists)), pyarrow.large_list(kind)), "plain")
        return self.values(column, name, list(map(list, lists)), encode_value)

    def node(self, name: str, cells: Sequence[Cell]) -> dict[str, Any]:
        """A node's cells: `kind` is `draw` or `plate`, or `cell` where a column holds both."""
        place: dict[str, Any]
        absent = [cell is ABSENT for cell in cells]
        if any(absent):
            fill: Cell = () if any(isinstance(cell, tuple) for cell in cells) else Draw(None)
            place = self.node(name, [fill if cell is ABSENT else cell for cell in cells])
            return {**place, "absent": self.values(f"{name}.absent", name, absent, encode_value)}
        if all(isinstance(cell, Draw) for cell in cells):
            draws = [cell for cell in cells if isinstance(cell, Draw)]
            place = {"kind": "draw"}
            place["value"] = self.values(name, name, [draw.value for draw in draws], encode_value)
            if any(draw.log_prob is not None for draw in draws):
                log_probs = [draw.log_prob for draw in draws]
                place["log_prob"] = self.values(f"{name}.log_prob", name, log_probs, encode_value)
            if any(draw.record for draw in draws):
                records = [dict(draw.record) for draw in draws]
                place["record"] = self.values(f"{name}.record", name, records, encode_value)
            return place
        if all(isinstance(cell, tuple) for cell in cells):
            plates = [cell for cell in cells if isinstance(cell, tuple)]
            place = {"kind": "plate"}
            place["value"] = self.lists(name, name, [[draw.value for draw in cell] for cell in plates])
            if any(draw.log_prob is not None for cell in plates for draw in cell):
                log_prob_lists = [[draw.log_prob for draw in cell] for cell in plates]
                place["log_prob"] = self.lists(f"{name}.log_prob", name, log_prob_lists)
            if any(draw.record for cell in plates for draw in cell):
                record_lists = [[dict(draw.record) for draw in cell] for cell in plates]
                place["record"] = self.values(f"{name}.record", name, record_lists, encode_value)
            return place
        return {"kind": "cell", "cell": self.values(name, name, cells, encode_cell)}


class _Reader:
    def __init__(self, table: Any) -> None:
        self._table = table

    def values(self, place: Mapping[str, str], decode: Callable[[Any], Any]) -> list[Any]:
        column = place["column"]
        array = self._table.column(column)
        if place["form"] == "plain":
            if not is_plain(array.type):
                raise ValueError(f"column {column!r} is {array.type}, which Trace.save does not write")
            return array.to_pylist()
        values = []
        for row, text in enumerate(array.to_pylist()):
            try:
                values.append(decode(json.loads(text)))
            except Exception as error:
                raise ValueError(f"row {row}, column {column!r}: {error}") from error
        return values

    def node(self, place: Mapping[str, Any]) -> list[Cell]:
        if "absent" in place:
            there = self.node({key: part for key, part in place.items() if key != "absent"})
            absent = self.values(place["absent"], decode_value)
            return [ABSENT if missing else cell for cell, missing in zip(there, absent, strict=True)]
        if place["kind"] == "cell":
            return self.values(place["cell"], decode_cell)
        values = self.values(place["value"], decode_value)
        log_probs, records = (
            self.values(place[part], decode_value) if part in place else [None] * len(values)
            for part in ("log_prob", "record")
        )
        rows = list(zip(values, records, log_probs, strict=True))
        if place["kind"] == "draw":
            return [Draw(value, record or {}, log_prob) for value, record, log_prob in rows]
        return [
            tuple(
                Draw(value, record or {}, log_prob)
                for value, record, log_prob in zip(
                    value_list, record_list or [{}] * len(value_list), log_prob_list or [None] * len(value_list),
                    strict=True,
                )
            )
            for value_list, record_list, log_prob_list in rows
        ]  # fmt: skip


def _text(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)
