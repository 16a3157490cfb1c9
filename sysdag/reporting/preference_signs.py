"""Diagnoses of the preference: log-probabilities, over-optimisation, a loss that stays, data that is too easy."""

from __future__ import annotations

import math

from sysdag.reporting.diagnosis import Diagnosis, Facts, end_of, observed
from sysdag.reporting.formats import number
from sysdag.reporting.history import EMPTY, History
from sysdag.reporting.trends import LEAST, Change, change, noise, peak

BEYOND_NOISE = 4.0
"""A change counts from this many standard errors on: there are many looks at many series in a report."""
BEYOND_LUCK = 3.0
"""And the best of n values must be left by so many standard deviations more than its luck, sqrt(2 ln n) of them."""
FALL = 1.0
"""nats that the mean log-probability of winners must fall: e times less likely is the least worth a word."""
LOST_OF_GAINED = 0.1
"""Over-optimisation: the part of what was gained up to the best step that must be lost again."""
LOST_OF_VALUE = 0.01
"""And the part of the best value itself, which counts where nothing was gained; for accuracies, points of 1."""
STILL = 0.01
"""A loss stands still if its change is less than this part of its first value,"""
WITHIN_NOISE = 2.0
"""or less than so many standard errors,"""
STILL_WITHIN_NOISE = 0.1
"""if that is no more than this: behind louder noise a real change may hide."""
EASY_ACCURACY = 0.995
EASY_MARGIN = 10.0
"""At this margin a pair's sigmoid loss is below 5e-5: nothing is left to learn from pairs like it."""


def chosen_log_probs_fall(history: History, facts: Facts) -> Diagnosis | None:
    """Winners become less likely while margins grow: losers only fall faster.

    Fires where the end of `logps/chosen` is below its beginning by more than `FALL` nats and `BEYOND_NOISE` standard
    errors, and `rewards/margins` grew by as many standard errors. Looks at the evaluation where it has 6 values.
    """
    split, chosen = observed(history, "logps/chosen", 2 * LEAST)
    _, margins = observed(history, "rewards/margins", 2 * LEAST)
    fall, growth = change(chosen), change(margins)
    if fall is None or growth is None:
        return None
    if fall.difference > -max(FALL, BEYOND_NOISE * fall.error) or growth.difference <= BEYOND_NOISE * growth.error:
        return None
    return Diagnosis(
        "chosen_log_probs_fall",
        "warning",
        "Chosen outputs become less likely",
        f"The mean log-probability of chosen outputs {split} fell from {number(fall.first)} to {number(fall.last)} "
        f"nats between step {fall.begin} and step {fall.end}, while the margin rose from {number(growth.first)} to "
        f"{number(growth.last)}: losers fall faster, and probability goes to outputs that are neither.",
        'Add a likelihood term (loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1]), lower the learning rate, raise '
        "beta, or stop earlier. Look at samples: a fall of a few nats may be harmless.",
        fall.begin,
        fall.end,
    )


def over_optimisation(history: History, facts: Facts) -> Diagnosis | None:
    """The evaluation was best at an earlier step, and is worse since by more than noise.

    For the loss, accuracies and margins of the evaluation: the mean of the last up to three values, all behind the
    best, is worse than the best by more than `BEYOND_LUCK` standard deviations of a value and what the best of as many
    is ahead by chance alone (for accuracies at least those of a share among as many pairs as the evaluation has), by
    `LOST_OF_GAINED` of what was gained before, and by `LOST_OF_VALUE`.
    """
    found = []
    for metric, higher in (("loss", False), ("rewards/accuracies", True), ("rewards/margins", True)):
        series = history.evaluation.get(metric, EMPTY).finite
        best = peak(series, higher_is_better=higher)
        if best is None:
            continue
        spread, scale = noise(series), abs(best.value)
        if metric == "rewards/accuracies":
            scale = 1.0
            if facts.evaluation_pairs:
                binomial = math.sqrt(max(best.value * (1 - best.value), 1e-2) / facts.evaluation_pairs)
                spread = max(spread, binomial / 2)  # the same pairs each time: most of their variance is shared
        chance = (BEYOND_LUCK + math.sqrt(2 * math.log(len(series)))) * spread
        if best.lost > max(chance, LOST_OF_GAINED * best.gained, LOST_OF_VALUE * scale):
            found.append((metric, best))
    if not found:
        return None
    told = "; ".join(
        f"{metric} was best at step {best.step} ({number(best.value)}) and its last {best.count} values, to step "
        f"{best.last_step}, have a mean of {number(best.since)}"
        for metric, best in found
    )
    first = found[0][1]
    return Diagnosis(
        "over_optimisation",
        "warning",
        f"Over-optimised after step {first.step}",
        f"In evaluation: {told}.",
        f"Use a checkpoint near step {first.step}: load_best_model_at_end=True keeps it (with save_strategy equal to "
        "eval_strategy). Or train for fewer steps, at a lower learning rate, with a larger beta, or on more pairs.",
        first.step,
        first.last_step,
    )


def loss_does_not_move(history: History, facts: Facts) -> Diagnosis | None:
    """The training loss ends where it began, and so do the margins.

    Fires where the means of the loss's beginning and end differ by no more than `STILL` of the first, or than
    `WITHIN_NOISE` standard errors and `STILL_WITHIN_NOISE` of the first; and those of the margin in training by no more
    than as much of 1.
    """
    loss = change(history.train.get("loss", EMPTY).finite)
    margin = change(history.train.get("rewards/margins", EMPTY).finite)
    if loss is None or _moves(loss, abs(loss.first)) or (margin is not None and _moves(margin, 1.0)):
        return None
    rate = facts.config.get("learning_rate")
    told = f" The learning rate is {number(rate)}." if isinstance(rate, (int, float)) else ""
    return Diagnosis(
        "loss_does_not_move",
        "problem",
        "The loss does not move",
        f"The training loss was {number(loss.first, 4)} around step {loss.begin} and is {number(loss.last, 4)} around "
        f"step {loss.end}.{told}",
        "Raise the learning rate (LoRA adapters take about ten times that of full weights), train longer, and see in "
        "the gradient norms by node that something is trained.",
        loss.begin,
        loss.end,
    )


def _moves(series: Change, scale: float) -> bool:
    still = max(STILL * scale, min(WITHIN_NOISE * series.error, STILL_WITHIN_NOISE * scale))
    return abs(series.difference) > still


def loss_rises(history: History, facts: Facts) -> Diagnosis | None:
    """The training loss ends above where it began: steps lead away from the preference.

    Fires where the mean of its end is above that of its beginning by more than `STILL` of that and `BEYOND_NOISE`
    standard errors.
    """
    loss = change(history.train.get("loss", EMPTY).finite)
    if loss is None or loss.difference <= max(STILL * abs(loss.first), BEYOND_NOISE * loss.error):
        return None
    return Diagnosis(
        "loss_rises",
        "problem",
        "The loss rises",
        f"The training loss was {number(loss.first, 4)} around step {loss.begin} and is {number(loss.last, 4)} around "
        f"step {loss.end}.",
        "Lower the learning rate, add warm-up, and clip gradients (max_grad_norm). If it rises from the first step on, "
        "see that nothing changes between steps but the weights (dropout), and what the weights of a mixed loss_type "
        "pull at.",
        loss.begin,
        loss.end,
    )


def too_easy(history: History, facts: Facts) -> Diagnosis | None:
    """Every pair is won and margins are huge: the pairs tell themselves apart.

    Fires where the last values of `rewards/accuracies` have a mean of at least `EASY_ACCURACY` and those of
    `rewards/margins` of at least `EASY_MARGIN`.
    """
    accuracy, margin = end_of(history, "rewards/accuracies"), end_of(history, "rewards/margins")
    if accuracy is None or margin is None or accuracy.mean < EASY_ACCURACY or margin.mean < EASY_MARGIN:
        return None
    return Diagnosis(
        "too_easy",
        "warning",
        "The preference is too easy",
        f"Between step {accuracy.begin} and step {accuracy.end} the accuracy {accuracy.split} is "
        f"{number(accuracy.mean)} and the mean margin {number(margin.mean)}: nothing is left to learn from these "
        "pairs, and margins only grow.",
        "Look for what gives winners away (length, format, an empty or truncated loser), and for pairs that are in "
        "training and evaluation alike. Make pairs that are closer, or stop earlier; a larger beta holds models back.",
        accuracy.begin,
        accuracy.end,
    )
