"""From the scores of a batch to the loss of each pair or unpaired run, and what a log shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from sysdag.data.preferences import Feedback
from sysdag.engine.scored import Scored
from sysdag.engine.zero_points import shift_of
from sysdag.objectives.loss_checks import own_weights, shown_rewards, shown_runs, typical_weights, with_targets
from sysdag.objectives.losses import PairScores, pair_losses
from sysdag.objectives.unpaired_losses import RunScores, run_losses

if TYPE_CHECKING:
    from sysdag.engine.step import SystemModel


def batch_losses(
    model: SystemModel,
    batch: Sequence[Feedback],
    scores: PairScores | RunScores,
    scored: Scored,
    kl: Float[Tensor, ""] | None,
    *,
    trains: bool,
) -> tuple[Float[Tensor, " P"], dict[str, Tensor]]:
    """What each pair or unpaired run loses, and the metrics to log, (P,) each.

    Args:
        scores: what `Comparison.combine` made of the batch's scores.
        scored: these.
        kl: see `RunScores`.
        trains: whether the batch is trained on, so that running means take it in.
    """
    options = model.options
    if isinstance(scores, RunScores):
        shift = shift_of(model, scores, model.device_of(scored), trains=trains) if options.needs_shift else None
        scores = replace(scores, kl=kl, shift=shift)
        losses = run_losses(
            scores, options.loss_type, options.weights,
            desirable_weight=options.desirable_weight, undesirable_weight=options.undesirable_weight,
        )  # fmt: skip
        shown = shown_runs(scores, options)
    else:
        scores = with_targets(scores, batch)
        losses = pair_losses(
            scores, options.loss_type, options.weights,
            beta=options.beta, label_smoothing=options.label_smoothing, constants=options.constants,
        )  # fmt: skip
        if options.use_weighting:
            losses = losses * typical_weights(scores, scored.typicality.values())
        shown = shown_rewards(scores, options)
    if (own := own_weights(batch, losses)) is not None:
        losses = losses * own
    if model.groups is not None and trains:
        model.groups.observe(batch, losses.detach())
        losses = losses * model.groups.of(batch, losses)
    return losses, shown
