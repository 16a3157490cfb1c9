"""The forward process of a diffusion model, x_t = alpha_t x_0 + sigma_t eps, and what the model predicts at x_t.

One form covers the variance-preserving schedulers of diffusers (Ho et al. 2020, arXiv 2006.11239; v-prediction:
Salimans and Ho 2022, arXiv 2202.00512) and flow matching (rectified flow; Esser et al. 2024, arXiv 2403.03206):

    kind            alpha_t             sigma_t                 the model predicts
    epsilon         sqrt(abar_t)        sqrt(1 - abar_t)        eps
    v_prediction    sqrt(abar_t)        sqrt(1 - abar_t)        alpha_t eps - sigma_t x_0
    sample          sqrt(abar_t)        sqrt(1 - abar_t)        x_0
    flow            1 - sigma_t         shifted t / T           eps - x_0

Times are integers t in 0..T-1 and more noise comes with larger t, whatever the order in which a scheduler keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sysdag.components.diffusion.timestep_density import TimestepDensity
from sysdag.errors import PlanError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "flow_prediction": "flow",
}


@dataclass(frozen=True, eq=False)
class DiffusionNoise:
    """What a diffusion score is random in: the times and the noise, M of each for every draw.

    Policy and reference, and the winner and the loser of a pair, are scored at the same noise; a winner and a loser of
    different shapes at the same times.

    Attributes:
        timesteps: (n,), or (n, M) for M > 1; integers in 0..T-1.
        eps: (n, *S), or (n, M, *S), S the shape of a sample; standard normal. A tuple of n where samples differ in
            shape.
        dropped: (n,) whether a draw is scored under the empty text instead of its own; None where none is.
    """

    timesteps: Int[Tensor, " n *M"]
    eps: Float[Tensor, " n *M *S"] | tuple[Float[Tensor, " *M *S"], ...]
    dropped: Bool[Tensor, " n"] | None = None

    @classmethod
    def draw(
        cls,
        shapes: Sequence[tuple[int, ...]],
        draws_each: int,
        num_timesteps: int,
        generator: torch.Generator | None = None,
        *,
        density: TimestepDensity | None = None,
        dropout: float = 0.0,
        drops: bool = False,
    ) -> DiffusionNoise:
        """Noise for draws of these shapes, on the CPU. The first k of n draws get the noise that k draws would get.

        Args:
            density: of the times; uniform by default.
            dropout: probability that a draw's text is dropped. Times and eps are the same whether `drops` or not.
        """
        density = density or TimestepDensity()
        place: dict[str, Any] = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        timesteps = torch.zeros(len(shapes), draws_each, dtype=torch.long)
        dropped = torch.zeros(len(shapes), dtype=torch.bool)
        eps = []
        for row, shape in enumerate(shapes):
            timesteps[row] = density.draw(draws_each, num_timesteps, **place)
            eps.append(torch.randn(draws_each, *shape, **place).cpu())
            if dropout:
                dropped[row] = torch.rand((), **place).cpu() < dropout
        hidden = dropped if dropout and drops else None
        if draws_each == 1:
            return cls(timesteps[:, 0], _together([each[0] for each in eps]), hidden)
        return cls(timesteps, _together(eps), hidden)

    def fitted(self, shapes: Sequence[tuple[int, ...]], generator: torch.Generator | None = None) -> DiffusionNoise:
        """The same times, and the same eps for every draw whose shape it has; the others get one of their own."""
        lead = self.timesteps.ndim - 1
        if all(tuple(eps.shape[lead:]) == tuple(shape) for eps, shape in zip(self.eps, shapes, strict=True)):
            return self
        place: dict[str, Any] = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        made = [
            eps if tuple(eps.shape[lead:]) == tuple(shape) else torch.randn(*eps.shape[:lead], *shape, **place).cpu()
            for eps, shape in zip(self.eps, shapes, strict=True)
        ]
        return replace(self, eps=_together(made))

    def replaced(self, eps: Sequence[Tensor]) -> DiffusionNoise:
        """The same times with one eps (*S) for each draw, at all of its times; shapes may differ."""
        if self.timesteps.ndim == 1:
            return replace(self, eps=_together(list(eps)))
        count = self.timesteps.shape[1]
        return replace(self, eps=_together([each.expand(count, *each.shape) for each in eps]))

    @staticmethod
    def join(parts: Sequence[DiffusionNoise]) -> DiffusionNoise:
        """The noise of several lists of draws, one after the other."""
        dropped = [part.dropped for part in parts if part.dropped is not None]
        assert len(dropped) in (0, len(parts))
        return DiffusionNoise(
            torch.cat([part.timesteps for part in parts]),
            _together([eps for part in parts for eps in part.eps]),
            torch.cat(dropped) if dropped else None,
        )

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    def select(self, rows: Sequence[int] | Int[Tensor, " k"]) -> DiffusionNoise:
        """The noise of the given draws, in that order; rows may repeat."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.timesteps.device)
        dropped = None if self.dropped is None else self.dropped[index.to(self.dropped.device)]
        if isinstance(self.eps, Tensor):
            return DiffusionNoise(self.timesteps[index], self.eps[index.to(self.eps.device)], dropped)
        return DiffusionNoise(self.timesteps[index], _together([self.eps[row] for row in index.tolist()]), dropped)

    def stacked(self) -> Float[Tensor, " n *M *S"]:
        """`eps` of draws of one shape."""
        assert isinstance(self.eps, Tensor)
        return self.eps


def _together(eps: list[Tensor]) -> Any:
    if not eps:
        return torch.zeros(0)
    return torch.stack(eps) if all(each.shape == eps[0].shape for each in eps) else tuple(eps)


@dataclass(frozen=True, eq=False)
class ForwardProcess:
    """A scheduler's forward process at its full training resolution.

    Attributes:
        alphas, sigmas: (T,) fp32, the scales of signal and noise.
        model_times: (T,) what the model receives as its time: t itself, or sigma_t T for flow matching.
        prediction: what the model predicts.
    """

    alphas: Float[Tensor, " T"]
    sigmas: Float[Tensor, " T"]
    model_times: Tensor
    prediction: Prediction

    @classmethod
    def of(cls, scheduler: Any) -> ForwardProcess:
        """The forward process that a scheduler of diffusers was trained with, whatever its inference steps are set to.

        Raises:
            PlanError: for a scheduler that is neither variance preserving nor flow matching, or an unknown prediction.
        """
        name = type(scheduler).__name__
        config = scheduler.config
        steps = config.get("num_train_timesteps")
        if steps is None or not (hasattr(scheduler, "scale_noise") or hasattr(scheduler, "alphas_cumprod")):
            raise PlanError(
                f"{name} cannot score: its forward process is neither variance preserving (`alphas_cumprod`) nor flow "
                "matching (`scale_noise`) over `num_train_timesteps`. Pass the scheduler that the model was trained "
                "with, such as DDPMScheduler or FlowMatchEulerDiscreteScheduler."
            )
        if hasattr(scheduler, "scale_noise"):  # the flow matching schedulers' forward process
            prediction: Prediction = "flow"
            shift = config.get("shift", 1.0)
            if config.get("invert_sigmas"):
                raise PlanError(f"{name} with invert_sigmas=True is not supported: its times run from data to noise.")
        elif config.get("prediction_type", "epsilon") not in _PREDICTIONS:
            raise PlanError(f"{name} has prediction_type={config.prediction_type!r}; known are {sorted(_PREDICTIONS)}.")
        else:
            prediction = _PREDICTIONS[config.get("prediction_type", "epsilon")]
            shift = config.get("flow_shift", 1.0)
        if prediction == "flow":
            linear = torch.arange(1, steps + 1, dtype=torch.float32) / steps
            # With dynamic shifting the shift depends on the image's size and is applied while sampling only.
            sigmas = linear if config.get("use_dynamic_shifting") else shift * linear / (1 + (shift - 1) * linear)
            return cls(1 - sigmas, sigmas, sigmas * steps, prediction)
        kept = type(scheduler).from_config(config).alphas_cumprod.float().cpu()
        return cls(kept.sqrt(), (1 - kept).sqrt(), torch.arange(steps), prediction)

    @property
    def num_timesteps(self) -> int:
        return len(self.sigmas)

    def corrupt(
        self, clean: Float[Tensor, " n *S"], timesteps: Int[Tensor, " n"], eps: Float[Tensor, " n *S"]
    ) -> Float[Tensor, " n *S"]:
        """x_t, the noisy sample."""
        return _at(self.alphas, timesteps, eps) * clean + _at(self.sigmas, timesteps, eps) * eps

    def target(
        self, clean: Float[Tensor, " n *S"], timesteps: Int[Tensor, " n"], eps: Float[Tensor, " n *S"]
    ) -> Float[Tensor, " n *S"]:
        """What a perfect model would predict at x_t."""
        match self.prediction:
            case "epsilon":
                return eps
            case "v_prediction":
                return _at(self.alphas, timesteps, eps) * eps - _at(self.sigmas, timesteps, eps) * clean
            case "sample":
                return clean
            case "flow":
                return eps - clean

    def snr(self, timesteps: Int[Tensor, " *n"]) -> Float[Tensor, " *n"]:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2 (exp of the paper's lambda_t)."""
        index = timesteps.to(self.sigmas.device)
        return ((self.alphas[index] / self.sigmas[index]) ** 2).to(timesteps.device)


def _at(scales: Float[Tensor, " T"], timesteps: Int[Tensor, " n"], sample: Tensor) -> Tensor:
    """(n, 1, ...), as many axes as the sample has."""
    return scales.to(timesteps.device)[timesteps].reshape(-1, *[1] * (sample.ndim - 1))
