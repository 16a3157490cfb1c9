"""One training step: score, differentiate, replay; and what it needs of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.engine.memory_estimate import Estimate, estimate
    from sysdag.engine.replay import accumulate_gradients
    from sysdag.engine.step import StepOutput, SystemModel

__all__ = [
    "Estimate",
    "StepOutput",
    "SystemModel",
    "accumulate_gradients",
    "estimate",
]
__getattr__ = exports(
    __name__,
    {
        "memory_estimate": ["Estimate", "estimate"],
        "replay": ["accumulate_gradients"],
        "step": ["StepOutput", "SystemModel"],
    },
)
