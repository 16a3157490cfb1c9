"""A language model's texts: prompts and completions as token ids, in the room that there is for them; no weights."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sysdag.components import prompt_date, rotary
from sysdag.components.component import Component, Takes
from sysdag.components.input_reader import Argument
from sysdag.components.language.chat_template import ChatTemplate, schemas
from sysdag.components.language.completions import CompletionEncoder, check_token_draws, scored_tokens, tokenizer_hash
from sysdag.components.language.messages import REASONING, ROW_OPTIONS, completion_value, is_blank, is_conversation
from sysdag.components.language.part_encoder import PartEncoder, of_places
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.language.prompts import Prompt, PromptEncoder
from sysdag.components.language.stop_strings import stop_strings
from sysdag.components.language.text_prompts import PromptReader
from sysdag.components.language.text_screen import TextScreen
from sysdag.errors import DataError, GraphError, PlanError
from sysdag.graph.parts import Partition, PartPrompt
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_MISPLACED = (
    "a part of a completion is empty exactly where the parts before it ended without their markers, and this draw was "
    "made behind others. Give its text instead of a draw."
)


class TextComponent(Component):
    """A component whose inputs are prompts and whose draws are completions of them.

    Args:
        lm: the model, of which the tokenizer and the config are read, and not the weights.
        max_new_tokens, max_length, stop, tools, chat_template_kwargs, sanitize_control_tokens: see `CausalLM`.

    Class attributes:
        limits_prompts: the option that a prompt which is cut is too long for.
        closes_prompts: whether a prompt is a whole text, which nothing goes on with (see `PromptEncoder`).

    Raises:
        PlanError: for options out of range.
    """

    value_type: type | None = str
    has_tokens = True
    row_options = ROW_OPTIONS
    limits_prompts: ClassVar[str] = "max_length"
    closes_prompts: ClassVar[bool] = False

    def __init__(
        self,
        lm: PretrainedLM,
        *,
        max_new_tokens: int | None,
        max_length: int | None,
        stop: str | Sequence[str] | None,
        tools: Sequence[Any] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        sanitize_control_tokens: bool,
    ) -> None:
        self.lm = lm
        self._max_length, self._max_new_tokens = max_length, max_new_tokens
        self.stop = list(stop_strings(stop))
        self.tools = list(tools or [])
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.sanitize_control_tokens = sanitize_control_tokens
        self._warned: set[str] = set()
        self._prompt_encoder: PromptEncoder | None = None
        self._reader: PromptReader | None = None
        self._completions: CompletionEncoder | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, loaded on first access."""
        return self.lm.tokenizer

    @property
    def config(self) -> Any:
        """The model's config; no weights are loaded for it."""
        return self.lm.config

    @property
    def max_length(self) -> int | None:
        """Most tokens of prompt and completion together; None where nothing limits it.

        Raises:
            PlanError: for more than a model has fixed frequencies for; see `sysdag.components.rotary`.
        """
        config = self.config.get_text_config(decoder=True)
        rotary.check_length(repr(self), config, "max_length", self._max_length)
        return self._max_length or rotary.positions_of(config)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of a completion."""
        if self._max_new_tokens is not None:
            return self._max_new_tokens
        return 256 if self.max_length is None else min(256, self.max_length // 2)

    def prompt_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of each prompt, as far as there is room for it (see `max_length`).

        Raises:
            DataError: for a prompt that is neither a string nor chat messages, or that has no tokens; for messages that
                the chat template refuses or leaves out, or that are too long without the turns that they can lose.
        """
        if not any(isinstance(each, PartPrompt) for each in prompts):
            return [prompt.ids for prompt in self._prompts(prompts)]
        found = []
        for element, (given, prompt) in enumerate(zip(prompts, self._prompts(prompts), strict=True)):
            with of_places([element]):
                found.append(self._parts().ids(given) if isinstance(given, PartPrompt) else prompt.ids)
        return found

    def screen(self) -> Takes | None:
        """See `Component`; of plain texts, by their characters (see `sysdag.components.language.text_screen`)."""
        if self.stop or self.tools or self.chat_template_kwargs:
            return None
        screen = TextScreen.of(
            self.tokenizer, max_length=self.max_length, room=self._room, embeddings=self.lm.num_embeddings,
            special=self._encoder().template.controls_of_texts().spellings.control,
        )  # fmt: skip
        return None if screen is None else screen.takes

    def cut_from(self, input: Any) -> int:
        """See `Component`; tokens of the prompt."""
        return self._prompts([input])[0].lost

    @property
    def _room(self) -> int | None:
        """Most tokens of a prompt."""
        longest = self.max_length
        room = None if longest is None else longest - self.max_new_tokens
        if room is not None and room < 1:
            raise PlanError(f"{self!r}: max_new_tokens={self.max_new_tokens} leaves no room in {longest} positions.")
        return room

    def _prompts(self, prompts: Sequence[Any]) -> list[Prompt]:
        found = self._encoded(prompts)
        for element, prompt in enumerate(found):
            self.lm.check_ids(prompt.ids, "a prompt", element)
            if prompt.lost:
                left = len(prompt.ids)
                kept = "first" if self.closes_prompts else "last"
                how = (
                    f"cut to its {kept} {left}" if isinstance(prompt.given, str) else f"left {left} without older turns"
                )
                self._warn_once("prompt", f"a prompt of {left + prompt.lost} tokens was {how} ({self.limits_prompts})")
        return found

    def _encoded(self, prompts: Sequence[Any]) -> list[Prompt]:
        if not any(isinstance(each, PartPrompt) for each in prompts):
            return self._encoder()(prompts, self._room)
        found = []
        for element, given in enumerate(prompts):
            with of_places([element]):
                is_part = isinstance(given, PartPrompt)
                found.append(self._parts().prompt(given) if is_part else self._encoder()([given], self._room)[0])
        return found

    def _parts(self) -> PartEncoder:
        """What reads and writes completions in parts."""
        return PartEncoder(
            repr(self), self._completion_encoder(), max_new_tokens=self.max_new_tokens, max_length=self.max_length
        )

    def part_values(self, value: Any, partition: Partition) -> list[Any] | None:
        """See `Component`; of a text, of one message of the assistant with its reasoning, or of a draw's tokens."""
        if isinstance(value, Draw):
            is_whole = "token_ids" in value.record and "part" not in value.record
            return self._parts().parted(partition, value) if is_whole else None
        if isinstance(value, str) or not is_conversation(value):
            return partition.texts(value) if isinstance(value, str) else None
        completion = completion_value(value)
        if isinstance(completion, str):
            return partition.texts(completion)
        reasoning = next((completion[0][key] for key in REASONING if completion[0].get(key)), None)
        content = completion[0].get("content", "")
        if len(completion) > 1 or "tool_calls" in completion[0] or len(partition.markers) > 1 or reasoning is None:
            return None
        if not isinstance(reasoning, str) or not isinstance(content, str):
            return None
        return [partition.thought(reasoning), partition.value(content)]

    def check_partition(self, partition: Partition) -> None:
        """Refuses stop strings that a marker is a part of, or ends in the beginning of one."""
        for marker, stop in itertools.product(partition.markers, self.stop):
            ends = (marker[start:] for start in range(len(marker)))
            if marker in stop or stop in marker or any(stop.startswith(end) for end in ends):
                raise GraphError(
                    f"@split: the stop string {stop!r} of {self!r} and the marker {marker!r} may be written by the "
                    "same characters, so that which of them ends a part cannot be told; leave the stop string out."
                )

    def _encoder(self) -> PromptEncoder:
        if self._prompt_encoder is None:
            template = ChatTemplate(
                repr(self), self.tokenizer, tools=self.tools, chat_template_kwargs=self.chat_template_kwargs,
                sanitize_control_tokens=self.sanitize_control_tokens,
            )  # fmt: skip
            self._prompt_encoder = PromptEncoder(repr(self), self.tokenizer, template, closes=self.closes_prompts)
        return self._prompt_encoder

    def _completion_encoder(self) -> CompletionEncoder:
        ends = self.lm.eos_token_ids
        if self._completions is None or (self._completions.ends, self._completions.stop) != (ends, self.stop):
            self._completions = CompletionEncoder(repr(self), self._encoder(), ends, self.stop)
        return self._completions

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%r: %s; further cases are not reported.", self, message)

    def key(self, draw: Draw) -> Any:
        ids = draw.record.get("token_ids")
        return json.dumps(draw.value, sort_keys=True) if ids is None else tuple(ids)

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        """Draws of texts or of messages; their tokens depend on the prompt (see `in_context`)."""
        draws = []
        for element, value in enumerate(values):
            try:
                draws.append(self._observed(value))
            except DataError as error:
                raise DataError(f"{self!r}: {error}", element=element) from error
        return draws

    def in_context(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> list[Draw]:
        """Observed completions with the tokens that say them behind their prompts (see `completions`)."""
        found = list(draws)
        unread = [place for place, draw in enumerate(draws) if "token_ids" not in draw.record]
        if not unread:
            return found
        whole = [place for place in unread if not isinstance(inputs[place], PartPrompt)]
        with of_places(whole):
            prompts = dict(zip(whole, self._prompts([inputs[place] for place in whole]), strict=True))
        for place in unread:
            with of_places([place]):
                if place in prompts:
                    found[place] = self._behind(prompts[place], draws[place])
                else:
                    found[place] = self._parts().behind(inputs[place], draws[place])
        return found

    def is_over(self, input: Any) -> bool:
        return isinstance(input, PartPrompt) and self._parts().is_over(input)

    def _observed(self, value: Any) -> Draw:
        return Draw(completion_value(value))

    def _behind(self, prompt: Prompt, draw: Draw) -> Draw:
        """An observed completion with its tokens behind a prompt."""
        return Draw(draw.value, self._completion_encoder()(prompt, draw.value))

    def _written(self, draw: Draw) -> Any:
        """The text or the messages of an observed completion."""
        return draw.value

    def _takes_values(self) -> bool:
        """Whether draws have other values than texts and messages."""
        return False

    def with_row_options(self, input: Any, options: Mapping[str, Any]) -> Any:
        return PromptReader(repr(self)).with_row_options(input, options)

    def tell_apart(self, input: Any, function: Callable[..., Any], arguments: Mapping[str, Argument]) -> Any:
        """See `Component`; of a text, what values spell in it (see `sysdag.components.language.text_prompts`)."""
        is_part = isinstance(input, PartPrompt)
        if not is_part and (not isinstance(input, str) or not self.sanitize_control_tokens):
            return input
        return self.input_reader().tell_apart(input, function, arguments)

    def input_reader(self) -> PromptReader:
        spellings = self._encoder().template.controls_of_texts().spellings if self.sanitize_control_tokens else None
        if self._reader is None or self._reader.spellings != spellings:
            self._reader = PromptReader(repr(self), spellings, self.tokenizer.eos_token)
        return self._reader

    def check_draws(self, draws: Sequence[Draw]) -> None:
        check_token_draws(repr(self), draws, self.lm.num_target_embeddings, any_value=self._takes_values())

    def is_empty(self, draw: Draw) -> bool:
        return is_blank(draw.value)

    def longest_draw(self, input: Any = None) -> int | None:
        """See `Component`; what is longer loses tokens at its end. A prompt takes at least one position."""
        if self.max_length is None:
            return None
        return self.max_length - (1 if input is None else len(self.prompt_ids([input])[0]))

    def _sequences(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> list[tuple[list[int], list[int]]]:
        return self._in_room(inputs, self.in_context(inputs, draws))

    def _in_room(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> list[tuple[list[int], list[int]]]:
        """Prompts and completions, whose tokens are known, as far as there is room for both."""
        prompts = self.prompt_ids(inputs)
        for element, (given, draw) in enumerate(zip(inputs, draws, strict=True)):
            if bool(draw.record["token_ids"]) == self.is_over(given):
                why = _MISPLACED if isinstance(given, PartPrompt) else "a draw needs its token_ids, and this has none."
                raise DataError(f"{self!r}: {why}", element=element)
            self.lm.check_target_ids(draw.record["token_ids"], element)
        longest = self.max_length
        return [self._fit(prompt, draw, longest) for prompt, draw in zip(prompts, draws, strict=True)]

    def _fit(self, prompt: list[int], draw: Draw, longest: int | None) -> tuple[list[int], list[int]]:
        completion: Sequence[int] = draw.record["token_ids"]
        prompt = prompt[: len(prompt) - draw.record.get("prompt_overlap", 0)]
        room = None if longest is None else longest - len(prompt)
        if room is not None and len(completion) > room:
            self._warn_once("completion", f"a completion of {len(completion)} tokens was cut to {room} (max_length)")
            completion = completion[:room]
        return prompt, list(completion)

    def lengths(self, draws: Sequence[Draw]) -> list[int]:
        known = [scored_tokens(draw) for draw in draws]
        return [
            self._completion_encoder().alone(self._written(draw)) if count is None else count
            for draw, count in zip(draws, known, strict=True)
        ]

    def positions(self, draws: Sequence[Draw]) -> list[int]:
        lengths = zip(draws, self.lengths(draws), strict=True)
        return [len(draw.record.get("token_ids", ())) or length for draw, length in lengths]

    @property
    def told_time(self) -> list[str]:
        """What its chat template writes of the time into prompts (see `prompt_date`)."""
        return prompt_date.told(self.tokenizer.chat_template)

    def reading(self) -> str:
        ends, options = self.lm.eos_token_ids, [schemas(self.tools), self.chat_template_kwargs]
        stop = [self.stop] if self.stop else []
        return tokenizer_hash(self.tokenizer, [ends, *options, self.sanitize_control_tokens, *stop, *self.told_time])
