"""Rows out of JSON: one object a line, an array, objects one behind the other, or the list in one object's `data`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.traces.rows import Rows

_CONTAINER = "data"


def read_lines(raw: bytes, path: Path, first: int = 1) -> Rows:
    """Rows of JSON lines, of which the first has the number `first`; one that cannot be read is told beside them."""
    found = Rows()
    for number, line in enumerate(raw.split(b"\n"), start=first):
        if line.strip():
            found.add(partial(_parsed, line), f"line {number}", path.parent)
    return found


def read_json(raw: bytes, path: Path, *, member: str | None = None) -> Rows:
    """Rows of a file that ends in `.json`, whatever it holds.

    Args:
        member: of the one object that the file holds, which the rows are in.

    Raises:
        DataError: for a file that is no JSON as a whole, or that holds columns and not rows.
    """
    if member is None and raw.lstrip()[:1] == b"{" and _is_object(raw.lstrip().split(b"\n", 1)[0]):
        found = read_lines(raw, path)
        if len(found.rows) + len(found.damaged) > 1:
            return found
    try:
        values = list(_values(_text(raw)))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if len(values) == 1:
        line, value = values[0]
        rows = _rows_of_one(value, path, member)
        places = [f"row {number}" for number in range(len(rows))] if rows != [value] else [f"line {line}"]
    else:
        rows, places = [value for _, value in values], [f"line {line}" for line, _ in values]
    found = Rows()
    for place, row in zip(places, rows, strict=True):
        found.add(partial(_same, row), place, path.parent)
    return found


def _rows_of_one(value: Any, path: Path, member: str | None) -> list[Any]:
    """The rows of the one value that a file holds."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and member is not None:
        if not isinstance(value.get(member), list):
            raise DataError(f"{path}: expected the rows as a list in {member!r}; the file has {sorted(value)}.")
        return value[member]
    if isinstance(value, dict):
        if _is_list_of_rows(value.get(_CONTAINER)) and not {"chosen", "rejected"} & value.keys():
            return value[_CONTAINER]
        if _holds_columns(value):
            raise DataError(
                f"{path} holds one object of whole columns, {sorted(value)}. Write an object for each row: with "
                "pandas, to_json(..., orient='records', lines=True)."
            )
    return [value]


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _holds_columns(value: dict[str, Any]) -> bool:
    """Whether every member is a column: a list of values that are no chat messages, or pandas' dict by the index."""
    parts = list(value.values())
    if len(parts) < 2:
        return False
    if all(isinstance(part, dict) and part and all(key.isdecimal() for key in part) for part in parts):
        return True
    is_conversation = any(
        isinstance(part, list) and any(isinstance(each, dict) and "role" in each for each in part) for part in parts
    )
    return all(isinstance(part, list) for part in parts) and len({*map(len, parts)}) == 1 and not is_conversation


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """The values of a text of JSON, one behind the other, each with the line that it begins on."""
    decoder, at, line, counted = json.JSONDecoder(), 0, 1, 0
    while (at := len(text) - len(text[at:].lstrip())) < len(text):
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at line {error.lineno}, character {error.colno}.") from error
        except RecursionError as error:
            raise ValueError("nested too deeply.") from error
        yield line, value


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_parsed(line), dict)
    except ValueError:
        return False


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}).") from error


def _parsed(line: bytes) -> Any:
    text = _text(line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1} of {text[:60]!r}.") from error
    except RecursionError as error:
        raise ValueError("nested too deeply.") from error


def _same(row: Any) -> Any:
    return row
