"""How a diffusion component scores: the denoising error at random times and noise, on the scale of a convention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.diffusion.denoising_error import denoising_errors, error_weights, margin_scores
from sysdag.components.diffusion.forward_process import DiffusionNoise, ForwardProcess
from sysdag.components.diffusion.images import noise_of
from sysdag.components.diffusion.loss_weighting import Weighting, min_snr
from sysdag.components.diffusion.sampled_diffusion import SampledDiffusion
from sysdag.components.diffusion.timestep_density import TimestepDensity
from sysdag.components.diffusion.whole_pipeline import check_prompts
from sysdag.errors import PlanError
from sysdag.traces.cells import Draw


class ScoredDiffusion(SampledDiffusion):
    """A component that scores images by a bound.

    Args:
        density: of the times.
        sampled: of `SampledDiffusion`; for the others see `Diffusion`.
    """

    likelihood = "bound"

    def __init__(
        self,
        source: str | Path | Any,
        *,
        density: TimestepDensity,
        convention: str,
        weighting: Callable[[Tensor], Tensor] | str | None,
        snr_gamma: float,
        num_noise_draws: int,
        caption_dropout: float,
        winner_safeguard: float | None,
        score_noise: str,
        **sampled: Any,
    ) -> None:
        super().__init__(source, **sampled)
        self._density = density
        self.timestep_sampling, self.logit_mean = density.name, density.logit_mean
        self.logit_std, self.mode_scale = density.logit_std, density.mode_scale
        self.convention = convention
        self.weighting = weighting
        self.snr_gamma = snr_gamma
        self.num_noise_draws = num_noise_draws
        self.caption_dropout = caption_dropout
        self.winner_safeguard = winner_safeguard
        self.score_noise = score_noise
        self._process: ForwardProcess | None = None
        self._residuals: list[Tensor] | None = None

    @property
    def forward_process(self) -> ForwardProcess:
        """alpha_t, sigma_t and what is predicted, at the scheduler's training resolution."""
        if self._process is None:
            self._process = ForwardProcess.of(self.pipeline.parts["scheduler"])
        return self._process

    def noise(self, draws: Sequence[Draw], generator: torch.Generator | None = None) -> DiffusionNoise:
        """Times t in 0..T-1 and standard normal eps for each draw, or its recorded noise, on the CPU; in train mode,
        which texts are dropped.

        Pass the same to policy and reference, and to the winner and the loser of a pair. The first k of n draws get the
        noise that k draws would get.
        """
        noise = DiffusionNoise.draw(
            self._sampler.shapes(draws), self.num_noise_draws, self.forward_process.num_timesteps, generator,
            density=self._density, dropout=self.caption_dropout, drops=self.module.training,
        )  # fmt: skip
        return noise if self.score_noise == "drawn" else self._with_recorded(noise, draws)

    def _with_recorded(self, noise: DiffusionNoise, draws: Sequence[Draw]) -> DiffusionNoise:
        if self.forward_process.prediction != "flow":
            raise PlanError(
                f"{self!r}: score_noise='recorded' takes the way from noise to image for a line, which it is nearly in "
                f"flow matching; {type(self.pipeline.parts['scheduler']).__name__} predicts "
                f"{self.forward_process.prediction}."
            )
        return noise.replaced([noise_of(draw, element) for element, draw in enumerate(draws)])

    def fit_noise(
        self, noise: DiffusionNoise, draws: Sequence[Draw], generator: torch.Generator | None = None
    ) -> DiffusionNoise:
        """The same times for other draws; the same eps for those of the same shape, or each one's recorded noise."""
        if self.score_noise == "recorded":
            return self._with_recorded(noise, draws)
        return noise.fitted(self._sampler.shapes(draws), generator)

    def errors(self, inputs: Sequence[Any], draws: Sequence[Draw], noise: DiffusionNoise) -> Float[Tensor, " n"]:
        """|target - prediction|^2 summed over a draw's C*H*W elements, fp32; with several (t, eps), their mean.

        The target is that of the scheduler's prediction type (see `forward_process`); of a model that learns its
        variance too, the first C channels are compared.
        """
        return self._errors(inputs, draws, noise).mean(1)

    def _errors(
        self,
        inputs: Sequence[Any],
        draws: Sequence[Draw],
        noise: Any,
        residuals: dict[int, Tensor] | None = None,
    ) -> Float[Tensor, "n M"]:
        if not isinstance(noise, DiffusionNoise) or not len(noise) == len(draws) == len(inputs):
            got = f"that of {len(noise)} draws" if isinstance(noise, DiffusionNoise) else type(noise).__name__
            raise PlanError(
                f"{self!r} scores {len(inputs)} inputs and {len(draws)} draws at the noise that noise(draws) made for "
                f"as many, got {got}."
            )
        if not draws:
            return torch.zeros(0, 1, device=self.device)
        sampler = self._sampler
        if noise.dropped is not None:
            check_prompts(inputs, f"that caption_dropout={self.caption_dropout:g} may drop")
            inputs = ["" if drops else text for text, drops in zip(inputs, noise.dropped.tolist(), strict=True)]

        def predict(rows: list[int], noisy: Tensor, times: Tensor) -> Tensor:
            chosen = [inputs[row] for row in rows], [draws[row] for row in rows]
            return sampler.predictions(*chosen, len(noisy) // len(rows), noisy, times)

        with self.pipeline.running():
            return denoising_errors(
                predict, self.forward_process, sampler.latents(draws), noise, self.device, residuals
            )

    def score(self, inputs: Sequence[Any], draws: Sequence[Draw], noise: Any = None) -> Float[Tensor, " n"]:
        """The draw's term in a margin, before the reference's is subtracted, on the scale of `convention`.

        Raises:
            PlanError: without noise, or with noise of another number of draws.
        """
        weighting = self._weighting
        residuals: dict[int, Tensor] | None = {} if self.winner_safeguard is not None else None
        errors = self._errors(inputs, draws, noise, residuals)
        if residuals is not None:
            self._residuals = [residuals[row] for row in range(len(draws))]
            if weighting is not None:
                weights = error_weights(weighting, self.forward_process, noise, errors.detach())
                shaped = [own.reshape(-1, *[1] * (r.ndim - 1)) for own, r in zip(weights, self._residuals, strict=True)]
                self._residuals = [own * each for own, each in zip(shaped, self._residuals, strict=True)]
        return margin_scores(
            errors, noise, self.forward_process, convention=self.convention, weighting=weighting,
            elements=[math.prod(shape) for shape in self._sampler.shapes(draws)],
        )  # fmt: skip

    @property
    def _weighting(self) -> Weighting | None:
        """omega; of min-SNR by what the model predicts.

        Raises:
            PlanError: if it is not defined for this model.
        """
        if not isinstance(self.weighting, str):
            return self.weighting
        return min_snr(self.forward_process.prediction, self.snr_gamma)

    def take_residuals(self) -> list[Tensor] | None:
        taken, self._residuals = self._residuals, None
        return taken

    @property
    def drops_inputs(self) -> bool:
        return self.caption_dropout > 0

    def prepare_training(self) -> None:
        """Has what trains by itself be fp32, where it was loaded and no dtype was asked for.

        Raises:
            PlanError: for a `weighting` that is not defined for the model.
        """
        super().prepare_training()
        if isinstance(self.weighting, str):
            _ = self._weighting

    def _forget(self) -> None:
        super()._forget()
        self._process = None
