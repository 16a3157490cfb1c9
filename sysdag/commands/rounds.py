"""`sysdag rounds`: sample, judge, train and evaluate, again and again, so that preferences stay fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sysdag.errors import OptionError


def rounds(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML: system, inputs, heldout, output_dir, and a section a stage.")
    ],
    output_dir: Annotated[str | None, typer.Option(metavar="FOLDER", help="In place of the file's.")] = None,
    number: Annotated[int | None, typer.Option("--rounds", min=1, help="In place of the file's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the file's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file, system, data and judges, and stop before weights load.")
    ] = False,
) -> None:
    """Train in rounds: sample the system as the last one left it, judge, train, and evaluate on held-out inputs.

    The same command goes on where it was cut off. Each round has a folder that the other commands read; the best
    round's system is in the output folder in the end.
    """
    try:
        from sysdag.training.round_settings import rounds_from

        asked = rounds_from(file, output_dir=output_dir, rounds=number, seed=seed)
        if dry_run:
            typer.echo(asked.check())
            return
        asked.run(typer.echo)
    except OptionError as error:
        if context.find_root().params["debug"]:
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
