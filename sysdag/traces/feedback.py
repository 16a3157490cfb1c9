"""What people said of runs, as logs hold it: a score, a thumb or a rank in a column."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from sysdag.errors import DataError, shown

Kind = Literal["scores", "thumbs", "ranks"]
NOUNS: dict[Kind, str] = {"scores": "score", "thumbs": "thumb", "ranks": "rank"}

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_THUMBS = {
    "up": 1, "thumbs up": 1, "thumb up": 1, "\N{THUMBS UP SIGN}": 1, "true": 1,
    "down": -1, "thumbs down": -1, "thumb down": -1, "\N{THUMBS DOWN SIGN}": -1, "false": -1,
}  # fmt: skip
EXPECTED: dict[Kind, str] = {
    "scores": "a finite number",
    "thumbs": "a thumb (true or false, 1 or 0, +1 or -1, 'up' or 'down')",
    "ranks": "a rank (a whole number from 1 on, 1 the best)",
}


def read_feedback(values: Sequence[Any], kind: Kind, where: str) -> list[float | None]:
    """A column of feedback as numbers; None for what is missing: null, or the empty text of a cell of CSV.

    Numbers may be written as text, as in CSV. Where a column of thumbs has both 0 and -1, what 0 means cannot be told.

    Args:
        values: one a run.
        kind: what they are. A thumb is 1 (up) or 0 (down).
        where: what an error calls the column.

    Raises:
        DataError: naming the run whose value is none of that kind.
    """
    found: list[float | None] = []
    first: dict[float, int] = {}
    for row, value in enumerate(values):
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
        if value is None or (isinstance(value, str) and not value.strip()):
            found.append(None)
            continue
        number = _thumb(value) if kind == "thumbs" else _number(value)
        if number is None or (kind == "ranks" and not _is_rank(value, number)):
            raise DataError(
                f"{where}, run {row}: expected {EXPECTED[kind]}, or nothing (null), got {type(value).__name__} "
                f"{shown(value, 80)}.{_hint(value, kind)}"
            )
        if kind == "thumbs" and not isinstance(value, bool):
            first.setdefault(number, row)
        found.append(number)
    if kind != "thumbs":
        return found
    if 0 in first and -1 in first:
        raise DataError(
            f"{where} has 0 (run {first[0]}) and -1 or 'down' (run {first[-1]}): whether 0 is a thumb down or none "
            "cannot be told. Write null where there is none."
        )
    return [None if number is None else float(number > 0) for number in found]


def _thumb(value: Any) -> float | None:
    """1 for up; 0 or -1, as it is written, for down; None for anything else."""
    if isinstance(value, bool):
        return 1.0 if value else -1.0
    if isinstance(value, str) and (named := _THUMBS.get(re.sub(r"[\s_-]+", " ", value.strip().lower()))) is not None:
        return float(named)
    number = _number(value)
    return number if number in (1, 0, -1) else None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value := value.strip()) else None
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    return None


def _is_rank(value: Any, number: float) -> bool:
    return not isinstance(value, bool) and number >= 1 and number == int(number)


def _hint(value: Any, kind: Kind) -> str:
    """What the value may be instead."""
    if kind == "scores" and (isinstance(value, str) and _thumb(value) is not None):
        return " Thumbs are read with --holds thumbs."
    if kind == "thumbs" and _number(value) is not None:
        return " Scores are read with --holds scores, and --threshold says which are good."
    return ""
