"""Where in a text a model's log-probabilities stop being finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def first_non_finite(model: Any, prompt: Sequence[int], completion: Sequence[int], device: torch.device) -> int | None:
    """The place of the first token of a completion whose log-probability is not finite; None without one.

    Attention multiplies what it masks by 0, so one nan reaches the tokens before it, too: each is asked without those
    behind it, by bisection, since from its source on a nan stays.
    """

    def is_finite(place: int) -> bool:
        ids = torch.tensor([[*prompt, *completion[:place]]], device=device)
        log_probs = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        return bool(log_probs[completion[place]].isfinite())

    low, high = 0, len(completion)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_finite(middle) else (low, middle)
    if low == len(completion):
        low = next((place for place in range(low) if not is_finite(place)), low)  # one token alone has none
    return None if low == len(completion) else low
