"""Drawing from logits: truncation, and random numbers that depend on a CPU generator alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.errors import PlanError


def check_truncation(owner: str, temperature: Any, top_p: Any, top_k: Any) -> None:
    """Raises a PlanError for options of sampling that are out of range; None is left to whoever draws."""
    if (temperature is not None and not temperature > 0) or (top_p is not None and not 0 < top_p <= 1):
        raise PlanError(f"{owner} needs temperature > 0 and 0 < top_p <= 1, got {temperature} and {top_p}.")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0):
        raise PlanError(f"{owner} needs a top_k of 1 or more tokens, or 0 or None for all, got {top_k!r}.")


def proposal_log_probs(
    logits: Float[Tensor, "B V"], temperature: float, top_p: float, top_k: int | None = None
) -> Float[Tensor, "B V"]:
    """Log-probabilities after temperature, top-k and nucleus truncation (Holtzman et al. 2020, arXiv 1904.09751).

    In this order, as in transformers: the nucleus is one of the `top_k` tokens that are left, whose probabilities sum
    to 1. Tokens as probable as the last of them stay, too.
    """
    log_probs = (logits / temperature).log_softmax(-1)
    if top_k and top_k < logits.shape[-1]:
        last = log_probs.topk(top_k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < last, -torch.inf).log_softmax(-1)
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    probs = ordered.exp()
    outside = probs.cumsum(-1) - probs >= top_p
    dropped = torch.zeros_like(outside).scatter(-1, order, outside)
    return log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)


def device_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on `device` seeded by the next number of a CPU generator (torch's global one by default)."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed)
