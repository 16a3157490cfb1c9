"""sysdag: define compound AI systems as graphs, and align all of their models jointly (SysDPO, arXiv 2502.17721)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sysdag.candidates import DiverseBeamSearch, Exhaustive, ImportanceSampling, MonteCarlo
    from sysdag.component import Component
    from sysdag.config import SysDPOConfig
    from sysdag.errors import DataError, GraphError, PlanError, SerializationError, SysdagError, TrainingError
    from sysdag.graph import Edge, Input, Node, System, loop, node
    from sysdag.plan import Plan
    from sysdag.trace import Draw, Trace
    from sysdag.trainer import SysDPOTrainer

_MODULES = {
    "candidates": ("DiverseBeamSearch", "Exhaustive", "ImportanceSampling", "MonteCarlo"),
    "component": ("Component",),
    "config": ("SysDPOConfig",),
    "errors": ("DataError", "GraphError", "PlanError", "SerializationError", "SysdagError", "TrainingError"),
    "graph": ("Edge", "Input", "Node", "System", "loop", "node"),
    "plan": ("Plan",),
    "trace": ("Draw", "Trace"),
    "trainer": ("SysDPOTrainer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [
    "Component", "DataError", "DiverseBeamSearch", "Draw", "Edge", "Exhaustive", "GraphError",
    "ImportanceSampling", "Input", "MonteCarlo", "Node", "Plan",
    "PlanError", "SerializationError", "SysDPOConfig", "SysDPOTrainer", "SysdagError", "System", "Trace",
    "TrainingError", "loop", "node",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"sysdag.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
