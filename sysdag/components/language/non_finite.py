"""Where in a text a model's log-probabilities stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def first_non_finite(logits_after: Callable[[Sequence[int]], Tensor], completion: Sequence[int]) -> int | None:
    """The place of the first token of a completion whose log-probability is not finite; None without one.

    Attention multiplies what it masks by 0, so one nan reaches the tokens before it, too: each is asked without those
    behind it, by bisection, since from its source on a nan stays.

    Args:
        logits_after: the logits (V,) of the token that follows the first ones of a completion.
    """

    def is_finite(place: int) -> bool:
        log_probs = logits_after(completion[:place]).float().log_softmax(-1)
        return bool(log_probs[completion[place]].isfinite())

    low, high = 0, len(completion)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_finite(middle) else (low, middle)
    if low == len(completion):
        low = next((place for place in range(low) if not is_finite(place)), low)  # one token alone has none
    return None if low == len(completion) else low
