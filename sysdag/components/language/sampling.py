"""Drawing tokens from a causal language model, with the log-probability of what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sysdag.components.decoding import device_generator, proposal_log_probs
from sysdag.components.language.decoder import decoder_of


@dataclass(frozen=True)
class SampledTokens:
    """What `sample_tokens` drew.

    Attributes:
        token_ids: (B, L), right-padded; the end-of-sequence token that ended a row is part of it.
        lengths: (B,) number of tokens drawn in each row.
        finished: (B,) whether the row ended with an end-of-sequence token or by its text rather than at the limit.
        log_probs: (B,) sum of the natural log-probabilities of the drawn tokens under the distribution that they were
            drawn from: after temperature, top-k and top-p, so at temperature 1 and without them under the model.
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
    top_k: int | None = None,
    ends_text: Callable[[list[int]], bool] | None = None,
    generator: torch.Generator | None = None,
) -> SampledTokens:
    """Ancestral sampling from left-padded prompts, as `decoder` finds out that the model can.

    Unlike `generate`, nothing of the model's generation config applies (no top-k of its own, no repetition penalty):
    the draws come from the distribution whose log-probability is returned.

    Args:
        model: any transformers causal language model.
        input_ids, attention_mask: (B, P) prompts, padded on the left.
        max_new_tokens: most tokens drawn for a row, at least 1.
        eos_token_ids: tokens that end a row.
        pad_token_id: what fills rows that have ended.
        temperature: divides the logits; above 0.
        top_p: draws from the smallest set of tokens whose probability reaches this; 1.0 is all.
        top_k: draws from this many most probable tokens, and those as probable as the last of them; None or 0 is all.
        ends_text: whether a row's new tokens are a text that ends here; asked after each token.
        generator: a CPU generator; draws depend on it alone.

    Raises:
        PlanError: for a model whose logits depend on the tokens behind them.
    """
    device = input_ids.device
    draws = device_generator(generator, device)
    eos = torch.tensor(list(eos_token_ids), device=device)
    batch = input_ids.shape[0]
    rows = torch.arange(batch, device=device)[:, None]
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    log_probs = torch.zeros(batch, dtype=torch.float32, device=device)
    lengths = torch.zeros(batch, dtype=torch.long, device=device)
    columns: list[Tensor] = []
    decoder = decoder_of(model)
    logits = decoder.start(input_ids, attention_mask.long(), 1)
    while True:
        proposal = proposal_log_probs(logits.float(), temperature, top_p, top_k)
        drawn = torch.multinomial(proposal.exp(), 1, generator=draws)
        log_probs += torch.where(alive, proposal.gather(1, drawn)[:, 0], 0.0)
        lengths += alive
        columns.append(torch.where(alive, drawn[:, 0], pad_token_id))
        alive = alive & ~torch.isin(drawn[:, 0], eos)
        if ends_text is not None:
            alive = alive & ~_stopped(columns, alive, ends_text)
        if len(columns) == max_new_tokens or not alive.any():
            break
        logits = decoder.extend(columns[-1][:, None], rows)[:, 0]
    return SampledTokens(torch.stack(columns, dim=1), lengths, ~alive, log_probs)


def _stopped(
    columns: Sequence[Tensor], alive: Bool[Tensor, " B"], ends_text: Callable[[list[int]], bool]
) -> Bool[Tensor, " B"]:
    drawn = torch.stack(list(columns), dim=1).tolist()
    ended = [open_ and ends_text(ids) for ids, open_ in zip(drawn, alive.tolist(), strict=True)]
    return torch.tensor(ended, device=alive.device)


def left_pad(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, P) padded on the left, and their attention mask."""
    width = max(len(row) for row in rows)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
