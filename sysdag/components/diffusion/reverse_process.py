"""The reverse process: from noise to samples with a scheduler of diffusers, reproducibly."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Predict = Callable[[Float[Tensor, "n C H W"], Float[Tensor, " n"]], Float[Tensor, "n K H W"]]


def denoise(
    predict: Predict,
    scheduler: Any,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    device: torch.device,
    patch_size: int = 1,
) -> Float[Tensor, "n C H W"]:
    """One sample a seed, fp32.

    Noise comes from one CPU generator a sample, so a sample depends on its own seed and neither on the device nor on
    the others of its batch. The scheduler is copied, never changed.

    Args:
        predict: the model, from the scaled noisy samples and their times to what the scheduler's step takes.
        shape: (C, H, W) of a sample.
        patch_size: of a transformer; schedulers with dynamic shifting depend on the number of its tokens.
    """
    scheduler = copy.deepcopy(scheduler)
    if scheduler.config.get("use_dynamic_shifting"):
        tokens = (shape[1] // patch_size) * (shape[2] // patch_size)
        scheduler.set_timesteps(num_inference_steps, device=device, mu=_shift(tokens, scheduler.config))
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if takes_generator else {}
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    samples = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    # A few schedulers draw from the global generator whatever they are passed.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(samples, time) if hasattr(scheduler, "scale_model_input") else samples
            prediction = predict(scaled, time.expand(len(samples)))
            samples = scheduler.step(prediction, time, samples, return_dict=False, **options)[0].float()
    return samples


def _shift(tokens: int, config: Any) -> float:
    """The time shift of an image of so many tokens, linear between two anchors (Esser et al. 2024, section 5.3.2)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)
