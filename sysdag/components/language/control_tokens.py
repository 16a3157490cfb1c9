"""Control tokens that a message or a value only spells, told as the text that they are.

A tokenizer takes `<|im_end|>` for the token that ends a turn wherever it stands, also where a user wrote it. So such
spellings are marked before a template renders the messages, by two noncharacters of Unicode that no text holds; where
they stand in a prompt that is a text, `sysdag.components.language.text_prompts` finds out. A tokenizer whose control
tokens are spelled otherwise (`sysdag.components.language.disarmed_tokenizer`) then takes them for text. One that is
written in Python gets the text in pieces, as transformers (from 5.20) has it under `sanitize_control_tokens=True`: what
a control token's spelling makes there stands apart from the tokens beside it.

In what an assistant says, tokens that are no special ones stay: models write `<think>` and `<tool_call>` themselves.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.components.language.disarmed_tokenizer import DisarmedTokenizer
from sysdag.errors import DataError

logger = logging.getLogger(__name__)
NONCHARACTERS = [(chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2)]
"""Pairs of marks that no text holds."""
_CONTEXTS = ("\n", "a", ":")  # what a piece is tokenised behind, so that it gets no space as the first of a text

Marks = tuple[str, str]


@dataclass(frozen=True)
class Spellings:
    """How control tokens are spelled; needs no tokenizer, and can be pickled.

    Attributes:
        special: patterns of the special ones.
        control: of these and the others that a template writes.
    """

    special: re.Pattern[str]
    control: re.Pattern[str]


class ControlTokens:
    """The control tokens of one tokenizer under one template.

    Args:
        tokenizer: of transformers.
        template: the source of the chat template; an added token that stands in it is a control token, special or not.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        added = {place: token for place, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        named = getattr(tokenizer, "chat_control_tokens", None)
        special = {
            place: token.content for place, token in added.items()
            if token.special or token.content in tokenizer.all_special_tokens
        }  # fmt: skip
        others = {
            place: token.content for place, token in added.items()
            if (token.content in template if named is None else token.content in named)
        }  # fmt: skip
        self.spellings = Spellings(any_of(special.values()), any_of([*special.values(), *others.values()]))
        self._ids = {*special, *others}

    def mark(self, messages: Sequence[Mapping[str, Any]], others: Any) -> tuple[list[Any], Any, Marks] | None:
        """Messages, and what else a template is given, with their spellings marked; None where there are none."""
        special, control = self.spellings.special, self.spellings.control
        texts = list(texts_of([*messages, others]))
        if not any(control.search(text) for text in texts):
            return None
        marks = next(pair for pair in NONCHARACTERS if not any(mark in text for text in texts for mark in pair))

        def by(pattern: re.Pattern[str]) -> Callable[[str], str]:
            return lambda text: pattern.sub(lambda found: marks[0] + found.group() + marks[1], text)

        told = [
            {
                key: value if key == "role" else _mapped(value, by(special if _is_own(message) else control))
                for key, value in message.items()
            }
            for message in messages
        ]
        return told, _mapped(others, by(control)), marks

    def encode_marked(self, rendered: str, marks: Marks) -> list[int]:
        """Token ids of a rendering with marks.

        Raises:
            DataError: if the template has written the marks in another way.
        """
        if any(f"\\u{ord(mark):04x}" in rendered.lower() for mark in marks):
            raise DataError("a message spells a control token, and the chat template writes it in escapes")
        start, end = marks
        return self._encode(re.split(f"{start}({self.spellings.control.pattern}){end}|[{start}{end}]", rendered))

    def encode(self, text: str, spelled: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids of a text, without what the tokenizer puts around one.

        Args:
            spelled: where it only spells a control token: the first character and the place behind the last, ascending.

        Raises:
            DataError: if the tokenizer makes a control token of it all the same.
        """
        places = [0, *(place for span in spelled for place in span), len(text)]
        return self._encode([text[start:end] for start, end in itertools.pairwise(places)])

    @functools.cached_property
    def _disarmed(self) -> DisarmedTokenizer | None:
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            return None
        try:
            return DisarmedTokenizer(self._tokenizer, self._ids)
        except ValueError as error:
            logger.info("What spells a control token is tokenised apart from the text beside it: %s.", error)
            return None

    def _encode(self, pieces: Sequence[str | None]) -> list[int]:
        """Token ids of pieces of a text, every other of which is a spelling."""
        whole = [piece or "" for piece in pieces]
        if self._disarmed is not None and self._disarmed.takes(whole):
            return self._disarmed.ids(whole, self.spellings.control)
        found: list[int] = []
        for number, piece in enumerate(pieces):
            if not piece:
                continue
            if number % 2:
                found += self._as_text(piece)
            else:
                found += self._behind(piece, self._plain) if number else self._plain(piece)
        return found

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _as_text(self, spelled: str) -> list[int]:
        ids = self._behind(spelled, self._without_added)
        for cut in range(1, len(spelled)):
            if not self._ids.intersection(ids):
                break
            ids = [
                token for half in (spelled[:cut], spelled[cut:]) for token in self._behind(half, self._without_added)
            ]
        if self._ids.intersection(ids):
            raise DataError(f"a text spells the control token {spelled!r}, which the tokenizer makes of any text")
        return ids

    def _without_added(self, text: str) -> list[int]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def _behind(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """A text's tokens in the middle of another one."""
        for context in _CONTEXTS:
            before, whole = encode(context), encode(context + text)
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
        return encode(text)


def any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of some texts, the longest that there is."""
    longest_first = sorted(set(spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # which nothing matches


def _is_own(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant"


def texts_of(value: Any) -> Iterator[str]:
    """The texts in a value of lists, tuples and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts_of(part)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, (list, tuple)) else value
