"""A row of a file, which knows its place there, and what a file holds: rows, and parts that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sysdag.traces.row_format import decode_row_value


class Row(dict):
    """A row of a file, which knows its place there.

    Attributes:
        place: where it stands in the file, as `line 7`; "" where its number says it all.
        number: its number there, from 0, where rows before it are left out; None where its place in a list says it.
        folder: of the file, which paths in the row may be relative to.
        unpaired: why it holds no preference (a tie, say), or "".
        damage: of what stands for a part of the file that is no row (see `Rows.in_order`), what is wrong with it.
    """

    def __init__(
        self, values: Any = (), *, place: str = "", folder: Path | None = None, unpaired: str = "", damage: str = "",
        number: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(values)
        self.place = place
        self.number = number
        self.folder = folder
        self.unpaired = unpaired
        self.damage = damage


def changed(row: Mapping[str, Any], values: Any, *, unpaired: str = "") -> Row:
    """A row of other values at the same place."""
    place, folder = getattr(row, "place", ""), getattr(row, "folder", None)
    unpaired, number = unpaired or getattr(row, "unpaired", ""), getattr(row, "number", None)
    return Row(values, place=place, folder=folder, unpaired=unpaired, number=number)


def numbered(rows: Sequence[Any], kept: Iterable[int]) -> list[Any]:
    """Some of a source's rows, by their numbers, each of which knows its own."""
    found = []
    for number in kept:
        row = changed(rows[number], rows[number])
        row.number = number
        found.append(row)
    return found


def number_of(row: Any, place: int) -> int:
    """The number of a row in its source; `place`, where it stands now, if it knows no other."""
    number = getattr(row, "number", None)
    return place if number is None else number


@dataclass
class Rows:
    """What a source holds.

    Attributes:
        rows: those that could be read.
        damaged: for each part that could not, its place and what is wrong with it.
    """

    rows: list[Row] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)  # for each part that is damaged, how many rows stand before it

    def damage(self, place: str, text: str) -> None:
        """Tells of a part that could not be read, behind the rows that are there."""
        self.damaged.append((place, text))
        self._before.append(len(self.rows))

    def extend(self, other: Rows) -> None:
        """Takes what another source holds behind what is there."""
        self._before += [len(self.rows) + count for count in other._before]
        self.damaged += other.damaged
        self.rows += other.rows

    def in_order(self) -> list[Row]:
        """The rows, with an empty one where a part is damaged, so that each has the number that it has in the file."""
        found: list[Row] = []
        parts = list(zip(self._before, self.damaged, strict=True))
        for number in range(len(self.rows) + 1):
            while parts and parts[0][0] == number:
                place, text = parts.pop(0)[1]
                found.append(Row(place=place, damage=text))
            found += self.rows[number : number + 1]
        return found

    def add(self, parse: Callable[[], Any], place: str, folder: Path) -> None:
        """Reads a row, which `parse` gives as JSON does; what it raises is told of its place."""
        try:
            data = parse()
            if not isinstance(data, dict):
                raise ValueError(f"a row is an object, got {type(data).__name__} {data!r:.60}.")
            values = {name: _without_empty_members(decode_row_value(value)) for name, value in data.items()}
        except Exception as error:  # noqa: BLE001 - whatever a damaged image or array raises, its line has to be named
            self.damage(place, str(error) or type(error).__name__)
            return
        self.rows.append(Row(values, place=place, folder=folder))


def _without_empty_members(value: Any) -> Any:
    """Chat messages without the members that are null: a file of columns gives each those that any of them has."""
    if isinstance(value, list):
        return [_without_empty_members(element) for element in value]
    if type(value) is dict and isinstance(value.get("role"), str):
        return {key: member for key, member in value.items() if member is not None}
    return value
