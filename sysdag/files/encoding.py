"""Values as strict JSON and back, without loss: what a trace's lines hold.

Strings, finite numbers, booleans, None and lists stand for themselves. Everything else is an object with one key that
names its kind. A value of any other type is refused, so what is read back always equals what was written.

`encode_value` tells every dict by such a key, too. `encode_json` leaves a dict with text keys as the object that it is,
which other programs read more easily; only a dict that could be taken for a named kind is told by a key.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from sysdag.errors import DataError

MAX_DEPTH = 64
"""How deeply lists, tuples and dicts may be nested, so that every reader can follow them."""
_LONGEST_INT = 2048  # bits; Python refuses to read longer ones from decimal digits
_KIND = re.compile(r"__\w+__")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # the modes that a PNG keeps bit for bit


def encode_value(value: Any, name: str) -> Any:
    """A JSON-ready form of a value; `name` is the input or node that an error names.

    Raises:
        DataError: for a type that cannot be written without loss, or a value nested deeper than `MAX_DEPTH`.
    """
    return _encode(value, name, False, _refuse, 0)


def encode_json(value: Any, name: str, other: Callable[[Any, str], Any] | None = None) -> Any:
    """As `encode_value`, but a dict with text keys stands for itself.

    Args:
        other: encodes values of types that `encode_value` refuses, or refuses them, too.
    """
    return _encode(value, name, True, other or _refuse, 0)


def _refuse(value: Any, name: str) -> Any:
    kind = type(value)
    raise DataError(
        f"{name!r}: a value of type {kind.__module__}.{kind.__qualname__} cannot be written as JSON without loss. Use "
        "str, numbers, bytes, lists, tuples, dicts, numpy arrays or PIL images."
    )


def _encode(value: Any, name: str, plain: bool, other: Callable[[Any, str], Any], depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return value if value.bit_length() <= _LONGEST_INT else {"__int__": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"__float__": repr(value)}
    if kind is str:
        return value if is_text(value) else {"__utf8__": _text(value.encode("utf-8", "surrogatepass"))}
    if kind is bytes:
        return {"__bytes__": _text(value)}
    if kind in (list, tuple, dict):
        if depth == MAX_DEPTH:
            raise DataError(f"{name!r}: a value is nested more than {MAX_DEPTH} levels deep.")

        def inner(part: Any) -> Any:
            return _encode(part, name, plain, other, depth + 1)

        if kind is list:
            return [inner(element) for element in value]
        if kind is tuple:
            return {"__tuple__": [inner(element) for element in value]}
        if all(type(key) is str and is_text(key) for key in value):
            members = {key: inner(element) for key, element in value.items()}
            return members if plain and not _names_a_kind(members) else {"__dict__": members}
        return {"__items__": [[inner(part) for part in item] for item in value.items()]}
    if kind is numpy.ndarray or isinstance(value, numpy.generic):
        return {"__npy__" if kind is numpy.ndarray else "__scalar__": _text(_npy(value, name))}
    image = sys.modules.get("PIL.Image")
    if image is not None and isinstance(value, image.Image):
        return _encode_image(value)
    return other(value, name)


def _names_a_kind(members: dict) -> bool:
    return len(members) == 1 and _KIND.fullmatch(next(iter(members))) is not None


def decode_value(data: Any) -> Any:
    """The value that `encode_value` wrote.

    Raises:
        ValueError: for an object of no known kind, or a value nested deeper than `MAX_DEPTH`.
        Exception: of whatever kind, where a value of a named kind is damaged.
    """
    return _decode(data, None, 0)


def decode_json(data: Any, others: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
    """The value that `encode_json` wrote; in what other programs wrote, an object of no known kind is a dict.

    Args:
        others: by the key of further kinds, what makes a value of what stands there.

    Raises:
        Exception: as `decode_value`.
    """
    return _decode(data, others or {}, 0)


def _decode(data: Any, others: Mapping[str, Callable[[Any], Any]] | None, depth: int) -> Any:
    # `others` is None where every object must be of a known kind.
    if not isinstance(data, (list, dict)):
        return data
    if depth == MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")

    def inner(part: Any) -> Any:
        return _decode(part, others, depth + 1)

    if isinstance(data, list):
        return [inner(element) for element in data]
    if len(data) == 1:
        [(kind, content)] = data.items()
        if others and kind in others:
            return others[kind](content)
        if kind in _KINDS:
            return _decoded(kind, content, inner)
    if others is None:
        raise ValueError(f"no known kind of value: {json.dumps(data)[:80]}")
    return {key: inner(element) for key, element in data.items()}


def _decoded(kind: str, content: Any, decode: Callable[[Any], Any]) -> Any:
    if kind == "__tuple__":
        return tuple([decode(element) for element in content])
    if kind == "__dict__":
        return {key: decode(element) for key, element in content.items()}
    if kind == "__items__":
        return {decode(key): decode(element) for key, element in content}
    return _LEAVES[kind](content)


def is_text(value: str) -> bool:
    """Whether a string can be written down as UTF-8; one with half of a surrogate pair cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _raw(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _npy(value: numpy.ndarray | numpy.generic, name: str) -> bytes:
    # A dtype that NumPy's file format does not know (bfloat16, for one) would come back as raw bytes.
    if value.dtype.hasobject or value.dtype.isbuiltin == 2:
        raise DataError(f"{name!r}: an array of dtype {value.dtype} cannot be written without loss; convert it first.")
    buffer = io.BytesIO()
    numpy.save(buffer, value, allow_pickle=False)
    return buffer.getvalue()


def _from_npy(text: str) -> numpy.ndarray:
    return numpy.lib.format.read_array(io.BytesIO(_raw(text)), allow_pickle=False)


def _encode_image(image: Any) -> Any:
    if image.mode in _PNG_MODES and 0 not in image.size:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"__png__": _text(buffer.getvalue())}
    return {"__image__": [image.mode, list(image.size), _text(image.tobytes())]}


def _from_png(text: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(_raw(text)), formats=["PNG"]).copy()


def _from_image(content: list) -> Any:
    from PIL import Image

    mode, size, text = content
    return Image.frombytes(mode, tuple(size), _raw(text))


_LEAVES: dict[str, Callable[[Any], Any]] = {
    "__int__": lambda text: int(text, 16),
    "__float__": float,
    "__utf8__": lambda text: _raw(text).decode("utf-8", "surrogatepass"),
    "__bytes__": _raw,
    "__npy__": _from_npy,
    "__scalar__": lambda text: _from_npy(text)[()],
    "__png__": _from_png,
    "__image__": _from_image,
}
_KINDS = _LEAVES.keys() | {"__tuple__", "__dict__", "__items__"}
