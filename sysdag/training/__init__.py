"""The trainer around the engine: a transformers Trainer for whole systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.training.config import SysDPOConfig
    from sysdag.training.job import train
    from sysdag.training.round_options import RoundOptions
    from sysdag.training.round_people import People
    from sysdag.training.rounds import Rounds, RoundsResult
    from sysdag.training.train_options import TrainJob
    from sysdag.training.trainer import SysDPOTrainer

__all__ = [
    "People",
    "RoundOptions",
    "Rounds",
    "RoundsResult",
    "SysDPOConfig",
    "SysDPOTrainer",
    "TrainJob",
    "train",
]
__getattr__ = exports(
    __name__,
    {
        "config": ["SysDPOConfig"],
        "job": ["train"],
        "round_options": ["RoundOptions"],
        "round_people": ["People"],
        "rounds": ["Rounds", "RoundsResult"],
        "train_options": ["TrainJob"],
        "trainer": ["SysDPOTrainer"],
    },
)
