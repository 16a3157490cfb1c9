"""What a step minds when processes share a model's weights: equally many calls, and whole weights while it generates.

Under FSDP2 (torch's `fully_shard`, accelerate's `fsdp_version: 2`) every call of a model exchanges weights, so all
processes must call it equally often; under DDP and DeepSpeed ZeRO-1 and 2 they need not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from sysdag.errors import PlanError


def rounds_of(model: nn.Module) -> Callable[[int], int] | None:
    """The largest of all processes' numbers, where they have to call the model equally often; else None.

    Raises:
        PlanError: for FSDP of version 1 and DeepSpeed ZeRO-3, in which a head's weight is no tensor between calls.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise PlanError("The model is wrapped in FSDP of version 1; use fsdp_config={'fsdp_version': 2}.")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise PlanError("The model is sharded by DeepSpeed ZeRO-3; use ZeRO-2, or FSDP of version 2.")
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    device = next(model.parameters()).device

    def largest(count: int) -> int:
        found = torch.tensor(count, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    return largest


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """While this lasts every process holds all weights, so that calls exchange nothing and may differ in number."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = [module for module in sharded if module is not model]
    for module in sharded:
        module.unshard()
    for module in inner:
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in inner:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
