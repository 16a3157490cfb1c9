"""Preference objectives as pure functions of a few tensors: no graph, no models.

SysDPO (arXiv 2502.17721) puts the whole system inside one sigmoid: the margin is the sum over nodes of
beta_i (log p_i - log q_i), winner minus loser. The loss functions are those of the DPO literature on that margin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sysdag.errors import PlanError
from sysdag.graph.import_path import function_path


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """What a loss sees of P preference pairs.

    Attributes:
        chosen_rewards, rejected_rewards: (P,) implicit rewards, sum over nodes of beta_i (log p_i - log q_i), in nats
            times beta.
        chosen_lengths, rejected_lengths: (P,) number of terms in the log-likelihoods: scored tokens, plus 1 for each
            draw that is no text.
        chosen_nll: () negative log-likelihood of the chosen runs for each term, summed over nodes.
    """

    chosen_rewards: Float[Tensor, " P"]
    rejected_rewards: Float[Tensor, " P"]
    chosen_lengths: Float[Tensor, " P"]
    rejected_lengths: Float[Tensor, " P"]
    chosen_nll: Float[Tensor, ""]

    @property
    def margins(self) -> Float[Tensor, " P"]:
        return self.chosen_rewards - self.rejected_rewards


def sigmoid_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """-log sigmoid(m) (Rafailov et al. 2023, arXiv 2305.18290); with smoothing e, cDPO:
    -(1 - e) log sigmoid(m) - e log sigmoid(-m)."""
    margins = scores.margins
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


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
    chosen = scores.chosen_rewards / scores.chosen_lengths.clamp(min=1)
    rejected = scores.rejected_rewards / scores.rejected_lengths.clamp(min=1)
    return ((chosen - rejected) / beta - 1 / (2 * beta)) ** 2


def sft_loss(scores: PairScores, beta: float, label_smoothing: float) -> Float[Tensor, " P"]:
    """Negative log-likelihood of the chosen runs for each term: over the batch's tokens as in TRL, for each node."""
    return scores.chosen_nll.expand_as(scores.chosen_rewards)


Loss = Callable[[PairScores, float, float], Float[Tensor, " P"]]

LOSSES: dict[str, Loss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "sft": sft_loss,
}
SMOOTHED_LOSSES = ["sigmoid", "robust"]


def register_loss(name: str, loss: Loss, *, smoothed: bool = False) -> None:
    """Makes a loss of one's own known, so that `loss_type` can name it like the others.

    Args:
        name: what `loss_type` calls it.
        loss: `loss(scores, beta, label_smoothing)` from `PairScores` of P pairs to a loss for each, (P,),
            differentiable by the scores. beta is the objective's, which the rewards contain already.
        smoothed: whether it makes use of `label_smoothing`, which is refused for losses that do not.

    Raises:
        PlanError: for a name that is taken (by another function: one that is defined again replaces itself), or what
            cannot be called with these three arguments.
    """
    if not isinstance(name, str) or not name:
        raise PlanError(f"register_loss: the name of a loss must be a text that is not empty, got {name!r}.")
    try:
        inspect.signature(loss).bind(None, 0.1, 0.0)
    except (TypeError, ValueError) as error:
        raise PlanError(
            f"register_loss: {name!r} must be a function loss(scores, beta, label_smoothing); {loss!r} cannot be "
            f"called with these three ({error})."
        ) from error
    known = LOSSES.get(name)
    if known is not None and known is not loss:
        path = function_path(loss)
        if path is None or path != function_path(known):
            raise PlanError(f"register_loss: the name {name!r} is taken by {known!r}; choose another.")
    LOSSES[name] = loss
    if name in SMOOTHED_LOSSES:
        SMOOTHED_LOSSES.remove(name)
    if smoothed:
        SMOOTHED_LOSSES.append(name)


def pair_losses(
    scores: PairScores, loss_types: Sequence[str], loss_weights: Sequence[float], *, beta: float, label_smoothing: float
) -> Float[Tensor, " P"]:
    """Weighted sum of the named losses of each pair.

    Raises:
        KeyError: for a name that is not in `LOSSES`.
        PlanError: for a loss that does not return one number a pair.
    """
    margins = scores.margins
    total = torch.zeros_like(margins)
    for name, weight in zip(loss_types, loss_weights, strict=True):
        loss = LOSSES[name](scores, beta, label_smoothing)
        if not isinstance(loss, Tensor) or loss.shape != margins.shape:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"loss_type {name!r} must return one loss a pair, shape {tuple(margins.shape)}, got {got}.")
        total = total + weight * loss
    return total


def preference_loss(
    scores: PairScores, loss_types: Sequence[str], loss_weights: Sequence[float], *, beta: float, label_smoothing: float
) -> Float[Tensor, ""]:
    """Weighted sum of the named losses, averaged over pairs; see `pair_losses`."""
    return pair_losses(scores, loss_types, loss_weights, beta=beta, label_smoothing=label_smoothing).mean()


def candidate_log_sum(joint: Float[Tensor, " M"], prompt: Int[Tensor, " M"], num_prompts: int) -> Float[Tensor, " P"]:
    """log sum over a prompt's candidates of exp(joint): SysDPO-Sampling's estimate of log p(z|x).

    Args:
        joint: log p(y, z|x) of every candidate.
        prompt: the prompt that each candidate belongs to.
        num_prompts: P; a prompt without candidates gets -inf.
    """
    top = joint.new_full((num_prompts,), -torch.inf).scatter_reduce(0, prompt, joint.detach(), "amax")
    shift = top.masked_fill(top.isinf(), 0.0)
    return joint.new_zeros(num_prompts).index_add(0, prompt, (joint - shift[prompt]).exp()).log() + shift


def responsibilities(joint: Float[Tensor, " M"], prompt: Int[Tensor, " M"], num_prompts: int) -> Float[Tensor, " M"]:
    """Softmax of the joint log-probabilities within each prompt: the coefficients of the Sampling gradient."""
    return (joint - candidate_log_sum(joint, prompt, num_prompts)[prompt]).exp()


def effective_sample_size(
    weights: Float[Tensor, " M"], prompt: Int[Tensor, " M"], num_prompts: int
) -> Float[Tensor, " P"]:
    """1 / sum of squared responsibilities (Kish): k when all candidates matter alike, 1 when one has everything."""
    return 1 / weights.new_zeros(num_prompts).index_add(0, prompt, weights**2)


def certificate(
    log_sum: Float[Tensor, " P"], coverage: Float[Tensor, " P"]
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Bounds on log p(z|x) for a discrete z: p-hat <= p(z|x) <= p-hat + (1 - c).

    Args:
        log_sum: log p-hat, the log of the sum of p(y, z|x) over distinct candidates.
        coverage: c, the sum of p(y|x) over the same candidates, at most 1; what is left bounds what was left out.

    Returns:
        The logarithms of the lower and the upper bound.
    """
    return log_sum, torch.logaddexp(log_sum, (1 - coverage).clamp(min=0).log()).clamp(max=0)
