"""A denoiser, its scheduler and what else was passed, put together here: where there is no pipeline that does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion import rows
from sysdag.components.diffusion.conditioning import Conditioner
from sysdag.components.diffusion.guidance import guided_latents
from sysdag.components.diffusion.images import read_pixels, stack_latents, to_pil
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.traces.cells import Draw


@dataclass(frozen=True, eq=False)
class SeparateParts:
    """Samples and predicts with a pipeline's parts.

    Attributes:
        sample_shape: (C, H, W).
        guidance_scale, num_inference_steps, batch_size: of sampling.
    """

    pipeline: Pipeline
    conditioner: Conditioner
    sample_shape: tuple[int, int, int]
    guidance_scale: float
    num_inference_steps: int
    batch_size: int

    def sample(self, inputs: Sequence[Any], seeds: Sequence[int]) -> list[Draw]:
        """See `Diffusion.sample`; one seed a draw."""
        draws: list[Draw] = []
        for start in range(0, len(inputs), self.batch_size):
            block = slice(start, start + self.batch_size)
            guided = self.guidance_scale != 1
            latents, noise = guided_latents(
                self.pipeline, self.conditioner(inputs[block]),
                self.conditioner.unconditional(inputs[block]) if guided else None,
                guidance_scale=self.guidance_scale, sample_shape=self.sample_shape, seeds=seeds[block],
                num_inference_steps=self.num_inference_steps,
                device=next(self.pipeline.denoiser.parameters()).device,
            )  # fmt: skip
            draws += [_draw(*each) for each in zip(self.pipeline.decode(latents), latents, noise, strict=True)]
        return draws

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        """See `Diffusion.observe`."""
        shape = self.pipeline.pixel_shape(self.sample_shape)
        draws = []
        for element, value in enumerate(values):
            pixels = read_pixels(value, shape, element=element)
            draws.append(_draw(pixels, self.pipeline.encode(pixels[None])[0]))
        return draws

    def shapes(self, draws: Sequence[Draw]) -> list[tuple[int, ...]]:
        """Of each draw's latents."""
        return [self.sample_shape] * len(draws)

    def latents(self, draws: Sequence[Draw]) -> list[Tensor]:
        """Each draw's latents, fp32 on the CPU."""
        return list(stack_latents(draws, self.sample_shape))

    def predictions(
        self,
        inputs: Sequence[Any],
        draws: Sequence[Draw],
        times_each: int,
        noisy: Float[Tensor, "nM C H W"],
        times: Tensor,
    ) -> Float[Tensor, "nM C H W"]:
        """What the model predicts for `times_each` noisy samples of each draw, of equal shape.

        Args:
            times: (nM,) the scheduler's.
        """
        conditioning = rows.mapped_tensors(
            self.conditioner(inputs), lambda tensor: tensor.repeat_interleave(times_each, dim=0)
        )
        return self.pipeline.predict(noisy, times, conditioning)[:, : noisy.shape[1]]


def _draw(
    pixels: Float[Tensor, "c h w"], latents: Float[Tensor, "C H W"], noise: Float[Tensor, "C H W"] | None = None
) -> Draw:
    image = to_pil(pixels) if len(pixels) in (1, 3) else pixels.cpu().numpy().copy()
    record = {"latents": latents, **({} if noise is None else {"noise": noise})}
    return Draw(image, {name: tensor.cpu().numpy().copy() for name, tensor in record.items()})
