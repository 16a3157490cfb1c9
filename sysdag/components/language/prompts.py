"""Prompts as token ids, cut where they do not fit, and remembered from one pass of a training step to the next."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysdag.components import prompt_date
from sysdag.components.language.chat_template import ChatTemplate
from sysdag.components.language.messages import ChatPrompt, Message, is_conversation
from sysdag.components.language.text_prompts import spelled_in
from sysdag.errors import DataError, shown

logger = logging.getLogger(__name__)
REMEMBERED = 2048


@dataclass(frozen=True)
class Prompt:
    """One prompt as a model gets it.

    Attributes:
        ids: its tokens, as many as there is room for.
        given: the text, or the conversation without the turns that it had to lose.
        lost: how many tokens it had more.
        beside: what a model gets beside them; see `ChatTemplate.beside`.
    """

    ids: list[int]
    given: str | ChatPrompt
    lost: int = 0
    beside: Any = None

    @property
    def is_open(self) -> bool:
        """Whether it ends inside a turn of the assistant, which the completion goes on with."""
        return isinstance(self.given, ChatPrompt) and is_open(self.given)


def is_open(chat: ChatPrompt) -> bool:
    """Whether a conversation ends with a message of the assistant."""
    return chat.messages[-1]["role"] == "assistant"


def put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


class PromptEncoder:
    """Tokenises prompts: strings as they stand, chat messages by the tokenizer's template with a generation prompt.

    Control tokens that a string only spells (see `TextPrompt`), or a message, are text.
    A string gets what the tokenizer puts in front of a text (its BOS token) unless it begins with it, as a chat that
    was rendered before does, and nothing behind it. A conversation whose last message is the assistant's is left open
    there.

    One optimizer step asks for the same prompts several times (policy and reference, winner and loser, every
    candidate), so the latest are kept, for as long as the tokenizer keeps its vocabulary and template; and what stands
    beside those of the last call.

    Args:
        owner: whose prompts they are, for errors.
        tokenizer: of transformers.
        template: of conversations.
        remembered: how many prompts are kept; by default `REMEMBERED`.
        closes: whether a string is whole, and no beginning: what the tokenizer puts behind a text stays, and one that
            is too long loses tokens at its end, as the source of an encoder-decoder does.
    """

    def __init__(
        self, owner: str, tokenizer: Any, template: ChatTemplate, *, remembered: int | None = None, closes: bool = False
    ) -> None:
        self.owner, self.tokenizer, self.template, self.closes = owner, tokenizer, template, closes
        self._kept: dict[tuple[Any, ...], tuple[array[int], ChatPrompt | None, int, Any]] = {}
        self._most = REMEMBERED if remembered is None else remembered
        self._beside: list[Any] = []  # of the prompts of the last call
        self._state: tuple[Any, ...] = ()
        self._around: tuple[list[int], list[int]] | None = None
        self._said: set[str] = set()

    def __call__(self, prompts: Sequence[Any], room: int | None = None) -> list[Prompt]:
        """The prompts as tokens.

        Args:
            prompts: strings, lists of messages, or `ChatPrompt`s.
            room: most tokens of one. A string loses what is too much at its start. A conversation loses whole turns of
                the middle, the oldest first: never its system message, nor anything from the last user message on.

        Raises:
            DataError: for a prompt that is neither, that has no tokens, that the template refuses, or that is too long
                without the turns that it can lose.
        """
        tokenizer = self.tokenizer
        template, date = tokenizer.chat_template, prompt_date.told(tokenizer.chat_template)
        state = (len(tokenizer), template, tokenizer.bos_token_id, tokenizer.eos_token_id, date)
        if state != self._state:
            self._kept, self._state, self._around = {}, state, None
        found = []
        for element, prompt in enumerate(prompts):
            try:
                found.append(self._remembered(prompt, room))
            except DataError as error:
                error.element = element
                raise
        self._beside = [prompt.beside for prompt in found if prompt.beside is not None]
        return found

    def _remembered(self, prompt: Any, room: int | None) -> Prompt:
        if is_conversation(prompt):
            prompt = ChatPrompt(prompt)
        key: tuple[Any, ...]
        if isinstance(prompt, str):
            key = (prompt, room, spelled_in(prompt))
        elif isinstance(prompt, ChatPrompt):
            prompt = self.template.prompt(prompt)
            key = (json.dumps([prompt.messages, prompt.tools, prompt.chat_template_kwargs], default=repr), room, "chat")
        else:
            raise DataError(
                f"{self.owner}: a prompt must be a string or a list of chat messages, got {shown(prompt, 200)}."
            )
        kept = self._kept.pop(key, None)
        if kept is None:
            made = self._encode_text(prompt, room) if isinstance(prompt, str) else self._encode_chat(prompt, room)
            kept = (
                array("q", made.ids),
                made.given if isinstance(made.given, ChatPrompt) else None,
                made.lost,
                made.beside,
            )
        self._kept[key] = kept  # the latest stand last
        if len(self._kept) > self._most:
            del self._kept[next(iter(self._kept))]
        ids, chat, lost, beside = kept
        return Prompt(ids.tolist(), prompt if chat is None else chat, lost, beside)

    def _encode_text(self, text: str, room: int | None) -> Prompt:
        if self.template.tools or self.template.chat_template_kwargs:
            raise DataError(
                f"{self.owner}: the prompt is a text, which no chat template renders, so tools and "
                "chat_template_kwargs cannot reach it. Return messages, or leave them out."
            )
        ids = self.text_ids(text, spelled_in(text))
        self._check_any(ids, text)
        lost = 0 if room is None else max(len(ids) - room, 0)
        if room is None or not self.closes or not lost:
            return Prompt(ids[lost:], text, lost)
        after = self._put_around[1]
        if room <= len(after):
            raise DataError(f"{self.owner}: there is room for {room} tokens of a source; its end takes {len(after)}.")
        return Prompt([*ids[: room - len(after)], *after], text, lost)

    def _check_any(self, ids: Sequence[int], prompt: Any) -> None:
        if not ids:
            raise DataError(f"{self.owner}: the prompt {prompt!r} has no tokens; a model needs at least one.")

    def text_ids(self, text: str, spelled: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Tokens of a text with what the tokenizer puts in front of one, once, and without what it puts behind.

        Where texts are whole, as the tokenizer has them.

        Args:
            spelled: where it only spells a control token, ascending.
        """
        if self.closes and not spelled:
            return list(self.tokenizer(text)["input_ids"])
        before, after = self._put_around
        if self.closes:
            return [*before, *self.template.text_ids(text, spelled), *after]
        if after:
            self._say(
                f"the tokenizer ends every text with {self._spelled(after)}; prompts go without, so that they go on"
            )
        ids = self.template.text_ids(text, spelled)
        if before and ids[: len(before)] == before:
            self._say(
                f"a prompt begins with {self._spelled(before)} already; the tokenizer puts no second one before it"
            )
            return ids
        return [*before, *ids]

    @property
    def _put_around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it, asked once."""
        if self._around is None:
            self._around = put_around(self.tokenizer)
        return self._around

    def _spelled(self, ids: Sequence[int]) -> str:
        return repr("".join(self.tokenizer.convert_ids_to_tokens(list(ids))))

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s: %s.", self.owner, text)

    def _encode_chat(self, chat: ChatPrompt, room: int | None) -> Prompt:
        ids = self._chat_ids(chat)
        self._check_any(ids, chat.messages)
        if room is None or len(ids) <= room:
            return Prompt(ids, chat, 0, self.template.beside(ids))
        for shorter in _shortened(chat.messages):
            made = replace(chat, messages=shorter)
            fewer = self._chat_ids(made)
            if len(fewer) <= room:
                return Prompt(fewer, made, len(ids) - len(fewer), self.template.beside(fewer))
        raise DataError(
            f"{self.owner}: a prompt has {len(ids)} tokens where there is room for {room} (max_length less "
            "max_new_tokens), and its system message and last turn alone are too long. Shorten them, or raise "
            "max_length."
        )

    def _chat_ids(self, chat: ChatPrompt) -> list[int]:
        options = {"header": not is_open(chat), "continues": is_open(chat)}
        self.template.check(chat, **options)
        return self.template.ids(chat, **options)


def _shortened(messages: Sequence[Mapping[str, Any]]) -> list[list[Message]]:
    """A conversation without its oldest turn, its two oldest, ...: a turn is a user message and what answers it."""
    roles = [message["role"] for message in messages]
    head = next((place for place, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    starts = [place for place in range(head, len(roles)) if roles[place] == "user"]
    return [[*map(dict, messages[:head]), *map(dict, messages[start:])] for start in starts if start > head]
