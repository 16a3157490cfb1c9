"""Reports of a training: one HTML file, and the same findings as text and JSON; no model loads for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.reporting.html import write_report

__all__ = ["write_report"]
__getattr__ = exports(__name__, {"html": ["write_report"]})
