"""Which completions surely have room behind their prompts, told by their characters, without a token made of them.

A vocabulary of pieces of text makes no more tokens of a text than it has bytes, beside those that stand around it. So
where the bytes have room the tokens have, and checking many short rows need not tokenise them. What this cannot tell is
looked at token by token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# Normalisers that make no text of ASCII longer, and pre-tokenisers that cut at white space, over which nothing merges.
_KEEPS_LENGTH = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "BertNormalizer", "Prepend", "Nmt"}
# By how much other text may grow, in bytes of UTF-8 (Unicode Standard Annex 15, table of expansion factors).
_GROWTH = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}
_CUTS = {"ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_MODELS = {"BPE", "WordPiece", "WordLevel", "Unigram"}
_AROUND = 16  # tokens that stand around a text, and the end that is put behind a completion, at most
_WORDS = re.compile(r"\s*\S+\s+\S+\s+\S")


@dataclass(frozen=True)
class TextScreen:
    """Tells of prompts and completions that are plain texts whether they surely can be scored as they are.

    Attributes:
        max_length: most tokens of both; None where nothing limits it.
        room: most tokens of a prompt; None likewise.
        special: what spells a special token, which is looked at more closely.
        growth: how many bytes a byte may become that is not ASCII; 0 where that is not known.
    """

    max_length: int | None
    room: int | None
    special: re.Pattern[str]
    growth: int

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        max_length: int | None,
        room: int | None,
        embeddings: int | None,
        special: re.Pattern[str],
    ) -> TextScreen | None:
        """None for a tokenizer of which nothing can be told so, or with ids that the model has no embedding for."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or embeddings is None or max(tokenizer.get_vocab().values(), default=0) >= embeddings:
            return None
        told = json.loads(backend.to_str())
        if told["model"]["type"] not in _MODELS or told.get("truncation") or told.get("padding"):
            return None
        if not all(_keeps_length(each) for each in _parts(told["normalizer"], "normalizers")):
            return None
        ids = tokenizer("a")["input_ids"]
        # A token in front of every text stays what it is, whatever is put behind the text; else its first word has to.
        if ids[0] != tokenizer.bos_token_id and not any(
            _cuts(each) for each in _parts(told["pre_tokenizer"], "pretokenizers")
        ):
            return None
        if len(ids) > _AROUND - 2:
            return None
        growth = 1
        for each in _parts(told["normalizer"], "normalizers"):
            growth *= _GROWTH.get(each["type"], 0)
        return cls(max_length, room, special, growth)

    def takes(self, prompt: Any, completion: str) -> bool:
        """Whether the completion surely can be scored whole behind the whole prompt; None is a prompt not known yet."""
        before, behind = self._most(prompt or ""), self._most(completion)
        if before is None or behind is None:
            return False
        if self.room is not None and before > self.room:
            return False
        # Of the completion those tokens of the prompt count, too, that are others with it: fewer than the prompt has.
        if self.max_length is not None and 2 * before + behind > self.max_length:
            return False
        return (prompt is None or _WORDS.match(prompt) is not None) and self.special.search(completion) is None

    def _most(self, text: Any) -> int | None:
        """Most tokens of a text, with those around it; None where that is not known."""
        if type(text) is not str:
            return None
        if text.isascii():
            return len(text) + _AROUND
        try:
            return self.growth * len(text.encode("utf-8")) + _AROUND if self.growth else None
        except UnicodeEncodeError:  # half of a surrogate pair
            return None


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for each in step[name] for part in _parts(each, name)] if step["type"] == "Sequence" else [step]


def _keeps_length(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["content"]) <= len(step["pattern"].get("String", ""))
    return step["type"] in _KEEPS_LENGTH


def _cuts(step: dict[str, Any]) -> bool:
    return step["type"] in _CUTS and step.get("use_regex", True)
