"""Models of fake tensors whose course depends on numbers: of what their inputs hold, as where images stand.

Fake tensors have no numbers, so a model of them cannot be asked how many tokens are an image's. What depends on no
weight needs none, and is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KnownValues(TorchDispatchMode):
    """A context inside `FakeTensorMode(allow_non_fake_inputs=True)` where only what a fake tensor enters is fake.

    All else has numbers: tensors that are made in it, and what follows from them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*_without_masks(func, args), **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _without_masks(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments whose boolean indices are places: how many a mask has is known here, and not to a fake tensor."""
    if func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return args
    with unset_fake_temporarily():
        places = [index for given in args[1] for index in _places(given)]
    return args[0], places, *args[2:]


def _places(index: Any) -> list[Any]:
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
    return list(index.nonzero(as_tuple=True)) if is_mask else [index]
