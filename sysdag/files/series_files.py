"""The records of trainings that belong together, in the folder that holds a folder for each.

`rounds.json` is that of `sysdag rounds`: `options` (all that the files depend on), `limits` (how many rounds, when they
end early), `status` (`running` or `finished`), `score` (what is measured on held-out inputs),
`rounds` (each with what its stages gave; number 0 is the system as it starts), `best` and `stopped` (why they ended).
`sweep.json` is that of `sysdag train --sweep`: `options` (what all trainings have in common), `swept` (keys and values)
and `runs` (`folder`, `options`, `done`). Both are replaced whole at every change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.files import atomic

ROUNDS_FILE, SWEEP_FILE = "rounds.json", "sweep.json"
FORMAT_VERSION = 1


def read_series(file: Path) -> dict[str, Any] | None:
    """The content of a record; None where there is no such file.

    Raises:
        DataError: for a file that is damaged, or of another version.
    """
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
        version = found["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: {error}.") from error
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file}: format_version is {version!r}, and this version of sysdag reads {FORMAT_VERSION}; use the sysdag "
            "that wrote it."
        )
    return found


def write_series(file: Path, record: Mapping[str, Any]) -> None:
    """Replaces a record as a whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format_version": FORMAT_VERSION, **record}, indent=1, ensure_ascii=False, allow_nan=False)
    atomic.write_text(file, text + "\n")


def first_difference(begun: Any, now: Any, name: str) -> str | None:
    """The first difference between two nests of dicts, in words; None where there is none.

    Args:
        name: of the whole; inside it keys are named by themselves.
    """
    return _difference(begun, now, name, is_whole=True)


def _difference(begun: Any, now: Any, name: str, *, is_whole: bool) -> str | None:
    if begun == now:
        return None
    if not isinstance(begun, dict) or not isinstance(now, dict):
        return f"{name} was {begun!r:.200}, and is now {now!r:.200}"
    if begun.keys() != now.keys():
        return f"{name} had {sorted(begun)}, and has now {sorted(now)}"
    key = next(key for key in now if begun[key] != now[key])
    return _difference(begun[key], now[key], key if is_whole else f"{name} {key}", is_whole=False)
