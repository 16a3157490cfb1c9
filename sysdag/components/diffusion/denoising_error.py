"""The denoising error of a diffusion or flow matching model, and the scales on which it enters a margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion.forward_process import DiffusionNoise, ForwardProcess
from sysdag.components.diffusion.loss_weighting import Weighting
from sysdag.ops import diffusion_error

CONVENTIONS = ("sysdpo", "diffusion-dpo", "diffusers")
PUBLISHED_BETAS = (2000.0, 5000.0)  # Wallace et al. 2023: Stable Diffusion 1.5, and SDXL
_FACTORS = {"diffusion-dpo": 0.5, "diffusers": 1.0}  # of the mean over elements


Predict = Callable[[list[int], Float[Tensor, " kM *S"], Tensor], Float[Tensor, " kM *S"]]
"""From rows, M noisy samples of each and their times (kM,) to the model's predictions."""


def denoising_errors(
    predict: Predict,
    process: ForwardProcess,
    clean: Sequence[Float[Tensor, " *S"]],
    noise: DiffusionNoise,
    device: Any,
    residuals: dict[int, Tensor] | None = None,
) -> Float[Tensor, "n M"]:
    """|target - prediction|^2 summed over a draw's elements, at each of its M pairs (t, eps), fp32.

    The target is that of the scheduler's prediction type; of a model that learns its variance too, the first C channels
    are compared. Draws of one shape are predicted together.

    Args:
        clean: each draw's latents.
        device: the denoiser's.
        residuals: takes each draw's prediction - target, (M, *S), without gradient, where it is given.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for row, latents in enumerate(clean):
        by_shape.setdefault(latents.shape, []).append(row)
    found: dict[int, Tensor] = {}
    for shape, rows in by_shape.items():
        chosen = noise.select(rows)
        times = chosen.timesteps.reshape(-1).to(device)
        count = len(times) // len(rows)
        eps = chosen.stacked().reshape(-1, *shape).to(device)
        repeated = torch.stack([clean[row] for row in rows]).to(device).repeat_interleave(count, dim=0)
        corrupted = process.corrupt(repeated, times, eps)
        prediction = predict(rows, corrupted, process.model_times.to(device)[times])
        target = process.target(repeated, times, eps)
        errors = diffusion_error(target, prediction)
        found |= dict(zip(rows, errors.reshape(len(rows), count), strict=True))
        if residuals is not None:
            apart = (prediction.detach() - target).reshape(len(rows), count, *shape)
            residuals |= dict(zip(rows, apart, strict=True))
    return torch.stack([found[row] for row in range(len(clean))])


def margin_scores(
    errors: Float[Tensor, "n M"],
    noise: DiffusionNoise,
    process: ForwardProcess,
    *,
    convention: str,
    weighting: Weighting | None,
    elements: Sequence[int],
) -> Float[Tensor, " n"]:
    """Errors on the scale of a convention (see `Diffusion`), averaged over the M pairs (t, eps) of each draw.

    Args:
        elements: C*H*W of each draw.
    """
    if convention == "sysdpo":
        if weighting is not None:
            errors = errors * error_weights(weighting, process, noise, errors)
        return -process.num_timesteps * errors.mean(1)
    return -_FACTORS[convention] * errors.mean(1) / errors.new_tensor(elements)


def error_weights(
    weighting: Weighting, process: ForwardProcess, noise: DiffusionNoise, errors: Float[Tensor, "n M"]
) -> Float[Tensor, "n M"]:
    """omega at each of the times."""
    return weighting(process.snr(noise.timesteps.reshape(errors.shape))).to(errors.device)


def usual_beta(convention: str, num_timesteps: int, elements: float, mean_weight: float = 1.0) -> tuple[float, float]:
    """The betas on the scale of a convention that are 2000 and 5000 on that of the published Diffusion-DPO code.

    Args:
        elements: N, those of a sample.
        mean_weight: of omega over the times.
    """
    per_mean = _FACTORS.get(convention, num_timesteps * elements * mean_weight)
    low, high = (beta * _FACTORS["diffusion-dpo"] / per_mean for beta in PUBLISHED_BETAS)
    return low, high
