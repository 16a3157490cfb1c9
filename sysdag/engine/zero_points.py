"""The rewards that unpaired losses tell desirable runs from others by: the KL term of `kto`, the shift of `bco`.

Both are estimated over the batches of all processes and have no gradient.

`kto` compares a reward with beta KL(policy || reference). As TRL's `KTOTrainer` does, the divergence is estimated by
runs that have nothing to do with their inputs: the mean log-ratio of *mismatched* runs, at least 0. Of a whole system,
a mismatched run has the inputs of one row and all observed values of the row before it in the batch; of the first that
of the last. So for Direct every node is scored, under the parents that these values and inputs make; for Sampling the
output is, summed over the candidates of its new inputs, the same ones that the row's own output is summed over, so that
what candidates leave out is missing on both sides of the difference r - z.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.data.preferences import UnpairedRun, mismatched
from sysdag.engine.distributed import added_up
from sysdag.engine.scored import HOST
from sysdag.engine.scoring import score
from sysdag.errors import PlanError, SysdagError
from sysdag.objectives.comparison import Comparison, Generators
from sysdag.objectives.unpaired_losses import RunScores

if TYPE_CHECKING:
    from sysdag.engine.step import SystemModel


@torch.no_grad()
def kl_term(
    model: SystemModel, runs: Sequence[UnpairedRun], comparison: Comparison, generator: Generators
) -> Float[Tensor, ""]:
    """beta KL(policy || reference) as `kto` estimates it; nodes with betas of their own enter by these.

    Args:
        runs: of the batch. Those without a mismatched run get it of each other.
        comparison: of the same runs.
        generator: as that of the comparison.

    Raises:
        PlanError: for one run that is alone.
        SysdagError: where a mismatched run cannot be scored.
    """
    if len(runs) == 1 and runs[0].mismatched is None:
        raise PlanError(
            "loss_type 'kto' mismatches the runs of a batch with each other's inputs, and this batch has one. Give it "
            "two or more."
        )
    others = [run.mismatched for run in mismatched(runs) if run.mismatched is not None]
    with _naming_mismatches():
        if model.stored is not None:
            generator = model.stored.generators(others)
        beside = comparison.beside(others, generator)
        budget = replace(model.budget, keeps_graphs=False)
        scored = score(model.plan, beside.terms, model.reference_of, budget, model.rounds())
        model.budget.max_tokens = min(model.budget.max_tokens, budget.max_tokens)
        model.take_stored(scored, beside.terms, others)
        scores, _ = beside.combine(scored.policy, scored.reference)
    assert isinstance(scores, RunScores)
    total, count = _over_processes(scores.rewards, model.device_of(scored))
    return (total / count).clamp(min=0)


def shift_of(model: SystemModel, scores: RunScores, device: torch.device, *, trains: bool) -> Float[Tensor, ""]:
    """The shift of `bco`, into which the rewards of a batch enter that is trained on.

    Args:
        device: of this process.
    """
    if trains:
        total, count = _over_processes(scores.rewards.detach(), device)
        model.shift.update(float(total), float(count))
    return scores.rewards.detach().new_tensor(model.shift.mean)


def _over_processes(rewards: Float[Tensor, " R"], device: torch.device) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sum of rewards over processes, and how many they are."""
    # In one dtype, whatever the nodes' are that the runs of this process took.
    sums = torch.tensor([float(rewards.sum()), len(rewards)], dtype=torch.float64, device=HOST)
    total, count = added_up(sums, device).to(rewards.dtype)
    return total, count


@contextlib.contextmanager
def _naming_mismatches() -> Iterator[None]:
    try:
        yield
    except SysdagError as error:
        raise type(error)(
            f"loss_type 'kto', which scores the inputs of each row with the values of the row before it: {error}"
        ) from error
