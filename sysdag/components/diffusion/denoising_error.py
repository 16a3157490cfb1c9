"""The denoising error of a diffusion or flow matching model, and the scales on which it enters a margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion.conditioning import repeated
from sysdag.components.diffusion.forward_process import DiffusionNoise, ForwardProcess
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.ops import diffusion_error

CONVENTIONS = ("sysdpo", "diffusion-dpo", "diffusers")


def denoising_errors(
    pipeline: Pipeline,
    process: ForwardProcess,
    conditioning: Mapping[str, Any],
    clean: Float[Tensor, "n C H W"],
    noise: DiffusionNoise,
) -> Float[Tensor, "n M"]:
    """|target - prediction|^2 summed over a draw's C*H*W elements, at each of its M pairs (t, eps), fp32.

    The target is that of the scheduler's prediction type; of a model that learns its variance too, the first C channels
    are compared.

    Args:
        conditioning: the denoiser's keyword arguments for the n draws.
        clean: the draws' latents, on the denoiser's device.
    """
    device = clean.device
    times = noise.timesteps.reshape(-1).to(device)
    eps = noise.eps.reshape(-1, *clean.shape[1:]).to(device)
    count = len(times) // len(clean)
    repeated_clean = clean.repeat_interleave(count, dim=0)
    corrupted = process.corrupt(repeated_clean, times, eps)
    prediction = pipeline.predict(corrupted, process.model_times.to(device)[times], repeated(conditioning, count))
    target = process.target(repeated_clean, times, eps)
    return diffusion_error(target, prediction[:, : clean.shape[1]]).reshape(len(clean), count)


def margin_scores(
    errors: Float[Tensor, "n M"],
    noise: DiffusionNoise,
    process: ForwardProcess,
    *,
    convention: str,
    weighting: Callable[[Tensor], Tensor] | None,
    elements: int,
) -> Float[Tensor, " n"]:
    """Errors on the scale of a convention (see `Diffusion`), averaged over the M pairs (t, eps) of each draw.

    Args:
        elements: C*H*W.
    """
    if convention == "sysdpo":
        if weighting is not None:
            snr = process.snr(noise.timesteps.reshape(errors.shape))
            errors = errors * weighting(snr).to(errors.device)
        return -process.num_timesteps * errors.mean(1)
    return -(0.5 if convention == "diffusion-dpo" else 1.0) * errors.mean(1) / elements
