"""How much of what trains has moved after the first optimizer steps: a sign that updates are not lost."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from sysdag.components.precision import trained_values
from sysdag.engine.step import SystemModel

logger = logging.getLogger(__name__)

STEPS = 8
LEAST = 0.01  # of the elements; bfloat16 weights at a learning rate of 1e-6 move by 0.004, fp32 ones by more than 0.5
_SAMPLED = 4096  # elements of each tensor


class MovementCheck(TrainerCallback):
    """Compares a sample of every trained tensor before the first optimizer step and after the first few.

    The share of elements that have moved is logged for each node, and warned of below `LEAST`. A training that resumes
    is not checked.

    Attributes:
        shares: by component, once it is known.
    """

    def __init__(self, model: SystemModel) -> None:
        self._model = model
        self._before: dict[str, list[Tensor]] = {}
        self.shares: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = {} if state.global_step else self._sampled(kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._before or state.global_step < min(STEPS, state.max_steps):
            return
        before, self._before = self._before, {}
        for key, now in self._sampled(kwargs.get("optimizer")).items():
            moved = sum(int((one != other).sum()) for one, other in zip(before[key], now, strict=True))
            count = sum(len(each) for each in now)
            if not count:  # sharded, with nothing here
                continue
            self.shares[key] = moved / count
            level = logging.WARNING if self.shares[key] < LEAST else logging.INFO
            logger.log(
                level, "Node %r: %.2f %% of the trained elements moved in the first %d optimizer steps%s", key,
                100 * self.shares[key], state.global_step, "." if level == logging.INFO else _ADVICE,
            )  # fmt: skip

    def _sampled(self, optimizer: Any) -> dict[str, list[Tensor]]:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        return {
            key: [
                _sample(trained_values(optimizer, parameter))
                for parameter in self._model.components[key].own_parameters().values()
                if parameter.requires_grad
            ]
            for key in self._model.references
        }


def _sample(values: Tensor) -> Tensor:
    """Copies some of the numbers that this process holds."""
    local = values.to_local() if isinstance(values, DTensor) else values
    flat = local.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].to(torch.float32, copy=True)


_ADVICE = (
    ", of which at least 1 % is expected. The learning rate may be too small or still 0 (warm-up), no gradient may "
    "reach them, or their dtype may not hold such small updates."
)
