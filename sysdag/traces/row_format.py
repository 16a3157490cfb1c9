"""Rows of preferences on file: the values of a row as JSON, and whole columns of them as Arrow arrays.

JSON is that of `sysdag.files.encoding.encode_json` with two kinds more:

    {"__draw__": {"value": ..., "record": {...}, "log_prob": ...}}    a `Draw`, with the token ids that were sampled
    {"__json__": "..."}    a value as JSON text, where a column of Parquet has no type for all of its values

A dict of the user's that looks so is written as `{"__dict__": {...}}`, so that each comes back as what it was.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sysdag.files.arrow import plain_type, text_column
from sysdag.files.encoding import decode_json, encode_json, encode_value
from sysdag.traces.cells import Draw

IMAGE_KEYS = frozenset({"bytes", "path"})
"""What the library `datasets` makes of an image in a column of Arrow."""
_DEEPEST_TYPE = 8
_NAME = re.compile(r"[\w .\[\]-]+")  # of a struct's field; other keys are left to JSON


def encode_row_value(value: Any, name: str) -> Any:
    """A JSON-ready form of a value of a row; `name` is the column that an error names.

    Raises:
        DataError: for a value that cannot be written without loss.
    """
    return encode_json(value, name, _encode_draw)


def decode_row_value(data: Any) -> Any:
    """The value that `encode_row_value` wrote; what other programs wrote stands for itself.

    Raises:
        Exception: of whatever kind, where a named kind of value is damaged.
    """
    return decode_json(data, _OTHERS)


def _encode_draw(value: Any, name: str) -> Any:
    if not isinstance(value, Draw):
        return encode_value(value, name)  # which refuses it
    content = {"value": encode_json(value.value, name), "record": encode_value(dict(value.record), name)}
    return {"__draw__": {**content, "log_prob": encode_value(value.log_prob, name)}}


def _decode_draw(content: Any) -> Draw:
    record, value = content.get("record"), content.get("value")
    record = decode_json(json.loads(record) if isinstance(record, str) else record or {})
    log_prob = decode_json(content.get("log_prob"), {"__json__": _decode_text})
    if not isinstance(record, dict) or not (log_prob is None or type(log_prob) in (int, float)):
        raise TypeError("a draw has a value, a record (a dict) and a log_prob (a number or null)")
    return Draw(decode_json(value, {"__json__": _decode_text}), record, log_prob)


def _decode_text(text: str) -> Any:
    return decode_json(json.loads(text), {"__draw__": _decode_draw})


_OTHERS = {"__draw__": _decode_draw, "__json__": _decode_text}


def to_arrow(values: Sequence[Any], name: str, depth: int = 0) -> Any:
    """A column as an Arrow array: texts, numbers, lists and dicts of them, and draws have types of their own.

    A draw's record is JSON text. None, and a key that is missing in some of the dicts, is null.

    Args:
        depth: of lists and dicts around it; deep ones are JSON text.

    Raises:
        DataError: for a value that cannot be written without loss.
    """
    import pyarrow

    if (kind := plain_type(values)) is not None:
        return pyarrow.array(values, kind)
    missing = [value is None for value in values]
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, Draw) for value in given):
        draws = [Draw(None) if value is None else value for value in values]
        parts = {"value": to_arrow([draw.value for draw in draws], name, depth + 1)}
        if any(draw.record for draw in draws):
            records = [_text(encode_value(dict(draw.record), name)) if draw.record else None for draw in draws]
            parts["record"] = text_column(records)
        if any(draw.log_prob is not None for draw in draws):
            parts["log_prob"] = to_arrow([draw.log_prob for draw in draws], name, depth + 1)
        return _structs({"__draw__": _structs(parts, missing)}, missing)
    if depth < _DEEPEST_TYPE and all(type(value) is list for value in given) and any(given):
        ends = list(itertools.accumulate((len(value or ()) for value in values), initial=0))
        elements = to_arrow([element for value in given for element in value], name, depth + 1)
        return pyarrow.LargeListArray.from_arrays(ends, elements, mask=pyarrow.array(missing))
    if depth < _DEEPEST_TYPE and given and all(map(_is_struct, given)):
        keys = dict.fromkeys(key for value in given for key in value)
        parts = {key: to_arrow([(value or {}).get(key) for value in values], name, depth + 1) for key in keys}
        return _structs(parts, missing)
    texts = [None if value is None else _text(encode_row_value(value, name)) for value in values]
    return _structs({"__json__": text_column(texts)}, missing)


def _is_struct(value: Any) -> bool:
    """Whether a dict comes back from a struct, where a missing key and None are the same, as what it was."""
    if type(value) is not dict or not value or any(element is None for element in value.values()):
        return False
    if not all(type(key) is str and _NAME.fullmatch(key) for key in value):
        return False
    return not value.keys() <= IMAGE_KEYS and not (len(value) == 1 and next(iter(value)).startswith("__"))


def _structs(parts: Mapping[str, Any], missing: Sequence[bool]) -> Any:
    import pyarrow

    return pyarrow.StructArray.from_arrays(list(parts.values()), names=list(parts), mask=pyarrow.array(missing))


def from_arrow(value: Any) -> Any:
    """A value of a row, of what Arrow gave: keys that a struct has only for other rows are gone, and an image is its
    file's content or, where that is not there, its path.

    Raises:
        Exception: as `decode_row_value`.
    """
    return decode_row_value(_without_nulls(value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    if isinstance(value, dict):
        if value.keys() == IMAGE_KEYS and (type(value["bytes"]) is bytes or type(value["path"]) is str):
            return value["path"] if value["bytes"] is None else value["bytes"]
        return {key: _without_nulls(element) for key, element in value.items() if element is not None}
    return value


def _text(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)
