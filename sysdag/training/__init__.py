"""The trainer around the engine: a transformers Trainer for whole systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.training.config import SysDPOConfig
    from sysdag.training.job import train
    from sysdag.training.train_options import TrainJob
    from sysdag.training.trainer import SysDPOTrainer

__all__ = [
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
        "train_options": ["TrainJob"],
        "trainer": ["SysDPOTrainer"],
    },
)
