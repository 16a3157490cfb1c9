"""The options of `Diffusion`: what they may be, and how a saved system keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components import hooks
from sysdag.components.diffusion.denoising_error import CONVENTIONS
from sysdag.components.diffusion.loss_weighting import check_weighting
from sysdag.components.precision import dtype_named
from sysdag.errors import PlanError, SerializationError, shown
from sysdag.files.saved_files import is_a, only

_FUNCTIONS = ("condition", "weighting")
_NUMBER, _NOTHING = (int, float), (type(None),)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "num_inference_steps": (int, *_NOTHING), "guidance_scale": (*_NUMBER, *_NOTHING), "convention": (str,),
    "num_noise_draws": (int,), "train_text_encoder": (bool,), "mask_padding": (bool, *_NOTHING),
    "max_text_length": (int, *_NOTHING), "null_class": (int, *_NOTHING), "batch_size": (int,),
    "pipeline_kwargs": (dict, *_NOTHING), "score_guidance_scale": (*_NUMBER, *_NOTHING), "snr_gamma": _NUMBER,
    "timestep_sampling": (str,), "logit_mean": _NUMBER, "logit_std": _NUMBER, "mode_scale": _NUMBER,
    "caption_dropout": _NUMBER, "winner_safeguard": (*_NUMBER, *_NOTHING), "cache": (bool,), "cache_bytes": (int,),
    "record_noise": (bool,), "score_noise": (str,), "sample_shape": (list, *_NOTHING),
}  # fmt: skip
_OPTIONS = tuple(_KINDS)
_GIVEN_BY_US: Mapping[str, tuple[str, Any]] = {
    "prompt": ("the prompt is what the node's function returns", None),
    "generator": ("it is made from the seed that is sampled with", None),
    "latents": ("the noise is drawn from the seed that is sampled with", None),
    "output_type": ("the node's value is a PIL image", "pil"),
    "num_images_per_prompt": ("a node draws one image for each input", 1),
    "num_videos_per_prompt": ("a node draws one film for each input", 1),
}
"""Arguments of a pipeline's call that are the component's: why, and the value that says the same."""
_PLACES: Mapping[str, tuple[type, ...]] = {
    "parts": (dict, *_NOTHING), "base": (dict, *_NOTHING), "adapter": (bool,),
    "condition": (dict, *_NOTHING), "weighting": (dict, str, *_NOTHING),
}  # fmt: skip

# Systems saved by earlier versions have these and no others, which are then the constructor's defaults.
_FIRST_OPTIONS = frozenset({
    "sample_shape", "num_inference_steps", "guidance_scale", "convention", "num_noise_draws", "train_text_encoder",
    "mask_padding", "max_text_length", "null_class", "batch_size",
})  # fmt: skip


def check_scale(
    convention: str,
    weighting: Callable[[Tensor], Tensor] | str | None,
    snr_gamma: float,
    *,
    caption_dropout: float,
    winner_safeguard: float | None,
) -> None:
    """Refuses options of the score's scale and of its gradient.

    Raises:
        PlanError: naming them.
    """
    if convention not in CONVENTIONS:
        raise PlanError(f"convention must be one of {list(CONVENTIONS)}, got {convention!r}.")
    if weighting is not None and convention != "sysdpo":
        raise PlanError(f"weighting belongs to convention='sysdpo'; {convention!r} has none.")
    check_weighting(weighting, snr_gamma)
    for name, value in (("caption_dropout", caption_dropout), ("winner_safeguard", winner_safeguard)):
        if value is not None and not 0 <= value <= 1:
            raise PlanError(f"{name} must be in [0, 1], got {value}.")


def check_draws(
    counts: Mapping[str, int | None], sample_shape: Sequence[int] | None, *, record_noise: bool, score_noise: str
) -> None:
    """Refuses options of what is drawn.

    Raises:
        PlanError: naming them.
    """
    if any(count is not None and count < 1 for count in counts.values()):
        raise PlanError(f"Diffusion needs counts of at least 1, got {counts}.")
    if sample_shape is not None and (len(sample_shape) != 3 or min(sample_shape) < 1):
        raise PlanError(f"sample_shape must be (C, H, W), got {tuple(sample_shape)}.")
    if score_noise not in ("drawn", "recorded"):
        raise PlanError(f"score_noise must be 'drawn' or 'recorded', got {score_noise!r}.")
    if score_noise == "recorded" and not record_noise:
        raise PlanError("score_noise='recorded' needs the noise of what is sampled; pass record_noise=True too.")


def check_call(pipeline_kwargs: Mapping[str, Any] | None, **options: float | None) -> None:
    """Refuses arguments of the pipeline's call that the component gives it.

    Args:
        options: those of the component that the call takes under the same name.

    Raises:
        PlanError: naming them.
    """
    given = pipeline_kwargs or {}
    for name, (own, allowed) in _GIVEN_BY_US.items():
        if name in given and not (isinstance(given[name], (str, int)) and given[name] == allowed):
            raise PlanError(f"pipeline_kwargs must not hold {name!r}: {own}. Leave it out.")
    for name, value in options.items():
        if value is not None and name in given:
            raise PlanError(f"{name}={value} and pipeline_kwargs={dict(given)} say the same; give {name} once.")


def loading_options(
    model: Any, dtype: torch.dtype | str | None, revision: str | None, variant: str | None
) -> dict[str, Any]:
    """How the parts of a folder are loaded.

    Raises:
        PlanError: for a dtype that is none, or any of them beside a model object.
    """
    dtype = None if dtype is None else dtype_named(dtype, "Diffusion")
    loading = {"dtype": dtype, "revision": revision, "variant": variant}
    if not isinstance(model, (str, Path)) and any(value is not None for value in loading.values()):
        raise PlanError(f"{list(loading)} choose what is loaded, but the model is an object; leave them out.")
    return loading


def check_parts(model: Any, given: Mapping[str, Any], *, train_text_encoder: bool) -> None:
    """Refuses a scheduler that is none, and a denoiser object without the parts that it needs beside it.

    Raises:
        PlanError: naming them.
    """
    scheduler = given.get("scheduler")
    if scheduler is not None and (isinstance(scheduler, type) or not hasattr(scheduler, "set_timesteps")):
        raise PlanError(
            "scheduler must be a scheduler object of diffusers, such as DDIMScheduler.from_pretrained(folder, "
            f"subfolder='scheduler'), got {shown(scheduler)}."
        )
    if not isinstance(model, nn.Module):
        return
    if "scheduler" not in given:
        raise PlanError("Diffusion(model) was given a model object; pass its scheduler too.")
    if ("text_encoder" in given) != ("tokenizer" in given):
        raise PlanError("text_encoder and tokenizer go together; pass both or neither.")
    if train_text_encoder and "text_encoder" not in given:
        raise PlanError("train_text_encoder=True needs a text_encoder.")


def to_saved(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON has them, functions by where they are imported from.

    Args:
        given: by `names()`.

    Raises:
        SerializationError: for a function that cannot be imported again.
    """
    functions = {name: given[name] for name in _FUNCTIONS}
    described = {n: value if isinstance(value, str) else hooks.describe(n, value) for n, value in functions.items()}
    return described | {name: given[name] for name in _OPTIONS}


def names() -> tuple[str, ...]:
    """Of the options that a saved system keeps."""
    return *_FUNCTIONS, *_OPTIONS


def from_saved(saved: Mapping[str, Any], defaults: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Arguments of the constructor from what a component saved.

    Args:
        saved: `parts`, `base` and `adapter` (see `component_folder`), and what `to_saved` made.
        defaults: the constructor's parameters, for options that came later than the saved system.

    Raises:
        SerializationError: if an option is missing or unknown, or a function cannot be had.
    """
    later = {name: defaults[name].default for name in _OPTIONS if name not in _FIRST_OPTIONS}
    options = {"base": None, **later, **saved}
    if unknown := sorted(options.keys() ^ {*_PLACES, *names()}):
        raise SerializationError(f"These are not the options of a saved Diffusion: {unknown} are unknown or missing.")
    only(options, {**_PLACES, **_KINDS}, "Diffusion")
    if not all(is_a(size, (int,)) for size in options["sample_shape"] or ()):
        raise SerializationError(f"Diffusion: sample_shape must hold integers, got {shown(options['sample_shape'])}.")
    functions = {name: options[name] for name in _FUNCTIONS}
    loaded: dict[str, Any] = {n: v if isinstance(v, str) else hooks.load(n, v) for n, v in functions.items()}
    return loaded | {name: options[name] for name in _OPTIONS}
