"""Log-probabilities that a model gives to tokens which somebody else drew, read in one pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sysdag.components.decoding import truncated


@dataclass(frozen=True)
class ReadTokens:
    """Natural log-probabilities of the tokens of one completion.

    Attributes:
        model: (T,) under the model.
        tempered: (T,) at the temperature of sampling, before truncation.
        proposal: (T,) at that temperature and after top-k and top-p, the distribution of a draw. A token that
            truncation leaves out is counted as one that it keeps.
        outside: (T,) whether it leaves the token out: at its edge, where others round otherwise, or for good.
    """

    model: Float[Tensor, " T"]
    tempered: Float[Tensor, " T"]
    proposal: Float[Tensor, " T"]
    outside: Bool[Tensor, " T"]


@torch.no_grad()
def read_tokens(
    model: Any,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    temperature: float,
    top_p: float,
    top_k: int | None,
) -> ReadTokens:
    """What a model, in evaluation mode, says of a completion behind its prompt.

    Args:
        model: any transformers causal language model.
        prompt, completion: token ids, at least one each.
        temperature, top_p, top_k: see `sysdag.components.decoding.truncated`.
    """
    device = next(model.parameters()).device
    count = len(completion)
    ids = torch.tensor([[*prompt, *completion[:-1]]], device=device)
    fewer = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **fewer)
    logits = found.logits[0, -count:].float()
    labels = torch.tensor(completion, device=device)[:, None]

    def of(log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, labels)[:, 0].cpu()

    everything = (logits / temperature).log_softmax(-1)
    kept = truncated(logits, temperature, top_p, top_k).log_softmax(-1)
    likeliest = everything.argmax(-1, keepdim=True)  # is never left out
    mass = (everything.gather(-1, likeliest) - kept.gather(-1, likeliest)).exp()[:, 0].cpu()
    tempered, proposal = of(everything), of(kept)
    outside = proposal.isneginf()
    proposal = torch.where(outside, tempered - (mass + tempered.exp()).log(), proposal)
    return ReadTokens(of(logits.log_softmax(-1)), tempered, proposal, outside)
