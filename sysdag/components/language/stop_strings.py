"""Texts that end a completion where they are written, whatever tokens write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sysdag.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The strings that were given, alone or in a list.

    Raises:
        PlanError: for anything but texts that are not empty.
    """
    found = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(each, str) and each for each in found):
        raise PlanError(f"CausalLM needs stop strings that are not empty, or None, got {stop!r}.")
    return found


class StopStrings:
    """Where a completion's tokens have written one of some strings.

    Special tokens count as their text here, so a string may name one.

    Args:
        strings: at least one; see `stop_strings`.
        tokenizer: of transformers.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings, self._tokenizer = tuple(strings), tokenizer
        # A token seldom writes less than a character, and bytes of a character are at most four tokens.
        self._tail = 4 * max(map(len, self.strings)) + 8

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens' text holds one of the strings; asked after each token, that is where it is complete."""
        return self._place(self._decoded(token_ids[-self._tail :])) is not None

    def first_end(self, token_ids: Sequence[int]) -> int | None:
        """How many of the tokens there are up to the one that completes a string; None where none does."""
        if not self.ends(token_ids) and self._place(self._decoded(token_ids)) is None:
            return None
        return next((end for end in range(1, len(token_ids) + 1) if self.ends(token_ids[:end])), None)

    def text_before(self, token_ids: Sequence[int]) -> str | None:
        """The text in front of the first of the strings, without special tokens; None where there is none."""
        place = self._place(self._decoded(token_ids))
        if place is None:
            return None
        whole = len(token_ids)  # how many tokens end in front of the string
        while whole and len(self._decoded(token_ids[:whole])) > place:
            whole -= 1
        rest = self._decoded(token_ids)[len(self._decoded(token_ids[:whole])) : place]
        return str(self._tokenizer.decode(list(token_ids[:whole]), skip_special_tokens=True)) + rest

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def _place(self, text: str) -> int | None:
        return min((text.index(each) for each in self.strings if each in text), default=None)
