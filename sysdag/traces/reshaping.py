"""Rows under other names: of columns that are renamed, and of the known sets in `sysdag.traces.shapes`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from sysdag.errors import DataError
from sysdag.traces.rows import Row, Rows, changed
from sysdag.traces.shapes import SHAPES, Unpaired


def reshaped(found: Rows, name: str, source: str) -> Rows:
    """The rows of a known set as `prompt`, `chosen` and `rejected`.

    A row without a preference has a reason for it in `Row.unpaired`; one that is not as the shape says is damaged.

    Args:
        name: one of `SHAPES`.
        source: what an error calls the rows.

    Raises:
        DataError: for an unknown shape, or rows of other columns.
    """
    if name not in SHAPES:
        raise DataError(f"shape {name!r} is unknown; those that are known: {', '.join(SHAPES)}.")
    shape = SHAPES[name]
    columns = {column for row in found.rows for column in row}
    if found.rows and not shape.columns <= columns:
        raise DataError(
            f"{source} has not the shape {name!r}, which needs the columns {sorted(shape.columns)}: it has "
            f"{sorted(columns)}.{_has_pairs(columns)}"
        )
    as_messages = any(row.get("system") or row.get("history") for row in found.rows) and "system" in shape.others
    made = Rows()
    taken = shape.columns | shape.others
    for number, row in enumerate(found.in_order()):
        if row.damage:
            made.damage(row.place, row.damage)
            continue
        rest = {column: value for column, value in row.items() if column not in taken}
        unpaired = ""
        try:
            values = {"prompt": shape.prompt(row, as_messages)}
            values["chosen"], values["rejected"] = shape.sides(row)
        except Unpaired as reason:
            unpaired = str(reason)
        except ValueError as error:
            made.damage(row.place or f"row {number}", f"not of the shape {name!r}: {error}")
            continue
        made.rows.append(changed(row, {**values, **rest}, unpaired=unpaired))
    return made


def _has_pairs(columns: Collection[str]) -> str:
    if {"prompt", "chosen", "rejected"} <= set(columns):
        return " Its rows have a prompt, chosen and rejected as they are; leave the shape out."
    told = told_shape(columns)
    return f" These columns are those of {told!r}." if told else ""


def renamed(rows: Sequence[Row], names: Mapping[str, str], source: str) -> list[Row]:
    """The rows with other names for some columns.

    Args:
        names: the new name by the old one.
        source: what an error calls the rows.

    Raises:
        DataError: for an old name that no row has, or a new one that is there already.
    """
    columns = {column for row in rows for column in row}
    for old, new in names.items():
        if rows and old not in columns:
            turned = f" Did you mean {new}={old}?" if new in columns else ""
            raise DataError(
                f"{source} has no column {old!r} to be renamed to {new!r}; it has {sorted(columns)}. The old name "
                f"stands first: OLD=NEW.{turned}"
            )
        if new in columns - names.keys():
            raise DataError(f"{source} has a column {new!r} already, so {old!r} cannot be renamed to it.")
    if len(set(names.values())) < len(names):
        raise DataError(f"{source}: two columns cannot be renamed to one: {dict(names)}.")
    return [changed(row, {names.get(column, column): value for column, value in row.items()}) for row in rows]


def rename_from(texts: Iterable[str]) -> dict[str, str]:
    """The new names of columns by the old ones, of texts as `question=prompt`.

    Raises:
        ValueError: for a text that is not so, or an old name that comes twice.
    """
    names: dict[str, str] = {}
    for text in texts:
        old, mark, new = text.partition("=")
        if not mark or not old or not new or "=" in new:
            raise ValueError(f"--rename {text}: expected OLD=NEW, as question=prompt.")
        if old in names:
            raise ValueError(f"--rename {text}: {old!r} is renamed twice.")
        names[old] = new
    return names


def told_shape(columns: Iterable[str]) -> str | None:
    """The name of the known set that has these columns, or None."""
    given = set(columns)
    return next((name for name, shape in SHAPES.items() if shape.columns <= given), None)


def advice(columns: Iterable[str]) -> str:
    """What to do with rows of these columns, which lack a prompt, `chosen` or `rejected`; options ready to paste."""
    given = set(columns)
    name = told_shape(given)
    if name is not None:
        shape = SHAPES[name]
        text = (
            f"These are the columns of {name}: --shape {name} makes pairs of them, {shape.about} (in Python: "
            f"read_rows(..., shape={name!r}))."
        )
        if shape.rename:
            options = " ".join(f"--rename {old}={new}" for old, new in shape.rename.items())
            text += f" Or {options}, {shape.lost}."
        return text
    return "--rename OLD=NEW gives a column the name that is read (in Python: read_rows(..., rename={'OLD': 'NEW'}))."
