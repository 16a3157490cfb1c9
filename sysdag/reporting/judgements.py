"""What `sysdag eval` measured: the figures of `eval.json`, with their intervals, in the order of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST = 200
_INTERVAL = {"estimate", "low", "high"}
_NOT_FIGURES = ("format_version", "rows", "versions")
"""Keys at the top of the file: how to read it, single comparisons, and what the training's record tells, too."""


@dataclass(frozen=True)
class Judgement:
    """One value by its path of keys.

    Attributes:
        name: the keys, joined by ` / `.
        value: a number, or a text.
        interval: its lower and upper end, or None.
    """

    name: str
    value: float | str
    interval: tuple[float, float] | None = None


def judgements(data: Any) -> list[Judgement]:
    """The figures and texts of an evaluation, at most `MOST`; an `estimate` with `low` and `high` is one figure."""
    if isinstance(data, Mapping):
        data = {name: value for name, value in data.items() if name not in _NOT_FIGURES}
    found = []
    for judgement in _walk(data, ()):
        found.append(judgement)
        if len(found) == MOST:
            break
    return found


def _walk(data: Any, path: tuple[str, ...]) -> Iterator[Judgement]:
    name = " / ".join(path)
    if isinstance(data, Mapping):
        if data.keys() >= _INTERVAL and _is_number(data["estimate"]):
            ends = data["low"], data["high"]
            yield Judgement(name, data["estimate"], ends if all(map(_is_number, ends)) else None)
            return
        for key, value in data.items():
            yield from _walk(value, (*path, str(key)))
    elif isinstance(data, list):
        if data and not any(isinstance(value, (Mapping, list)) for value in data):
            yield Judgement(name, ", ".join(map(str, data))[:200])
            return
        for at, value in enumerate(data):
            yield from _walk(value, (*path, str(at)))
    elif data is not None:
        yield Judgement(name, data if _is_number(data) else str(data)[:200])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
