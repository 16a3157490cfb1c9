"""Ordered choices without replacement: the Plackett-Luce distribution (Plackett 1975; Luce 1959).

p(c_1, ..., c_k) is the product over i of exp(s_{c_i}) / sum of exp(s_j) over the options j that are left. With k = 1
it is the softmax.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sysdag.components.decoding import draw_options
from sysdag.components.random_streams import uniforms


def step_logits(logits: Float[Tensor, "B n"], chosen: Int[Tensor, "B k"]) -> Iterator[Float[Tensor, "B n"]]:
    """Before each step, the logits with those of the options taken already at -inf.

    Args:
        logits: -inf for what is no option.
        chosen: the options in the order in which they are taken.
    """
    for step in range(chosen.shape[1]):
        yield logits
        if step + 1 < chosen.shape[1]:
            logits = logits.scatter(1, chosen[:, step : step + 1], -torch.inf)


def log_prob(logits: Float[Tensor, "B n"], chosen: Int[Tensor, "B k"]) -> Float[Tensor, " B"]:
    """Natural logarithm of the probability of each ordered choice.

    Args:
        logits: -inf for what is no option.
        chosen: different options of each row.
    """
    picked = logits.gather(1, chosen)
    left = torch.stack([remaining.logsumexp(-1) for remaining in step_logits(logits, chosen)], 1)
    return (picked - left).sum(1)


def typicality(logits: Float[Tensor, "B n"], chosen: Int[Tensor, "B k"]) -> Float[Tensor, " B"]:
    """Sum over the steps of log p - log sum_v p(v)^2, of the distribution at each (see `Component.typicality`)."""
    steps = [remaining.log_softmax(-1) for remaining in step_logits(logits, chosen)]
    scale = torch.stack([(2 * log_probs).logsumexp(-1) for log_probs in steps], 1)
    return log_prob(logits, chosen) - scale.sum(1)


def gumbel_top_k(logits: Float[Tensor, "B n"], k: int, seeds: Int[Tensor, " B"]) -> Int[Tensor, "B k"]:
    """An ordered choice of each row: the k largest of logits plus Gumbel noise (Kool et al. 2019, arXiv 1903.06059).

    The noise of an option depends on its row's seed and its place alone, and on no padding behind the row.
    """
    noise = -(-uniforms(seeds, torch.zeros_like(seeds), logits.shape[1]).log()).log()
    return (logits.double() + noise).topk(k, dim=-1).indices


def truncated_top_k(
    logits: Float[Tensor, " n"], k: int, seed: int, temperature: float, top_p: float, top_k: int | None
) -> tuple[list[int], float]:
    """An ordered choice whose every step is truncated anew (see `sysdag.components.decoding.truncated`).

    Returns:
        the options and the log-probability that they were drawn with.
    """
    left, chosen, total = logits[None], list[int](), 0.0
    for step in range(k):
        place = torch.tensor([step], device=logits.device)
        found, log_probs = draw_options(
            left, torch.tensor([seed], device=logits.device), place, temperature=temperature, top_p=top_p, top_k=top_k
        )
        chosen.append(int(found))
        total += float(log_probs)
        left = left.index_fill(1, found, -torch.inf)
    return chosen, total


def count(options: int, k: int) -> int:
    """How many ordered choices there are."""
    return math.perm(options, k)


def every(options: int, k: int) -> list[tuple[int, ...]]:
    """All ordered choices."""
    return list(itertools.permutations(range(options), k))


def best(logits: Sequence[float], k: int, most: int) -> list[tuple[int, ...]]:
    """The most probable ordered choices, at most so many, best first; of equal ones those of earlier options.

    Whatever is fixed, taking the largest of what is left at each further step is the most probable completion: to
    exchange a larger logit forward lowers every denominator. So the best one of each part of all choices is known, and
    parts are opened in the order of theirs (Lawler 1972). Choices of probability 0 are left out.
    """
    order = sorted((place for place, logit in enumerate(logits) if logit > -math.inf), key=lambda at: -logits[at])
    if len(order) < k:
        return []

    def completed(prefix: tuple[int, ...], without: frozenset[int]) -> tuple[float, tuple[int, ...]] | None:
        left = [option for option in order if option not in prefix]
        first = next((option for option in left if option not in without), None)
        if first is None:
            return None
        rest = [option for option in left if option != first][: k - len(prefix) - 1]
        whole = (*prefix, first, *rest)
        return _log_prob(logits, whole), whole

    start = completed((), frozenset())
    assert start is not None
    rank = {option: place for place, option in enumerate(order)}
    waiting = [(-start[0], [rank[o] for o in start[1]], start[1], 0, frozenset[int]())]
    found: list[tuple[int, ...]] = []
    while waiting and len(found) < most:
        _, _, whole, fixed, without = heapq.heappop(waiting)
        found.append(whole)
        for place in range(fixed, k):
            taken = frozenset({whole[place]}) | (without if place == fixed else frozenset())
            other = completed(whole[:place], taken)
            if other is not None:
                heapq.heappush(waiting, (-other[0], [rank[o] for o in other[1]], other[1], place, taken))
    return found


def _log_prob(logits: Sequence[float], chosen: Sequence[int]) -> float:
    left, total = dict(enumerate(logits)), 0.0
    for option in chosen:
        peak = max(left.values())
        whole = math.fsum(math.exp(logit - peak) for logit in left.values())
        total += logits[option] - peak - math.log(whole)
        del left[option]
    return total
