"""Runs of a pipeline of diffusers with other numbers in its denoiser's answers and in its samples, step by step.

The denoiser's first answer is its own, for its form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sysdag.components.diffusion import rows, watching
from sysdag.errors import SysdagError

_RUNS = 8

NOT_ITS_OWN = (
    ValueError, TypeError, LookupError, AttributeError, AssertionError, NameError, ImportError, RuntimeError,
)  # fmt: skip
"""What a pipeline raises where it cannot do what it is asked for."""


def tells_of_pipeline(error: Exception) -> bool:
    """Whether one of `NOT_ITS_OWN` is the pipeline's say; memory that runs out, or an error of sysdag's own, is not."""
    return not isinstance(error, SysdagError) and (type(error) is RuntimeError or not isinstance(error, RuntimeError))


Fill = Callable[[int, int], Tensor] | None
"""From numbers of rows and of elements to what is put in, (rows, elements); None: what was there."""


@dataclass(frozen=True, eq=False)
class Step:
    """One watched step.

    Attributes:
        arguments: that the denoiser was called with.
        answer: what it was made to answer.
        output, time, sample: what the scheduler's step was called with.
    """

    arguments: Mapping[str, Any]
    answer: Any
    output: Tensor
    time: Tensor
    sample: Tensor


class Misfit(Exception):
    """What a pipeline does that no form describes; the words go into an error with its name."""


def run_quietly(pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any], **watched: Any) -> Any:
    """One watched call (see `watching.run`), out of any autocast: what is learnt and recorded is the pipeline's own.

    Raises:
        Misfit: for a call that fails.
    """
    generators = [torch.Generator().manual_seed(row) for row in range(len(prompts))]
    given = {"prompt": list(prompts) if len(prompts) > 1 else prompts[0], "generator": generators}
    device = next(getattr(pipe, watching.denoiser_name(pipe)).parameters()).device
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of, it warns of when it samples
    try:
        with torch.autocast(device.type, enabled=False):
            return watching.run(pipe, {**given, **arguments}, scaled_input=False, **watched)
    except NOT_ITS_OWN as error:
        if not tells_of_pipeline(error):
            raise
        shown = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
        raise Misfit(f"called with {shown}, it raises {type(error).__name__}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def watched_steps(
    pipe: Any, prompts: Sequence[str], arguments: Mapping[str, Any], answers: Sequence[Fill], samples: Sequence[Fill]
) -> list[Step]:
    """As many watched steps as there are answers.

    Args:
        answers: what is put into the denoiser's answer at each step.
        samples: what is put into the sample that each step returns.
    """
    found: list[Step] = []
    own: list[Any] = []
    count = len(answers)
    for _ in range(_RUNS):
        pending: list[tuple[Mapping[str, Any], Any]] = []
        started = len(found)

        def on_denoiser(given: dict[str, Any], answer: Any, pending: list[Any] = pending) -> Any:
            if pending:
                raise Misfit("it calls its denoiser more than once a step")
            if not own:
                own.append(answer())
                if not all(bool(tensor.isfinite().all()) for tensor in rows.tensors(own[0])):
                    raise Misfit("its denoiser's answer has numbers that are not finite; its weights may have diverged")
            fill = answers[len(found)]
            made = own[0] if fill is None else _filled(own[0], fill, len(prompts))
            pending.append((rows.mapped_tensors(given, torch.clone), made))
            return made

        def on_step(output: Tensor, time: Any, sample: Tensor, step: Any, pending: list[Any] = pending) -> Any:
            if not pending:
                raise Misfit("it steps without calling its denoiser")
            given, made = pending.pop()
            found.append(Step(given, made, output.clone(), torch.as_tensor(time).clone(), sample.clone()))
            if len(found) == len(answers):
                raise watching.Stop
            fill = samples[len(found) - 1]
            return step() if fill is None else with_samples(step(), sample, fill(len(sample), sample[0].numel()))

        def on_other(name: str, started: int = started) -> None:
            if len(found) > started:
                raise Misfit(f"its {name} works between the steps")

        try:
            run_quietly(
                pipe, prompts, {**arguments, "num_inference_steps": count},
                on_denoiser=on_denoiser, on_step=on_step, on_other=on_other,
            )  # fmt: skip
        except Misfit as misfit:
            if found or count == 2 or not isinstance(misfit.__cause__, ValueError):
                raise
            count = 2  # a few pipelines take no other number of steps
            continue
        if len(found) == len(answers):
            return found
        if len(found) == started:
            break
    raise Misfit(f"{len(answers)} steps were wanted and {len(found)} seen")


def _filled(answer: Any, fill: Callable[[int, int], Tensor], count: int) -> Any:
    """The answer with other numbers: row by row, in the order of its tensors."""
    sizes = [tensor.numel() for tensor in rows.tensors(answer)]
    if len(sizes) % count == 0 and count > 1:  # a list with an element for each row
        flat = list(fill(count, sum(sizes) // count).flatten().split(sizes))
    elif any(size % count for size in sizes):
        raise Misfit(f"its denoiser's answer for {count} rows has tensors of {sizes} elements")
    else:
        parts = fill(count, sum(sizes) // count).split([size // count for size in sizes], dim=1)
        flat = [part.flatten() for part in parts]
    return rows.mapped_tensors(answer, lambda tensor: flat.pop(0).reshape(tensor.shape).to(tensor))


def with_samples(result: Any, sample: Tensor, flat: Tensor, place: int = 0) -> Any:
    """A step's result with other numbers in one of its tensors of the sample's shape and zeros in the others."""
    seen = -1

    def other(tensor: Tensor) -> Tensor:
        nonlocal seen
        if tensor.shape != sample.shape:
            return tensor
        seen += 1
        return flat.reshape(sample.shape).to(tensor) if seen == place else torch.zeros_like(tensor)

    return rows.mapped_tensors(result, other)
