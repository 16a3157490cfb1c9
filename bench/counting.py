"""Counts what a piece of work asks of a device, on a CPU that stands in for one.

Tensors are followed from where they reach the device (weights, `.to(device)`, `device=` of a factory) through every
operation on them; their device is called cpu:0 meanwhile, and the host cpu. What is computed of host tensors alone is
the host's, and is not counted.

- A launch is a call of an aten operation, or of one of sysdag's, that runs a kernel. Views, metadata, allocations
  without a fill and reads of a number run none (`NO_KERNEL`). Operations that are made of others count as those.
- A synchronisation is a wait for the device: a number that is read (`_local_scalar_dense`, `equal`), a result whose
  size depends on numbers (`nonzero`, indexing by a mask, `unique`, `repeat_interleave` without a size), a copy to the
  host (`cpu`, `tolist`, `numpy`), and a copy to the device that is not asynchronous (`non_blocking`).
- Tokens are those that an embedding looks up, head rows those whose logits are computed, peak bytes those of all
  storages that the work made on the device and that are alive at once, whatever kernels need inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sysdag.ops import _head_walk

NO_KERNEL = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "advise_huge_pages", "alias", "detach", "empty",
    "empty_like", "empty_strided", "equal", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "resize_",
    "set_", "sym_numel", "sym_size", "sym_stride",
}  # fmt: skip
READS = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
PRODUCTS = {"addmm", "addmm_", "baddbmm", "bmm", "mm"}
MADE_OF_OTHERS = {"linear_logprob", "linear_logprob_backward"}  # of sysdag: what they run is counted
_device_of = Tensor.device.__get__  # type: ignore[attr-defined]
TO_HOST = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}


class Counter:
    """What was counted while `counting` lasted.

    Args:
        modules: whose parameters and buffers are on the device.
        heads: weights (V, H) of output embeddings.
    """

    def __init__(self, modules: Iterable[nn.Module], heads: Iterable[Tensor]) -> None:
        self.launches = self.synchronisations = self.uploads = self.tokens = self.peak_bytes = 0
        self._head_elements = 0.0
        self._there: dict[int, StorageWeakRef] = {}
        self._live: dict[int, int] = {}  # bytes of what was made since
        self._paused = False
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._place(tensor)
                if tensor.grad is not None:
                    self._place(tensor.grad)
        self._heads = {_storage(weight): weight.shape for weight in heads}
        self._live.clear()
        self._functions, self._operations = _Functions(self), _Operations(self)

    @property
    def head_rows(self) -> int:
        return round(self._head_elements)

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter]:
        plain = _head_walk.forward, _head_walk.backward
        try:
            # Inside of an operation of sysdag's nothing is dispatched to modes unless they are entered anew.
            _head_walk.forward, _head_walk.backward = (self._inside(function) for function in plain)
            with self._functions, self._operations:
                yield self
        finally:
            _head_walk.forward, _head_walk.backward = plain

    def _inside(self, function: Callable[..., Any]) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._functions, self._operations:
                return function(*arguments, **options)

        return counted

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return _storage(tensor) in self._there

    def _place(self, tensor: Tensor) -> None:
        key = _storage(tensor)
        if key not in self._there:
            self._there[key] = StorageWeakRef(tensor.untyped_storage())
            self._live[key] = tensor.untyped_storage().nbytes()

    def moved(self, tensor: Tensor, to_device: bool, waits: bool = True) -> Tensor:
        """A copy on the other side, which waits for the device or not."""
        self._paused = True
        try:
            copied = tensor.clone()
        finally:
            self._paused = False
        self.synchronisations += waits
        if to_device:
            self.uploads += 1
            self._place(copied)
        return copied

    def saw(self, operation: Any, arguments: tuple[Any, ...], options: dict[str, Any], found: Any, made: bool) -> None:
        """Counts an operation that has run; `made` says that its results were asked for on the device."""
        if self._paused:
            return
        given = [each for each in tree_leaves((arguments, options)) if isinstance(each, Tensor)]
        name = operation._schema.name.split("::")[1]
        if name in MADE_OF_OTHERS or not (made or any(map(self.has, given))):
            return
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self._place(each)
        self.synchronisations += name in READS or _depends_on_numbers(name, arguments, options)
        if name in NO_KERNEL or operation.is_view:
            return
        self.launches += 1
        if name == "embedding":
            self.tokens += arguments[1].numel()
        if name in PRODUCTS:
            self._saw_product([each for each in given if each.dim() >= 2], found)
        self._measure()

    def _saw_product(self, operands: list[Tensor], found: Tensor) -> None:
        for weight in operands:
            vocabulary, width = self._heads.get(_storage(weight), (0, 0))
            if vocabulary and weight.shape[-2] == width:  # (H, V) or a tile of it: logits
                self._head_elements += found.numel() / vocabulary

    def _measure(self) -> None:
        for key in [key for key in self._live if self._there[key].expired()]:
            del self._live[key], self._there[key]
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _depends_on_numbers(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    if name == "repeat_interleave":
        return options.get("output_size") is None
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    if name != "index" and arguments[2].numel() == 1:  # runs as masked_fill
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])


class _Functions(TorchFunctionMode):
    """What never reaches a dispatcher on a CPU: copies between device and host."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, counter = kwargs or {}, self.counter
        if func is _device_of:
            return torch.device("cpu", 0) if counter.has(args[0]) else torch.device("cpu")
        if func in TO_HOST and counter.has(args[0]):
            copied = counter.moved(args[0].detach() if func is not Tensor.cpu else args[0], to_device=False)
            return func(copied, *args[1:], **options)
        if func is Tensor.to and not counter.has(args[0]) and _names_a_device(counter, (*args[1:], *options.values())):
            waits = not options.get("non_blocking", False)
            return func(counter.moved(args[0], to_device=True, waits=waits), *args[1:], **options)
        asked = options.get("device")
        if (
            not isinstance(asked, torch.device)
            or asked.index is None
            or any(isinstance(each, Tensor) for each in args[:1])
        ):
            return func(*args, **options)
        if func is torch.tensor:
            return counter.moved(func(*args, **options), to_device=True)
        before, counter._operations.makes = counter._operations.makes, True
        try:
            return func(*args, **options)
        finally:
            counter._operations.makes = before


def _names_a_device(counter: Counter, arguments: Iterable[Any]) -> bool:
    return any(counter.has(each) if isinstance(each, Tensor) else isinstance(each, torch.device) for each in arguments)


class _Operations(TorchDispatchMode):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter
        self.makes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        found = func(*args, **options)
        self.counter.saw(func, args, options, found, self.makes)
        return found
