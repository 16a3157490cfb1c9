"""Means of what steps measured: since the last log, and of the loss since training began.

A checkpoint takes the sums along, so that a training that was resumed logs what one that was never cut off does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from sysdag.training.pair_means import PairMeans


class StepMeans(TrainerCallback):
    """Adds up the loss of steps and the metrics of their pairs.

    Args:
        add_up: sums a tensor over processes.
    """

    def __init__(self, add_up: Callable[[Tensor], Tensor]) -> None:
        self._add_up = add_up
        self._pairs = PairMeans()
        self._resumed: Mapping[str, Any] | None = None
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._pairs.clear()
        self._total = 0.0  # of what has been logged
        self._unlogged = torch.zeros(())
        self._logged_at = self._first = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(int(state.global_step))
        kept, self._resumed = self._resumed, None
        if kept is None:
            return
        self._first, self._logged_at = int(kept["first_step"]), int(kept["logged_at"])
        self._total = float(kept["logged_loss"])
        self._unlogged = torch.tensor(float(kept["unlogged_loss"]))
        self._pairs.load(kept["metrics"], of_all=args.process_index == 0)

    def resume(self, kept: Mapping[str, Any] | None) -> None:
        """Has the training that begins next go on from a `state`; None, of a checkpoint that has none, counts anew."""
        self._resumed = kept

    def add_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Of a batch, (P,) each."""
        self._pairs.add(metrics)

    def add_loss(self, loss: Tensor) -> None:
        """Of a batch, (), already divided by the number of batches of its step."""
        self._unlogged = self._unlogged.to(loss.device) + loss.detach()

    def take(self, step: int) -> dict[str, float]:
        """The means since they were last taken, the loss by steps and the metrics by pairs; to be called by all
        processes.

        Args:
            step: the number of steps so far.
        """
        found = self._pairs.take(self._add_up)
        if step > self._logged_at:
            loss = self._over_processes()
            self._total += loss
            found["loss"] = loss / (step - self._logged_at)
            self._unlogged, self._logged_at = torch.zeros(()), step
        return found

    def training_loss(self, step: int) -> float:
        """The mean loss of all steps of the training; to be called by all processes."""
        return (self._total + self._over_processes()) / max(step - self._first, 1)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, the same in all processes, which have to call it together."""
        return {
            "first_step": self._first,
            "logged_at": self._logged_at,
            "logged_loss": self._total,
            "unlogged_loss": self._over_processes(),
            "metrics": self._pairs.state(self._add_up),
        }

    def _over_processes(self) -> float:
        total, count = self._add_up(torch.stack([self._unlogged, torch.ones_like(self._unlogged)])).tolist()
        return total / count
