"""Completions of prompts, drawn or searched for: draws that hold the token ids that the model wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sysdag.components.language.beam import search_side_by_side
from sysdag.components.language.beam_state import BeamRules
from sysdag.components.language.decoder import Decoder, PromptInputs
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.language.sampling import sample_tokens
from sysdag.components.language.stop_strings import StopStrings
from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.traces.cells import Draw


@dataclass(frozen=True, kw_only=True)
class Completer:
    """Completes prompts with one model, in evaluation mode and without gradients.

    Attributes:
        lm: the model, its tokenizer and its ends.
        max_new_tokens: most tokens of a completion.
        max_batch_tokens, batch_size: most tokens, and sequences, decoded side by side; see `CausalLM`.
        stops: the texts that end a completion beside the end tokens.
        inputs: what prompts hold beside text.
        decoder_of: what extends rows of the model's tokens, in place of the one that serves the model.
        grammar: what completions are texts of; see `CausalLM`.
    """

    lm: PretrainedLM
    max_new_tokens: int
    max_batch_tokens: int
    batch_size: int | None = None
    stops: StopStrings | None = None
    inputs: PromptInputs | None = None
    decoder_of: Callable[[Any], Decoder] | None = None
    grammar: TokenGrammar | None = None

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
                max_batch_rows=self.batch_size, inputs=self.inputs, decoder=self._decoder(model),
                grammar=self.grammar,
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

        def has_too_few(place: int, sequences: torch.Tensor, scores: torch.Tensor) -> bool:
            for row in sequences[scores.isfinite()].tolist():  # others are of tokens that may not stand there
                draw = self.draw(self._ended(row), None)
                found[place].setdefault(tuple(draw.record["token_ids"]), draw)
            return len(found[place]) < num_candidates

        rules = [
            BeamRules(
                num_candidates, beams, diversity_penalty, self.max_new_tokens, self.lm.eos_token_ids,
                self.lm.pad_token_id, ngram_size=ngram_size, eos_as_written=True, grammar=self.grammar,
            )
            for beams in (1, 2, 4)
        ]  # fmt: skip
        with self.decoding() as model:
            search_side_by_side(
                model, prompts, rules, has_too_few, self.max_batch_tokens, self.batch_size, self.inputs,
                self._decoder(model),
            )  # fmt: skip
        return [list(kept.values())[:num_candidates] for kept in found]

    def _decoder(self, model: Any) -> Decoder | None:
        return None if self.decoder_of is None else self.decoder_of(model)

    def draw(self, token_ids: list[int], log_prob: float | None) -> Draw:
        """The draw of a completion that ended, or was cut, at its last token."""
        finished = token_ids[-1] in self.lm.eos_token_ids
        if self.grammar is not None:
            return self._constrained_draw(self.grammar, token_ids, finished, log_prob)
        text = None if self.stops is None else self.stops.text_before(token_ids)
        if text is None:
            ids = token_ids[:-1] if finished else token_ids
            text = str(self.lm.tokenizer.decode(ids, skip_special_tokens=True))
        else:
            finished = True
        return Draw(text, {"token_ids": list(token_ids), "finished": finished}, log_prob)

    @staticmethod
    def _constrained_draw(grammar: TokenGrammar, token_ids: list[int], finished: bool, log_prob: float | None) -> Draw:
        text = grammar.text(token_ids)
        record = {"token_ids": list(token_ids), "finished": finished}
        if not grammar.grammar.is_json:
            return Draw(text, record, log_prob)
        return Draw(grammar.grammar.value(text) if finished else text, {**record, "text": text}, log_prob)

    def _ended(self, row: list[int]) -> list[int]:
        ends = set(self.lm.eos_token_ids)
        row = row[: next((place + 1 for place, token in enumerate(row) if token in ends), len(row))]
        return row if self.stops is None else row[: self.stops.first_end(row)]

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
