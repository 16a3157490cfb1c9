"""Whether a pipeline of diffusers does to each of several prompts of one call what a call with it alone does."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sysdag.components.diffusion import rows, watching
from sysdag.components.diffusion.call_form import CallForm, structure_of
from sysdag.components.diffusion.watched_steps import NOT_ITS_OWN, tells_of_pipeline

logger = logging.getLogger(__name__)

_ROUNDING = 0.02  # of what is compared: text encoders in bf16 differ with the rows beside


def keeps_apart(pipe: Callable[[], Any], pair: tuple[str, str], arguments: Mapping[str, Any], form: CallForm) -> bool:
    """Whether the rows that reach the denoiser at the first step of a call with both prompts are those that reach it
    with each alone.

    Args:
        pipe: gives the pipeline as its parts are now.
        arguments: of its call, beside prompts and generators.
        form: of its calls of the denoiser, for several rows.
    """
    alone = [_first_rows(pipe, [prompt], [row], arguments, form) for row, prompt in enumerate(pair)]
    wanted = [row for found in alone for row in found or []]
    return None not in alone and _same_rows(_first_rows(pipe, pair, (0, 1), arguments, form) or [], wanted)


def _first_rows(
    pipe: Callable[[], Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    arguments: Mapping[str, Any],
    form: CallForm,
) -> list[Any] | None:
    """The rows that the denoiser gets at the first step, guidance and all; None if that fails."""
    found: list[Any] = []
    count, grow = math.prod(form.sample_shape), form.received_grow
    assert grow is not None

    def on_denoiser(given: dict[str, Any], answer: Any) -> Any:
        leaf = dict(rows.leaves(given))[form.latents_path]
        held = sum(tensor.numel() for tensor in rows.tensors(given[form.latents_path[0]])) // count
        assert isinstance(leaf, Tensor)
        found.extend([given] if held == 1 else rows.parted(grow, given, held))
        return form.zero_answer(held)

    def on_step(output: Tensor, time: Any, sample: Tensor, step: Any) -> Any:
        raise watching.Stop

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"prompt": list(prompts), "generator": generators, **arguments}
    try:
        watching.run(pipe(), given, on_denoiser=on_denoiser, on_step=on_step)
    except NOT_ITS_OWN as error:
        if not tells_of_pipeline(error):
            raise
        logger.debug("%s: several prompts raise %r.", type(pipe()).__name__, error)
        return None
    return found


def _same_rows(found: list[Any], wanted: list[Any]) -> bool:
    """Whether the same rows are in both lists, in any order, but for how a batch rounds."""
    left = list(wanted)
    for row in found:
        place = next((place for place, other in enumerate(left) if _agree(row, other)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _agree(row: Any, other: Any) -> bool:
    pairs = zip(rows.tensors(row), rows.tensors(other), strict=False)
    if structure_of(row) != structure_of(other) or any(one.shape != two.shape for one, two in pairs):
        return False
    return all(
        (one.double() - two.double()).abs().max() <= _ROUNDING * max(1.0, float(two.double().abs().max()))
        for one, two in zip(rows.tensors(row), rows.tensors(other), strict=True)
        if one.numel()
    )
