"""A tokenizer whose control tokens are spelled otherwise, so that what spells one of its own is any text."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

_BEGIN, _END = "\ue000", "\uf8ff"  # around the number of a token, of Unicode's characters for private use


class DisarmedTokenizer:
    """Tokenises texts in which some spellings of control tokens act and others are text.

    The vocabulary, its rules and the ids are the tokenizer's own, and texts go through it as a whole: words and merges
    reach over the border between a spelling and what stands beside it, as they do in other text.

    Args:
        tokenizer: of transformers, on a tokenizer of the library `tokenizers`.
        control: the ids of its control tokens.

    Raises:
        ValueError: for a tokenizer that cannot be spelled otherwise.
    """

    def __init__(self, tokenizer: Any, control: Collection[int]) -> None:
        from tokenizers import Tokenizer

        told = json.loads(tokenizer.backend_tokenizer.to_str())
        self._spelled = {
            token["content"]: _other(token["id"]) for token in told["added_tokens"] if token["id"] in control
        }
        for token in told["added_tokens"]:
            if token["id"] in control:
                token.update(content=_other(token["id"]), normalized=False)
        model = told["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._spelled.get(token, token): place for token, place in model["vocab"].items()}
        else:
            model["vocab"] = [[self._spelled.get(token, token), *score] for token, *score in model["vocab"]]
        if model.get("unk_token") in self._spelled:
            model["unk_token"] = self._spelled[model["unk_token"]]
        told.update(post_processor=None, truncation=None, padding=None)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(told))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"its tokenizer cannot be spelled otherwise: {error}") from error
        if any(self._tokenizer.token_to_id(_other(token)) != token for token in control):
            raise ValueError("its control tokens have other ids when they are spelled otherwise")

    def takes(self, pieces: Sequence[str]) -> bool:
        """Whether a text holds none of the characters by which tokens are spelled here."""
        return not any(char in piece for piece in pieces for char in (_BEGIN, _END))

    def ids(self, pieces: Sequence[str], acts: re.Pattern[str]) -> list[int]:
        """Token ids of a text in pieces, without what a tokenizer puts around one.

        Args:
            pieces: every other of them, from the second on, is text whatever it spells.
            acts: the pattern of the control tokens in the others.
        """
        written = [
            piece if number % 2 else acts.sub(lambda found: self._spelled[found.group()], piece)
            for number, piece in enumerate(pieces)
        ]
        return list(self._tokenizer.encode("".join(written), add_special_tokens=False).ids)


def _other(token: int) -> str:
    return f"{_BEGIN}{token}{_END}"
