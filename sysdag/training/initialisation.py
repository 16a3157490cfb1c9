"""Loading a system's models such that what is random in their start follows the training's seed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

import torch
from torch import nn

from sysdag.execution.batches import load
from sysdag.graph.system import System
from sysdag.saving.serialization import component_keys

logger = logging.getLogger(__name__)


def initialise(system: System, seed: int) -> None:
    """Loads every component's model; new adapters and heads get weights that depend on `seed` and their node alone.

    torch's global generators are left as they were. What was loaded before (the system has run) stays as it is.

    Raises:
        RunError: naming the node whose model cannot be loaded.
    """
    for key, component in component_keys(system).items():
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:15], 16))
            load(key, component, None)


def warn_if_trained(parameters_by_node: Iterable[tuple[str, Iterable[nn.Parameter]]]) -> None:
    """Says which nodes an earlier trainer has trained: their references are what they are now."""
    trained = [
        name
        for name, parameters in parameters_by_node
        if any(getattr(parameter, "_sysdag_trained", False) for parameter in parameters)
    ]
    if trained:
        logger.warning(
            "Nodes %s were trained by an earlier trainer of this process: this training goes on from their weights, "
            "which are its reference, too. system.fresh() gives the system as it was before it trained.",
            trained,
        )


def mark_trained(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter._sysdag_trained = True  # type: ignore[attr-defined]
