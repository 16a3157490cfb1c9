"""What a run leaves behind, and preference rows in files. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.traces.cells import ABSENT, Draw
    from sysdag.traces.pairs import output_names, preference_row, runs_by_input, write_pairs
    from sysdag.traces.readers import read_all, read_rows
    from sysdag.traces.trace import Trace
    from sysdag.traces.unpaired import unpaired_row

__all__ = [
    "ABSENT",
    "Draw",
    "Trace",
    "output_names",
    "preference_row",
    "read_all",
    "read_rows",
    "runs_by_input",
    "unpaired_row",
    "write_pairs",
]
__getattr__ = exports(
    __name__,
    {
        "cells": ["ABSENT", "Draw"],
        "pairs": ["output_names", "preference_row", "runs_by_input", "write_pairs"],
        "readers": ["read_all", "read_rows"],
        "trace": ["Trace"],
        "unpaired": ["unpaired_row"],
    },
)
