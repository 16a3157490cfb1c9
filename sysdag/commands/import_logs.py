"""`sysdag import`: runs out of plain logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysdag.commands.arguments import OnError, RenameOption, SplitOption, reading
from sysdag.commands.files import check_output
from sysdag.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sysdag.traces.trace import Trace

_MOST_NAMED = 20  # of the rows that were skipped; the file beside the output has all


def import_logs(
    logs: Annotated[
        list[str],
        typer.Argument(
            metavar="LOGS",
            help="Rows with the inputs' names as columns (or `prompt`, for a system with one input), the output under "
            "its node's name or as `output`, other nodes by name or in `intermediates`, and any others: JSON lines, "
            "JSON, CSV, Parquet, a datasets folder, or a dataset on the Hub.",
        ),
    ],
    system: Annotated[str, typer.Option(help="SYSTEM.py:name, package.module:name, or a saved system's folder.")],
    output: Annotated[Path, typer.Option(help="The file of traces to write, ending in .jsonl or .parquet.")],
    split: SplitOption = "train",
    rename: RenameOption = None,
    on_error: Annotated[
        OnError,
        typer.Option(help="At a row that cannot be used: stop, or leave the row out and name it at the end."),
    ] = OnError.stop,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Make runs of what a system said in production, one a row of the logs, for judge, label and eval.

    Columns that are neither inputs nor nodes (a thumb, a score, a rank, a user's name, a reference answer) stay beside
    the runs as columns. No weights are loaded.
    """
    if output.suffix not in (".jsonl", ".parquet"):
        raise typer.BadParameter(f"--output {output}: its ending must be .jsonl or .parquet.")
    check_output("--output", output, logs)
    if output.exists() and not overwrite:
        raise DataError(f"--output {output} exists; replace it (--overwrite), or write to another file.")
    options = reading(split, rename, None)

    from sysdag.data.logs import logged_runs
    from sysdag.execution.execute import flat_draws
    from sysdag.files.atomic import write_text
    from sysdag.saving.loading import load_system
    from sysdag.traces.pairs import runs_by_input
    from sysdag.traces.readers import read_all

    plan = load_system(system).compile()
    rows: list[Any] = []
    begins = []  # of each file, the number of its first row
    for source in logs:
        begins.append(len(rows))
        rows += read_all(source, **options).in_order()

    def place(number: int) -> str:
        file = max(at for at, begin in enumerate(begins) if begin <= number)
        line = getattr(rows[number], "place", "")
        return f"{logs[file]}, row {number - begins[file]}{f' ({line})' if line else ''}"

    found = logged_runs(plan, rows, place=place, skip=on_error is OnError.skip)
    found.trace.save(output)
    record = output.with_name(f"{output.name}.skipped.jsonl")
    if found.bad:
        lines = [json.dumps({"place": place(number), "why": why}) for number, why in sorted(found.bad.items())]
        write_text(record, "\n".join(lines) + "\n")
    else:
        record.unlink(missing_ok=True)
    trace = found.trace
    typer.echo(f"Wrote {len(trace)} runs of {len(runs_by_input(trace))} inputs to {output}.", err=True)
    typer.echo(f"Nodes: {', '.join(trace.cells)}. {_columns(trace)}", err=True)
    if found.silent:
        typer.echo(f"No values of {', '.join(found.silent)}; Direct needs those of every model.", err=True)
    for name, cells in trace.cells.items():
        if count := sum(
            any(isinstance(draw.value, str) and not draw.value.strip() for draw in flat_draws([cell])) for cell in cells
        ):
            typer.echo(f"{count} runs have an empty {name}.", err=True)
    _tell_skipped(found.bad, rows, [place(number) for number in found.bad], record)


def _columns(trace: Trace) -> str:
    return f"Columns beside them: {', '.join(trace.columns)}." if trace.columns else "No other columns."


def _tell_skipped(bad: Mapping[int, str], rows: Sequence[Any], places: Sequence[str], record: Path) -> None:
    """Names the rows that are not in the file."""
    if not bad:
        return
    lines = [f"Skipped {len(bad)} of {len(rows)} rows; {record} has them all:"]
    lines += [f"  {place}: {why}" for place, why in list(zip(places, bad.values(), strict=True))[:_MOST_NAMED]]
    lines += ["  ..."] * (len(bad) > _MOST_NAMED)
    typer.echo("\n".join(lines), err=True)
