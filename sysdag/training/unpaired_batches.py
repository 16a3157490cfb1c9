"""What a training on unpaired runs asks of its data: what they are mismatched with, and how many of either label."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sysdag.data.preferences import Feedback, UnpairedRun, mismatched
from sysdag.errors import DataError, PlanError
from sysdag.objectives.options import ObjectiveOptions
from sysdag.training.config import SysDPOConfig

logger = logging.getLogger(__name__)
_ENOUGH = 1.33  # times as much as the other label's, at most: equation 8 of arXiv 2402.01306


def check_unpaired(args: SysDPOConfig) -> None:
    """Refuses batches that the KL term of `kto` cannot be estimated on.

    Raises:
        PlanError: naming the option.
    """
    if not args.objective_options().needs_kl:
        return
    if args.per_device_train_batch_size < 2:
        raise PlanError(
            "loss_type 'kto' estimates a KL divergence by runs that are mismatched within their batch, and of a batch "
            "of one the estimate would be its own reward: per_device_train_batch_size must be 2 or more."
        )
    if args.precompute_ref_log_probs and not _is_in_order(args):
        raise PlanError(
            "precompute_ref_log_probs with loss_type 'kto': which runs are mismatched has to be known before training, "
            "and shuffling decides it batch by batch. Set train_sampling_strategy='sequential', as TRL's KTOTrainer "
            "does, on rows in random order; or leave precompute_ref_log_probs out."
        )


def _is_in_order(args: SysDPOConfig) -> bool:
    return str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)) == "sequential"


def fix_mismatches(args: SysDPOConfig, name: str, runs: Sequence[Feedback]) -> list[Feedback]:
    """Runs whose order stays, with what each is mismatched with for good; others as they are.

    As TRL's `KTOTrainer` does it, evaluation data included: within parts of `per_device_train_batch_size` rows. A last
    one that is alone in its part takes the run before it, where TRL would take its own.

    Args:
        name: `train_dataset` or `eval_dataset`.

    Raises:
        DataError: for a single run.
    """
    if not args.objective_options().needs_kl or (name == "train_dataset" and not _is_in_order(args)):
        return list(runs)
    own = [run for run in runs if isinstance(run, UnpairedRun)]  # all of them: others were refused
    size = args.per_device_train_batch_size
    found: list[Feedback] = []
    for start in range(0, len(own), size):
        part = own[start : start + size]
        found += mismatched(part, _before(own, start) if len(part) == 1 else None)
    alike = sum(_asks_the_same(other) for other in itertools.pairwise([own[-1], *own]))
    if 2 * alike > len(own):
        logger.warning(
            "%s: %d of %d rows stand behind one with the same inputs, so what kto mismatches belongs to them after all "
            "and its KL term is too high. Put the rows in random order.", name, alike, len(own),
        )  # fmt: skip
    return found


def _asks_the_same(runs: tuple[UnpairedRun, UnpairedRun]) -> bool:
    first, second = (replace(run, run={}).key for run in runs)
    return first == second


def _before(runs: Sequence[UnpairedRun], place: int) -> UnpairedRun:
    if len(runs) < 2:
        raise DataError("loss_type 'kto' mismatches runs with each other's inputs, and there is one row; it needs two.")
    return runs[place - 1]


class Batches:
    """Puts a batch together: rows as they are; one that is alone, where `kto` needs two, with a mismatch of the data's.

    Args:
        options: of the objective.
        runs: all that are trained on.
    """

    def __init__(self, options: ObjectiveOptions, runs: Any) -> None:
        alone = options.needs_kl and isinstance(runs, list) and bool(runs)
        self._runs: list[UnpairedRun] = runs if alone else []
        if alone:
            _before(self._runs, 0)

    def __call__(self, rows: list[Feedback]) -> dict[str, Any]:
        run = rows[0]
        if len(rows) > 1 or not self._runs or not isinstance(run, UnpairedRun) or run.mismatched is not None:
            return {"pairs": rows}
        place = next(place for place, each in enumerate(self._runs) if each is run or each.key == run.key)
        return {"pairs": mismatched([run], _before(self._runs, place))}


def warn_if_uneven(options: ObjectiveOptions, runs: Sequence[Feedback]) -> None:
    """Says which weights would even out unequal numbers of labels, where the given ones do not.

    KTO's range: desirable runs in all weigh 1 to 4/3 times as much as the others (equation 8 of arXiv 2402.01306).
    """
    if not options.is_unpaired:
        return
    good = sum(isinstance(run, UnpairedRun) and run.label for run in runs)
    bad = len(runs) - good
    if good == bad:
        return
    if not good or not bad:
        logger.warning(
            "All %d rows are %s, so the losses have nothing to tell them from: rewards move one way, whatever was run.",
            len(runs), "desirable" if good else "undesirable",
        )  # fmt: skip
        return
    ratio = options.desirable_weight * good / (options.undesirable_weight * bad) if options.undesirable_weight else 0.0
    if not 1 <= round(ratio, 2) <= _ENOUGH:
        least = options.undesirable_weight * bad / good
        most = options.desirable_weight * good / bad
        logger.warning(
            "%d rows are desirable and %d are not. KTO recommends that the former weigh 1 to 4/3 times as much in all: "
            "desirable_weight of %.2f to %.2f, or undesirable_weight of %.2f to %.2f.",
            good, bad, least, least * _ENOUGH, most / _ENOUGH, most,
        )  # fmt: skip
