"""What trainings that belong together have in common."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sysdag.errors import SerializationError
from sysdag.training.config import SysDPOConfig
from sysdag.training.resume import checkpoint_to_resume
from sysdag.training.run_record import without_secrets

_OF_PLACES = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "hub_model_id", "resume_from_checkpoint",
    "local_rank", "log_level", "dataloader_pin_memory",
}  # fmt: skip


def comparable(args: SysDPOConfig) -> dict[str, Any]:
    """A configuration as JSON-ready data, without secrets and without what says where and not what."""
    told = without_secrets(args.to_dict())
    return json.loads(json.dumps({key: told[key] for key in told if key not in _OF_PLACES}, default=str))


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint of the training that a folder records; None where it has none."""
    try:
        return str(checkpoint_to_resume(folder, True))
    except SerializationError:
        return None


@contextlib.contextmanager
def globals_kept() -> Iterator[None]:
    """Leaves the environment and torch's switches as they were, which some options of a training set for good."""
    environment = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
