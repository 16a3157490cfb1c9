"""Rows out of CSV: the delimiter is found, and cells that hold chat messages become lists of messages."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.traces.rows import Row, Rows

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_NESTED = (
    "chosen",
    "rejected",
    "chosen_intermediates",
    "rejected_intermediates",
    "intermediates",
    "output",
    "completion",
)  # as `chosen.node`
_WRITTEN = re.compile(r"""\s*(?:array\()?\[?\s*\{\s*["'](?:role|content|tool_calls|from|value)["']\s*:""")
_ROLE = re.compile(r"""["'](?:role|from)["']\s*:""")
_MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})


def read_csv(raw: bytes, path: Path, delimiter: str, *, is_certain: bool = False) -> Rows:
    """Rows of CSV whose first line names the columns; `chosen.draft` is the column of a dict by node.

    A cell that is a list of chat messages in JSON, or as Python prints it, is that list; any other is its text.

    Args:
        delimiter: what the file's ending stands for. Where the header has only one column by it, the file's own
            delimiter is looked for.
        is_certain: takes `delimiter` as it is.

    Raises:
        DataError: for a file that is no UTF-8, a header that names a column twice, or several possible delimiters.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte {raw[error.start]:#04x}). Write the file as UTF-8."
        ) from error
    with _long_cells(text):
        if not is_certain:
            delimiter = _delimiter(text, path, delimiter)
        return _rows(text, path, delimiter)


@contextmanager
def _long_cells(text: str) -> Iterator[None]:
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _reader(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)


def _delimiter(text: str, path: Path, expected: str) -> str:
    """The one by which the header has several columns; of several such, the one by which all rows have as many."""
    headers = {each: _header(text, each) for each in DELIMITERS}
    if len(headers[expected]) > 1 and all(len(headers[each]) <= 1 for each in DELIMITERS if each != expected):
        return expected
    possible = [each for each, header in headers.items() if len(header) > 1]
    if len(possible) < 2:
        return possible[0] if possible else expected
    fitting = [each for each in possible if _fits(text, each)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and expected in possible:
        return expected  # whose rows are told one by one
    names = " and ".join(DELIMITERS[each] for each in fitting or possible)
    columns = " or ".join(str(headers[each]) for each in fitting or possible)
    raise DataError(
        f"{path}: what parts its columns cannot be told: {names} both could, for the columns {columns}. Quote the "
        "cells, or write JSON lines."
    )


def _header(text: str, delimiter: str) -> list[str]:
    try:
        return next(_reader(text, delimiter), [])
    except csv.Error:
        return []


def _fits(text: str, delimiter: str) -> bool:
    try:
        return len({len(cells) for cells in _reader(text, delimiter) if cells}) == 1
    except csv.Error:
        return False


def _rows(text: str, path: Path, delimiter: str) -> Rows:
    found = Rows()
    reader = _reader(text, delimiter)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            found.damage(f"line {line}", f"not CSV, and what follows is not read: {error}.")
            return found
        if cells is None:
            return found
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise DataError(f"{path}, line 1: the header names a column twice: {header}.")
        elif cells and len(cells) != len(header):
            message = f"expected {len(header)} cells, one for each of {header}, got {len(cells)}."
            found.damage(f"line {line}", message)
        elif cells:
            try:
                values = _nested({name: _value(cell, name) for name, cell in zip(header, cells, strict=True)})
            except ValueError as error:
                found.damage(f"line {line}", str(error))
                continue
            found.rows.append(Row(values, place=f"line {line}", folder=path.parent))


def _value(cell: str, name: str) -> Any:
    """The chat messages that a cell holds, or its text."""
    if not is_written_messages(cell):
        return cell
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if _is_messages(value):
            return _without_null_members(value)
    raise ValueError(
        f"column {name!r} holds chat messages that are no JSON, as numpy or another program prints them: {cell:.60}. "
        "Write them as JSON (json.dumps), or write the file as JSON lines or Parquet."
    )


def is_written_messages(text: str) -> bool:
    """Whether a text begins as a list of chat messages does when it is written down, or one such message."""
    return _WRITTEN.match(text) is not None and _ROLE.search(text) is not None


def _is_messages(value: Any) -> bool:
    messages = value if isinstance(value, list) else [value]
    return bool(messages) and all(
        isinstance(message, dict) and any(keys <= message.keys() for keys in _MESSAGE_KEYS) for message in messages
    )


def _without_null_members(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_null_members(message) for message in value]
    return {key: member for key, member in value.items() if member is not None}


def _nested(cells: dict[str, Any]) -> dict[str, Any]:
    """Cells by column; those of `chosen_intermediates.draft` become a dict by node."""
    values: dict[str, Any] = {}
    for name, cell in cells.items():
        side, dot, inner = name.partition(".")
        if dot and side in _NESTED and isinstance(values.setdefault(side, {}), dict):
            values[side][inner] = cell
        else:
            values[name] = cell
    return values
