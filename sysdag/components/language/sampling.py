"""Drawing completions from a causal language model, with the log-probability of what was drawn.

Continuous batching (Yu et al. 2022, "Orca"): rows that have ended leave, and waiting ones enter in their place, within
a budget of tokens. A prompt is read once for all its samples. A draw depends on its row's seed and its position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sysdag.components.decoding import draw_options
from sysdag.components.language.decoder import Decoder, PromptInputs, arranged, decoder_of
from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.components.language.waiting_prompts import WaitingPrompts
from sysdag.errors import DataError

MAX_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class SampledTokens:
    """What `sample_tokens` drew; R rows, those of a prompt together.

    Attributes:
        token_ids: of each row, the end-of-sequence token that ended it among them.
        finished: (R,) whether the row ended with an end-of-sequence token or by its text rather than at the limit.
        log_probs: (R,) sum of the natural log-probabilities of the drawn tokens under the distribution that they were
            drawn from: after temperature, top-k and top-p, so at temperature 1 and without them under the model. fp64.
    """

    token_ids: list[list[int]]
    finished: Bool[Tensor, " R"]
    log_probs: Float[Tensor, " R"]

    @property
    def lengths(self) -> Int[Tensor, " R"]:
        """Number of tokens drawn in each row."""
        return torch.tensor([len(ids) for ids in self.token_ids])


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    ends_text: Callable[[list[int]], bool] | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    max_batch_rows: int | None = None,
    inputs: PromptInputs | None = None,
    decoder: Decoder | None = None,
    grammar: TokenGrammar | None = None,
) -> SampledTokens:
    """Ancestral sampling of `num_samples` completions of each prompt, as `decoder` finds out that the model can.

    Unlike `generate`, nothing of the model's generation config applies (no top-k of its own, no repetition penalty):
    the draws come from the distribution whose log-probability is returned.

    Args:
        model: any transformers causal language model.
        prompts: token ids, at least one each; equal prompts are read once.
        seeds: one for each sample of the first prompt, then those of the next: a row's draws depend on its prompt and
            its seed, and not on what else is asked for.
        max_new_tokens: most tokens drawn for a row, at least 1.
        eos_token_ids: tokens that end a row.
        temperature: divides the logits; above 0.
        top_p: draws from the smallest set of tokens whose probability reaches this; 1.0 is all.
        top_k: draws from this many most probable tokens, and those as probable as the last of them; None or 0 is all.
        ends_text: whether a row's new tokens are a text that ends here; asked after each token.
        max_batch_tokens: most tokens of the rows that are decoded side by side, each with its prompt and all that it
            may draw; what keys and values take is this many times what a token's do. A single row may take more.
        max_batch_rows: most rows side by side; None leaves that to the tokens.
        inputs: what prompts hold beside text.
        decoder: what extends rows; by default the one that serves the model.
        grammar: constrains each token's logits, before all else.

    Raises:
        PlanError: for a model whose logits depend on the tokens behind them.
        DataError: for logits that are not finite; `DataError.element` is the row.
    """
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    decoder = decoder_of(model, inputs) if decoder is None else decoder
    batch = _Batch(
        seeds, next(model.parameters()).device, options, frozenset(eos_token_ids), max_new_tokens, ends_text, grammar
    )
    waiting = WaitingPrompts(max_new_tokens, max_batch_tokens, max_batch_rows)
    for number, prompt in enumerate(prompts):
        waiting.add(prompt, range(number * num_samples, (number + 1) * num_samples))
    while waiting.rows or batch.running:
        batch.leave(decoder)
        if batch.running:
            batch.draw(decoder.extend(batch.last_tokens()))
        for rows in waiting.admitted([len(prompts[row // num_samples]) for row in batch.running], decoder.joins):
            logits = decoder.enter([prompts[some[0] // num_samples] for some in rows], list(map(len, rows)))
            repeats = torch.tensor(list(map(len, rows)), device=logits.device)
            batch.enter([row for some in rows for row in some])
            batch.draw(logits.repeat_interleave(repeats, 0))
    log_probs = torch.tensor(batch.log_probs, dtype=torch.float64)
    return SampledTokens(batch.token_ids, torch.tensor(batch.finished, dtype=torch.bool), log_probs)


class _Batch:
    """The rows that are decoded, in the decoder's order, and what was drawn for all."""

    def __init__(
        self, seeds: Sequence[int], device: torch.device, options: Mapping[str, Any], eos: frozenset[int],
        max_new_tokens: int, ends_text: Callable[[list[int]], bool] | None, grammar: TokenGrammar | None,
    ) -> None:  # fmt: skip
        self.running: list[int] = []
        self.token_ids: list[list[int]] = [[] for _ in seeds]
        self.log_probs, self.finished = [0.0] * len(seeds), [False] * len(seeds)
        self._seeds, self._device, self._options = seeds, device, options
        self._eos, self._max_new_tokens, self._ends_text = eos, max_new_tokens, ends_text
        self._grammar = grammar
        self._states = [] if grammar is None else [grammar.start] * len(seeds)

    def leave(self, decoder: Decoder) -> None:
        """Has the rows that have ended leave the decoder."""
        kept = [place for place, row in enumerate(self.running) if not self._has_ended(row)]
        if len(kept) < len(self.running):
            order = [source for _, source in sorted(zip(arranged(kept), kept, strict=True))]
            decoder.keep(order)
            self.running = [self.running[place] for place in order]

    def _has_ended(self, row: int) -> bool:
        return self.finished[row] or len(self.token_ids[row]) == self._max_new_tokens

    def last_tokens(self) -> Int[Tensor, " R"]:
        return torch.tensor([self.token_ids[row][-1] for row in self.running], device=self._device)

    def enter(self, rows: Sequence[int]) -> None:
        self.running += rows

    def draw(self, logits: Float[Tensor, "R V"]) -> None:
        """Draws a token for each of the last rows from their logits."""
        rows = self.running[len(self.running) - len(logits) :]
        seeds, positions = [self._seeds[row] for row in rows], [len(self.token_ids[row]) for row in rows]
        if self._grammar is not None:
            logits = self._grammar.constrained(logits, [self._states[row] for row in rows])
        tensor = partial(torch.tensor, device=logits.device, dtype=torch.long)
        try:
            drawn, log_probs = draw_options(logits, tensor(seeds), tensor(positions), **self._options)
        except DataError as error:
            error.element = None if error.element is None else rows[error.element]
            raise
        for row, token, log_prob in zip(rows, drawn.tolist(), log_probs.tolist(), strict=True):
            ids = self.token_ids[row]
            ids.append(token)
            self.log_probs[row] += log_prob
            if self._grammar is not None:
                self._states[row] = self._grammar.after(self._states[row], token)
            self.finished[row] = token in self._eos or (self._ends_text is not None and self._ends_text(ids))
