"""The running mean of rewards that the loss `bco` tells desirable runs from others by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sysdag.errors import SerializationError


class RewardShift:
    """The mean of all rewards that training has seen so far, each once a visit; 0 before the first.

    As in TRL's `BCOTrainer`: each batch enters before its own loss is computed, and an evaluation does not enter.
    """

    def __init__(self) -> None:
        self.mean, self.count = 0.0, 0.0

    def update(self, total: float, count: float) -> None:
        """Takes in rewards, of all processes.

        Args:
            total: their sum.
            count: how many they are.
        """
        if count:
            self.count += count
            self.mean += (total - count * self.mean) / self.count

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, ready for JSON."""
        return {"mean": self.mean, "count": self.count}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Goes on from a `state`.

        Raises:
            SerializationError: for none.
        """
        if state is None:
            raise SerializationError(
                "loss_type 'bco': the checkpoint does not hold the mean of rewards that training had seen. Resume from "
                "one that was made with 'bco'."
            )
        self.mean, self.count = float(state["mean"]), float(state["count"])
