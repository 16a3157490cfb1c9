"""The denoising error of a diffusion or flow matching model, and the scales on which it enters a margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion.forward_process import DiffusionNoise, ForwardProcess
from sysdag.ops import diffusion_error

CONVENTIONS = ("sysdpo", "diffusion-dpo", "diffusers")


Predict = Callable[[list[int], Float[Tensor, " kM *S"], Tensor], Float[Tensor, " kM *S"]]
"""From rows, M noisy samples of each and their times (kM,) to the model's predictions."""


def denoising_errors(
    predict: Predict, process: ForwardProcess, clean: Sequence[Float[Tensor, " *S"]], noise: DiffusionNoise, device: Any
) -> Float[Tensor, "n M"]:
    """|target - prediction|^2 summed over a draw's elements, at each of its M pairs (t, eps), fp32.

    The target is that of the scheduler's prediction type; of a model that learns its variance too, the first C channels
    are compared. Draws of one shape are predicted together.

    Args:
        clean: each draw's latents.
        device: the denoiser's.
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
        errors = diffusion_error(process.target(repeated, times, eps), prediction)
        found |= dict(zip(rows, errors.reshape(len(rows), count), strict=True))
    return torch.stack([found[row] for row in range(len(clean))])


def margin_scores(
    errors: Float[Tensor, "n M"],
    noise: DiffusionNoise,
    process: ForwardProcess,
    *,
    convention: str,
    weighting: Callable[[Tensor], Tensor] | None,
    elements: Sequence[int],
) -> Float[Tensor, " n"]:
    """Errors on the scale of a convention (see `Diffusion`), averaged over the M pairs (t, eps) of each draw.

    Args:
        elements: C*H*W of each draw.
    """
    if convention == "sysdpo":
        if weighting is not None:
            snr = process.snr(noise.timesteps.reshape(errors.shape))
            errors = errors * weighting(snr).to(errors.device)
        return -process.num_timesteps * errors.mean(1)
    return -(0.5 if convention == "diffusion-dpo" else 1.0) * errors.mean(1) / errors.new_tensor(elements)
