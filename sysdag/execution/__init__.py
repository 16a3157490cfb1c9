"""Running a plan, here or on Ray, and the likelihood of what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.execution.batches import LocalEngine, Runs
    from sysdag.execution.branching import skipped_rows
    from sysdag.execution.execute import fill, sample
    from sysdag.execution.likelihood import log_probs
    from sysdag.execution.ray_engine import RayEngine
    from sysdag.execution.running import run
    from sysdag.execution.trace_file import TraceFile

__all__ = [
    "LocalEngine",
    "RayEngine",
    "Runs",
    "TraceFile",
    "fill",
    "log_probs",
    "run",
    "sample",
    "skipped_rows",
]
__getattr__ = exports(
    __name__,
    {
        "batches": ["LocalEngine", "Runs"],
        "branching": ["skipped_rows"],
        "execute": ["fill", "sample"],
        "likelihood": ["log_probs"],
        "ray_engine": ["RayEngine"],
        "running": ["run"],
        "trace_file": ["TraceFile"],
    },
)
