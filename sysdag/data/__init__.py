"""Rows of feedback, checked, as pairs of runs or single ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.data.encoding import encode_pairs, encode_rows
    from sysdag.data.logs import logged_runs
    from sysdag.data.preferences import PreferencePair, Problem, UnpairedRun
    from sysdag.data.validation import ValidationReport, validate_rows

__all__ = [
    "PreferencePair",
    "Problem",
    "UnpairedRun",
    "ValidationReport",
    "encode_pairs",
    "encode_rows",
    "logged_runs",
    "validate_rows",
]
__getattr__ = exports(
    __name__,
    {
        "encoding": ["encode_pairs", "encode_rows"],
        "logs": ["logged_runs"],
        "preferences": ["PreferencePair", "Problem", "UnpairedRun"],
        "validation": ["ValidationReport", "validate_rows"],
    },
)
