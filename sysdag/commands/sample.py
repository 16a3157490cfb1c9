"""`sysdag sample`: runs a system over a file of inputs and writes the traces."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sysdag.commands.arguments import SystemArgument
from sysdag.commands.files import check_output, naming

if TYPE_CHECKING:
    from sysdag.execution.batches import Engine


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
    split: Annotated[str, typer.Option(help="Of a dataset that has splits.")] = "train",
    device: Annotated[
        str, typer.Option(help="Where models are put: auto (a GPU where there is one), cpu, cuda:0, ...")
    ] = "auto",
    engine: Annotated[EngineName, typer.Option(help="What runs it: this process, or Ray.")] = EngineName.local,
    actors: Annotated[
        list[str] | None,
        typer.Option(metavar="NODE=N", help="With ray: actors that hold this node's model, 1 by default. Repeatable."),
    ] = None,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="With ray: GPUs of each actor, or a part of one.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output that was cut off.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Run a system over a file of inputs and write every variable of every run, one line a run.

    Each line also has the columns `prompt` (the input's row, from 0) and `run`. The same seed, inputs and batch size
    give the same file whatever the engine; a command that was cut off goes on with --resume.
    """
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other.")
    if engine is EngineName.local and (actors or gpus_per_actor):
        raise typer.BadParameter("--actors and --gpus-per-actor belong to --engine ray.")
    sizes = dict(_size(given) for given in actors or ())
    check_output("--output", output, [inputs])

    from tqdm import tqdm

    from sysdag.data.inputs import inputs_of
    from sysdag.execution.batches import Runs
    from sysdag.execution.running import run
    from sysdag.execution.trace_file import TraceFile
    from sysdag.saving.loading import load_system
    from sysdag.traces.readers import read_rows

    plan = load_system(system).compile()
    rows = read_rows(inputs, split=split)[:limit]
    with naming(inputs):
        columns, ignored = inputs_of(plan, rows)
    if ignored:
        typer.echo(f"Columns that are no inputs of the system are ignored: {', '.join(ignored)}.", err=True)
    wanted = Runs(inputs=columns, runs=runs, seed=seed, batch_size=batch_size)
    file = TraceFile(output, plan, wanted, existing="resume" if resume else "overwrite" if overwrite else "refuse")
    if file.batches == wanted.batches:
        typer.echo(f"{output} is complete: {wanted.total} runs.", err=True)
        return
    first = file.batches
    done = first * batch_size
    traces = run(
        plan, columns, runs=runs, seed=seed, batch_size=batch_size, first_batch=first,
        engine=_engine(engine, device, sizes, gpus_per_actor),
    )  # fmt: skip
    with tqdm(total=wanted.total, initial=done, unit="run", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        try:
            for trace in traces:
                file.append(trace)
                bar.update(len(trace))
                done += len(trace)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"{done} of {wanted.total} runs are in {output}; the same command with --resume goes on."
            ) from error
    typer.echo(f"Wrote {wanted.total} runs to {output}.", err=True)


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
