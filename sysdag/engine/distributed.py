"""What training minds when processes share a model's weights: equally many calls, and whole weights where needed.

Under FSDP2 (torch's `fully_shard`, accelerate's `fsdp_version: 2`) every call of a model exchanges weights, so all
processes must call it equally often; under DDP and DeepSpeed ZeRO-1 and 2 they need not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

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


def added_up(tensor: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes, on the host; to be called by each of them.

    Args:
        device: of the process, over which processes reach each other.
    """
    if not torch.distributed.is_initialized():
        return tensor.cpu()
    total = tensor.to(device, copy=True)
    torch.distributed.all_reduce(total)
    return total.cpu()


def first_says(text: str) -> str:
    """What the first process says; to be called by each of them."""
    told = [text]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told)
    return told[0]


def wait_for_everyone(accelerator: Accelerator) -> None:
    """As its method, for processes on a CPU too.

    Where torch is built for GPUs that one waits on them, each process on its own, even if all work on the CPU over gloo
    and there are fewer GPUs or none.
    """
    if accelerator.device.type == "cpu" and torch.distributed.is_initialized():
        torch.distributed.barrier()
    else:
        accelerator.wait_for_everyone()


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


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process may hold a part; to be called by all processes then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gathered(model: nn.Module, *, here: bool, changed: bool = False) -> Iterator[None]:
    """While this lasts sharded parameters are whole ones on the host, so that they can be saved or loaded.

    To be entered by all processes; not for running the model.

    Args:
        model: whose parameters; those that are not sharded stay as they are.
        here: whether this process gets them. The others keep their shards.
        changed: whether the shards take the values that the whole ones have in the end; needs `here` on every process.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    places: dict[DTensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                places.setdefault(parameter, []).append((module, name))
    host: dict[DTensor, nn.Parameter] = {}
    for shard in places:
        numbers = whole(shard.detach())
        if here:
            host[shard] = nn.Parameter(numbers.cpu(), requires_grad=shard.requires_grad)
    try:
        for shard, parameter in host.items():
            for module, name in places[shard]:
                module._parameters[name] = parameter
        yield
        if changed:
            with torch.no_grad():
                for shard, parameter in host.items():
                    numbers = parameter.to(shard.device, shard.dtype)
                    shard.copy_(distribute_tensor(numbers, shard.device_mesh, shard.placements, src_data_rank=None))
    finally:
        for shard in host:
            for module, name in places[shard]:
                module._parameters[name] = shard  # type: ignore[assignment]
