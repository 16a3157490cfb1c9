"""The check before the first step: policy and reference score alike."""

from __future__ import annotations

import torch
from torch import nn

from sysdag.engine.step import StepOutput, SystemModel
from sysdag.errors import TrainingError

_ROUNDING = {torch.float32: 0.01, torch.float64: 0.0}


def check_reference(output: StepOutput, model: SystemModel, disabled: bool) -> None:
    """At step 0 the policy is the reference: every margin must be 0 up to rounding.

    Args:
        output: of the first batch.
        model: what gave it.
        disabled: whether the dropout modules are off.

    Raises:
        TrainingError: naming the node that differs, and what of its model is random.
    """
    for name, difference in output.log_ratios.items() if model.options.needs_reference else ():
        worst = float(difference.abs().max())
        allowed = 1e-3 * max(1.0, float(output.scores[name].abs().max()) * _ROUNDING.get(difference.dtype, 0.01))
        if worst <= allowed:
            continue
        module = model.plan.system[name].component.module
        fields = {} if module is None else _random_fields(module)
        cause = "the adapter may have been trained before"
        if not disabled:
            cause = f"dropout may be on (disable_dropout=True turns it off), or {cause}"
        if fields:
            cause = f"its config makes it random in training: set {fields} to 0 there; or {cause}"
        raise TrainingError(
            f"Node {name!r}: policy and reference differ by {worst:.3g} nats before the first step, at most "
            f"{allowed:.3g} is rounding. The reference is not the model that training starts from: "
            f"{cause}. check_reference=False trains all the same."
        )


def _random_fields(module: nn.Module) -> dict[str, float]:
    """Fields of the configs inside a model that make it random in training, and are not 0."""
    found = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            continue
        nested = [config.to_dict()]
        for fields in nested:
            nested += [value for value in fields.values() if isinstance(value, dict)]
            for name, value in fields.items():
                is_random = any(word in str(name) for word in ("drop", "jitter", "noise"))
                if is_random and isinstance(value, float) and value > 0 and not str(name).startswith("classifier"):
                    found[name] = value
    return found
