"""A grammar over a tokenizer's tokens: which of them may follow, and the distribution that is left.

This is the one place that constrains logits; sampling, beam search and scoring call it. A token may follow where its
bytes lead to a text that some tokens complete; end tokens may where the text so far is one of the grammar's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.language.grammar import DEAD, Grammar
from sysdag.errors import DataError, PlanError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenGrammar:
    """A grammar over the tokens of one tokenizer.

    Args:
        owner: whose completions they are, for errors.
        grammar: over bytes.
        tokenizer: of transformers, whose tokens are bytes or text in a row (byte-level or SentencePiece-like BPE,
            Unigram, characters).
        ends: the tokens that end a completion.

    Raises:
        PlanError: for a tokenizer of words, whose text depends on their neighbours; or one that has no tokens for any
            text of the grammar; or without end tokens.
    """

    def __init__(self, owner: str, grammar: Grammar, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> None:
        if not ends:
            raise PlanError(f"{owner}: a grammar needs an end token (tokenizer.eos_token), and there is none.")
        self.owner, self.grammar, self.ends = owner, grammar, frozenset(ends)
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._bytes = _bytes_of_tokens(owner, tokenizer)
        for end in self.ends:
            if end < len(self._bytes):
                self._bytes[end] = b""
        self._order = sorted((n for n, text in enumerate(self._bytes) if text), key=lambda n: -len(self._bytes[n]))
        longest = len(self._bytes[self._order[0]]) if self._order else 0
        self._columns = [
            numpy.array([self._bytes[n][place] for n in self._order if len(self._bytes[n]) > place], numpy.uint8)
            for place in range(longest)
        ]
        self._after: dict[tuple[int, int], int] = {}
        self._allowed: dict[int, Tensor] = {}
        self._live = self._completed_by_tokens()
        if not self._live[self.start]:
            raise PlanError(f"{owner}: the tokenizer has no tokens that write a text of the grammar.")

    @property
    def start(self) -> int:
        """The state before the first token."""
        return self.grammar.automaton.start

    def after(self, state: int, token: int) -> int:
        """The state behind a token; `DEAD` where it may not stand. An end token leaves the state as it is."""
        key = (state, token)
        if key not in self._after:
            self._after[key] = self._next(state, token)
        return self._after[key]

    def _next(self, state: int, token: int) -> int:
        if token in self.ends:
            return state if self.grammar.automaton.accepts[state] else DEAD
        if not 0 <= token < len(self._bytes) or not self._bytes[token]:
            return DEAD
        found = self.grammar.automaton.after(state, self._bytes[token])
        return found if self._live[found] else DEAD

    def states(self, token_ids: Sequence[int]) -> list[int]:
        """The state before each token of a completion.

        Raises:
            DataError: naming the first token that may not stand where it does.
        """
        found = [self.start]
        for place, token in enumerate(token_ids):
            state = self.after(found[-1], token)
            if state == DEAD or (place and token_ids[place - 1] in self.ends):
                raise DataError(
                    f"{self.owner}: token {place + 1} of {len(token_ids)}, "
                    f"{self._tokenizer.decode([token])!r} (id {token}), is outside the grammar behind "
                    f"{shown(self.text(token_ids[:place]), 200)}. Another grammar made the draw: give its text instead."
                )
            found.append(state)
        return found[:-1]

    def constrained(self, logits: Float[Tensor, "R V"], states: Sequence[int]) -> Float[Tensor, "R V"]:
        """Logits, -inf for tokens that may not follow; so their softmax is over those that may.

        Args:
            logits: of the next token.
            states: of each row. One in `DEAD`, a beam that was given up, is left as it is.
        """
        distinct = sorted(set(states))
        masks = torch.stack([self._mask(state, logits.shape[-1]) for state in distinct]).to(logits.device)
        row_of = {state: row for row, state in enumerate(distinct)}
        rows = torch.tensor([row_of[state] for state in states], device=logits.device)
        return logits.masked_fill(~masks[rows], -torch.inf)

    def text(self, token_ids: Sequence[int]) -> str:
        """What tokens write, their end left out; a character that is cut is U+FFFD."""
        known = [self._bytes[token] for token in token_ids if 0 <= token < len(self._bytes)]
        return b"".join(known).decode("utf-8", "replace")

    def token_ids(self, text: str) -> list[int]:
        """The tokens that the tokenizer has for a text of the grammar, without an end, whatever stands before it.

        Raises:
            DataError: for a text that its tokens write otherwise.
        """
        alone = self._ids(text)
        if self._writes(alone, text):
            return alone
        newline = self._ids("\n")  # in front of a text that stands alone some tokenizers put a space
        behind = self._ids("\n" + text)
        if newline and behind[: len(newline)] == newline and self._writes(behind[len(newline) :], text):
            return behind[len(newline) :]
        raise DataError(
            f"{self.owner}: the tokenizer writes the completion {shown(text, 200)} as {shown(self.text(alone), 200)}, "
            "which is another text. Give one that it keeps."
        )

    @property
    def first_end(self) -> int:
        """The end token that observed texts have."""
        return self._ends[0]

    def reads(self, tokenizer: Any) -> bool:
        """Whether this was made of the tokenizer."""
        return self._tokenizer is tokenizer

    def writes(self, token_ids: Sequence[int], text: str) -> bool:
        """Whether tokens are a text of the grammar and one end token behind it."""
        return bool(token_ids) and token_ids[-1] in self.ends and self._writes(token_ids[:-1], text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _writes(self, token_ids: Sequence[int], text: str) -> bool:
        return all(self._bytes[token] for token in token_ids) and self.text(token_ids) == text

    def _mask(self, state: int, vocabulary: int) -> Tensor:
        if state == DEAD:
            return torch.ones(vocabulary, dtype=torch.bool)
        if state not in self._allowed or len(self._allowed[state]) != vocabulary:
            mask = numpy.zeros(max(vocabulary, len(self._bytes)), bool)
            mask[self._order] = self._live[self._targets(state)]
            mask[list(self.ends)] = self.grammar.automaton.accepts[state]
            self._allowed[state] = torch.from_numpy(mask[:vocabulary])
        return self._allowed[state]

    def _targets(self, state: int) -> numpy.ndarray:
        """The states behind each token of `_order`."""
        found = numpy.full(len(self._order), state, numpy.int32)
        for column in self._columns:
            found[: len(column)] = self.grammar.automaton.table[found[: len(column)], column]
        return found

    def _completed_by_tokens(self) -> numpy.ndarray:
        """The states from which some tokens lead to an accepting one."""
        automaton = self.grammar.automaton
        needed = {int(byte) for byte in numpy.flatnonzero(automaton.table.any(0))}
        if needed <= {text[0] for text in self._bytes if len(text) == 1}:
            found = numpy.ones(len(automaton.table), bool)
            found[DEAD] = False
            return found
        reached: dict[int, set[int]] = {}
        waiting = [self.start]
        while waiting:
            state = waiting.pop()
            if state not in reached:
                reached[state] = {int(target) for target in numpy.unique(self._targets(state))} - {DEAD}
                waiting += reached[state]
        found = automaton.accepts.copy()
        grows = True
        while grows:
            more = [state for state, targets in reached.items() if not found[state] and any(found[t] for t in targets)]
            found[more] = True
            grows = bool(more)
        return found


def _bytes_of_tokens(owner: str, tokenizer: Any) -> list[bytes]:
    """What each token writes, wherever it stands; b"" for special tokens and ids without one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if hasattr(backend, "to_str") else None
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if not kinds or not kinds <= {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise PlanError(
            f"{owner}: grammar= needs a tokenizer whose tokens write their text wherever they stand (byte-level or "
            f"SentencePiece-like), and this one decodes by {sorted(kinds) or 'words'}."
        )
    replaced = [step for step in steps if step["type"] == "Replace"]
    spaces = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
    spaces += [step["pattern"]["String"] for step in replaced if step["content"] == " " and "String" in step["pattern"]]
    if len(spaces) < len(replaced):
        raise PlanError(f"{owner}: grammar= does not know what the tokenizer's decoder replaces: {replaced}.")
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    found = [b""] * (max(vocabulary.values()) + 1)
    byte_of = _byte_level() if "ByteLevel" in kinds else {}
    for token, number in vocabulary.items():
        if number in special:
            continue
        if number in added:
            found[number] = added[number].content.encode()
        elif byte_of:
            is_spelled = all(char in byte_of for char in token)  # what is not, the decoder leaves as it is
            found[number] = bytes(byte_of[char] for char in token) if is_spelled else token.encode()
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[number] = bytes([int(token[3:5], 16)])
        else:
            for space in spaces:
                token = token.replace(space, " ")
            found[number] = token.encode("utf-8", "surrogatepass")
    return found


def _byte_level() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (Radford et al. 2019, GPT-2): those that can be printed
    stand for themselves, the others for those from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
