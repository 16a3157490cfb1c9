"""Completions of prompts, drawn or searched for: draws that hold the token ids that the model wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sysdag.components.language.beam import diverse_beam_search, left_pad
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.language.sampling import sample_tokens
from sysdag.components.language.stop_strings import StopStrings
from sysdag.traces.cells import Draw


@dataclass(frozen=True, kw_only=True)
class Completer:
    """Completes prompts with one model, in evaluation mode and without gradients.

    Attributes:
        lm: the model, its tokenizer and its ends.
        max_new_tokens: most tokens of a completion.
        max_batch_tokens, batch_size: most tokens, and sequences, decoded side by side; see `CausalLM`.
        stops: the texts that end a completion beside the end tokens.
    """

    lm: PretrainedLM
    max_new_tokens: int
    max_batch_tokens: int
    batch_size: int | None = None
    stops: StopStrings | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a completion; empty where only tokens do."""
        return () if self.stops is None else self.stops.strings

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        top_p: float,
        top_k: int | None,
        seeds: Sequence[int],
    ) -> list[Draw]:
        """A draw for each prompt from its own seed, with its log-probability under what it was drawn from."""
        with self.decoding() as model:
            sampled = sample_tokens(
                model, prompts, seeds, max_new_tokens=self.max_new_tokens, eos_token_ids=self.lm.eos_token_ids,
                temperature=temperature, top_p=top_p, top_k=top_k,
                ends_text=None if self.stops is None else self.stops.ends, max_batch_tokens=self.max_batch_tokens,
                max_batch_rows=self.batch_size,
            )  # fmt: skip
        return [
            self.draw(ids, log_prob)
            for ids, log_prob in zip(sampled.token_ids, sampled.log_probs.tolist(), strict=True)
        ]

    def search(
        self, prompts: Sequence[Sequence[int]], num_candidates: int, diversity_penalty: float, ngram_size: int
    ) -> list[list[Draw]]:
        """Up to `num_candidates` distinct completions of each prompt, best first; see `CausalLM.search`."""
        found: list[dict[tuple[int, ...], Draw]] = [{} for _ in prompts]
        for beams_per_group in (1, 2, 4):
            short = [place for place, kept in enumerate(found) if len(kept) < num_candidates]
            beams = num_candidates * beams_per_group
            if not short:
                break
            ids, mask = self._padded([prompts[place] for place in short])
            with self.decoding() as model:
                sequences, _ = diverse_beam_search(
                    model, ids, mask, num_beams=beams, num_beam_groups=num_candidates,
                    diversity_penalty=diversity_penalty, max_new_tokens=self.max_new_tokens,
                    eos_token_id=self.lm.eos_token_ids, pad_token_id=self.lm.pad_token_id, ngram_size=ngram_size,
                    eos_as_written=True, max_batch_tokens=self.max_batch_tokens, max_batch_rows=self.batch_size,
                )  # fmt: skip
            for place, rows in zip(short, sequences.tolist(), strict=True):
                for row in rows:
                    draw = self.draw(self._ended(row), None)
                    found[place].setdefault(tuple(draw.record["token_ids"]), draw)
        return [list(kept.values())[:num_candidates] for kept in found]

    def draw(self, token_ids: list[int], log_prob: float | None) -> Draw:
        """The draw of a completion that ended, or was cut, at its last token."""
        finished = token_ids[-1] in self.lm.eos_token_ids
        text = None if self.stops is None else self.stops.text_before(token_ids)
        if text is None:
            ids = token_ids[:-1] if finished else token_ids
            text = str(self.lm.tokenizer.decode(ids, skip_special_tokens=True))
        else:
            finished = True
        return Draw(text, {"token_ids": list(token_ids), "finished": finished}, log_prob)

    def _ended(self, row: list[int]) -> list[int]:
        ends = set(self.lm.eos_token_ids)
        row = row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))]
        return row if self.stops is None else row[: self.stops.first_end(row)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(self.lm.module.parameters()).device
        return left_pad(rows, self.lm.pad_token_id, device)

    @contextlib.contextmanager
    def decoding(self) -> Iterator[Any]:
        """The model at work, as it decodes; its mode is put back afterwards."""
        module = self.lm.module
        was_training = module.training
        module.eval()
        try:
            with self.lm.at_work() as model, torch.no_grad():
                yield model
        finally:
            module.train(was_training)
