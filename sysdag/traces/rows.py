"""A row of a file, which knows its place there, and what a file holds: rows, and parts that are none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sysdag.traces.row_format import decode_row_value


class Row(dict):
    """A row of a file, which knows its place there.

    Attributes:
        place: where it stands in the file, as `line 7`; "" where its number says it all.
        folder: of the file, which paths in the row may be relative to.
        unpaired: why it holds no preference (a tie, say), or "".
    """

    def __init__(self, values: Any = (), *, place: str = "", folder: Path | None = None, unpaired: str = "") -> None:
        super().__init__(values)
        self.place = place
        self.folder = folder
        self.unpaired = unpaired


def changed(row: Mapping[str, Any], values: Any, *, unpaired: str = "") -> Row:
    """A row of other values at the same place."""
    place, folder = getattr(row, "place", ""), getattr(row, "folder", None)
    return Row(values, place=place, folder=folder, unpaired=unpaired or getattr(row, "unpaired", ""))


@dataclass
class Rows:
    """What a source holds.

    Attributes:
        rows: those that could be read.
        damaged: for each part that could not, its place and what is wrong with it.
    """

    rows: list[Row] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)

    def add(self, parse: Callable[[], Any], place: str, folder: Path) -> None:
        """Reads a row, which `parse` gives as JSON does; what it raises is told of its place."""
        try:
            data = parse()
            if not isinstance(data, dict):
                raise ValueError(f"a row is an object, got {type(data).__name__} {data!r:.60}.")
            values = {name: _without_empty_members(decode_row_value(value)) for name, value in data.items()}
        except Exception as error:  # noqa: BLE001 - whatever a damaged image or array raises, its line has to be named
            self.damaged.append((place, str(error) or type(error).__name__))
            return
        self.rows.append(Row(values, place=place, folder=folder))


def _without_empty_members(value: Any) -> Any:
    """Chat messages without the members that are null: a file of columns gives each those that any of them has."""
    if isinstance(value, list):
        return [_without_empty_members(element) for element in value]
    if type(value) is dict and isinstance(value.get("role"), str):
        return {key: member for key, member in value.items() if member is not None}
    return value
