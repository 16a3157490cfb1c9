"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

SystemArgument = Annotated[
    str, typer.Argument(metavar="SYSTEM", help="SYSTEM.py:name, package.module:name, or a saved system's folder.")
]
