"""Sums over the candidates of a prompt, their weights, and what the sums say of the likelihood.

SysDPO-Sampling (arXiv 2502.17721) estimates log p(z|x) by log p-hat(z|x), the log-sum over candidates of their joint
with z.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
