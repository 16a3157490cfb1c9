"""A language model whose completions are the texts of a grammar, where it has one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sysdag.components.component import Takes
from sysdag.components.language.completer import Completer
from sysdag.components.language.grammar import Grammar
from sysdag.components.language.language_model import LanguageModel
from sysdag.components.language.prompts import Prompt
from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.errors import DataError, PlanError, shown
from sysdag.traces.cells import Draw


class ConstrainedModel(LanguageModel):
    """A language model that may have a grammar; without one it is a `LanguageModel`.

    With a grammar a token's probability is the softmax over the tokens that may follow (see `TokenGrammar`), in draws,
    searches and scores. The value of a JSON schema's completion is what the text says; its record keeps the `text`. One
    that was cut at `max_new_tokens` is a text that a text of the grammar begins with, and its value is that text.

    Args:
        grammar: see `CausalLM`.
        options: see `LanguageModel`.

    Raises:
        PlanError: for a grammar that is none, or beside stop strings.
    """

    def __init__(self, *args: Any, grammar: str | Mapping[str, Any] | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._grammar = None if grammar is None else Grammar(grammar)
        self._token_grammar: TokenGrammar | None = None
        if self._grammar is not None and self._grammar.is_json:
            self.value_type = None
        if self._grammar is not None:
            self._check_stop(self.stop)

    @property
    def grammar(self) -> str | Mapping[str, Any] | None:
        """A regular expression or a JSON schema, as it was given; None for any text."""
        return None if self._grammar is None else self._grammar.given

    @property
    def token_grammar(self) -> TokenGrammar | None:
        """The grammar over the model's tokens; None without one."""
        if self._grammar is None:
            return None
        made, ends = self._token_grammar, self.lm.eos_token_ids
        if made is None or made.ends != frozenset(ends) or not made.reads(self.tokenizer):
            self._token_grammar = made = TokenGrammar(repr(self), self._grammar, self.tokenizer, ends)
        return made

    def _check_stop(self, stop: str | Sequence[str] | None) -> None:
        if stop:
            raise PlanError(
                f"{self!r}: a completion with a grammar ends where the grammar does, and not at stop strings, got "
                f"stop={stop!r}. Leave one of them out."
            )

    def _completer(self, stop: str | Sequence[str] | None = None) -> Completer:
        if self._grammar is not None:
            self._check_stop(stop)
        return replace(super()._completer(stop), grammar=self.token_grammar)

    def screen(self) -> Takes | None:
        return super().screen() if self._grammar is None else None

    def _observed(self, value: Any) -> Draw:
        if self._grammar is None:
            return super()._observed(value)
        text = self._grammar.text(value)
        return Draw(self._grammar.value(text), {"text": text} if self._grammar.is_json else {})

    def _behind(self, prompt: Prompt, draw: Draw) -> Draw:
        """See `LanguageModel`; the tokens are those of the text alone where the prompt or a template would change them.

        A model is constrained behind its prompt's own tokens, so none of them may merge with the completion's.
        """
        grammar = self.token_grammar
        if grammar is None:
            return super()._behind(prompt, draw)
        text = self._written(draw)
        grammar.grammar.text(text)
        end = grammar.first_end
        if not isinstance(prompt.given, str):
            record = self._completion_encoder()(prompt, text)
            ids = record["token_ids"]
            if "completion_mask" not in record and "prompt_overlap" not in record and grammar.writes(ids, text):
                return Draw(draw.value, {**draw.record, **record})
            end = ids[-1] if ids[-1] in grammar.ends else end
        return Draw(draw.value, {**draw.record, "token_ids": [*grammar.token_ids(text), end], "finished": True})

    def _written(self, draw: Draw) -> Any:
        if self._grammar is None:
            return super()._written(draw)
        return draw.record["text"] if "text" in draw.record else self._grammar.text(draw.value)

    def is_empty(self, draw: Draw) -> bool:
        return super().is_empty(draw) if self._grammar is None else not self._written_or_cut(draw).strip()

    def _written_or_cut(self, draw: Draw) -> str:
        return draw.value if isinstance(draw.value, str) else self._written(draw)

    def check_draws(self, draws: Sequence[Draw]) -> None:
        super().check_draws(draws)
        if self._grammar is None:
            return
        for element, draw in enumerate(draws):
            text = draw.record.get("text") if self._grammar.is_json else draw.value
            if not isinstance(text, str):
                raise DataError(
                    f"{self!r}: a draw of a JSON schema needs its `text`, got {shown(text)}. Another grammar, or none, "
                    "made it: give its value as an observation.",
                    element=element,
                )
            self._check_tokens(element, draw.record["token_ids"])

    def _in_room(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> list[tuple[list[int], list[int]]]:
        found = super()._in_room(inputs, draws)
        if self._grammar is not None:
            for element, (_, completion) in enumerate(found):
                self._check_tokens(element, completion)
        return found

    def _check_tokens(self, element: int, token_ids: Sequence[int]) -> None:
        assert self.token_grammar is not None
        try:
            self.token_grammar.states(token_ids)
        except DataError as error:
            error.element = element
            raise

    def _takes_values(self) -> bool:
        return self._grammar is not None and self._grammar.is_json

    def reading(self) -> str:
        if self._grammar is None:
            return super().reading()
        return hashlib.sha256(f"{super().reading()}{json.dumps(self.grammar)}".encode()).hexdigest()

    def _saved_chat(self) -> dict[str, Any]:
        return super()._saved_chat() | ({} if self.grammar is None else {"grammar": self.grammar})
