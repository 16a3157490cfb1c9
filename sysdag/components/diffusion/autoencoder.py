"""Autoencoders of images as parts on their own: by how much they compress, and how their latents are scaled.

latents = (encoded - mean) * scale, as the pipelines of diffusers have it for each class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sysdag.errors import PlanError

# Whose latents are (n, C, H, W) and scaled by their config alone. Others need their pipeline: those of videos, and
# Flux 2's, which normalises by a layer.
_KNOWN = ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
_BLOCKS = ("block_out_channels", "encoder_block_out_channels")


def check(vae: Any) -> None:
    """Refuses an autoencoder that can only be used by a pipeline of its family.

    Raises:
        PlanError: naming it.
    """
    kinds = {kind.__name__ for kind in type(vae).__mro__}
    is_foreign = type(vae).__module__.partition(".")[0] != "diffusers"
    if kinds.isdisjoint(_KNOWN) and not (is_foreign and _blocks(vae)):
        raise PlanError(
            f"vae={type(vae).__name__} is none of {list(_KNOWN)}, whose latents their config scales. Pass the whole "
            "pipeline instead, its folder or object: Diffusion('folder')."
        )


def compression(vae: Any) -> int:
    """How many pixels a latent is wide and high."""
    blocks = _blocks(vae)
    assert blocks is not None  # of those that `check` lets through
    return 2 ** (len(blocks) - 1)


def _blocks(vae: Any) -> Any:
    config = getattr(vae, "config", {})
    return next((config[name] for name in _BLOCKS if config.get(name) is not None), None)


def latents_of(encoded: Any) -> Tensor:
    """Of an encoder's output: the mode of the posterior, where it gives one."""
    for name in ("latent_dist", "latents", "latent"):
        if hasattr(encoded, name):
            found = getattr(encoded, name)
            return found.mode() if name == "latent_dist" else found
    return encoded[0] if isinstance(encoded, tuple) else encoded


def latent_scale(vae: Any) -> tuple[Any, Any]:
    """Mean and scale with which latents = (encoded - mean) * scale, from the config."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, scale
    mean, std = (torch.tensor(config[key], device=vae.device)[:, None, None] for key in ("latents_mean", "latents_std"))
    return mean, scale / std
