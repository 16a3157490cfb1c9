"""How much a call of a component gets, and what happens when memory runs out in it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from sysdag.components.component import Component
from sysdag.engine.micro_batch import MicroBatch
from sysdag.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass
class Budget:
    """How much a call of a component gets.

    Attributes:
        max_tokens: of a micro-batch, as `Component.micro_batches` counts them. Halved when memory runs out.
        keeps_graphs: whether the first pass keeps its graphs; dropped when memory runs out.
        reuses: whether it keeps some of its work where it keeps no graphs; dropped likewise.
    """

    max_tokens: int
    keeps_graphs: bool
    reuses: bool = True

    def shrink(self, batch: MicroBatch, component: Component) -> list[list[int]]:
        """The micro-batch's elements in two or more parts, after memory ran out on it.

        Raises:
            TrainingError: for a single element, which cannot be split.
        """
        if len(batch.rows) == 1:
            raise TrainingError(
                f"Node {batch.name!r}, {batch.called(0)}: memory ran out on a single element. Shorter "
                "texts (max_length), gradient_checkpointing=True, bf16=True or a smaller model need less. The weights "
                "were not changed."
            )
        parts = [list(range(len(batch.rows)))]
        while len(parts) == 1 and self.max_tokens > 1:
            self.max_tokens //= 2
            parts = component.micro_batches(batch.inputs, batch.draws, self.max_tokens)
        logger.warning(
            "Memory ran out at node %r; micro-batches hold at most %d tokens from now on (micro_batch_tokens).",
            batch.name, self.max_tokens,
        )  # fmt: skip
        return parts


Result = TypeVar("Result")


def attempt(run: Callable[[], Result]) -> Result | None:
    """What `run` returns, or None after memory ran out in it; its tensors are then gone and cached memory is freed."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    free_cached_memory()
    return None


def free_cached_memory() -> None:
    """Gives memory back that torch keeps of tensors that are gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, or on a CPU whose process is limited."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(sign in str(error) for sign in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
