"""Options that the user gave, told from those left at their defaults: one that cannot be honoured is refused."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Refuses options that were given on the command line or by the environment.

    Args:
        names: of the command's parameters.
        why: what is wrong with one, as it goes on behind its name.

    Raises:
        typer.BadParameter: for the first of them that was given.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")
