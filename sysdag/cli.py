"""The command line `sysdag`.

A mistake of the user ends in one message on standard error and exit code 1, with a traceback only under `--debug`;
wrong options end in exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sysdag import __version__
from sysdag.commands.env import env
from sysdag.commands.eval import evaluate
from sysdag.commands.import_logs import import_logs
from sysdag.commands.judge import judge
from sysdag.commands.label import label
from sysdag.commands.plan import plan
from sysdag.commands.report import report
from sysdag.commands.rounds import rounds
from sysdag.commands.sample import sample
from sysdag.commands.train import INTERRUPTED, SETTINGS, train
from sysdag.commands.validate import validate
from sysdag.errors import SysdagError


class Commands(TyperGroup):
    """Ends in a message where a command raises what a user can mend."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (SysdagError, OSError) as error:
            if ctx.params["debug"] or (isinstance(error, OSError) and error.errno == errno.EPIPE):  # typer ends quietly
                raise
            typer.echo(f"Error: {_told(error)}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo(f"\nInterrupted. {error}".rstrip(), err=True)
            raise typer.Exit(INTERRUPTED) from error


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sysdag {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback()
def sysdag(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Compound AI systems as graphs, aligned jointly."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers and diffusers heed it, too


app.command()(env)
app.command("eval")(evaluate)
app.command("import")(import_logs)
app.command()(judge)
app.command()(label)
app.command()(plan)
app.command()(report)
app.command()(rounds)
app.command()(sample)
app.command(context_settings=SETTINGS)(train)
app.command()(validate)

if __name__ == "__main__":  # accelerate launch -m sysdag.cli train ...
    app()
