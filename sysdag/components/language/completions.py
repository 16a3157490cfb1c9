"""Observed completions as token ids: what a model would have had to write, behind the prompt at hand, to say them.

The same answer has other ids behind another prompt: tokenizers put a space in front of a text that stands alone, tokens
merge over the border, and a chat template writes the answer in its own way, with its own end of the turn. So an
observed completion is tokenised together with its prompt, as TRL does, and begins where the two part:

- behind a text, `prompt + completion + eos_token` is tokenised; a completion that ends in an end token gets no second,
  and what spells a special token before its end is text;
- behind messages, the conversation with the answer is rendered, up to the token that ends the turn. What a template
  writes behind that (a line break, as a rule) is not scored: the model has stopped there. A template that ends turns
  without such a token has all of it scored, as TRL has.

Of a completion of several messages the assistant's are scored, each up to its end; the others are read.

Where sampling stops at strings, a text that holds one ends where a draw of it would: at the token that completes the
first, with no end token behind it. A text without any may have ended by either; it is scored with its end token, as TRL
has it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sysdag.components.language.chat_template import ChatTemplate
from sysdag.components.language.messages import ChatPrompt, Message
from sysdag.components.language.prompts import Prompt, PromptEncoder
from sysdag.components.language.stop_strings import StopStrings
from sysdag.components.language.text_prompts import spelled_in
from sysdag.errors import DataError, shown
from sysdag.traces.cells import Draw

logger = logging.getLogger(__name__)


class CompletionEncoder:
    """Puts observed completions behind their prompts.

    Args:
        owner: whose completions they are, for errors.
        prompts: what encodes the prompts.
        ends: the tokens that end a completion when the model writes them, the tokenizer's own first.
        stop: the texts that end one, too.
    """

    def __init__(self, owner: str, prompts: PromptEncoder, ends: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.owner, self.prompts, self.ends, self.stop = owner, prompts, list(ends), list(stop)
        self._stops = StopStrings(self.stop, prompts.tokenizer) if stop else None
        self.template: ChatTemplate = prompts.template
        self.tokenizer = prompts.tokenizer
        self._said: set[str] = set()
        self._control_ids: tuple[int, set[int]] = (-1, set())

    def __call__(self, prompt: Prompt, value: str | Sequence[Message]) -> dict[str, Any]:
        """The record of a draw of this value.

        Args:
            prompt: what it continues.
            value: see `completion_value`.

        Returns:
            `token_ids`; whether it is `finished` by an end token or a stop string; where not all tokens are scored,
            `completion_mask` (1 for one that is); and where the first of them stand in place of the prompt's last ones,
            `prompt_overlap`, the number of these.

        Raises:
            DataError: for a completion that does not continue the prompt.
        """
        if isinstance(prompt.given, str):
            whole, shared = self._behind_text(prompt, prompt.given, value)
            mask = [1] * (len(whole) - shared)
            before = len(prompt.ids) + prompt.lost - shared
        else:
            whole, shared, mask = self._behind_chat(prompt, value)
            before = len(prompt.ids) - shared
        if before >= len(prompt.ids):
            raise DataError(
                f"{self.owner}: the completion {shown(value)} leaves no token of its prompt as it was, so there is "
                "nothing that it follows. End the prompt at the end of a word, or of a line."
            )
        if before:
            lost = self.tokenizer.decode(self.template.plain(prompt.ids[-before:]))
            self._say(
                "border",
                f"behind a prompt with its completion the tokens of the prompt's end, {lost!r}, are others than "
                "without it. The completion begins where they part, as in TRL, so it is scored behind less than the "
                "model gets when it samples. End prompts at the end of a token",
            )
        ids = whole[shared:]
        if not any(mask):
            raise DataError(f"{self.owner}: the completion {shown(value)} has no token to score behind its prompt.")
        ends = ids[-1] in self.ends or (not isinstance(prompt.given, str) and ids[-1] in self._controls())
        stop = self._stops.first_end(ids) if self._stops is not None and isinstance(value, str) else None
        if stop is not None:
            if not all(token in self.ends for token in ids[stop:]):
                self._say(
                    "stop", f"a completion goes on behind a stop string ({self.stop}), where a draw ends; it is cut"
                )
            ids, mask, ends = ids[:stop], mask[:stop], True
        record: dict[str, Any] = {"token_ids": ids, "finished": ends}
        if not all(mask):
            record["completion_mask"] = mask
        if before:
            record["prompt_overlap"] = before
        return record

    def alone(self, value: str | Sequence[Message]) -> int:
        """About how many tokens a completion has behind whatever prompt: its texts and an end."""
        texts = [value] if isinstance(value, str) else [str(m.get("content", "")) for m in value]
        return sum(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)

    def opened(self, prompt: Prompt) -> list[int]:
        """The tokens of a chat's prompt that its template writes of the turn which is gone on with."""
        chat = prompt.given
        assert isinstance(chat, ChatPrompt)
        before = list(chat.messages)[: -1 if prompt.is_open else None]
        shared = shared_tokens(self.template.ids(replace(chat, messages=before)), prompt.ids) if before else 0
        return prompt.ids[shared:]

    def end_behind(self, prompt: Prompt) -> list[int]:
        """The token that ends a completion of a prompt; none where its chat template ends turns without."""
        if isinstance(prompt.given, str):
            return [self.tokenizer.eos_token_id]
        messages, _ = self._conversation(prompt, "x")
        turn = replace(prompt.given, messages=messages)
        whole = self.template.ids(turn)
        start = shared_tokens(prompt.ids, whole)
        stop = self._end_of_turn(whole, start, len(whole), turn)
        return [whole[stop - 1]] if whole[stop - 1] in {*self.ends, *self._controls()} else []

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s: %s; further cases are not reported.", self.owner, text)

    def spelled_end(self, text: str) -> str:
        """The end token that a text ends in, as it is spelled; "" without one."""
        spelled = [self.tokenizer.convert_ids_to_tokens(end) for end in self.ends]
        return max((end for end in spelled if end and text.endswith(end)), key=len, default="")

    def _behind_text(self, prompt: Prompt, text: str, value: str | Sequence[Message]) -> tuple[list[int], int]:
        """The tokens of a prompt and its completion, and how many of them are the prompt's."""
        if not isinstance(value, str):
            raise DataError(
                f"{self.owner}: a completion of several messages, or with calls or reasoning, needs a chat template to "
                f"render it, but its prompt is a text. Return messages from the node's function. Got {shown(value)}."
            )
        before = spelled_in(text)
        spelled = [*before, *((len(text) + start, len(text) + end) for start, end in self._only_spelled(value))]
        if self.spelled_end(value):
            whole = self.prompts.text_ids(text + value, spelled)
        else:
            whole = self.prompts.text_ids(text + value + self.tokenizer.eos_token, spelled)
        if whole[-1] not in self.ends:  # a tokenizer that splits special tokens
            whole = [*self.prompts.text_ids(text + value, spelled), self.tokenizer.eos_token_id]
        return whole, shared_tokens(prompt.ids if not prompt.lost else self.prompts.text_ids(text, before), whole)

    def _only_spelled(self, text: str) -> list[tuple[int, int]]:
        """Where a completion only spells a special token: those that it ends in are meant."""
        if not self.template.sanitizes:
            return []
        special = self.template.controls_of_texts().spellings.special
        found = [match.span() for match in special.finditer(text) if match.group() not in self.stop]
        end = len(text)
        while found and not text[found[-1][1] : end].strip():
            end = found.pop()[0]
        if found:
            token = text[slice(*found[0])]
            self._say("spelled", f"a completion spells the special token {token!r} before its end, which is text there")
        return found

    def _behind_chat(self, prompt: Prompt, value: str | Sequence[Message]) -> tuple[list[int], int, list[int]]:
        """The tokens of a prompt and its completion, how many are the prompt's, and which of the others are scored."""
        chat = prompt.given
        assert isinstance(chat, ChatPrompt)
        messages, first = self._conversation(prompt, value)
        own = [place for place in range(first, len(messages)) if messages[place]["role"] == "assistant"]
        conversation = replace(chat, messages=messages[: own[-1] + 1])
        self.template.check(conversation, answer_from=first)
        whole = self.template.ids(conversation)
        shared = shared_tokens(prompt.ids, whole)
        if shared < len(prompt.ids):
            self._check_history(replace(chat, messages=messages[:first]), prompt.ids, shared)
        spans: list[tuple[int, int]] = []
        for number, place in enumerate(own):
            upto = replace(chat, messages=messages[:place])
            header = prompt.ids if place == first else self.template.ids(upto, header=True)
            start = shared_tokens(header, whole)
            if place != first and start < len(header):
                self._check_history(upto, header, start)
            if number and start < spans[-1][0]:
                raise DataError(f"{self.owner}: its chat template writes earlier turns anew where others follow.")
            spans.append((start, place))
        mask = [0] * len(whole)
        stop = shared
        for number, (start, place) in enumerate(spans):
            following = spans[number + 1][0] if number + 1 < len(spans) else len(whole)
            stop = self._end_of_turn(whole, start, following, replace(chat, messages=messages[: place + 1]))
            mask[start:stop] = [1] * (stop - start)
        return whole[:stop], shared, mask[shared:stop]

    def _conversation(self, prompt: Prompt, value: str | Sequence[Message]) -> tuple[list[Message], int]:
        """A prompt's messages with those of its completion, and the place of the first of these."""
        assert isinstance(prompt.given, ChatPrompt)
        before = [dict(message) for message in prompt.given.messages]
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        added = [dict(message) for message in value]
        for message in added:
            content = message.get("content")
            if message["role"] == "assistant" and isinstance(content, str):
                message["content"] = content.removesuffix(self.spelled_end(content))
        if not prompt.is_open:
            return [*before, *added], len(before)
        if added[0]["role"] != "assistant":
            raise DataError(
                f"{self.owner}: the prompt ends in a message of the assistant, which the completion goes on with, but "
                f"it begins with a message of the role {added[0]['role']!r}."
            )
        begun, more = before[-1].get("content", ""), added[0].get("content", "")
        if not (isinstance(begun, str) and isinstance(more, str)):
            raise DataError(f"{self.owner}: a message of the assistant that is gone on with must be of one text.")
        return [*before[:-1], {**before[-1], **added[0], "content": begun + more}, *added[1:]], len(before) - 1

    def _check_history(self, chat: ChatPrompt, header: Sequence[int], shared: int) -> None:
        """Refuses a conversation that reads otherwise, before the answer begins, once the answer is there."""
        if chat.messages and shared < shared_tokens(self.template.ids(chat), header):
            raise DataError(
                f"{self.owner}: with an answer its chat template writes the messages before it otherwise than without, "
                f"from token {shared} on, so there is no prompt that the answer continues. Sample with "
                "another tokenizer.chat_template."
            )

    def _end_of_turn(self, whole: Sequence[int], start: int, stop: int, turn: ChatPrompt) -> int:
        """The place behind the token that ends the turn of the assistant which begins at `start`.

        Args:
            whole: the conversation.
            stop: where the next turn of the assistant begins, or the end.
            turn: the conversation up to this turn.
        """
        if stop < len(whole):  # others follow
            end = next((place + 1 for place in range(start, stop) if whole[place] in self.ends), None)
            if end is not None:
                return end
            stop = shared_tokens(self.template.ids(turn), whole)
        trailing = stop
        while trailing > start and self._says_nothing(whole[trailing - 1]):
            trailing -= 1
        written = [place for place in range(trailing, stop) if whole[place] in self.ends]
        if written:
            return written[0] + 1
        controls = [place for place in range(trailing, stop) if whole[place] in self._controls()]
        if controls:
            end = whole[controls[-1]]
            self._say(
                f"end {end}",
                f"the chat template ends a turn with {self.tokenizer.convert_ids_to_tokens(end)!r}, which is neither "
                "the tokenizer's eos_token nor in generation_config.eos_token_id: completions are scored with it, but "
                "sampling will not stop there. Add it to model.generation_config.eos_token_id",
            )
            return controls[-1] + 1
        self._say("no end", "the chat template ends a turn without an end token, so completions are scored without one")
        return stop

    def _controls(self) -> set[int]:
        """Added tokens but those that say nothing of a turn."""
        tokenizer, size = self.tokenizer, len(self.tokenizer)
        if self._control_ids[0] != size:
            others = {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id} - set(self.ends)
            added = {place for place, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
            self._control_ids = (size, added - others)
        return self._control_ids[1]

    def _says_nothing(self, token: int) -> bool:
        return token in self.ends or token in self._controls() or not self.tokenizer.decode([token]).strip()


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for place, (token, counterpart) in enumerate(zip(one, other, strict=False)):
        if token != counterpart:
            return place
    return min(len(one), len(other))


def scored_tokens(draw: Draw) -> int | None:
    """How many tokens of a draw are scored; None for an observed one whose tokens are not known yet."""
    ids = draw.record.get("token_ids")
    return None if ids is None else sum(draw.record.get("completion_mask") or [1] * len(ids))


def check_token_draws(owner: str, draws: Sequence[Draw], vocabulary: int | None, *, any_value: bool = False) -> None:
    """Refuses draws with token ids that `owner` cannot have made.

    Args:
        vocabulary: how many tokens the model has; None where that is not known.
        any_value: whether a value may be something else than a text or messages.

    Raises:
        DataError: `DataError.element` is the draw's index.
    """
    for element, draw in enumerate(draws):
        ids: Any = draw.record.get("token_ids")
        mask: Any = draw.record.get("completion_mask", [1])
        overlap: Any = draw.record.get("prompt_overlap", 0)
        if not any_value and not isinstance(draw.value, (str, list)):
            raise DataError(f"{owner}: a draw's value is its text, got {shown(draw.value)}.", element=element)
        is_list = isinstance(ids, (list, tuple)) and (bool(ids) or draw.value == "")  # of a part that was not come to
        if not is_list or not all(type(token) is int and token >= 0 for token in ids):
            raise DataError(
                f"{owner}: a draw needs its token_ids, a list of integers, got {shown(ids)}.", element=element
            )
        if "completion_mask" in draw.record and not (
            isinstance(mask, (list, tuple)) and len(mask) == len(ids) and all(scored in (0, 1) for scored in mask)
        ):
            raise DataError(
                f"{owner}: a draw's completion_mask has 0 or 1 for each of its {len(ids)} tokens, got {shown(mask)}.",
                element=element,
            )
        if type(overlap) is not int or overlap < 0:
            raise DataError(
                f"{owner}: a draw's prompt_overlap is a number of tokens, got {shown(overlap)}.", element=element
            )
        if vocabulary is not None and max(ids, default=0) >= vocabulary:
            raise DataError(
                f"{owner}: a draw has the token id {max(ids)}, but the model has {vocabulary}; another model made it. "
                "Give its text instead.",
                element=element,
            )


def tokenizer_hash(tokenizer: Any, options: Any) -> str:
    """SHA-256 of what makes tokens of texts: the vocabulary with its rules, the template, and `options` of its use."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items())
    if hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}  # of one call
    content = json.dumps([rules, tokenizer.special_tokens_map, tokenizer.chat_template, options], default=str)
    return hashlib.sha256(content.encode()).hexdigest()
