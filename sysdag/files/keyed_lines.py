"""Rows kept by a key in a file of JSON lines that several threads and processes may append to.

Paid answers are kept so: what was written stays, whenever the process ends.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdag.files.atomic import explaining_disk_errors


class KeyedLines:
    """JSON objects with a text `key`, one a line; of several lines with one key the last counts.

    A line that a killed process left unfinished, or that holds no such object, is left out. Memory holds keys and
    places alone: a row is read from the file when it is asked for.

    Args:
        path: of the file; it is made, with its folders, if it is not there.
        fields: what every row has beside its key.

    Attributes:
        damaged: how many lines were left out.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path = path
        self.damaged = 0
        self._is_cut = False  # whether the last line of this process is one that the disk took a part of
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            start, line = 0, b"\n"
            for line in file:
                key = _key_of(line, fields)
                if key is None:
                    self.damaged += 1
                else:
                    self._places[key] = (start, len(line))
                start += len(line)
            if not line.endswith(b"\n"):
                file.write(b"\n")

    def __len__(self) -> int:
        with self._lock:
            return len(self._places)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._places

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of a key; None where there is none."""
        with self._lock:
            place = self._places.get(key)
        if place is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place[0])
            return json.loads(file.read(place[1]))

    def put(self, row: Mapping[str, Any]) -> None:
        """Appends a row, which has its `key`, by a single write of a whole line.

        Raises:
            SerializationError: where the disk does not take it.
        """
        line = json.dumps(row, allow_nan=False).encode("utf-8") + b"\n"
        whole = b"\n" + line if self._is_cut else line
        advice = "What was kept before is intact."
        with self._lock, explaining_disk_errors(f"A row of {self.path.name}", self.path.parent, len(line), advice):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            written = 0
            try:
                while written < len(whole):  # a full disk takes a part, and then says why
                    written += os.write(descriptor, whole[written:])
                end = os.lseek(descriptor, 0, os.SEEK_CUR)
            finally:
                os.close(descriptor)
                self._is_cut = (self._is_cut or written > 0) and written < len(whole)
            self._places[row["key"]] = (end - len(line), len(line))


def _key_of(line: bytes, fields: Sequence[str]) -> str | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not row.keys() >= set(fields):
        return None
    return row["key"]
