"""Images as a diffusion component sees them: pixels (C, H, W) in [-1, 1], to and from PIL, files and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.opened_image import MODES, is_image_source, open_image
from sysdag.errors import DataError, shown
from sysdag.traces.cells import Draw


def to_pil(pixels: Float[Tensor, "C H W"]) -> Any:
    """A PIL image, mode L for one channel and RGB for three; values outside [-1, 1] are clipped."""
    from PIL import Image

    levels = ((pixels.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(levels[0] if len(levels) == 1 else numpy.ascontiguousarray(levels.transpose(1, 2, 0)))


Shape = tuple[int, int | None, int | None]
"""(C, H, W) of an image; None stands for any size."""


def read_pixels(value: Any, shape: Shape, *, element: int | None = None) -> Float[Tensor, "C H W"]:
    """Pixels of a PIL image, an image file (path or bytes), or a float array that holds them already.

    A photograph is turned as its EXIF orientation says, as `datasets.Image` and diffusers' `load_image` do. Nothing is
    resized, and no content is lost: a colour model takes gray, palette and CMYK images, but none with transparent
    pixels (what shows behind them is not in the image) or more than 8 bits; a gray model takes no colours.

    Args:
        shape: the (C, H, W) that is expected. Arrays with other than 1 or 3 channels are no images, and are not
            checked to lie in [-1, 1].
        element: goes into the error.

    Raises:
        DataError: for an unreadable file, or another size, mode, number of channels or range.
    """
    if is_image_source(value):
        channels, height, width = shape
        if channels not in MODES:
            raise DataError(
                f"an image has 1 or 3 channels, but this model draws {channels}: pass a float array {shape}.",
                element=element,
            )
        pixels = numpy.array(open_image(value, channels, (width, height), element=element), dtype=numpy.float32)
        return torch.from_numpy(pixels if channels == 3 else pixels[:, :, None]).permute(2, 0, 1) / 127.5 - 1
    return _from_array(value, shape, element)


def _from_array(value: Any, shape: Shape, element: int | None) -> Float[Tensor, "C H W"]:
    expected = f"expected a PIL image, path, bytes or float array of shape {shape} in [-1, 1]"
    if not isinstance(value, (numpy.ndarray, Tensor)):
        raise DataError(f"{expected}, got {type(value).__name__} {shown(value)}.", element=element)
    is_float = value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"
    fits = value.ndim == 3 and all(want in (None, got) for got, want in zip(value.shape, shape, strict=True))
    if not is_float or not fits:
        raise DataError(f"{expected}, got an array of {value.dtype} of shape {tuple(value.shape)}.", element=element)
    if isinstance(value, Tensor):
        array = value.detach().to("cpu", torch.float32, copy=True)
    else:
        array = torch.from_numpy(value.astype(numpy.float32))
    if not array.isfinite().all():
        raise DataError(f"{expected}, got values that are not finite.", element=element)
    if shape[0] in MODES and array.abs().max() > 1:
        low, high = array.min().item(), array.max().item()
        raise DataError(f"{expected}, got values from {low:.3g} to {high:.3g}.", element=element)
    return array


def latents_of(draw: Draw, element: int) -> Tensor:
    """The latents of a draw, fp32 on the CPU.

    Raises:
        DataError: for a draw that holds none.
    """
    return _array_of(draw, element, "latents", "make draws of images with observe(...)")


def noise_of(draw: Draw, element: int) -> Tensor:
    """The noise that a draw was sampled from, fp32 on the CPU, of the shape of its latents.

    Raises:
        DataError: for a draw that holds none.
    """
    noise = _array_of(draw, element, "noise", "only what was sampled with record_noise=True has it")
    latents = latents_of(draw, element)
    if noise.shape != latents.shape:
        raise DataError(
            f"expected noise of the latents' shape {tuple(latents.shape)}, got {tuple(noise.shape)}.", element=element
        )
    return noise


def _array_of(draw: Draw, element: int, name: str, advice: str) -> Tensor:
    if name not in draw.record:
        raise DataError(
            f"expected a draw that holds {name}, got the record {list(draw.record)}; {advice}.", element=element
        )
    given = draw.record[name]
    is_float = given.dtype.kind == "f" if isinstance(given, numpy.ndarray) else isinstance(given, Tensor)
    if not is_float:
        raise DataError(f"expected {name} in a float array, got {shown(given)}.", element=element)
    return torch.as_tensor(given, dtype=torch.float32).cpu()


def stack_latents(draws: Sequence[Draw], shape: tuple[int, ...], first: int = 0) -> Float[Tensor, "n C H W"]:
    """The latents of draws, fp32 on the CPU.

    Args:
        first: the first one's element in an error.

    Raises:
        DataError: for a draw that holds no latents, or latents of another shape.
    """
    found = []
    for element, draw in enumerate(draws, first):
        latents = latents_of(draw, element)
        if tuple(latents.shape) != tuple(shape):
            raise DataError(f"expected latents of shape {shape}, got {tuple(latents.shape)}.", element=element)
        found.append(latents)
    return torch.stack(found) if found else torch.zeros(0, *shape)
