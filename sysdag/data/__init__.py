"""Preference rows, checked, as pairs of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.data.encoding import encode_pairs
    from sysdag.data.logs import logged_runs
    from sysdag.data.preferences import PreferencePair, Problem
    from sysdag.data.validation import ValidationReport, validate_rows

__all__ = [
    "PreferencePair",
    "Problem",
    "ValidationReport",
    "encode_pairs",
    "logged_runs",
    "validate_rows",
]
__getattr__ = exports(
    __name__,
    {
        "encoding": ["encode_pairs"],
        "logs": ["logged_runs"],
        "preferences": ["PreferencePair", "Problem"],
        "validation": ["ValidationReport", "validate_rows"],
    },
)
