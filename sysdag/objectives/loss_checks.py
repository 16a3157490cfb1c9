"""Which losses a system can be trained with, how runs weigh in them, and what rewards a log shows of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.component import Component
from sysdag.data.preferences import Feedback, UnpairedRun
from sysdag.errors import DataError, PlanError
from sysdag.graph.plan import Plan
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.objectives.losses import KINDS, PairScores
from sysdag.objectives.options import ObjectiveOptions
from sysdag.objectives.strategies import Exhaustive, ImportanceSampling
from sysdag.objectives.unpaired_losses import UNPAIRED_LOSSES, RunScores, split_sides, zero_point

logger = logging.getLogger(__name__)


def check_losses(plan: Plan, options: ObjectiveOptions) -> None:
    """Refuses losses that are not defined on a system's nodes.

    Raises:
        PlanError: naming the loss or the option, a node, and why.
    """
    scored = {name: _component(plan, name) for name in plan.factors(options.objective)}
    bounds = [name for name, component in scored.items() if component.likelihood != "exact"]
    if options.is_unpaired:
        _check_unpaired(plan, options, scored)
        return
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


def _check_unpaired(plan: Plan, options: ObjectiveOptions, scored: Mapping[str, Component]) -> None:
    if options.needs_kl and plan.system.switches:
        raise PlanError(
            "loss_type 'kto' scores the inputs of one row with the values of another, and this system has switches: "
            f"other inputs may take branches that these values are not of. Choose another of {sorted(UNPAIRED_LOSSES)}."
        )
    for name, component in scored.items():
        if getattr(component, "winner_safeguard", None) is not None:
            raise PlanError(
                f"Node {name!r} has a winner_safeguard, which scales the gradient of a pair's loser, and loss_type "
                f"{options.loss_type[0]!r} takes single runs. Leave it out."
            )
        if options.needs_kl and (source := _counted_by(plan, name)) is not None:
            raise PlanError(
                f"loss_type 'kto' scores the inputs of one row with the values of another, and node {name!r} has one "
                f"value for each element of a list that depends on the input {source!r}: other inputs have other "
                f"numbers of them. Choose another of {sorted(UNPAIRED_LOSSES)}."
            )


def _counted_by(plan: Plan, name: str) -> str | None:
    """The input that decides how many elements a plate has; None for no plate, or one over values of the run."""
    above = [edge.parent for edge in plan.parents(name) if edge.each]
    inputs = {given.name for given in plan.system.inputs}
    while above:
        parent = above.pop()
        if parent in inputs:
            return parent
        if not plan.system[parent].is_random:
            above += [edge.parent for edge in plan.parents(parent)]
    return None


def warn_of_plain_sums(options: ObjectiveOptions, candidates: CandidateStrategy | None) -> None:
    """Says where a sum over candidates stands for a single run, and what is common to candidates does not cancel."""
    if not options.is_unpaired or candidates is None or isinstance(candidates, (Exhaustive, ImportanceSampling)):
        return
    logger.warning(
        "%s sums the probabilities of the candidates that it finds. Between the two sides of a pair their share of all "
        "probability cancels; of single runs (loss_type %r) it does not, and training moves it: up by desirable runs, "
        "down by others, whether or not the output depends on them. ImportanceSampling weighs candidates so that this "
        "has a mean of 0, and Exhaustive leaves none out.",
        type(candidates).__name__, options.loss_type[0],
    )  # fmt: skip


def _check_tokens(plan: Plan, options: ObjectiveOptions, loss: str) -> None:
    """A run's length is the tokens of the nodes scored; for Sampling, whose likelihood is the outputs', of those."""
    names = plan.factors("direct") if options.objective == "direct" else plan.results
    for name in names:
        if not _component(plan, name).has_tokens:
            raise PlanError(
                f"loss_type {loss!r} divides log-likelihoods by numbers of tokens, and node {name!r} "
                f"({_component(plan, name)!r}) has none. Choose a loss that is not length-normalised, as 'sigmoid'."
            )


def check_pairs(options: ObjectiveOptions, pairs: Sequence[Feedback]) -> None:
    """Refuses feedback that the losses do not take, and what pairs say of themselves where a loss has no use for it.

    Raises:
        DataError: for a pair where single runs are expected, or the reverse, with its number.
        PlanError: naming the column and the loss.
    """
    wanted = options.wanted
    for number, pair in enumerate(pairs):
        if isinstance(pair, UnpairedRun) != wanted.unpaired:
            other = "a pair" if wanted.unpaired else "an unpaired run"
            raise DataError(f"Row {pair.row_name or number} is {other}. {wanted.why[0].upper()}{wanted.why[1:]}")
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


def with_targets(scores: PairScores, pairs: Sequence[Feedback]) -> PairScores:
    """The scores with the pairs' own margins, where they have any."""
    if not any(pair.margin for pair in pairs):
        return scores
    return replace(scores, target=scores.chosen_rewards.new_tensor([pair.margin for pair in pairs]))


def own_weights(pairs: Sequence[Feedback], like: Float[Tensor, " P"]) -> Float[Tensor, " P"] | None:
    """The pairs' own weights; None where all are 1."""
    if all(pair.weight == 1 for pair in pairs):
        return None
    return like.new_tensor([pair.weight for pair in pairs])


def shown_rewards(scores: PairScores, options: ObjectiveOptions) -> dict[str, Tensor]:
    """The rewards of winners and losers that are logged, those that the loss compares, and what follows from them.

    They are averaged over tokens for `simpo` alone; `sigmoid_norm` and `ipo` log sums, as TRL does.
    """
    chosen, rejected = scores.chosen_rewards.detach(), scores.rejected_rewards.detach()
    if options.loss_type[0] == "simpo" and not options.needs_reference:
        chosen, rejected = chosen / scores.chosen_lengths.clamp(min=1), rejected / scores.rejected_lengths.clamp(min=1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }


def shown_runs(scores: RunScores, options: ObjectiveOptions) -> dict[str, Tensor]:
    """The same of single runs, each nan for runs of the other label, and TRL's `kl` and `delta`.

    A run counts as accurate whose reward is on the side of the first loss's zero point that its label says. `kl` is in
    nats; a node's own beta_i enters it as the weight beta_i / beta.
    """
    rewards, zero = scores.rewards.detach(), zero_point(scores, options.loss_type[0])
    found = split_sides("rewards", rewards, scores.desirable)
    found["rewards/accuracies"] = ((rewards > zero) == scores.desirable).float()
    if scores.kl is not None:
        found["kl"] = (scores.kl / options.beta).expand_as(rewards)
    if scores.shift is not None:
        found["delta"] = scores.shift.expand_as(rewards)
    return found


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
