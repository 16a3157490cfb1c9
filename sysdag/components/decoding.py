"""Drawing tokens from a causal language model, with the log-probability of what was drawn."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class SampledTokens:
    """What `sample_tokens` drew.

    Attributes:
        token_ids: (B, L), right-padded; the end-of-sequence token that ended a row is part of it.
        lengths: (B,) number of tokens drawn in each row.
        finished: (B,) whether the row ended with an end-of-sequence token rather than at the limit.
        log_probs: (B,) sum of the natural log-probabilities of the drawn tokens under the distribution that they were
            drawn from: after temperature and top-p, so at temperature 1 and top-p 1 under the model.
    """

    token_ids: Int[Tensor, "B L"]
    lengths: Int[Tensor, " B"]
    finished: Bool[Tensor, " B"]
    log_probs: Float[Tensor, " B"]


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> SampledTokens:
    """Ancestral sampling with a key-value cache from left-padded prompts.

    Unlike `generate`, nothing of the model's generation config applies (no top-k, no repetition penalty): the draws
    come from the distribution whose log-probability is returned.

    Args:
        model: any transformers causal language model.
        input_ids, attention_mask: (B, P) prompts, padded on the left.
        max_new_tokens: most tokens drawn for a row, at least 1.
        eos_token_ids: tokens that end a row.
        pad_token_id: what fills rows that have ended.
        temperature: divides the logits; above 0.
        top_p: draws from the smallest set of tokens whose probability reaches this; 1.0 is all.
        generator: a CPU generator; draws depend on it alone.
    """
    device = input_ids.device
    draws = device_generator(generator, device)
    eos = torch.tensor(list(eos_token_ids), device=device)
    batch = input_ids.shape[0]
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    log_probs = torch.zeros(batch, dtype=torch.float32, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    columns: list[Tensor] = []
    mask, tokens, cache = attention_mask, input_ids, None
    for _ in range(max_new_tokens):
        output = model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True,
            **position_ids(model, mask, tokens.shape[1]),
        )  # fmt: skip
        cache = output.past_key_values
        proposal = proposal_log_probs(output.logits[:, -1].float(), temperature, top_p)
        drawn = torch.multinomial(proposal.exp(), 1, generator=draws)
        log_probs += torch.where(alive, proposal.gather(1, drawn)[:, 0], 0.0)
        lengths += alive
        columns.append(torch.where(alive, drawn[:, 0], pad_token_id))
        alive = alive & ~torch.isin(drawn[:, 0], eos)
        if not alive.any():
            break
        tokens = columns[-1][:, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return SampledTokens(torch.stack(columns, dim=1), lengths, ~alive, log_probs)


def proposal_log_probs(logits: Float[Tensor, "B V"], temperature: float, top_p: float) -> Float[Tensor, "B V"]:
    """Log-probabilities after temperature and nucleus truncation (Holtzman et al. 2020, arXiv 1904.09751)."""
    log_probs = (logits / temperature).log_softmax(-1)
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    probs = ordered.exp()
    outside = probs.cumsum(-1) - probs >= top_p
    dropped = torch.zeros_like(outside).scatter(-1, order, outside)
    return log_probs.masked_fill(dropped, -torch.inf).log_softmax(-1)


def position_ids(model: nn.Module, attention_mask: Int[Tensor, "B T"], last: int) -> dict[str, Tensor]:
    """Positions that ignore padding, for the last `last` tokens; empty for models without such an argument."""
    if "position_ids" not in _forward_parameters(model):
        return {}
    return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -last:]}


def _forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters


def device_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator on `device` seeded by the next number of a CPU generator (torch's global one by default)."""
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) padded on the left, and their attention mask."""
    width = max(len(row) for row in rows)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
