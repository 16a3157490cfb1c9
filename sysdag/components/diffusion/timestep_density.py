"""Densities of the times at which a diffusion model is scored, under the names that diffusers' training scripts use.

Esser et al. 2024 (arXiv 2403.03206, section 3.1); `diffusers.training_utils.compute_density_for_timestep_sampling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sysdag.errors import PlanError

DENSITIES = ("uniform", "logit_normal", "mode")
_LARGEST_MODE = 2 / (math.pi - 2)  # where the map of "mode" stops being monotone


@dataclass(frozen=True)
class TimestepDensity:
    """How times are drawn: u in [0, 1] has a density, and t = T - 1 - floor(u T), so that u = 0 is the noisiest time.

    | name             | u                                                     |
    |------------------|-------------------------------------------------------|
    | `"uniform"`      | uniform                                               |
    | `"logit_normal"` | sigmoid(z), z ~ N(logit_mean, logit_std^2)            |
    | `"mode"`         | 1 - v - mode_scale (cos^2(pi v / 2) - 1 + v), v uniform |

    Raises:
        PlanError: for another name, or constants that are out of range or of another density.
    """

    name: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        if self.name not in DENSITIES:
            raise PlanError(f"timestep_sampling must be one of {list(DENSITIES)}, got {self.name!r}.")
        if not self.logit_std > 0:
            raise PlanError(f"logit_std must be positive, got {self.logit_std}.")
        if not -1 <= self.mode_scale <= _LARGEST_MODE:
            raise PlanError(f"mode_scale must be from -1 to {_LARGEST_MODE:.4f}, got {self.mode_scale}.")
        for option, owner in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode")):
            if self.name != owner and getattr(self, option) != getattr(TimestepDensity, option):
                raise PlanError(f"{option} belongs to timestep_sampling={owner!r}; {self.name!r} has none.")

    def draw(self, count: int, num_timesteps: int, **place: Any) -> Int[Tensor, " count"]:
        """Times in 0..T-1, on the CPU.

        Args:
            place: the generator and its device.
        """
        if self.name == "uniform":
            return torch.randint(num_timesteps, (count,), **place).cpu()
        index = (self._unit(count, **place) * num_timesteps).long().clamp(0, num_timesteps - 1)
        return (num_timesteps - 1 - index).cpu()

    def _unit(self, count: int, **place: Any) -> Float[Tensor, " count"]:
        if self.name == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn(count, **place))
        uniform = torch.rand(count, **place)
        return 1 - uniform - self.mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
