"""Arguments that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class OnError(StrEnum):
    stop = "stop"
    skip = "skip"


SystemArgument = Annotated[
    str, typer.Argument(metavar="SYSTEM", help="SYSTEM.py:name, package.module:name, or a saved system's folder.")
]

SplitOption = Annotated[str, typer.Option(help="Of a dataset that has splits.")]
RenameOption = Annotated[
    list[str] | None,
    typer.Option(metavar="OLD=NEW", help="Give a column another name, as question=prompt. Repeatable."),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Make prompt, chosen and rejected of the columns of a known data set, as helpsteer3; a wrong name lists "
        "all.",
    ),
]


def reading(split: str, rename: list[str] | None, shape: str | None) -> dict[str, Any]:
    """The options of `sysdag.traces.readers.read_rows`.

    Raises:
        typer.BadParameter: for a name that cannot be read, or an unknown shape.
    """
    from sysdag.traces.reshaping import rename_from
    from sysdag.traces.shapes import SHAPES

    if shape is not None and shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape} is unknown; those that are known: {', '.join(SHAPES)}.")
    try:
        return {"split": split, "rename": rename_from(rename or ()), "shape": shape}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
