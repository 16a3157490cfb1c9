"""The reverse process: from noise to samples with a scheduler of diffusers, reproducibly."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.errors import PlanError

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
) -> tuple[Float[Tensor, "n C H W"], Float[Tensor, "n C H W"]]:
    """One sample a seed, and the noise that the first step began with, fp32.

    Noise comes from one CPU generator a sample, so a sample depends on its own seed and neither on the device nor on
    the others of its batch. The scheduler is copied, never changed.

    Args:
        predict: the model, from the scaled noisy samples and their times to what the scheduler's step takes.
        shape: (C, H, W) of a sample.
        patch_size: of a transformer; schedulers with dynamic shifting depend on the number of its tokens.

    Raises:
        PlanError: for a scheduler whose steps take something else than the model's output, a time and the sample; for
            numbers that are not finite.
    """
    scheduler = copy.deepcopy(scheduler)
    _check(scheduler)
    shifted = {}
    if scheduler.config.get("use_dynamic_shifting"):
        tokens = (shape[1] // patch_size) * (shape[2] // patch_size)
        shifted["mu"] = _shift(tokens, scheduler.config)
    with _naming(scheduler, num_inference_steps):
        scheduler.set_timesteps(num_inference_steps, device=device, **shifted)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generators} if takes_generator else {}
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    samples = start = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    # A few schedulers draw from the global generator whatever they are passed.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])
        for number, time in enumerate(scheduler.timesteps, 1):
            scaled = scheduler.scale_model_input(samples, time) if hasattr(scheduler, "scale_model_input") else samples
            prediction = predict(scaled, time.expand(len(samples)))
            with _naming(scheduler, num_inference_steps):
                samples = scheduler.step(prediction, time, samples, return_dict=False, **options)[0].float()
            check_step(scheduler, number, time, prediction, samples)
    return samples, start


def check_step(scheduler: Any, number: int, time: Any, prediction: Tensor, samples: Tensor) -> None:
    """Refuses a step of sampling that leaves numbers that are not finite, which would become a black image.

    Args:
        number: which step it is, from 1.
        time: the scheduler's.
        prediction: what the scheduler was given.
        samples: what it made of that.

    Raises:
        PlanError: naming what they came from: the denoiser or the scheduler.
    """
    if bool(samples.isfinite().all()):
        return
    where = f"at step {number} (time {float(time):g})"
    if not bool(prediction.isfinite().all()):
        raise PlanError(
            f"The denoiser's answer has numbers that are not finite {where}. Its weights may have diverged; in float16 "
            "numbers may run over: pass dtype='bfloat16' or 'float32'."
        )
    config = scheduler.config
    options = {name: config[name] for name in _UNSTABLE if config.get(name) not in (None, False)}
    raise PlanError(
        f"{type(scheduler).__name__} left numbers that are not finite {where}; it has {options}. {_INSTEAD}"
    )


def check_decoded(decoder: Any, images: Tensor) -> None:
    """Raises a PlanError for images that are not finite, of latents that are."""
    if not bool(images.isfinite().all()):
        raise PlanError(
            f"{type(decoder).__name__} decodes latents to numbers that are not finite. In float16 some autoencoders "
            "run over: pass dtype='bfloat16' or 'float32'."
        )


# Options with which schedulers of diffusers are known to divide by zero.
_UNSTABLE = ("variance_type", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "clip_sample")
_INSTEAD = "Pass another scheduler for sampling, such as DDIMScheduler or FlowMatchEulerDiscreteScheduler."


@contextlib.contextmanager
def _naming(scheduler: Any, steps: int) -> Iterator[None]:
    """Tells what a scheduler cannot do with its name; memory that runs out is none of it."""
    try:
        yield
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise PlanError(
            f"{type(scheduler).__name__} cannot sample here in {steps} steps ({what}). {_INSTEAD}"
        ) from error


def _check(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise PlanError(f"{name} cannot sample here: it has no `step`. {_INSTEAD}")
    taken = inspect.signature(scheduler.step).parameters.values()
    needed = [each.name for each in taken if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if others := [each for each in needed if each not in ("model_output", "timestep", "sample")]:
        raise PlanError(f"{name} cannot sample here: its step also needs {others}. {_INSTEAD}")


def _shift(tokens: int, config: Any) -> float:
    """The time shift of an image of so many tokens, linear between two anchors (Esser et al. 2024, section 5.3.2)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)
