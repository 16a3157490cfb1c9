"""Drawing from logits: truncation, and draws that depend on a row's seed and the position in it alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sysdag.components.random_streams import uniforms
from sysdag.errors import DataError, PlanError

_BLOCK = 128  # options of a block: near the root of a large vocabulary, so that few random numbers are needed
_AT_ONCE = 1 << 22  # logits: bounds what a draw needs beside them
_TOP = 512  # most probable options that a nucleus is looked for in, before all of them are sorted


def check_truncation(owner: str, temperature: Any, top_p: Any, top_k: Any) -> None:
    """Raises a PlanError for options of sampling that are out of range; None is left to whoever draws."""
    if (temperature is not None and not temperature > 0) or (top_p is not None and not 0 < top_p <= 1):
        raise PlanError(f"{owner} needs temperature > 0 and 0 < top_p <= 1, got {temperature} and {top_p}.")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0):
        raise PlanError(f"{owner} needs a top_k of 1 or more tokens, or 0 or None for all, got {top_k!r}.")


def truncated(
    logits: Float[Tensor, "B V"], temperature: float, top_p: float, top_k: int | None = None
) -> Float[Tensor, "B V"]:
    """Logits over temperature, those outside the top-k and the nucleus (Holtzman et al. 2020, arXiv 1904.09751) -inf.

    In this order, as in transformers: the nucleus is one of the `top_k` tokens that are left, whose probabilities sum
    to 1. Tokens as probable as the last of them stay, too.
    """
    logits = logits if temperature == 1.0 else logits / temperature
    if top_k and top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    return logits if top_p >= 1.0 else _nucleus(logits, top_p, min(_TOP, logits.shape[-1]))


def _nucleus(logits: Float[Tensor, "B V"], top_p: float, most: int) -> Float[Tensor, "B V"]:
    """The logits of the fewest options whose probabilities reach `top_p`, looked for among the `most` likeliest."""
    ordered, order = logits.topk(most, dim=-1)
    probs = (ordered - logits.logsumexp(-1, keepdim=True)).exp().double()
    inside = probs.cumsum(-1) - probs < top_p
    found = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(~inside, -torch.inf))
    open_ = inside[:, -1].nonzero()[:, 0]
    if most < logits.shape[-1] and len(open_):
        found[open_] = _nucleus(logits[open_], top_p, min(16 * most, logits.shape[-1]))
    return found


def draw_options(
    logits: Float[Tensor, "B V"],
    seeds: Int[Tensor, " B"],
    positions: Int[Tensor, " B"],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """One option of each row, with its log-probability after truncation (see `truncated`).

    The first arrival of a race of exponentials has the odds of their rates. First the blocks of options race, at the
    rates of their sums, then the options of the block that won. So a row takes about two roots of V random numbers; and
    rounding of the logits matters where two arrivals are as near to each other, not at each bound of a cumulated sum.

    Returns:
        options and log-probabilities, fp64.

    Raises:
        DataError: naming the first element whose logits give no distribution: nan, +inf, or none above -inf.
    """
    step = max(1, _AT_ONCE // logits.shape[-1])
    parts = []
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        left = truncated(logits[rows].float(), temperature, top_p, top_k)
        parts.append(_race(left, seeds[rows], positions[rows]))
    chosen, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
    good = log_probs.isfinite()
    if not good.all():
        element = int((~good).nonzero()[0, 0])
        raise DataError("the model's logits are not finite: nothing can be drawn from them.", element=element)
    return chosen, log_probs


def first_undrawable(logits: Float[Tensor, "B V"], least: int = 1) -> int | None:
    """The first row of which `least` options cannot be drawn: it has a nan or +inf, or too few above -inf."""
    good = (logits < torch.inf).all(-1) & ((logits > -torch.inf).sum(-1) >= least)  # a nan is neither
    return None if good.all() else int((~good).nonzero()[0, 0])


def _race(logits: Float[Tensor, "B V"], seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    rows, options = logits.shape
    blocks = -(-options // _BLOCK)
    peak = logits.amax(-1, keepdim=True)
    weights = logits.new_zeros(rows, blocks * _BLOCK)
    torch.sub(logits, peak, out=weights[:, :options]).exp_()
    weights = weights.unflatten(-1, (blocks, _BLOCK))
    sums = weights.sum(-1).double()
    arrivals = -uniforms(seeds, positions, blocks + _BLOCK).log()
    block = (arrivals[:, :blocks] / sums).argmin(-1)
    rates = weights[torch.arange(rows, device=logits.device), block].double()
    chosen = block * _BLOCK + (arrivals[:, blocks:] / rates).argmin(-1)
    chosen = chosen.clamp(max=options - 1)  # of a row without a distribution, whose log-probability says so
    log_probs = (logits.gather(1, chosen[:, None]) - peak)[:, 0].double() - sums.sum(-1).log()
    return chosen, log_probs
