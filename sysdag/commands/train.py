"""`sysdag train`: aligns a system from the command line; its options are those of `SysDPOConfig`."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from sysdag.errors import OptionError

INTERRUPTED = 130  # what a shell gives a process that Ctrl-C ended
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Align a system from preferences about its outputs; `sysdag train --help` lists every option."""
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        from sysdag.training.train_options import parse

        job = parse(context.args)
        from accelerate.state import PartialState

        from sysdag.training.job import train as run
        from sysdag.training.sweep import sweep

        if job.sweep:
            folders = sweep(context.args, job, typer.echo)
            if is_main and not job.dry_run:
                _tell(folders)
        else:
            run(job, typer.echo)
        PartialState().destroy_process_group()
    except OptionError as error:
        if context.find_root().params["debug"]:
            raise
        if is_main:
            typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if is_main:
            typer.echo(f"\nInterrupted. {error}".rstrip(), err=True)
        raise typer.Exit(INTERRUPTED) from error


def _tell(folders: list[Path]) -> None:
    """A line for each training of a sweep, and how to see more."""
    from sysdag.reporting.series import overview_of, read_series_runs

    root = folders[0].parent
    found = overview_of(root, read_series_runs(root))
    assert found is not None  # its record has just been written
    typer.echo(f"{found}\n\n`sysdag report {root}` draws them over each other.")
