"""The command line `sysdag`.

A user's mistake ends in one message on standard error and exit code 1, without a traceback unless `--debug` asks for it;
wrong options end in exit code 2.
"""

from __future__ import annotations

from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from sysdag.commands.env import env
from sysdag.errors import SysdagError


class Commands(TyperGroup):
    """Ends in a message where a command raises what a user can mend."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SysdagError, OSError) as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(str(error)) from error


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@app.callback()
def sysdag(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Compound AI systems as graphs, aligned jointly."""


app.command()(env)
