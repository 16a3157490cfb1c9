"""How the time that a denoiser receives follows from its scheduler's: t, t/T, 1 - t/T, a scaled t."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_EXACT: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "t": lambda t, T: t,
    "t / T": lambda t, T: t / T,
    "1 - t / T": lambda t, T: 1 - t / T,
    "(T - t) / T": lambda t, T: (T - t) / T,
    "T - t": lambda t, T: T - t,
}


@dataclass(frozen=True)
class TimeArgument:
    """A fixed map from the scheduler's time to the denoiser's.

    Attributes:
        form: one of "t", "t / T", "1 - t / T", "(T - t) / T", "T - t", or "a t + b".
        total: T, the scheduler's `num_train_timesteps`.
        given: the dtype of the scheduler's times, which are whole numbers for some.
        first: what t is cast to before the arithmetic; None for nothing.
        dtype: of the result.
        slope, offset: of the last form.
    """

    form: str
    total: int
    given: torch.dtype
    first: torch.dtype | None
    dtype: torch.dtype
    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, times: Tensor) -> Tensor:
        times = times.to(self.given)
        times = times if self.first is None else times.to(self.first)
        if self.form in _EXACT:
            return _EXACT[self.form](times, self.total).to(self.dtype)
        return (times.double() * self.slope + self.offset).to(self.dtype)

    def __str__(self) -> str:
        return self.form if self.form in _EXACT else f"{self.slope:g} t + {self.offset:g}"

    @classmethod
    def learnt(cls, times: Sequence[Tensor], arguments: Sequence[Tensor], total: int) -> TimeArgument | None:
        """The map of a scheduler's times to the arguments of as many steps; None where no fixed one holds for all.

        A form of the list holds exactly. The last is laid through two steps and holds for the others to the last two
        digits of the arguments' dtype.

        Args:
            times, arguments: () each, one a step; of a dtype each.
        """
        dtype = arguments[0].dtype
        got = torch.stack(list(arguments))
        given = torch.stack(list(times))
        for form in _EXACT:
            for first in (None, dtype):
                made = cls(form, total, given.dtype, first, dtype)
                if torch.equal(made(given), got):
                    return made
        t, y = given.double(), got.double()
        low, high = int(t.argmin()), int(t.argmax())
        if t[low] == t[high]:
            return None
        slope = ((y[high] - y[low]) / (t[high] - t[low])).item()
        offset = (y[low] - slope * t[low]).item()
        if slope == 0 or len(t.unique()) < 3:
            return None
        spacing = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        error = (slope * t + offset - y).abs()
        close = bool((error <= 4 * spacing * y.abs().max()).all()) if dtype.is_floating_point else False
        return cls("a t + b", total, given.dtype, None, dtype, slope, offset) if close else None
