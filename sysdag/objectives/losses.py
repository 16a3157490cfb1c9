"""Preference objectives as pure functions of a few tensors: no graph, no models.

SysDPO (arXiv 2502.17721) puts the whole system inside one sigmoid: the margin is the sum over nodes of
beta_i (log p_i - log q_i), winner minus loser. The loss functions are those of the DPO literature on that margin, and
on the rewards of its two sides; names and constants are those of TRL 1.16.

In their formulas c and r are the rewards of winner and loser, m = c - r the margin (less the pair's own, where the data
give one), P_c and P_r the policy's parts of the rewards, |c| and |r| the lengths, and e the label smoothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sysdag.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """What a loss sees of P preference pairs, on the CPU.

    Attributes:
        chosen_rewards, rejected_rewards: (P,) implicit rewards, sum over nodes of beta_i (log p_i - log q_i), in nats
            times beta.
        chosen_lengths, rejected_lengths: (P,) number of terms in the log-likelihoods: scored tokens, plus 1 for each
            draw that is no text. For Sampling, whose likelihood is of the outputs, those of the outputs.
        chosen_nll: (P,) negative log-likelihood of the chosen runs, times P over the number of their terms: the mean is
            that for each term over the batch, as TRL has it, summed over nodes. Or one number for all, ().
        chosen_policy, rejected_policy: (P,) the policy's part of the rewards, sum over nodes of beta_i log p_i; None
            where it is not known apart (of a bound only the difference to a reference is).
        target: (P,) by how much the winner's reward should exceed the loser's, from a `margin` column; None for 0.
    """

    chosen_rewards: Float[Tensor, " P"]
    rejected_rewards: Float[Tensor, " P"]
    chosen_lengths: Float[Tensor, " P"]
    rejected_lengths: Float[Tensor, " P"]
    chosen_nll: Float[Tensor, " *P"]
    chosen_policy: Float[Tensor, " P"] | None = None
    rejected_policy: Float[Tensor, " P"] | None = None
    target: Float[Tensor, " P"] | None = None

    @property
    def margins(self) -> Float[Tensor, " P"]:
        """What a loss compares with 0: chosen minus rejected reward, less the pair's own margin."""
        return self._beyond_target(self.chosen_rewards - self.rejected_rewards)

    def _beyond_target(self, difference: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        return difference if self.target is None else difference - self.target

    def policies(self) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """The policy's parts of the rewards.

        Raises:
            PlanError: where they are not known.
        """
        if self.chosen_policy is None or self.rejected_policy is None:
            raise PlanError("The policy's part of the rewards is not known apart from the reference's.")
        return self.chosen_policy, self.rejected_policy


def _smoothed(margins: Float[Tensor, " P"], e: float) -> Float[Tensor, " P"]:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m)."""
    return -(1 - e) * F.logsigmoid(margins) - e * F.logsigmoid(-margins) if e else -F.logsigmoid(margins)


def sigmoid_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """-log sigmoid(m) (Rafailov et al. 2023, arXiv 2305.18290); with smoothing e, cDPO:
    -(1 - e) log sigmoid(m) - e log sigmoid(-m)."""
    return _smoothed(scores.margins, label_smoothing)


def robust_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """Unbiased under labels flipped with probability e (Chowdhury et al. 2024, arXiv 2403.00409):
    (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2e)."""
    margins = scores.margins
    clean, flipped = -F.logsigmoid(margins), -F.logsigmoid(-margins)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """max(0, 1 - m) (SLiC, Zhao et al. 2023, arXiv 2305.10425)."""
    return torch.relu(1 - scores.margins)


def ipo_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """(d - 1 / (2 beta))^2 with d the difference of length-averaged log-ratios (Azar et al. 2023, arXiv 2310.12036).

    As in TRL, log-ratios are averaged over their terms. A node's own beta_i enters as the weight beta_i / beta.
    """
    return (_average_difference(scores) / beta - 1 / (2 * beta)) ** 2


def sigmoid_norm_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """-log sigmoid(c/|c| - r/|r|): length-normalised DPO (Lambert et al. 2024, arXiv 2411.15124)."""
    return -F.logsigmoid(_average_difference(scores))


def _average_difference(scores: PairScores) -> Float[Tensor, " P"]:
    chosen = scores.chosen_rewards / scores.chosen_lengths.clamp(min=1)
    return chosen - scores.rejected_rewards / scores.rejected_lengths.clamp(min=1)


def exo_pair_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """KL(softmax(c, r) || (1 - e, e)), the reverse KL to smoothed labels, e > 0 (EXO, Ji et al. 2024, arXiv 2402.00856,
    equation 16); the paper's e is 1e-3."""
    margins, e = scores.margins, torch.tensor(label_smoothing, dtype=torch.float64, device=scores.margins.device)
    chosen = margins.sigmoid() * (F.logsigmoid(margins) - float(torch.log1p(-e)))
    return chosen + (-margins).sigmoid() * (F.logsigmoid(-margins) - float(e.log()))


def nca_pair_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """-log sigmoid(c) - (log sigmoid(-c) + log sigmoid(-r)) / 2 (Chen et al. 2024, arXiv 2402.05369)."""
    chosen, rejected = scores.chosen_rewards, scores.rejected_rewards
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """-log sigmoid(c) - log sigmoid(-r): a binary classifier of the sides, without a shift of the rewards (Jung et al.
    2024, arXiv 2404.04656)."""
    return -F.logsigmoid(scores.chosen_rewards) - F.logsigmoid(-scores.rejected_rewards)


def sppo_hard_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """(c/beta - 1/(2 beta))^2 + (r/beta + 1/(2 beta))^2: SPPO with probabilities of winning of 1 and 0 (Wu et al. 2024,
    arXiv 2405.00675). A node's own beta_i enters as the weight beta_i / beta."""
    return ((scores.chosen_rewards - 0.5) / beta) ** 2 + ((scores.rejected_rewards + 0.5) / beta) ** 2


def aot_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """Smoothed -log sigmoid of sort(P_c - P_r) - sort(Q_c - Q_r), policy and reference each sorted over the batch: the
    policy's log-ratios are to dominate the reference's stochastically (AOT, Melnyk et al. 2024, arXiv 2406.05882)."""
    chosen, rejected = scores.policies()
    reference = ((chosen - scores.chosen_rewards) - (rejected - scores.rejected_rewards)).detach()
    return _smoothed((chosen - rejected).sort().values - reference.sort().values, label_smoothing)


def aot_unpaired_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """Smoothed -log sigmoid of sort(c) - sort(r), each over the batch (arXiv 2406.05882, unpaired)."""
    return _smoothed(scores.chosen_rewards.sort().values - scores.rejected_rewards.sort().values, label_smoothing)


def apo_zero_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """1 - sigmoid(c) + sigmoid(r): for winners that are better than the model (APO, D'Oosterlinck et al. 2024, arXiv
    2408.06266, equation 7)."""
    return (-scores.chosen_rewards).sigmoid() + scores.rejected_rewards.sigmoid()


def apo_down_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """sigmoid(c) + 1 - sigmoid(c - r): for winners that are worse than the model (arXiv 2408.06266, equation 8)."""
    return scores.chosen_rewards.sigmoid() + (scores.rejected_rewards - scores.chosen_rewards).sigmoid()


def discopop_loss(
    scores: PairScores, beta: float, label_smoothing: float, *, discopop_tau: float = 0.05
) -> Float[Tensor, " P"]:
    """-log sigmoid(m) (1 - s) + exp(-m) s with s = sigmoid(m / tau) (DiscoPOP, Lu et al. 2024, arXiv 2406.08414,
    equation 5)."""
    margins = scores.margins
    logistic = -F.logsigmoid(margins) * (-margins / discopop_tau).sigmoid()
    return logistic + (F.logsigmoid(margins / discopop_tau) - margins).exp()


def simpo_loss(
    scores: PairScores, beta: float, label_smoothing: float, *, simpo_gamma: float = 0.5
) -> Float[Tensor, " P"]:
    """Smoothed -log sigmoid(P_c/|c| - P_r/|r| - gamma), without a reference (SimPO, Meng et al. 2024, arXiv
    2405.14734); TRL's `CPOTrainer` with `loss_type="simpo"` and `cpo_alpha=0`."""
    chosen, rejected = scores.policies()
    difference = chosen / scores.chosen_lengths.clamp(min=1) - rejected / scores.rejected_lengths.clamp(min=1)
    return _smoothed(scores._beyond_target(difference - simpo_gamma), label_smoothing)


def cpo_loss(scores: PairScores, beta: float, label_smoothing: float, *, cpo_alpha: float = 1.0) -> Float[Tensor, " P"]:
    """Smoothed -log sigmoid(P_c - P_r) + alpha NLL(chosen), without a reference (CPO, Xu et al. 2024, arXiv
    2401.08417); the likelihood is averaged as in `sft_loss`."""
    chosen, rejected = scores.policies()
    return _smoothed(scores._beyond_target(chosen - rejected), label_smoothing) + cpo_alpha * scores.chosen_nll


def sft_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """Negative log-likelihood of the chosen runs for each term: over the batch's tokens as in TRL, for each node."""
    return scores.chosen_nll.expand_as(scores.chosen_rewards)


Loss = Callable[..., Float[Tensor, " P"]]
"""`loss(scores, beta, label_smoothing)`, with its constants behind, if any."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is asked of a loss before it is computed.

    Attributes:
        smooths: whether it makes use of `label_smoothing`.
        takes_margins: whether a pair's own margin enters it.
        compares_pairs: whether a pair's loss depends on the others of its batch (it sorts them).
        needs_reference: whether it has a reference at all.
        needs_policy: whether it looks at the policy's part of the rewards apart.
        needs_tokens: whether it divides by lengths, so that every node whose likelihood counts must have tokens.
        constants: its own options, by name with their defaults.
    """

    smooths: bool = False
    takes_margins: bool = False
    compares_pairs: bool = False
    needs_reference: bool = True
    needs_policy: bool = False
    needs_tokens: bool = False
    constants: tuple[str, ...] = ()


LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "sft": sft_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
}
KINDS: dict[str, Kind] = {
    "sigmoid": Kind(smooths=True, takes_margins=True),
    "ipo": Kind(),
    "hinge": Kind(takes_margins=True),
    "robust": Kind(smooths=True, takes_margins=True),
    "sft": Kind(),
    "exo_pair": Kind(smooths=True, takes_margins=True),
    "nca_pair": Kind(),
    "bco_pair": Kind(),
    "sppo_hard": Kind(),
    "aot": Kind(smooths=True, compares_pairs=True, needs_policy=True),
    "aot_unpaired": Kind(smooths=True, compares_pairs=True),
    "apo_zero": Kind(),
    "apo_down": Kind(),
    "discopop": Kind(takes_margins=True, constants=("discopop_tau",)),
    "sigmoid_norm": Kind(needs_tokens=True),
    "simpo": Kind(
        smooths=True, takes_margins=True, needs_reference=False, needs_policy=True, needs_tokens=True,
        constants=("simpo_gamma",),
    ),
    "cpo": Kind(
        smooths=True, takes_margins=True, needs_reference=False, needs_policy=True, constants=("cpo_alpha",)
    ),
}  # fmt: skip


def pair_losses(
    scores: PairScores,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    *,
    beta: float,
    label_smoothing: float,
    constants: Mapping[str, float] | None = None,
) -> Float[Tensor, " P"]:
    """Weighted sum of the named losses of each pair.

    Args:
        constants: of the losses that have any (`Kind.constants`), by name; those that are missing have their defaults.

    Raises:
        KeyError: for a name that is not in `LOSSES`.
        PlanError: for a loss that does not return one number a pair.
    """
    shape = scores.chosen_rewards.shape
    weighted = []
    for name, weight in zip(loss_types, loss_weights, strict=True):
        own = {key: (constants or {})[key] for key in KINDS[name].constants if key in (constants or {})}
        loss = LOSSES[name](scores, beta, label_smoothing, **own)
        if not isinstance(loss, Tensor) or loss.shape != shape:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"loss_type {name!r} must return one loss a pair, shape {tuple(shape)}, got {got}.")
        weighted.append(loss if weight == 1 else weight * loss)
    return functools.reduce(operator.add, weighted)


def preference_loss(
    scores: PairScores,
    loss_types: Sequence[str],
    loss_weights: Sequence[float],
    *,
    beta: float,
    label_smoothing: float,
    constants: Mapping[str, float] | None = None,
) -> Float[Tensor, ""]:
    """Weighted sum of the named losses, averaged over pairs; see `pair_losses`."""
    return pair_losses(
        scores, loss_types, loss_weights, beta=beta, label_smoothing=label_smoothing, constants=constants
    ).mean()
