"""Observed targets as token ids: the labels that the model's own tokenizer makes of a text, up to its end.

A target is tokenised by itself, as `tokenizer(text_target=...)` has it: by the target's own pieces (Marian), with the
target language's code (mBART, NLLB), with what the tokenizer puts around a text. It ends where the model stops: at its
first end token, so a code behind that (mBART's first release) is no part of it. A token that the generation config
forces first and that the tokenizer does not write is put in front.

What spells a special token before the end is text, as in the completions of other language models.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sysdag.components.language.encoder_decoder.generation_rules import GenerationRules
from sysdag.components.language.messages import Message
from sysdag.components.language.prompts import Prompt, PromptEncoder
from sysdag.components.language.stop_strings import StopStrings
from sysdag.errors import DataError, shown

logger = logging.getLogger(__name__)


class TargetEncoder:
    """Makes the record of an observed target; takes the place of a `CompletionEncoder`.

    Args:
        owner: whose targets they are, for errors.
        sources: what encodes the sources.
        rules: what may be written.
        stop: the texts that end a target beside the end tokens.
    """

    def __init__(self, owner: str, sources: PromptEncoder, rules: GenerationRules, stop: Sequence[str] = ()) -> None:
        self.owner, self.sources, self.rules, self.stop = owner, sources, rules, list(stop)
        self.ends, self.tokenizer = list(rules.ends), sources.tokenizer
        self._stops = StopStrings(self.stop, self.tokenizer) if stop else None
        self._said: set[str] = set()

    def __call__(self, prompt: Prompt, value: str | Sequence[Message]) -> dict[str, Any]:
        """The record of a draw of this value: its `token_ids`, and whether it is `finished`.

        Raises:
            DataError: for a target that is no text, or that the generation config forbids.
        """
        text = self._text(value)
        ids = self.ids(text)
        stop = self._stops.first_end(ids) if self._stops is not None else None
        if stop is not None:
            if ids[stop:] not in ([], ids[-1:]):
                self._say("stop", f"a target goes on behind a stop string ({self.stop}), where a draw ends; it is cut")
            ids = ids[:stop]
        self.rules.check(prompt.ids, ids, self.owner, self.spelled)
        return {"token_ids": ids, "finished": True}

    def alone(self, value: str | Sequence[Message]) -> int:
        """How many tokens a target has."""
        return len(self.ids(self._text(value)))

    def spelled(self, token: int) -> str:
        """A token as the tokenizer spells it."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _text(self, value: str | Sequence[Message]) -> str:
        if isinstance(value, str):
            return value
        alone = value[0] if len(value) == 1 else {}
        text = alone.get("content")
        if alone.get("role") != "assistant" or not isinstance(text, str) or set(alone) - {"role", "content"}:
            raise DataError(f"{self.owner}: an encoder-decoder writes one text, got the messages {shown(value)}.")
        return text

    def ids(self, text: str) -> list[int]:
        """The labels of a text, its end token included."""
        tokenizer: Any = self.tokenizer
        spelled = self._only_spelled(text)
        if spelled:
            with _target_mode(tokenizer):
                whole = list(tokenizer("", return_attention_mask=False)["input_ids"])
                cut = whole.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in whole else len(whole)
                ids = [*whole[:cut], *self.sources.template.text_ids(text, spelled), *whole[cut:]]
        else:
            ids = list(tokenizer(text_target=text)["input_ids"])
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        ids = [*ids, tokenizer.eos_token_id] if end is None else ids[: end + 1]
        first = self.rules.forced_first
        return ids if first is None or ids[0] == first or self._begins_otherwise(ids[0]) else [first, *ids]

    def _begins_otherwise(self, token: int) -> bool:
        """Whether a target begins with the code of a language, as a forced one does."""
        known = getattr(self.tokenizer, "tgt_lang", None)
        return known is not None and token in set(getattr(self.tokenizer, "all_special_ids", ()))

    def _only_spelled(self, text: str) -> list[tuple[int, int]]:
        """Where a target only spells a special token: an end token that it ends in is meant."""
        template = self.sources.template
        if not template.sanitizes:
            return []
        special = template.controls_of_texts().spellings.special
        found = [match.span() for match in special.finditer(text) if match.group() not in self.stop]
        closing = {self.spelled(end) for end in self.ends}
        while found and text[slice(*found[-1])] in closing and not text[found[-1][1] :].strip():
            text = text[: found.pop()[0]]
        if found:
            token = text[slice(*found[0])]
            self._say("spelled", f"a target spells the special token {token!r} before its end, which is text there")
        return found

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s: %s; further cases are not reported.", self.owner, text)


@contextlib.contextmanager
def _target_mode(tokenizer: Any) -> Iterator[None]:
    """Has a tokenizer read targets, as its `text_target` does."""

    def switch(name: str) -> Callable[[], Any]:
        return getattr(tokenizer, name, lambda: None)

    switch("_switch_to_target_mode")()
    try:
        yield
    finally:
        switch("_switch_to_input_mode")()
