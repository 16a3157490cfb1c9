"""Drawing by one call of a pipeline of diffusers, watched: what its steps begin with, end with, and get wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.diffusion import rows, watching
from sysdag.components.diffusion.reverse_process import check_decoded, check_step
from sysdag.components.diffusion.watched_steps import NOT_ITS_OWN, tells_of_pipeline
from sysdag.errors import PlanError


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one row of a pipeline's call gave.

    Attributes:
        value: a PIL image, or a list of them.
        latents: fp32 on the CPU, as the last step left them.
        noise: as `latents`, what the first step began with.
    """

    value: Any
    latents: Tensor
    noise: Tensor


def draw_rows(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], arguments: Mapping[str, Any], place: int
) -> list[Drawn]:
    """A row for each prompt, by one call of the pipeline.

    Args:
        arguments: of the call, beside prompts and generators.
        place: of the latents among the tensors of their shape that a step returns.

    Raises:
        PlanError: for a call that fails, or numbers that are not finite.
    """
    first: list[Tensor] = []
    last: list[Tensor] = []
    number = itertools.count(1)

    def on_step(output: Tensor, time: Any, sample: Tensor, step: Any) -> Any:
        if not first:
            first.append(sample.float().cpu().clone())  # some pipelines go on in the same tensor
        result = step()
        found = [tensor for tensor in rows.tensors(result) if tensor.shape == sample.shape]
        check_step(pipe.scheduler, next(number), time, output, found[0])
        last[:] = [found[place if place < len(found) else 0]]
        return result

    def on_decode(decoder: nn.Module, latents: Tensor, decode: Any) -> Any:
        result = decode()
        for images in rows.tensors(result):
            check_decoded(decoder, images)
        return result

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        output = watching.run(
            pipe, {"prompt": list(prompts), "generator": generators, **arguments}, on_step=on_step,
            on_decode=on_decode, seed=seeds[0] % 2**63,
        )  # fmt: skip
    except NOT_ITS_OWN as error:
        if not tells_of_pipeline(error):
            raise
        raise PlanError(
            f"{type(pipe).__name__} cannot sample: called with {arguments}, it raises {type(error).__name__}: {error}"
        ) from error
    values = output[0]
    latents = last[0].float().cpu().clone()
    if len(values) != len(prompts) or len(latents) != len(prompts):
        raise PlanError(f"{type(pipe).__name__} gave {len(values)} values for {len(prompts)} prompts.")
    return [Drawn(*each) for each in zip(values, latents, first[0], strict=True)]
