"""The arguments of a pipeline's call that switch its guidance off: a score is of the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sysdag.components.diffusion import rows, watching
from sysdag.components.diffusion.watched_steps import Misfit, run_quietly
from sysdag.errors import PlanError

_GUIDANCE_OFF: tuple[dict[str, float], ...] = (
    {}, {"true_cfg_scale": 1.0}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0},
)  # fmt: skip


def unguided(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call with which its denoiser sees each prompt once a step.

    A guidance that the model has learnt to read as one of its own arguments stays as it is.

    Raises:
        PlanError: if there are none.
    """
    taken = watching.parameters_of_call(pipe)
    seen = []
    for change in _GUIDANCE_OFF:
        if not change.keys() <= taken.keys():
            continue
        perturbed = {"pag_scale": 0.0} if change and "pag_scale" in taken else {}
        tried = {**arguments, **change, **perturbed}
        calls: list[Mapping[str, Any]] = []
        samples: list[Tensor] = []

        def on_denoiser(given: dict[str, Any], answer: Any, calls: list[Any] = calls) -> Any:
            calls.append(given)
            return answer()

        def on_step(output: Tensor, time: Any, sample: Tensor, step: Any, samples: list[Tensor] = samples) -> Any:
            samples.append(sample)
            raise watching.Stop

        try:
            run_quietly(pipe, [prompt], {**tried, "num_inference_steps": 2}, on_denoiser=on_denoiser, on_step=on_step)
        except Misfit as misfit:
            raise PlanError(f"{type(pipe).__name__} cannot be scored: {misfit}.") from misfit
        if not samples:
            raise PlanError(f"{type(pipe).__name__} cannot be scored: its scheduler's step is not called.")
        if (
            len(calls) == 1
            and [_same_numbers(samples[0], tensor) for tensor in rows.tensors(calls[0])].count(True) == 1
        ):
            return tried
        seen.append(f"{len(calls)} calls a step with {change or 'its own guidance'}")
    raise PlanError(
        f"{type(pipe).__name__} cannot be scored: at no setting of its guidance does it call its denoiser once a step "
        f"with each prompt once ({'; '.join(seen)})."
    )


def _same_numbers(sample: Tensor, tensor: Tensor) -> bool:
    if tensor.numel() != sample.numel():
        return False
    return torch.equal(sample.to(tensor.dtype).flatten().sort().values, tensor.flatten().sort().values)
