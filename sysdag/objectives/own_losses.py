"""Losses of the user's own: known by a name, and tried out before anything is trained with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from sysdag.errors import PlanError
from sysdag.graph.import_path import function_path
from sysdag.objectives.losses import KINDS, LOSSES, Kind, Loss, PairScores
from sysdag.objectives.unpaired_losses import UNPAIRED_LOSSES
from sysdag.saving.loading import load_function

_BUILT_IN = frozenset(LOSSES)


def register_loss(name: str, loss: Loss, *, smoothed: bool = False) -> None:
    """Makes a loss of one's own known, so that `loss_type` can name it like the others.

    Args:
        name: what `loss_type` calls it.
        loss: `loss(scores, beta, label_smoothing)` from `PairScores` of P pairs, on the CPU, to a loss for each, (P,),
            differentiable by the scores. beta is the objective's, which the rewards contain already.
        smoothed: whether it makes use of `label_smoothing`, which is refused for losses that do not.

    Raises:
        PlanError: for a name that is taken (by another function: one that is defined again replaces itself), or what
            cannot be called with these three arguments.
    """
    _register(name, loss)
    KINDS[name] = Kind(smooths=smoothed)


def _register(name: str, loss: Loss) -> None:
    if not isinstance(name, str) or not name:
        raise PlanError(f"register_loss: the name of a loss must be a text that is not empty, got {name!r}.")
    try:
        inspect.signature(loss).bind(None, 0.1, 0.0)
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"register_loss: {name!r} must be a function loss(scores, beta, label_smoothing); {loss!r} cannot be "
            f"called with these three ({error})."
        ) from error
    if name in UNPAIRED_LOSSES:
        raise PlanError(f"register_loss: the name {name!r} is taken by {UNPAIRED_LOSSES[name]!r}; choose another.")
    known = LOSSES.get(name)
    if known is not None and known is not loss:
        path = function_path(loss)
        if path is None or path != function_path(known):
            raise PlanError(f"register_loss: the name {name!r} is taken by {known!r}; choose another.")
    LOSSES[name] = loss
    KINDS.pop(name, None)


def name_of(loss: Callable[..., Any]) -> str:
    """The name that `loss_type` has for a function: its own where it is known, or where it stands.

    A function that cannot be imported (a lambda, one inside a function) has a number behind its name, where another one
    has that.

    Raises:
        PlanError: as `register_loss`.
    """
    known: Callable[..., Any]
    for name, known in (*LOSSES.items(), *UNPAIRED_LOSSES.items()):
        if known is loss:
            return name
    path = function_path(loss)
    if path is None:
        place = f"{getattr(loss, '__module__', None) or type(loss).__module__}"
        plain = f"{place}:{getattr(loss, '__qualname__', type(loss).__qualname__)}"
        path = next(f"{plain}{tail}" for tail in _tails() if f"{plain}{tail}" not in LOSSES)
    _register(path, loss)
    return path


def _tails() -> Any:
    yield ""
    number = 2
    while True:
        yield f"#{number}"
        number += 1


def look_up(names: tuple[str, ...], beta: float) -> None:
    """Finds losses that are named by where they stand, and tries out those that are no part of sysdag.

    Raises:
        PlanError: naming a loss that is unknown, with those that are known; or that is not one number a pair, is not
            finite, or has no gradient, on a few pairs.
        LoadingError: for a loss that is not where its name says.
    """
    for name in names:
        if name not in LOSSES and ":" in name:
            _register(name, load_function(name))
    unknown = [name for name in names if name not in LOSSES and name not in UNPAIRED_LOSSES]
    if unknown or not names:
        raise PlanError(
            f"loss_type must name one or more of {sorted({**LOSSES, **UNPAIRED_LOSSES})}, or a function of your own as "
            f"FILE.py:function, got {list(names)}."
        )
    for name in names:
        if name not in _BUILT_IN and name not in UNPAIRED_LOSSES:
            KINDS[name] = _tried(name, LOSSES[name], beta, KINDS.get(name))


def _tried(name: str, loss: Loss, beta: float, declared: Kind | None) -> Kind:
    """What a loss is, as far as a few pairs show."""
    whole = _trial()
    leaves = {
        field.name: value.clone().requires_grad_() if field.name not in _NUMBERS else value
        for field in fields(PairScores)
        if (value := getattr(whole, field.name)) is not None
    }
    values = _called(name, loss, PairScores(**leaves), beta, 0.0)
    found: list[Tensor] = []
    if values.requires_grad:
        variables = [leaf for leaf in leaves.values() if leaf.requires_grad]
        found = list(torch.autograd.grad(values.sum(), variables, materialize_grads=True))
    if not any(bool(gradient.any()) for gradient in found):
        raise PlanError(
            f"loss_type {name!r} has no gradient: it must be differentiable by the scores, and depend on them."
        )
    if not all(bool(gradient.isfinite().all()) for gradient in found):
        raise PlanError(f"loss_type {name!r} has a gradient that is not finite on rewards of {_REWARDS}.")
    values = values.detach()

    def differs(scores: PairScores, e: float = 0.0, expected: Tensor = values) -> bool:
        other = _called(name, loss, scores, beta, e).detach()
        return not torch.allclose(other, expected, rtol=1e-6, atol=1e-9)

    count = len(values)
    apart = [differs(_select(whole, place), expected=values[place : place + 1]) for place in range(count)]
    smooths = declared.smooths if declared is not None else differs(whole, 0.1)
    shifted = replace(whole, chosen_policy=whole.policies()[0] + 1, rejected_policy=whole.policies()[1] - 1)
    compared = replace(whole, chosen_rewards=whole.chosen_rewards - 0.7, rejected_rewards=whole.rejected_rewards + 0.9)
    return Kind(
        smooths=smooths,
        takes_margins=differs(replace(whole, target=torch.full_like(whole.chosen_rewards, 0.5))),
        compares_pairs=any(apart),
        needs_reference=differs(compared),
        needs_policy=differs(shifted),
    )


def _called(name: str, loss: Loss, scores: PairScores, beta: float, e: float) -> Tensor:
    count = len(scores.chosen_rewards)
    try:
        values = loss(scores, beta, e)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"loss_type {name!r} fails on {count} pairs ({type(error).__name__}: {error}); see `PairScores` for "
            "what it is given."
        ) from error
    if not isinstance(values, Tensor) or values.shape != (count,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise PlanError(f"loss_type {name!r} must return one loss a pair, shape ({count},), got {got}.")
    if not values.is_floating_point() or not bool(values.isfinite().all()):
        raise PlanError(f"loss_type {name!r} is not finite on rewards of {_REWARDS}: it gives {values.tolist()}.")
    return values


_NUMBERS = ("chosen_lengths", "rejected_lengths", "target")
_REWARDS = "-1.2 to 0.9"


def _trial() -> PairScores:
    return PairScores(
        chosen_rewards=torch.tensor([0.3, 0.9, -1.2, 0.1]),
        rejected_rewards=torch.tensor([-0.4, 0.6, 0.2, -0.7]),
        chosen_lengths=torch.tensor([3.0, 7.0, 5.0, 2.0]),
        rejected_lengths=torch.tensor([4.0, 2.0, 9.0, 3.0]),
        chosen_nll=torch.tensor(1.5),
        chosen_policy=torch.tensor([-1.3, -2.2, -1.9, -0.6]),
        rejected_policy=torch.tensor([-1.6, -0.9, -3.1, -1.1]),
    )


def _select(scores: PairScores, place: int) -> PairScores:
    """One of the pairs, alone."""
    return PairScores(
        **{
            field.name: value if value is None or value.ndim == 0 else value[place : place + 1]
            for field in fields(PairScores)
            for value in [getattr(scores, field.name)]
        }
    )
