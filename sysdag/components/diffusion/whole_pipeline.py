"""A text-to-image pipeline of diffusers as a component's sampler and model, with everything left to the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from sysdag.components.diffusion.images import latents_of, read_pixels
from sysdag.components.diffusion.pipeline_calls import ANY_PROMPT, PipelineCalls, Size
from sysdag.components.diffusion.watched_steps import Misfit
from sysdag.errors import DataError, PlanError, shown
from sysdag.traces.cells import Draw


@dataclass(frozen=True, eq=False)
class WholePipeline:
    """Samples and predicts by a pipeline's own calls.

    Attributes:
        denoiser: the model that is called for a score: the pipeline's own, or a reference's.
        batch_size: of sampling.
    """

    calls: PipelineCalls
    denoiser: Any
    batch_size: int

    def sample(self, inputs: Sequence[Any], seeds: Sequence[int]) -> list[Draw]:
        """See `Diffusion.sample`; one seed a draw."""
        check_prompts(inputs)
        return [
            Draw(each.value, {"latents": each.latents.numpy().copy(), "noise": each.noise.numpy().copy()})
            for each in self.calls.sample(inputs, seeds, self.batch_size)
        ]

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        """See `Diffusion.observe`."""
        draws = []
        for element, value in enumerate(values):
            pixels = picture(value, element)
            size = tuple(pixels.shape[1:])
            own = size == self.calls.default_size(ANY_PROMPT)
            try:
                latents = self.calls.decoding(ANY_PROMPT, () if own else size).latents(self.calls.pipe(), pixels)
            except (Misfit, PlanError) as error:
                if own and isinstance(error, PlanError):
                    raise
                raise DataError(
                    f"expected an image of a size that the pipeline draws; of {_named(size)}: {error}", element=element
                ) from error
            record = {"latents": latents[0].cpu().numpy().copy()}
            draws.append(Draw(value, record if own else record | {"size": numpy.array(size)}))
        return draws

    def shapes(self, draws: Sequence[Draw]) -> list[tuple[int, ...]]:
        """Of each draw's latents."""
        return [tuple(latents.shape) for latents in self.latents(draws)]

    def latents(self, draws: Sequence[Draw]) -> list[Tensor]:
        """Each draw's latents, fp32 on the CPU."""
        return [latents_of(draw, element) for element, draw in enumerate(draws)]

    def predictions(
        self, inputs: Sequence[Any], draws: Sequence[Draw], times_each: int, noisy: Tensor, times: Tensor
    ) -> Tensor:
        """What the pipeline would hand to its scheduler for `times_each` noisy samples of each draw, of equal shape.

        Args:
            times: (nM,) the scheduler's.
        """
        check_prompts(inputs)
        recorded = []
        for element, (prompt, draw) in enumerate(zip(inputs, draws, strict=True)):
            made = self.calls.recorded(prompt, _size(draw), gradients=torch.is_grad_enabled())
            if tuple(noisy.shape[1:]) != made.form.sample_shape:
                raise DataError(
                    f"expected latents of shape {made.form.sample_shape}, got {tuple(noisy.shape[1:])}.",
                    element=element,
                )
            recorded += [made] * times_each
        return torch.stack(self.calls.model_outputs(self.denoiser, recorded, list(noisy), times))


def check_prompts(inputs: Sequence[Any], what: str = "for the pipeline's prompt") -> None:
    """Raises a DataError for an input that is no text.

    Args:
        what: the text is expected for, in the message.
    """
    for element, prompt in enumerate(inputs):
        if not isinstance(prompt, str):
            raise DataError(f"expected text (str) {what}, got {shown(prompt)}.", element=element)


def picture(value: Any, element: int | None = None) -> Tensor:
    """Pixels in [-1, 1] of an image, (3, H, W), or of a list of images of one size, (3, F, H, W).

    Raises:
        DataError: for anything else.
    """
    if not isinstance(value, (list, tuple)):
        return read_pixels(value, (3, None, None), element=element)
    frames = [read_pixels(each, (3, None, None), element=element) for each in value]
    if not frames or any(frame.shape != frames[0].shape for frame in frames):
        raise DataError("expected a list of images of one size, at least one.", element=element)
    return torch.stack(frames, dim=1)


def check_size(pixels: Tensor, factor: int | None, element: int) -> None:
    """Raises a DataError for an image that is no whole number of its latents' pixels.

    Args:
        factor: pixels of the image for each of the latents, along an axis; None where that is not known.
    """
    *_, height, width = pixels.shape
    if factor is not None and (height % factor or width % factor):
        raise DataError(
            f"expected an image whose sides are multiples of {factor}, got {width}x{height}.", element=element
        )


def check_latents(draw: Draw, default: tuple[int, ...] | None, element: int) -> None:
    """Raises a DataError for a draw whose latents are not those of a pipeline.

    Args:
        default: the shape of what the pipeline draws by itself; None where that is not known.
    """
    found = tuple(latents_of(draw, element).shape)
    if default is not None and (len(found) != len(default) or ("size" not in draw.record and found != default)):
        raise DataError(f"expected latents of shape {default}, got {found}.", element=element)


def _size(draw: Draw) -> Size:
    return tuple(int(number) for number in draw.record.get("size", ()))


def _named(size: Size) -> str:
    *frames, height, width = size
    return f"{width}x{height}" + (f" and {frames[0]} frames" if frames else "")
