"""`sysdag sample`: runs a system over a file of inputs and writes the traces."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sysdag.commands import decoder_options
from sysdag.commands.arguments import OnError, RenameOption, ShapeOption, SplitOption, SystemArgument, reading
from sysdag.commands.files import check_output, naming
from sysdag.errors import SysdagError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sysdag.execution.batches import Engine
    from sysdag.execution.trace_file import TraceFile
    from sysdag.graph.plan import Plan
    from sysdag.traces.trace import Trace

_MOST_NAMED = 20  # of the rows that were skipped; the record beside the output has all


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


def sample(
    context: typer.Context,
    system: SystemArgument,
    inputs: Annotated[
        str,
        typer.Argument(
            metavar="INPUTS",
            help="Rows with the inputs' names as columns (or `prompt`, for a system with one input): JSON lines, JSON, "
            "CSV, Parquet, a datasets folder, or a dataset on the Hub.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file of traces to write, ending in .jsonl.")],
    runs: Annotated[int, typer.Option(min=1, help="Runs of each input.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Runs that go through the system together.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the inputs.")] = None,
    split: SplitOption = "train",
    rename: RenameOption = None,
    shape: ShapeOption = None,
    on_error: Annotated[
        OnError,
        typer.Option(
            help="At a row that cannot be read, or at which a node fails: stop, or leave the row out and name it at "
            "the end."
        ),
    ] = OnError.stop,
    device: Annotated[
        str, typer.Option(help="Where models are put: auto (a GPU where there is one), cpu, cuda:0, ...")
    ] = "auto",
    engine: Annotated[EngineName, typer.Option(help="What runs it: this process, or Ray.")] = EngineName.local,
    actors: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE=N", help="With ray: actors that hold this node's model, 1 by default. Repeatable."),
    ] = None,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="With ray: GPUs of each actor, or a part of one.")] = 0,
    decoder: decoder_options.Decoders = None,
    model: decoder_options.Models = None,
    api_key_env: decoder_options.ApiKeyEnv = None,
    concurrency: decoder_options.Concurrency = 32,
    timeout: decoder_options.Timeout = 600.0,
    retries: decoder_options.Retries = 6,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output that was cut off.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Run a system over a file of inputs and write every variable of every run, one line a run.

    Each line also has the columns `prompt` (the input's row, from 0) and `run`, and those of the input's row that are
    no inputs, as a reference answer. The same seed, inputs and batch size give the same file whatever the engine, and
    other batch sizes the same draws to rounding (but a server's draws are new ones each time); a command that was cut
    off goes on with --resume, also where inputs were corrected that have not been run yet. Rows that --on-error skip
    left out of what is written stay left out.
    """
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other.")
    if engine is EngineName.local and (actors or gpus_per_actor):
        raise typer.BadParameter("--actors and --gpus-per-actor belong to --engine ray.")
    sizes = dict(_size(given) for given in actors or ())
    check_output("--output", output, [inputs])
    options = reading(split, rename, shape)

    from tqdm import tqdm

    from sysdag.data.inputs import columns_beside, inputs_of
    from sysdag.execution.batches import Runs, Skipped
    from sysdag.execution.trace_file import TraceFile
    from sysdag.saving.loading import load_system
    from sysdag.traces.readers import read_all, read_rows

    plan = decoder_options.with_decoders(context, load_system(system).compile())
    bad: dict[int, str] | None = {} if on_error is OnError.skip else None
    rows = (read_rows(inputs, **options) if bad is None else read_all(inputs, **options).in_order())[:limit]
    with naming(inputs):
        columns, ignored = inputs_of(plan, rows, bad)
    beside = columns_beside(plan, rows)
    if left := [name for name in ignored if name not in beside]:
        typer.echo(f"Columns that are no inputs of the system are ignored: {', '.join(left)}.", err=True)
    if beside:
        typer.echo(f"Columns that stay beside the runs: {', '.join(beside)}.", err=True)
    skipped = {number: Skipped(why=why) for number, why in (bad or {}).items()}
    wanted = Runs(inputs=columns, columns=beside, runs=runs, seed=seed, batch_size=batch_size, skipped=skipped)
    file = TraceFile(output, plan, wanted, existing="resume" if resume else "overwrite" if overwrite else "refuse")
    if file.batches == wanted.batches:
        typer.echo(f"{output} is complete: {file.runs.made} runs.", err=True)
        _tell_skipped(file, rows)
        return
    done = sum(len(file.runs.pairs(number)) for number in range(file.batches))
    chosen = _engine(engine, device, sizes, gpus_per_actor)
    with tqdm(total=wanted.total, initial=done, unit="run", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        try:
            for trace in _traces(plan, file, chosen, skips=bad is not None):
                file.append(trace)
                bar.update(len(trace))
                done += len(trace)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"{done} of {wanted.total} runs are in {output}; the same command with --resume goes on."
            ) from error
    typer.echo(f"Wrote {file.runs.made} runs to {output}.", err=True)
    _tell_skipped(file, rows)
    if not file.runs.made:
        raise typer.Exit(1)


def _traces(plan: Plan, file: TraceFile, engine: Engine, *, skips: bool) -> Iterator[Trace]:
    """The batches that the file has not got, each to be appended before the next is asked for.

    Args:
        skips: leaves out a row at which a node fails, and makes the batch again without it.
    """
    from sysdag.execution.running import run

    while file.batches < file.runs.batches:
        runs = file.runs
        try:
            yield from run(
                plan, runs.inputs, columns=runs.columns, runs=runs.runs, seed=runs.seed, batch_size=runs.batch_size,
                skipped=runs.skipped, first_batch=file.batches, engine=engine,
            )  # fmt: skip
        except SysdagError as error:
            if not skips or error.input_row is None:
                raise
            file.skip(error.input_row, str(error))


def _tell_skipped(file: TraceFile, rows: Sequence[Any]) -> None:
    """Names the rows that are not in the file."""
    skipped = file.runs.skipped
    if not skipped:
        return
    lines = [f"Skipped {len(skipped)} of {len(rows)} rows; {file.side_path} has them all:"]
    for number, each in sorted(skipped.items())[:_MOST_NAMED]:
        place = getattr(rows[number], "place", "") if number < len(rows) else ""
        runs = f", from run {each.from_run} on" if each.from_run else ""
        lines.append(f"  Row {number}{f' ({place})' if place else ''}{runs}: {each.why}")
    if len(skipped) > _MOST_NAMED:
        lines.append("  ...")
    typer.echo("\n".join(lines), err=True)


def _size(given: str) -> tuple[str, int]:
    name, _, number = given.rpartition("=")
    if not name or not number.isdecimal() or int(number) < 1:
        raise typer.BadParameter(f"--actors {given}: expected NODE=N with N of 1 or more.")
    return name, int(number)


def _engine(name: EngineName, device: str, actors: dict[str, int], gpus_per_actor: float) -> Engine:
    if name is EngineName.local:
        from sysdag.execution.batches import LocalEngine

        return LocalEngine(device=device)
    from sysdag.execution.ray_engine import RayEngine

    return RayEngine(actors=actors, gpus_per_actor=gpus_per_actor, device=device)
