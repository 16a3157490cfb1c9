"""The learning rate of each component: its node's own, the training's, or what fits adapters or whole models."""

from __future__ import annotations

from sysdag.components import adapter_layers
from sysdag.engine.step import SystemModel

OF_WEIGHTS = 1e-6
OF_ADAPTERS = 1e-5


def learning_rates(model: SystemModel, given: float | None) -> dict[str, float]:
    """The rate of each component that trains, by its key.

    A new adapter's product starts at 0 and has few numbers, which takes a rate about ten times that of whole weights:
    the ratio of TRL's own two examples of DPO.

    Args:
        given: the training's, for nodes without one of their own; None chooses `OF_ADAPTERS` for a component whose
            model carries an adapter, and `OF_WEIGHTS` for others.
    """
    found = {}
    for key in model.references:
        own, module = model.learning_rate(key), model.components[key].module
        usual = OF_ADAPTERS if module is not None and adapter_layers.is_carried_by(module) else OF_WEIGHTS
        found[key] = next(rate for rate in (own, given, usual) if rate is not None)
    return found
