"""Losses of single runs with a label, desirable or not, as pure functions of a few tensors.

Names, constants and formulas are those of TRL 1.16's `KTOTrainer`, and of its `BCOTrainer` where that was. In the
formulas r is the reward of a run, beta (log p - log q) of the whole system: the sum over nodes for Direct, of the
candidates' log-sum for Sampling. Each pushes r up where the run is desirable and down where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sysdag.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """What a loss sees of R unpaired runs, on the CPU.

    Attributes:
        rewards: (R,) implicit rewards, sum over nodes of beta_i (log p_i - log q_i), in nats times beta.
        desirable: (R,) their labels.
        kl: () beta times the KL divergence of policy and reference, 0 or more, as `kto` estimates it by runs that are
            mismatched with their inputs; without a gradient. None where no loss asks for it.
        shift: () the mean of all rewards that training has seen, as `bco` keeps it; without a gradient. None likewise.
    """

    rewards: Float[Tensor, " R"]
    desirable: Bool[Tensor, " R"]
    kl: Float[Tensor, ""] | None = None
    shift: Float[Tensor, ""] | None = None

    @property
    def signs(self) -> Float[Tensor, " R"]:
        """1 where the run is desirable, -1 where it is not."""
        return torch.where(self.desirable, 1.0, -1.0).to(self.rewards)

    def known(self, name: str) -> Float[Tensor, ""]:
        """`kl` or `shift`.

        Raises:
            PlanError: where it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise PlanError(f"The scores of these runs were made without {name}, which the loss needs.")
        return value


def kto_loss(scores: RunScores) -> Float[Tensor, " R"]:
    """1 - sigmoid(r - z) of desirable runs, 1 - sigmoid(z - r) of others, with z the KL term, `RunScores.kl` (KTO,
    Ethayarajh et al. 2024, arXiv 2402.01306, equation 7)."""
    return (-scores.signs * (scores.rewards - scores.known("kl"))).sigmoid()


def apo_zero_unpaired_loss(scores: RunScores) -> Float[Tensor, " R"]:
    """1 - sigmoid(r) of desirable runs, sigmoid(r) of others (APO, D'Oosterlinck et al. 2024, arXiv 2408.06266,
    equation 7, each side by itself)."""
    return (-scores.signs * scores.rewards).sigmoid()


def bco_loss(scores: RunScores) -> Float[Tensor, " R"]:
    """-log sigmoid(r - d) of desirable runs, -log sigmoid(d - r) of others, with d the running shift (BCO, Jung et al.
    2024, arXiv 2404.04656): the classifier of `bco_pair` around the mean reward."""
    return -F.logsigmoid(scores.signs * (scores.rewards - scores.known("shift")))


UNPAIRED_LOSSES: dict[str, Callable[[RunScores], Float[Tensor, " R"]]] = {
    "kto": kto_loss,
    "apo_zero_unpaired": apo_zero_unpaired_loss,
    "bco": bco_loss,
}
NEEDS_KL = "kto"
NEEDS_SHIFT = "bco"


def zero_point(scores: RunScores, loss_type: str) -> Float[Tensor, ""]:
    """The reward that a loss tells desirable runs from others by."""
    of = {NEEDS_KL: "kl", NEEDS_SHIFT: "shift"}
    return scores.known(of[loss_type]) if loss_type in of else scores.rewards.new_zeros(())


def split_sides(name: str, values: Float[Tensor, " R"], desirable: Bool[Tensor, " R"]) -> dict[str, Tensor]:
    """Values of runs as two columns, `<name>/chosen` and `<name>/rejected`, nan for the runs of the other label."""
    nothing = torch.full_like(values.detach(), torch.nan)
    return {
        f"{name}/chosen": torch.where(desirable, values.detach(), nothing),
        f"{name}/rejected": torch.where(desirable, nothing, values.detach()),
    }


def run_losses(
    scores: RunScores,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " R"]:
    """Weighted sum of the named losses of each run, times what its label weighs.

    Raises:
        KeyError: for a name that is not in `UNPAIRED_LOSSES`.
        PlanError: for a loss whose KL term or shift is not known.
    """
    total = torch.zeros_like(scores.rewards)
    for name, weight in zip(loss_types, loss_weights, strict=True):
        total = total + weight * UNPAIRED_LOSSES[name](scores)
    weights = total.new_tensor([undesirable_weight, desirable_weight])
    return total * weights[scores.desirable.long()]
