"""Sampling latents with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.diffusion.reverse_process import denoise


def guided_latents(
    pipeline: Pipeline,
    conditional: Mapping[str, Any],
    unconditional: Mapping[str, Any] | None,
    *,
    guidance_scale: float,
    sample_shape: tuple[int, int, int],
    seeds: Sequence[int],
    num_inference_steps: int,
    device: torch.device,
) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, "n C H W"]]:
    """One sample a seed from a pipeline's denoiser and scheduler (Ho and Salimans 2022, arXiv 2207.12598), and the
    noise that it began with.

    Args:
        conditional: the denoiser's keyword arguments for the n samples.
        unconditional: those without a condition; None for no guidance.
    """
    scheduler = pipeline.parts["scheduler"]
    channels = sample_shape[0]
    learned_variance = str(scheduler.config.get("variance_type")).startswith("learned")

    def predict(noisy: Tensor, times: Tensor) -> Tensor:
        prediction = pipeline.predict(noisy, times, conditional)
        mean, variance = prediction[:, :channels], prediction[:, channels:]
        if unconditional is not None:
            base = pipeline.predict(noisy, times, unconditional)[:, :channels]
            mean = base + guidance_scale * (mean - base)
        return torch.cat([mean, variance], dim=1) if learned_variance else mean

    return denoise(
        predict, scheduler, sample_shape, seeds, num_inference_steps=num_inference_steps, device=device,
        patch_size=pipeline.denoiser.config.get("patch_size") or 1,
    )  # fmt: skip
