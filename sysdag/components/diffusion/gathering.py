"""A fixed rearrangement of a tensor's elements: how latents are packed for a denoiser, and its answer unpacked.

It is learnt by sending numbers through that tell each element's place. A number is written in digits below 256, one
tensor a digit, so that it arrives whole in every floating dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 256


def digit(count: int, power: int, base: int = BASE) -> Tensor:
    """A digit of each of the places 0..count-1, the lowest is `power` 0: (count,)."""
    return (torch.arange(count) // base**power % base).float()


def places(received: Sequence[Tensor], base: int = BASE) -> Tensor | None:
    """Which place each element of what arrived is from; None if that was no rearrangement of digits."""
    total = torch.zeros_like(received[0], dtype=torch.float64)
    for power, digit in enumerate(received):
        if not torch.equal(digit, digit.round()) or not bool(((digit >= 0) & (digit < base)).all()):
            return None
        total += digit.double() * base**power
    return total.long()


@dataclass(frozen=True, eq=False)
class Gather:
    """Takes elements of a flat tensor, in a fixed order.

    Attributes:
        index: (K,) their places.
        shape: of the result, K elements.
        factor: what each is multiplied by, 1 or -1.
    """

    index: Tensor
    shape: tuple[int, ...]
    factor: float = 1.0

    def __post_init__(self) -> None:
        start = int(self.index[0]) if len(self.index) else 0
        run = torch.arange(start, start + len(self.index), device=self.index.device)
        object.__setattr__(self, "_start", start if torch.equal(self.index, run) else None)
        object.__setattr__(self, "_placed", {})

    def __call__(self, flat: Tensor) -> Tensor:
        """(n, N) to (n, *shape)."""
        start: int | None = self._start  # type: ignore[attr-defined]
        if start is not None:
            taken = (
                flat if start == 0 and flat.shape[1] == len(self.index) else flat[:, start : start + len(self.index)]
            )
        else:
            taken = flat.index_select(1, self._on(flat.device))
        taken = taken if self.factor == 1 else taken * self.factor
        return taken.reshape(len(flat), *self.shape)

    def _on(self, device: torch.device) -> Tensor:
        placed: dict[torch.device, Tensor] = self._placed  # type: ignore[attr-defined]
        if device not in placed:
            placed[device] = self.index.to(device)
        return placed[device]

    def inverse(self, shape: tuple[int, ...]) -> Gather | None:
        """What undoes it, where it takes every element of a tensor of `shape` once."""
        count = math.prod(shape)
        if len(self.index) != count or not torch.equal(self.index.sort().values, torch.arange(count)):
            return None
        return Gather(self.index.argsort(), shape, self.factor)
