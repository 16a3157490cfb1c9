"""A model's arguments or answers for one row, and the same for a batch: how each of their parts grows with the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor


class Uneven(Exception):
    """Two values are not the same thing for one row and for two."""


@dataclass(frozen=True)
class Along:
    """A tensor whose axis `axis` holds the rows."""

    axis: int


@dataclass(frozen=True)
class Listed:
    """A list or tuple with an equal share of elements for each row."""


@dataclass(frozen=True)
class Shared:
    """The same for all rows."""


How = Along | Listed | Shared | Mapping[str, Any] | Sequence[Any]


def growth(one: Any, two: Any) -> How:
    """How a value grows, from what it is for one row and for two equal ones.

    Raises:
        Uneven: if it is another thing for two rows.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape == two.shape:
            return Shared()
        grown = [axis for axis, (n, m) in enumerate(zip(one.shape, two.shape, strict=False)) if n != m]
        if one.ndim != two.ndim or len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
            raise Uneven(f"tensors {tuple(one.shape)} and {tuple(two.shape)}")
        return Along(grown[0])
    if type(one) is not type(two):
        raise Uneven(f"{type(one).__name__} and {type(two).__name__}")
    if isinstance(one, Mapping):
        if one.keys() != two.keys():
            raise Uneven(f"the keys {sorted(one)} and {sorted(two)}")
        return {key: growth(one[key], two[key]) for key in one}
    if isinstance(one, (list, tuple)):
        if one and len(two) == 2 * len(one):
            return Listed()
        if len(two) != len(one):
            raise Uneven(f"{len(one)} and {len(two)} elements")
        return [growth(*pair) for pair in zip(one, two, strict=True)]
    if not isinstance(one, Tensor) and one is not two and one != two:
        raise Uneven(f"{one!r:.80} and {two!r:.80}")
    return Shared()


def joined(how: How, values: Sequence[Any]) -> Any:
    """The value for a batch, from each row's."""
    first = values[0]
    match how:
        case Along(axis):
            return torch.cat(list(values), dim=axis)
        case Listed():
            return type(first)(element for value in values for element in value)
        case Shared():
            return first
    if isinstance(how, Mapping):
        return _like(first, {key: joined(inner, [value[key] for value in values]) for key, inner in how.items()})
    made = [joined(inner, [value[place] for value in values]) for place, inner in enumerate(how)]
    return type(first)(made)


def parted(how: How, value: Any, count: int) -> list[Any]:
    """Each row's value, from a batch's of `count` rows."""
    match how:
        case Along(axis):
            return list(value.chunk(count, dim=axis))
        case Listed():
            each = len(value) // count
            return [type(value)(value[row * each : (row + 1) * each]) for row in range(count)]
        case Shared():
            return [value] * count
    if isinstance(how, Mapping):
        inner = {key: parted(how[key], value[key], count) for key in how}
        return [_like(value, {key: rows[row] for key, rows in inner.items()}) for row in range(count)]
    parts = [parted(each, value[place], count) for place, each in enumerate(how)]
    return [type(value)([rows[row] for rows in parts]) for row in range(count)]


def _like(value: Any, made: dict[Any, Any]) -> Any:
    if not is_dataclass(value):
        return made
    kind: Any = type(value)  # an output class of diffusers, which is a dict, too
    return kind(**made)


def company(how: How, value: Any) -> Any:
    """Equal for the values of rows that may be joined: what they share, and the shapes that have to fit."""
    match how:
        case Along(axis):
            return (*value.shape[:axis], *value.shape[axis + 1 :])
        case Listed():
            return None
        case Shared():
            return fingerprint(value)
    if isinstance(how, Mapping):
        return tuple((key, company(inner, value[key])) for key, inner in how.items())
    return tuple(company(inner, value[place]) for place, inner in enumerate(how))


def fingerprint(value: Any) -> Any:
    """Something hashable that equal values have in common, to the last bit of their tensors."""
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return value.dtype, tuple(value.shape), hashlib.sha256(numbers.tobytes()).hexdigest()
    if isinstance(value, Mapping):
        return tuple((key, fingerprint(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(fingerprint, value))
    return value if isinstance(value, (str, int, float, bool, type(None))) else id(value)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nest of dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in inner for tensor in tensors(each)]


def mapped_tensors(value: Any, function: Any) -> Any:
    """The same nest with `function` of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _like(value, {key: mapped_tensors(inner, function) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)([mapped_tensors(inner, function) for inner in value])
    return value


Path = tuple[Any, ...]


def leaves(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Everything in a nest of dicts, lists and tuples that is none of those, with the keys that lead there."""
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, (list, tuple)):
        return [leaf for place, inner in enumerate(value) for leaf in leaves(inner, (*path, place))]
    return [(path, value)]


def replaced(value: Any, new: Mapping[Path, Any], path: Path = ()) -> Any:
    """The same nest with other leaves at some paths."""
    if path in new:
        return new[path]
    if isinstance(value, Mapping):
        return _like(value, {key: replaced(inner, new, (*path, key)) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(inner, new, (*path, place)) for place, inner in enumerate(value)])
    return value


def grown_at(how: How, path: Path, new: How) -> How:
    """The same growth with another one for the leaf at a path, where that has one of its own."""
    if isinstance(how, (Along, Listed)):
        return how
    if isinstance(how, Shared) or not path:
        return new
    if isinstance(how, Mapping):
        return {**how, path[0]: grown_at(how[path[0]], path[1:], new)}
    return [grown_at(inner, path[1:], new) if place == path[0] else inner for place, inner in enumerate(how)]
