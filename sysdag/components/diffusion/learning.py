"""Learns how a pipeline of diffusers calls its denoiser and its decoder, by watching it run.

A recorder takes the denoiser's place: its first answer is the denoiser's own, for its form; the others, and the samples
that the scheduler's step returns, are numbers that tell their place. What is learnt is then held against steps with
random numbers, and for two rows at a time. A pipeline that does anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sysdag.components.diffusion import rows
from sysdag.components.diffusion.call_form import CallForm, structure_of
from sysdag.components.diffusion.gathering import Gather, digit, places
from sysdag.components.diffusion.rows import Path
from sysdag.components.diffusion.time_argument import TimeArgument
from sysdag.components.diffusion.watched_steps import Fill, Misfit, Step, watched_steps
from sysdag.errors import PlanError

_DIGITS = 3


def learn_calls(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> CallForm:
    """The form of a pipeline's calls for one size of sample.

    Args:
        arguments: of the pipeline's call, without guidance (see `unguided`).

    Raises:
        PlanError: for a pipeline that has none.
    """
    try:
        return _learnt(pipe, prompt, arguments)
    except Misfit as misfit:
        raise PlanError(f"{type(pipe).__name__} cannot be scored: {misfit}.") from None


def _random(seed: int) -> Fill:
    return lambda n, count: torch.randn(n, count, generator=torch.Generator().manual_seed(seed))


def _constant(value: float) -> Fill:
    return lambda n, count: torch.full((n, count), value)


def _digit(power: int) -> Fill:
    return lambda n, count: digit(count, power).expand(n, -1)


def _learnt(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> CallForm:
    tells = [_digit(power) for power in range(_DIGITS)]
    answers = [None, *tells, _constant(1.0), _random(1), _random(2)]
    samples = [*tells, _random(3), _random(4), _random(5)]
    steps = watched_steps(pipe, [prompt], arguments, answers, samples)
    first = steps[0]
    shape = tuple(first.sample.shape[1:])
    if first.sample.shape[0] != 1 or any(step.sample.shape != first.sample.shape for step in steps):
        raise Misfit(f"its samples for one prompt are {[tuple(step.sample.shape) for step in steps]}")
    leaves = [dict(rows.leaves(step.arguments)) for step in steps]
    if any(each.keys() != leaves[0].keys() for each in leaves):
        raise Misfit("its denoiser's arguments differ from step to step")
    latents_path: Path | None = None
    pack: Gather | None = None
    times: dict[Path, tuple[TimeArgument, tuple[int, ...]]] = {}
    for path in leaves[0]:
        values = [each[path] for each in leaves]
        if _constant_over(values):
            continue
        name = ".".join(map(str, path))
        if not all(isinstance(value, Tensor) for value in values):
            raise Misfit(f"its denoiser's argument {name} changes from step to step ({values[0]!r:.60})")
        if values[0].numel() == first.sample.numel() and latents_path is None:
            index = places([value.flatten() for value in values[1 : 1 + _DIGITS]])
            if index is not None and len(index.unique()) == len(index) and int(index.max()) < len(index):
                latents_path, pack = path, Gather(index, tuple(values[0].shape))
                continue
        times[path] = _time(name, steps, values, pipe)
    if latents_path is None or pack is None:
        raise Misfit("none of its denoiser's arguments is the sample in another order")
    if not times:
        raise Misfit("none of its denoiser's arguments follows the time")
    unpack = _unpacking(pipe, steps, shape)
    form = CallForm(
        shape, latents_path, leaves[0][latents_path].dtype, pack, times, unpack, None, None, None,
        structure_of(first.arguments), rows.mapped_tensors(first.answer, torch.zeros_like),
    )  # fmt: skip
    _verify(form, steps, [[step.arguments] for step in steps])
    return _with_batches(pipe, prompt, arguments, form, first)


def _constant_over(values: Sequence[Any]) -> bool:
    first = values[0]
    if isinstance(first, Tensor):
        return all(isinstance(v, Tensor) and v.dtype == first.dtype and torch.equal(v, first) for v in values)
    if isinstance(first, (bool, int, float, str, type(None), torch.dtype, torch.Size)):
        return all(value == first for value in values)
    return all(value is first for value in values)


def _time(name: str, steps: Sequence[Step], values: Sequence[Tensor], pipe: Any) -> Any:
    given = [step.time.reshape(-1) for step in steps]
    flat = [value.reshape(-1) for value in values]
    if any(len(time) != 1 for time in given) or any(not bool((value == value[0]).all()) for value in flat):
        raise Misfit(f"its denoiser's argument {name} depends on more than the time of the step")
    total = pipe.scheduler.config.get("num_train_timesteps")
    time = TimeArgument.learnt([each[0] for each in given], [each[0] for each in flat], total)
    if time is None:
        shown = ", ".join(
            f"{a.item():g} at {t.item():g}" for t, a in zip(given[:3], [v[0] for v in flat], strict=False)
        )
        raise Misfit(f"its denoiser's argument {name} follows the scheduler's time by no fixed map ({shown})")
    return time, tuple(values[0].shape) or (1,)


def _unpacking(pipe: Any, steps: Sequence[Step], shape: tuple[int, ...]) -> Gather:
    count = steps[0].sample.numel()
    signs = steps[1 + _DIGITS].output.flatten()
    sign = signs[0].item() if len(signs) else 0.0
    if sign not in (1.0, -1.0) or not bool((signs == sign).all()):
        raise Misfit("what its scheduler gets is not its denoiser's answer or the negative of it")
    index = places([step.output.flatten() * sign for step in steps[1 : 1 + _DIGITS]])
    if index is None or len(index.unique()) != len(index):
        raise Misfit("what its scheduler gets is not its denoiser's answer in another order")
    learned = str(pipe.scheduler.config.get("variance_type")).startswith("learned")
    if len(index) == 2 * count and learned and steps[0].output.shape[1] == 2 * shape[0]:
        index = index[:count]
    if len(index) != count:
        raise Misfit(f"its scheduler gets {len(index)} numbers for a sample of {count}")
    return Gather(index, shape, sign)


def _verify(form: CallForm, steps: Sequence[Step], recorded: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """That the form gives what was seen at every step.

    Args:
        recorded: each row's arguments, a list for each step.

    Raises:
        Misfit: otherwise.
    """
    for step, each in zip(steps, recorded, strict=True):
        count = len(each)
        made = form.arguments(each, step.sample, step.time.reshape(-1)[:1].expand(count))
        for name in {form.latents_path[0], *(path[0] for path in form.times)}:
            pairs = zip(rows.leaves(made[name]), rows.leaves(step.arguments[name]), strict=True)
            if not all(_agree(*pair) for pair in pairs):
                raise Misfit(f"its denoiser's argument {name} is not the same function of sample and time at all steps")
        output = form.model_output(step.answer, count)
        seen = step.output.flatten(1)[:, : output[0].numel()].reshape(output.shape)
        if not torch.equal(output.to(seen.dtype), seen):
            raise Misfit("what its scheduler gets is not the same function of its denoiser's answer at all steps")


def _agree(made: tuple[Path, Any], seen: tuple[Path, Any]) -> bool:
    if made[0] != seen[0] or type(made[1]) is not type(seen[1]):
        return False
    if not isinstance(seen[1], Tensor):
        return made[1] is seen[1] or bool(made[1] == seen[1])
    # The time of a step may be one number for all rows.
    return torch.equal(made[1], seen[1].expand(made[1].shape) if seen[1].numel() == 1 else seen[1])


def _with_batches(pipe: Any, prompt: str, arguments: Mapping[str, Any], form: CallForm, one: Step) -> CallForm:
    """The form for several rows at a time, where the pipeline takes several prompts."""
    try:
        two = watched_steps(pipe, [prompt, prompt], arguments, [None, _random(6), _random(7)], [_random(8), _random(9)])
    except Misfit as misfit:
        if misfit.__cause__ is None:
            raise
        return form
    if two[0].sample.shape != (2, *form.sample_shape):
        raise Misfit(f"its samples for two prompts are {tuple(two[0].sample.shape)}, for one {(1, *form.sample_shape)}")
    try:
        grown = rows.growth(one.arguments, two[0].arguments)
        answer = rows.growth(one.answer, two[0].answer)
    except rows.Uneven:
        return form
    joined = grown
    for path in form.times:
        joined = rows.grown_at(joined, path, rows.Along(0))
    made = replace(form, arguments_grow=joined, received_grow=grown, answer_grows=answer)
    _verify(made, two, [rows.parted(grown, step.arguments, 2) for step in two])
    return made
