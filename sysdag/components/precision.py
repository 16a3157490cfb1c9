"""Number formats of weights: their names, and training in them.

At a learning rate of 1e-6 an update is far below half the distance between two bfloat16 numbers, so it is lost when it
is added to one. Weights that train are fp32; where 16 bits are wanted, the optimizer works on fp32 copies of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.errors import PlanError

_NAMES = {
    "fp64": torch.float64,
    "double": torch.float64,
    "fp32": torch.float32,
    "float": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    **{name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")},
}
_COPY = "fp32_copy"
_watched: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def dtype_named(name: Any, owner: str) -> torch.dtype:
    """The floating-point dtype of that name: one of torch's (`bfloat16`), or a short one (`bf16`).

    Args:
        owner: who asks, in an error.

    Raises:
        PlanError: for another name, or something that is none.
    """
    found = name if isinstance(name, torch.dtype) else _NAMES.get(str(name).removeprefix("torch."))
    if found is None or not found.is_floating_point:
        raise PlanError(f"{owner}: dtype must be float32, bfloat16, float16 or float64, got {name!r}.")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in torch."""
    return str(dtype).removeprefix("torch.")


def is_half(dtype: torch.dtype) -> bool:
    """Whether it has 16 bits."""
    return dtype in (torch.bfloat16, torch.float16)


def widened(tensor: Tensor) -> Tensor:
    """In fp32 or better."""
    return tensor.float() if is_half(tensor.dtype) else tensor


def optimizer_bytes(parameters: Iterable[Tensor]) -> int:
    """What AdamW keeps of parameters that train: two averages, for those of 16 bits in fp32 beside an fp32 copy."""
    return sum(
        parameter.numel() * (3 * 4 if is_half(parameter.dtype) else 2 * parameter.element_size())
        for parameter in parameters
    )


def keep_fp32_copies(optimizer: torch.optim.Optimizer) -> None:
    """Has the optimizer work on fp32 copies of its 16-bit parameters, which take the rounded results.

    The copies are part of the optimizer's state, so that checkpoints hold them. A parameter that something else has
    changed since the last step, as loading weights does, is taken as it is now.
    """
    if optimizer in _watched:
        return
    _watched.add(optimizer)
    optimizer.register_step_pre_hook(lambda self, args, kwargs: _put_copies_in(self))
    optimizer.register_step_post_hook(lambda self, args, kwargs: _take_copies_out(self))
    # Loading casts the state to the dtype of its parameter.
    optimizer.register_load_state_dict_pre_hook(lambda self, state: _put_copies_in(self))
    optimizer.register_load_state_dict_post_hook(lambda self: _take_copies_out(self, writes=False))


@torch.no_grad()
def _put_copies_in(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            if not is_half(parameter.dtype):
                continue
            state = optimizer.state.pop(parameter, {})
            copy, now = state.pop(_COPY, None), parameter.detach().float()
            if copy is not None:
                now = torch.where(copy.to(parameter.dtype) == parameter.detach(), copy, now)
            made = nn.Parameter(now)
            made.grad = None if parameter.grad is None else parameter.grad.float()
            made._half = parameter  # type: ignore[attr-defined]
            group["params"][place] = made
            if state:
                optimizer.state[made] = state


@torch.no_grad()
def _take_copies_out(optimizer: torch.optim.Optimizer, writes: bool = True) -> None:
    for group in optimizer.param_groups:
        for place, made in enumerate(group["params"]):
            parameter = getattr(made, "_half", None)
            if parameter is None:
                continue
            state = optimizer.state.pop(made, {})
            if writes:
                parameter.copy_(made.detach())
                state[_COPY] = made.detach()
            group["params"][place] = parameter
            if state:
                optimizer.state[parameter] = state


def trained_values(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> Tensor:
    """The numbers that training moves: the optimizer's fp32 copy where there is one, else the parameter."""
    state = getattr(optimizer, "state", {}).get(parameter, {})
    return state.get(_COPY, parameter).detach()
