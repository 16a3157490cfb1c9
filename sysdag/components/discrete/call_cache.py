"""What a function returned, kept on disk by what it was called with and what it was then."""

from __future__ import annotations

import base64
import dis
import functools
import hashlib
import inspect
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from sysdag.errors import DataError, SysdagError, shown
from sysdag.files.encoding import decode_json, encode_json
from sysdag.files.keyed_lines import KeyedLines
from sysdag.graph.source import source_hash

logger = logging.getLogger(__name__)

_PLAIN = (str, bytes, int, float, complex, bool, type(None))


class CallCache:
    """Answers of one function in a file of JSON lines, `{"key", "value"}`.

    A key is the hash of the argument, value by value, and of the function: where it stands, its code, that of the
    functions of its own module that it calls, and the plain constants (texts, numbers, tuples of them) that it reads
    from its module, its closure, its defaults or the object it is a method of. What else it depends on (a list, a
    client, a service) is not seen: that is what `version` is for.

    Args:
        path: of the file, which functions may share.
        function: whose answers they are.
        version: part of the key.
    """

    def __init__(self, path: Path, function: Callable[[Any], Any], version: str) -> None:
        self._lines = KeyedLines(path, ["value"])
        self._function = [version, *_identity(function, set())]
        if self._lines.damaged:
            logger.warning("%s: %d line(s) hold no call's answer; those are called again.", path, self._lines.damaged)

    def key(self, argument: Any) -> str:
        """What the answer to an argument is kept by.

        Raises:
            DataError: for a value of a type that is not told apart.
        """
        try:
            said = encode_json(argument, "input", _encode_other)
        except DataError as error:
            raise DataError(
                f"The cache of calls cannot tell the input {shown(argument)} from others ({error}) Let the node's "
                "function return what it can, or leave out `cache`."
            ) from error
        return hashlib.sha256(json.dumps([self._function, said, _beside(argument)]).encode()).hexdigest()

    def known(self, key: str) -> bool:
        return key in self._lines

    def get(self, key: str) -> Any:
        """The answer that was kept.

        Raises:
            SysdagError: if the file's line was damaged since it was read.
        """
        row = self._lines.get(key)
        try:
            assert row is not None
            return decode_json(row["value"], {"__tensor__": _decode_tensor})
        except Exception as error:
            raise SysdagError(
                f"{self._lines.path}: the answer of a call is damaged ({error}); remove the file."
            ) from error

    def put(self, key: str, value: Any) -> None:
        """Keeps an answer.

        Raises:
            DataError: for a value of a type that cannot be written without loss.
        """
        try:
            said = encode_json(value, "value", _encode_other)
        except DataError as error:
            raise DataError(f"The cache of calls cannot keep the answer {shown(value)} ({error})") from error
        self._lines.put({"key": key, "value": said})


def _encode_other(value: Any, name: str) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided and not value.is_quantized:
        raw = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = base64.b64encode(raw.numpy().tobytes()).decode("ascii")
        return {"__tensor__": [str(value.dtype).removeprefix("torch."), list(value.shape), data]}
    kind = type(value)
    raise DataError(
        f"a {name} of type {kind.__module__}.{kind.__qualname__} cannot be written without loss: use str, numbers, "
        "bytes, lists, tuples, dicts, numpy arrays, tensors or PIL images."
    )


def _decode_tensor(content: Any) -> torch.Tensor:
    dtype, shape, data = content
    raw = numpy.frombuffer(bytearray(base64.b64decode(data, validate=True)), numpy.uint8)
    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape) if raw.size else torch.empty(
        shape, dtype=getattr(torch, dtype)
    )  # fmt: skip


def _beside(value: Any) -> list[str]:
    """What images hold beside their pixels (EXIF, a palette, a profile), which a function may read."""
    image = sys.modules.get("PIL.Image")
    if image is None:
        return []
    if isinstance(value, image.Image):
        facts = {"palette": value.getpalette() if value.mode in ("P", "PA") else None, **value.info}
        return [hashlib.sha256(repr(sorted(facts.items(), key=lambda item: str(item[0]))).encode()).hexdigest()]
    if isinstance(value, Mapping):
        return [fact for item in value.items() for part in item for fact in _beside(part)]
    if isinstance(value, (list, tuple)):
        return [fact for part in value for fact in _beside(part)]
    return []


def _identity(function: Any, seen: set[int]) -> list[Any]:
    """What tells a function from another one, and from itself before it was changed, as JSON."""
    if id(function) in seen:
        return []
    seen.add(id(function))
    function = inspect.unwrap(function)
    if isinstance(function, functools.partial):
        given = [*function.args, *(part for item in sorted(function.keywords.items()) for part in item)]
        return ["partial", *_identity(function.func, seen), *_constants(given, seen)]
    if isinstance(function, types.MethodType):
        return ["method", *_identity(function.__func__, seen), *_state(function.__self__, seen)]
    if isinstance(function, types.FunctionType):
        names = [function.__module__, function.__qualname__, source_hash(function) or _code_hash(function.__code__)]
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        return [*names, *_constants(defaults, seen), *_constants(_read_values(function), seen)]
    if isinstance(function, (types.BuiltinFunctionType, types.MethodDescriptorType, type)):
        return [str(getattr(function, "__module__", None)), function.__qualname__]
    called = type(function).__call__
    return ["object", *_identity(called, seen), *_state(function, seen)]


def _state(owner: Any, seen: set[int]) -> list[Any]:
    """The class of an object and its plain attributes."""
    kind = owner if isinstance(owner, type) else type(owner)
    found: list[Any] = [kind.__module__, kind.__qualname__]
    for name, value in sorted(getattr(owner, "__dict__", {}).items() if kind is not owner else ()):
        found += [name, *_constants([value], seen)]
    return found


def _constants(values: list[Any], seen: set[int]) -> list[Any]:
    """Plain values, and what functions among others are; the rest is left out."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, _PLAIN):
            found.append([type(value).__name__, repr(value)])
        elif isinstance(value, (tuple, frozenset)):
            found.append(_constants(list(value) if isinstance(value, tuple) else sorted(value, key=repr), seen))
        elif isinstance(value, (types.FunctionType, functools.partial, types.MethodType)):
            found += _identity(value, seen)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of what is defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _read_values(function: types.FunctionType) -> list[Any]:
    """What a function reads from its closure and its module and never assigns; of functions, those of its module."""
    instructions = [each for code in _codes(function.__code__) for each in dis.get_instructions(code)]
    assigned = {each.argval for each in instructions if each.opname in ("STORE_GLOBAL", "STORE_DEREF")}
    found: dict[str, Any] = {}
    for each in instructions:
        if each.opname == "LOAD_GLOBAL" and each.argval in function.__globals__:
            value = function.__globals__[each.argval]
            if not isinstance(value, types.FunctionType) or value.__module__ == function.__module__:
                found[each.argval] = value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return [part for name in sorted(found) if name not in assigned for part in (name, found[name])]


def _code_hash(code: types.CodeType) -> str:
    """Of a function without source, as one that was typed in."""
    parts = [
        [each.co_code.hex(), list(each.co_names), [repr(c) for c in each.co_consts if not hasattr(c, "co_code")]]
        for each in _codes(code)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
