"""`sysdag validate`: what is wrong with a file of preferences, before any weights load."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sysdag.commands.arguments import RenameOption, ShapeOption, SplitOption, SystemArgument, reading
from sysdag.commands.files import check_output

if TYPE_CHECKING:
    from sysdag.traces.rows import Row


class Empty(StrEnum):
    drop = "drop"
    keep = "keep"


class Objective(StrEnum):
    direct = "direct"
    sampling = "sampling"


def validate(
    system: SystemArgument,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Preference rows: a .jsonl, .json, .csv or .parquet file, a folder that the library datasets saved "
            "or that was cloned from the Hub, or a name on the Hub.",
        ),
    ],
    objective: Annotated[Objective, typer.Option(help="What the rows are for.")] = Objective.direct,
    split: SplitOption = "train",
    rename: RenameOption = None,
    shape: ShapeOption = None,
    empty: Annotated[
        Empty, typer.Option(help="Whether rows whose chosen output is empty are dropped, or kept.")
    ] = Empty.drop,
    strict: Annotated[
        bool, typer.Option("--strict", help="Rows that would be dropped (empty, identical, over-long) are errors.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="Most problems of each kind that are listed.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Write the rows that can be used, as .jsonl or .parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check preference rows against a system: every problem with its row, line, node and kind, all at once.

    Ends with 0 if training can use the data, and with 1 if there are errors or no row is left. No weights are loaded.
    """
    if output is not None and output.suffix.lower() not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"--output {output}: its ending must be .jsonl or .parquet.")
    check_output("--output", output, [data])
    options = reading(split, rename, shape)

    from sysdag.data.row_paths import with_whole_paths
    from sysdag.data.validation import validate_rows
    from sysdag.saving.loading import load_system
    from sysdag.traces.pairs import write_pairs
    from sysdag.traces.readers import iterate_rows

    plan = load_system(system).compile()
    plan.check(objective.value)
    report = validate_rows(
        plan, iterate_rows(data, **options), objective.value, limit=limit, strict=strict, empty=empty.value
    )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if output is not None and not report.kept:
        typer.echo(f"{output} is not written: no row can be used.", err=True)
    elif output is not None:
        kept = _rows(iterate_rows(data, **options), set(report.kept))
        moves = any(row.folder is not None and row.folder.resolve() != output.parent.resolve() for row in kept)
        write_pairs(output, [with_whole_paths(plan, row) for row in kept] if moves else kept)
        typer.echo(f"Wrote {len(report.kept)} rows to {output}.", err=True)
    if not report.is_usable:
        raise typer.Exit(1)


def _rows(rows: Iterable[Row], kept: set[int]) -> list[Row]:
    """Those of the rows that are kept, by their number among those that could be read."""
    return [row for number, row in enumerate(each for each in rows if not each.damage) if number in kept]
