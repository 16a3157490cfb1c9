"""Which losses a system can be trained with, how runs weigh in them, and what rewards a log shows of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.component import Component
from sysdag.data.preferences import PreferencePair
from sysdag.errors import PlanError
from sysdag.graph.plan import Plan
from sysdag.objectives.losses import KINDS, PairScores
from sysdag.objectives.options import ObjectiveOptions


def check_losses(plan: Plan, options: ObjectiveOptions) -> None:
    """Refuses losses that are not defined on a system's nodes.

    Raises:
        PlanError: naming the loss or the option, a node, and why.
    """
    scored = {name: _component(plan, name) for name in plan.factors(options.objective)}
    bounds = [name for name, component in scored.items() if component.likelihood != "exact"]
    for name in options.loss_type:
        if bounds and KINDS[name].needs_policy:
            raise PlanError(
                f"loss_type {name!r} looks at the policy's likelihood itself, and of node {bounds[0]!r} "
                f"({scored[bounds[0]]!r}) only a bound's difference to a reference is known. Choose a loss of the "
                "rewards, as 'sigmoid'."
            )
        if KINDS[name].needs_tokens:
            _check_tokens(plan, options, name)
    if bounds and not options.needs_reference:
        raise PlanError(
            f"reference_free=True: of node {bounds[0]!r} ({scored[bounds[0]]!r}) only a bound's difference to a "
            "reference is known."
        )
    if bounds and options.use_weighting:
        raise PlanError(
            f"use_weighting=True weighs runs by their probability, which node {bounds[0]!r} ({scored[bounds[0]]!r}) "
            "does not have."
        )
    if options.ld_alpha is not None and not any(component.has_tokens for component in scored.values()):
        raise PlanError("ld_alpha weighs tokens, and no node of this system has any.")


def _check_tokens(plan: Plan, options: ObjectiveOptions, loss: str) -> None:
    """A run's length is the tokens of the nodes scored; for Sampling, whose likelihood is the outputs', of those."""
    names = plan.factors("direct") if options.objective == "direct" else plan.results
    for name in names:
        if not _component(plan, name).has_tokens:
            raise PlanError(
                f"loss_type {loss!r} divides log-likelihoods by numbers of tokens, and node {name!r} "
                f"({_component(plan, name)!r}) has none. Choose a loss that is not length-normalised, as 'sigmoid'."
            )


def check_pairs(options: ObjectiveOptions, pairs: Sequence[PreferencePair]) -> None:
    """Refuses what pairs say of themselves where a loss has no use for it.

    Raises:
        PlanError: naming the column and the loss.
    """
    if any(pair.margin for pair in pairs):
        for name in options.loss_type:
            if name != "sft" and not KINDS[name].takes_margins:
                served = sorted(known for known, kind in KINDS.items() if kind.takes_margins)
                raise PlanError(
                    f"The data have a column `margin`, which has no place in loss_type {name!r}; it enters {served}. "
                    "Choose one of them, or give the column another name (--rename margin=...)."
                )
    if options.compares_pairs and any(pair.weight != 1 for pair in pairs):
        raise PlanError(
            f"The data have a column `weight`, and loss_type {options.compares_pairs!r} sorts pairs over the batch, so "
            "that its losses are of none. Choose another loss, or give the column another name (--rename weight=...)."
        )


def with_targets(scores: PairScores, pairs: Sequence[PreferencePair]) -> PairScores:
    """The scores with the pairs' own margins, where they have any."""
    if not any(pair.margin for pair in pairs):
        return scores
    return replace(scores, target=_beside([pair.margin for pair in pairs], scores))


def own_weights(scores: PairScores, pairs: Sequence[PreferencePair]) -> Float[Tensor, " P"] | None:
    """The pairs' own weights; None where all are 1."""
    if all(pair.weight == 1 for pair in pairs):
        return None
    return _beside([pair.weight for pair in pairs], scores)


def _beside(numbers: Sequence[float], scores: PairScores) -> Float[Tensor, " P"]:
    like = scores.chosen_rewards
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)


def shown_rewards(scores: PairScores, options: ObjectiveOptions) -> tuple[Tensor, Tensor]:
    """The rewards of winners and losers that are logged: those that the loss compares.

    They are averaged over tokens for `simpo` alone; `sigmoid_norm` and `ipo` log sums, as TRL does.
    """
    chosen, rejected = scores.chosen_rewards.detach(), scores.rejected_rewards.detach()
    if options.loss_type[0] == "simpo" and not options.needs_reference:
        return chosen / scores.chosen_lengths.clamp(min=1), rejected / scores.rejected_lengths.clamp(min=1)
    return chosen, rejected


def typical_weights(scores: PairScores, typicality: Iterable[Float[Tensor, " R"]]) -> Float[Tensor, " P"]:
    """WPO's weight of each pair: exp of the mean typicality of the winner's terms, times the loser's.

    Args:
        typicality: by node, of winners followed by losers; see `Component.typicality`.
    """
    total = torch.stack(list(typicality)).sum(0)
    lengths = torch.cat([scores.chosen_lengths, scores.rejected_lengths]).clamp(min=1)
    chosen, rejected = (total / lengths).chunk(2)
    return (chosen + rejected).exp()


def _component(plan: Plan, name: str) -> Component:
    component = plan.system[name].component
    assert component is not None  # factors and outputs that are scored are of random nodes
    return component
