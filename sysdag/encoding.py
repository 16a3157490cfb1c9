"""Values as strict JSON and back, without loss: what a trace's lines hold.

Strings, finite numbers, booleans, None and lists stand for themselves. Everything else is an object with one key that
names its kind. A value of any other type is refused, so what is read back always equals what was written.
"""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy

from sysdag.errors import DataError

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # the modes that a PNG keeps bit for bit


def encode_value(value: Any, name: str) -> Any:
    """A JSON-ready form of a value; `name` is the input or node that an error names.

    Raises:
        DataError: for a type that cannot be written without loss.
    """
    kind = type(value)
    if value is None or kind in (bool, int):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"__float__": repr(value)}
    if kind is str:
        return value if _is_text(value) else {"__utf8__": _text(value.encode("utf-8", "surrogatepass"))}
    if kind is bytes:
        return {"__bytes__": _text(value)}
    if kind is list:
        return [encode_value(element, name) for element in value]
    if kind is tuple:
        return {"__tuple__": [encode_value(element, name) for element in value]}
    if kind is dict:
        if all(type(key) is str and _is_text(key) for key in value):
            return {"__dict__": {key: encode_value(element, name) for key, element in value.items()}}
        return {"__items__": [[encode_value(part, name) for part in item] for item in value.items()]}
    if kind is numpy.ndarray or isinstance(value, numpy.generic):
        return {"__npy__" if kind is numpy.ndarray else "__scalar__": _text(_npy(value, name))}
    image = sys.modules.get("PIL.Image")
    if image is not None and isinstance(value, image.Image):
        return _encode_image(value)
    raise DataError(
        f"{name!r}: a value of type {kind.__module__}.{kind.__qualname__} cannot be written as JSON without loss. Use "
        "str, numbers, bytes, lists, tuples, dicts, numpy arrays or PIL images."
    )


def decode_value(data: Any) -> Any:
    """The value that `encode_value` wrote.

    Raises:
        ValueError: for an object of no known kind.
    """
    if isinstance(data, list):
        return [decode_value(element) for element in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1 or (kind := next(iter(data))) not in _DECODERS:
        raise ValueError(f"no known kind of value: {json.dumps(data)[:80]}")
    return _DECODERS[kind](data[kind])


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


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


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "__float__": float,
    "__utf8__": lambda text: _raw(text).decode("utf-8", "surrogatepass"),
    "__bytes__": _raw,
    "__tuple__": lambda elements: tuple(decode_value(element) for element in elements),
    "__dict__": lambda members: {key: decode_value(element) for key, element in members.items()},
    "__items__": lambda items: {decode_value(key): decode_value(element) for key, element in items},
    "__npy__": _from_npy,
    "__scalar__": lambda text: _from_npy(text)[()],
    "__png__": _from_png,
    "__image__": _from_image,
}
