"""sysdag: define compound AI systems as graphs, and align all of their models jointly (SysDPO, arXiv 2502.17721).

Each package hands on its public names in the same way: they load on first use (PEP 562), so importing sysdag loads
neither torch nor transformers nor diffusers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sysdag.components.component import Component
    from sysdag.errors import DataError, GraphError, PlanError, SerializationError, SysdagError, TrainingError
    from sysdag.graph.loops import loop
    from sysdag.graph.parts import split
    from sysdag.graph.plan import Plan
    from sysdag.graph.switches import switch
    from sysdag.graph.system import System
    from sysdag.graph.variables import Edge, Input, Node, node
    from sysdag.objectives.strategies import DiverseBeamSearch, Exhaustive, ImportanceSampling, MonteCarlo
    from sysdag.traces.cells import Draw
    from sysdag.traces.trace import Trace
    from sysdag.training.config import SysDPOConfig
    from sysdag.training.trainer import SysDPOTrainer

__all__ = [
    "Component",
    "DataError",
    "DiverseBeamSearch",
    "Draw",
    "Edge",
    "Exhaustive",
    "GraphError",
    "ImportanceSampling",
    "Input",
    "MonteCarlo",
    "Node",
    "Plan",
    "PlanError",
    "SerializationError",
    "SysDPOConfig",
    "SysDPOTrainer",
    "SysdagError",
    "System",
    "Trace",
    "TrainingError",
    "loop",
    "node",
    "split",
    "switch",
]
__version__ = "0.1.0"


def exports(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names are in the given modules of it."""
    module_of = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in module_of:
            return getattr(importlib.import_module(module_of[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


__getattr__ = exports(
    __name__,
    {
        "components.component": ["Component"],
        "errors": ["DataError", "GraphError", "PlanError", "SerializationError", "SysdagError", "TrainingError"],
        "graph.loops": ["loop"],
        "graph.parts": ["split"],
        "graph.plan": ["Plan"],
        "graph.switches": ["switch"],
        "graph.system": ["System"],
        "graph.variables": ["Edge", "Input", "Node", "node"],
        "objectives.strategies": ["DiverseBeamSearch", "Exhaustive", "ImportanceSampling", "MonteCarlo"],
        "traces.cells": ["Draw"],
        "traces.trace": ["Trace"],
        "training.config": ["SysDPOConfig"],
        "training.trainer": ["SysDPOTrainer"],
    },
)
