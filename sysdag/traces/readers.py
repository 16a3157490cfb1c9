"""Rows out of files: JSON lines, a JSON array, CSV, Parquet, a folder of the library `datasets`, or a name on the Hub.

Values are what `sysdag.traces.row_format` says: texts, numbers, lists and dicts as they stand, the named kinds of
`sysdag.files.encoding` (`{"__png__": ...}`, `{"__bytes__": ...}`), and draws. What is null in Parquet or in a dataset
is not there at all. Every row knows where it came from, so an error about it names the file's line.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.files.arrow import read_parquet
from sysdag.traces.row_format import decode_row_value, from_arrow

FORMS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_NESTED = ("chosen", "rejected", "chosen_intermediates", "rejected_intermediates")  # as `chosen.node` in CSV


class Row(dict):
    """A row of a file, which knows its place there.

    Attributes:
        place: where it stands in the file, as `line 7`; "" where its number says it all.
        folder: of the file, which paths in the row may be relative to.
    """

    def __init__(self, values: Any = (), *, place: str = "", folder: Path | None = None) -> None:
        super().__init__(values)
        self.place = place
        self.folder = folder


@dataclass
class Rows:
    """What a source holds.

    Attributes:
        rows: those that could be read.
        damaged: for each part that could not, its place and what is wrong with it.
    """

    rows: list[Row] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)


def read_rows(source: str | Path, *, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a file, a folder or a dataset on the Hub.

    Args:
        source: a file by its ending (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`), a folder that `save_to_disk` of
            `datasets` wrote, or a name on the Hub, `org/name` or `org/name:configuration`.
        split: of a dataset that has splits.

    Raises:
        DataError: naming the file and its first line or row that cannot be read; or a dataset that cannot be loaded.
    """
    found = read_all(source, split=split)
    if found.damaged:
        place, text = found.damaged[0]
        raise DataError(f"{source}, {place}: {text}")
    return list(found.rows)


def read_all(source: str | Path, *, split: str = "train") -> Rows:
    """As `read_rows`, with what is damaged line by line told beside the rows.

    Raises:
        DataError: if nothing can be read: another kind of file, a damaged Parquet file, no such dataset.
    """
    path = Path(source)
    if path.is_dir():
        return Rows(rows_of(_dataset(source, split, _from_disk), path))
    form = path.suffix.lower()
    if form not in FORMS or not path.exists():
        if not path.exists() and form not in FORMS and _NAME.fullmatch(str(source)):
            return Rows(rows_of(_dataset(source, split, _from_hub)))
        if not path.exists():
            raise DataError(f"There is no file, folder or dataset {source}.")
        raise DataError(f"{source}: rows are read from files that end in {', '.join(FORMS)}.")
    if split != "train":
        raise DataError(f"{source} is one file, which has no split {split!r}; give the file of that split.")
    if form == ".parquet":
        return Rows(_rows_of_table(read_parquet(path), str(source), path.parent))
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if form in (".csv", ".tsv"):
        return _read_csv(raw, path, "," if form == ".csv" else "\t")
    if form == ".json" and raw.lstrip()[:1] == b"[":
        return _read_array(raw, path)
    return _read_lines(raw, path)


def rows_of(data: Any, folder: Path | None = None) -> list[Any]:
    """The rows of a `datasets.Dataset`, its images undecoded, or what its transform (`with_transform`) makes of them;
    those of any other iterable as they are.

    Raises:
        DataError: naming the column and row of a damaged value.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset) and data.format["type"] != "custom":
        return _rows_of_table(data.with_format("arrow")[:], "the dataset", folder)
    if datasets is not None and isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return [Row({name: from_arrow(value) for name, value in row.items() if value is not None}) for row in data]
    return list(data)


def _dataset(source: str | Path, split: str, load: Callable[[Any, str, str], Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'{source}: reading it needs the library datasets: pip install "sysdag[data]".') from error
    try:
        return load(datasets, str(source), split)
    except Exception as error:  # the library raises what a network, a file system or a parser may raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source} cannot be loaded as a dataset: {reason}") from error


def _from_disk(datasets: Any, source: str, split: str) -> Any:
    found = datasets.load_from_disk(source)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"it has the splits {sorted(found)}, and no {split!r}.")
        return found[split]
    if split != "train":
        raise ValueError(f"it has no splits, so there is no {split!r}.")
    return found


def _from_hub(datasets: Any, source: str, split: str) -> Any:
    name, _, configuration = source.partition(":")
    return datasets.load_dataset(name, configuration or None, split=split)


def _read_lines(raw: bytes, path: Path) -> Rows:
    found = Rows()
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            _add(found, partial(_parsed, line), f"line {number}", path)
    return found


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}).") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1} of {text[:60]!r}.") from error
    except RecursionError as error:
        raise ValueError("nested too deeply.") from error


def _read_array(raw: bytes, path: Path) -> Rows:
    found = Rows()
    try:
        rows = _parsed(raw)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    for number, row in enumerate(rows):
        _add(found, partial(_same, row), f"row {number}", path)
    return found


def _same(row: Any) -> Any:
    return row


def _add(found: Rows, parse: Callable[[], Any], place: str, path: Path) -> None:
    try:
        data = parse()
        if not isinstance(data, dict):
            raise ValueError(f"a row is an object, got {type(data).__name__} {data!r:.60}.")
        values = {name: decode_row_value(value) for name, value in data.items()}
    except Exception as error:  # noqa: BLE001 - whatever a damaged image or array raises, its line has to be named
        found.damaged.append((place, str(error) or type(error).__name__))
        return
    found.rows.append(Row(values, place=place, folder=path.parent))


def _read_csv(raw: bytes, path: Path, delimiter: str) -> Rows:
    found = Rows()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {raw[error.start]:#04x}).") from error
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                found.damaged.append((f"line {line}", f"not CSV, and what follows is not read: {error}."))
                return found
            if cells is None:
                return found
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{path}, line 1: the header names a column twice: {header}.")
            elif cells and len(cells) != len(header):
                message = f"expected {len(header)} cells, one for each of {header}, got {len(cells)}."
                found.damaged.append((f"line {line}", message))
            elif cells:
                values = _nested(zip(header, cells, strict=True))
                found.rows.append(Row(values, place=f"line {line}", folder=path.parent))
    finally:
        csv.field_size_limit(limit)


def _nested(cells: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Cells by column; those of `chosen_intermediates.draft` become a dict by node."""
    values: dict[str, Any] = {}
    for name, cell in cells:
        side, dot, inner = name.partition(".")
        if dot and side in _NESTED and isinstance(values.setdefault(side, {}), dict):
            values[side][inner] = cell
        else:
            values[name] = cell
    return values


def _rows_of_table(table: Any, source: str, folder: Path | None) -> list[Row]:
    names = table.column_names
    if len(set(names)) < len(names):
        raise DataError(f"{source} has two columns of one name: {names}.")
    columns = {name: _column(table, name, source) for name in names}
    return [
        Row({name: column[row] for name, column in columns.items() if column[row] is not None}, folder=folder)
        for row in range(table.num_rows)
    ]


def _column(table: Any, name: str, source: str) -> list[Any]:
    values: list[Any] = []
    try:
        for element in table.column(name):
            values.append(from_arrow(element.as_py()))
    except Exception as error:  # whatever a damaged image or text raises, its place has to be named
        raise DataError(f"{source}, row {len(values)}, column {name!r}: {error}") from error
    return values
