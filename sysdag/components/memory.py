"""What a graph of autograd keeps, in bytes, and what is free."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SavedBytes:
    """A context, entered as often as wanted, that adds up what the graphs built inside it save for their backward.

    Storages are counted once within one entry; parameters are not, since they are there anyway.

    Attributes:
        total: bytes of all entries.
        devices: where they are.
    """

    def __init__(self) -> None:
        self.total = 0
        self.devices: set[torch.device] = set()
        self._seen: dict[int, Any] = {}
        self._hooks: Any = None

    def __enter__(self) -> Self:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._seen.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage  # held, so that its address is not used again
                self.total += storage.nbytes()
                self.devices.add(tensor.device)
        return tensor

    def fits(self, spare: float = 2.0) -> bool:
        """Whether `spare` times as much is free on every device."""
        return all(spare * self.total <= free_bytes(device) for device in self.devices)


class PeakBytes(TorchDispatchMode):
    """A context that follows what operations allocate inside it, forward and backward; of fake tensors too.

    Args:
        module: whose parameters, their gradients and buffers are there anyway.

    Attributes:
        bytes: the most that was there at once.
        now: what is there.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        self.now = 0
        self._alive: dict[int, weakref.ref[Any] | None] = {}
        present = [*module.parameters(), *module.buffers()]
        for tensor in (*present, *(each.grad for each in present if each.grad is not None)):
            self._alive[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.bytes = max(self.bytes, self.now)
        return result

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation could still get: of the GPU and torch's cache on it, or of the host."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
