"""Conversations as token ids, by a tokenizer's chat template, with nothing of them lost on the way.

Three things that a template does are silent and never meant. It writes control tokens that a message only spells, so a
text could end its own turn: such spellings are told as text. It leaves out what it does not know, a call or a role:
that is refused, after a second rendering has shown that nothing depends on it. And it raises whatever its author
thought of, or whatever jinja does: that is a `DataError`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sysdag.components import prompt_date
from sysdag.components.language.control_tokens import ControlTokens, Marks
from sysdag.components.language.messages import REASONING, REFERENCES, ROLES, ChatPrompt, Message, checked
from sysdag.errors import DataError, shown

RESERVED = frozenset(
    ("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict",
     "return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs",
     "sanitize_control_tokens")
)  # fmt: skip
_MARK = "Zq7"  # what a probe adds to a text
_REMEMBERED = 4096
_ALLOWED = "CausalLM(sanitize_control_tokens=False) reads such text as the token itself."


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        owner: whose it is, for errors.
        tokenizer: of transformers.
        tools, chat_template_kwargs, sanitize_control_tokens: see `CausalLM`.
    """

    def __init__(
        self,
        owner: str,
        tokenizer: Any,
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
    ) -> None:
        self.owner, self.tokenizer = owner, tokenizer
        self.tools, self.chat_template_kwargs = schemas(tools), dict(chat_template_kwargs or {})
        self.sanitizes = sanitize_control_tokens
        self._complete: dict[str, None] = {}
        self._control_tokens: tuple[Any, ControlTokens] | None = None

    def prompt(self, given: ChatPrompt) -> ChatPrompt:
        """A prompt whose messages are checked, with the component's tools and variables where it has none of its own.

        Raises:
            DataError: for messages that are none, or variables that are not the caller's to set.
        """
        made = given.with_defaults(self.tools, self.chat_template_kwargs)
        made = replace(made, messages=self._messages(made.messages), tools=schemas(made.tools))
        if reserved := RESERVED & made.chat_template_kwargs.keys():
            raise DataError(f"{self.owner}: chat_template_kwargs cannot set {sorted(reserved)}.")
        template = self._source(made)
        unread = [name for name in self.chat_template_kwargs if not _names(name, template) and name not in _ARGUMENTS]
        if unread:
            raise DataError(f"{self.owner}: its chat template reads no {unread[0]!r} (chat_template_kwargs).")
        return made

    def _messages(self, given: Sequence[Any]) -> list[Message]:
        try:
            return checked(given)
        except DataError as error:
            raise DataError(f"{self.owner}: {error}") from error

    def _source(self, prompt: ChatPrompt) -> str:
        if self.tokenizer.chat_template is None and "chat_template" not in prompt.chat_template_kwargs:
            raise DataError(
                f"{self.owner}: the prompt is a list of chat messages, but the tokenizer has no chat template. Return "
                "a string, or set tokenizer.chat_template."
            )
        try:
            return self.tokenizer.get_chat_template(prompt.chat_template_kwargs.get("chat_template"), prompt.tools)
        except ValueError as error:
            raise DataError(f"{self.owner}: {error}") from error

    def ids(self, prompt: ChatPrompt, *, header: bool = False, continues: bool = False) -> list[int]:
        """Token ids of a conversation.

        Args:
            prompt: as `prompt` gave it, or with other messages.
            header: whether the beginning of the assistant's turn follows (the generation prompt).
            continues: whether the last message is left open, for the model to go on with.

        Raises:
            DataError: for what the template refuses.
        """
        options = {"add_generation_prompt": header, "continue_final_message": continues}
        told = self._told(self._controls(self._source(prompt)), prompt) if self.sanitizes else None
        if told is None:
            return list(self._rendered(prompt, tokenize=True, return_dict=False, **options))
        controls, marked, marks = told
        return self._encoded(controls, self._rendered(marked, tokenize=False, **options), marks)

    def _told(self, controls: ControlTokens, prompt: ChatPrompt) -> tuple[ControlTokens, ChatPrompt, Marks] | None:
        """A conversation in which what only spells a control token is marked; None where nothing does."""
        variables = {name: value for name, value in prompt.chat_template_kwargs.items() if name != "chat_template"}
        marked = controls.mark(prompt.messages, [prompt.tools, variables])
        if not marked:
            return None
        messages, (tools, variables), marks = marked
        kwargs = {**prompt.chat_template_kwargs, **variables}
        return controls, replace(prompt, messages=messages, tools=tools, chat_template_kwargs=kwargs), marks

    def _encoded(self, controls: ControlTokens, rendered: str, marks: Marks) -> list[int]:
        try:
            return controls.encode_marked(rendered, marks)
        except DataError as error:
            raise DataError(f"{self.owner}: {error}. {_ALLOWED}") from error

    def plain(self, ids: Sequence[int]) -> list[int]:
        """Ids as the tokenizer has them."""
        return list(ids)

    def beside(self, ids: Sequence[int]) -> Any:
        """What a model gets beside the ids of a prompt that was just encoded, to be kept as long as they are."""
        return None

    def text_ids(self, text: str, spelled: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Token ids of a text that no template renders, without what the tokenizer puts around one.

        Args:
            spelled: where it only spells a control token, ascending; see `ControlTokens.encode`.
        """
        if not spelled:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        try:
            return self.controls_of_texts().encode(text, spelled)
        except DataError as error:
            raise DataError(f"{self.owner}: {error}. {_ALLOWED}") from error

    def controls_of_texts(self) -> ControlTokens:
        """The control tokens of texts that no template renders: those of the tokenizer's own, where it has one."""
        template = self.tokenizer.chat_template
        return self._controls("\n".join(template.values()) if isinstance(template, dict) else template or "")

    def _controls(self, template: str) -> ControlTokens:
        state = (template, len(self.tokenizer))
        if self._control_tokens is None or self._control_tokens[0] != state:
            self._control_tokens = (state, ControlTokens(self.tokenizer, template))
        return self._control_tokens[1]

    def _rendered(self, prompt: ChatPrompt, **options: Any) -> Any:
        options = {**prompt.chat_template_kwargs, **options}
        source = self._source(prompt)
        if prompt_date.told(source):
            options["chat_template"] = prompt_date.dated(source)
        try:
            return self.tokenizer.apply_chat_template(list(prompt.messages), tools=prompt.tools, **options)
        except _refusals() as error:
            raise DataError(
                f"{self.owner}: its chat template refuses the messages of the roles "
                f"{[message['role'] for message in prompt.messages]}: {type(error).__name__}: {error!s:.300}"
            ) from error

    def check(self, prompt: ChatPrompt, *, answer_from: int | None = None, **options: bool) -> None:
        """Refuses a conversation of which the template leaves something out.

        What was found for some messages holds for others that have the same roles and keys.

        Args:
            prompt: as `prompt` gave it, or with further messages.
            answer_from: the first message of the completion, whose reasoning must not be lost either.
            options: see `ids`.

        Raises:
            DataError: naming the message, and its role or key.
        """
        template = self._source(prompt)
        for number, message in enumerate(prompt.messages):
            if message["role"] not in ROLES and not _names(message["role"], template):
                raise DataError(
                    f"{self.owner}: message {number} has the role {message['role']!r}; known are {list(ROLES)}"
                    " and those that the chat template names."
                )
        shape = [[m["role"], *sorted((k, _shape(v), bool(v)) for k, v in m.items())] for m in prompt.messages]
        told = [template, shape, answer_from, prompt.tools, prompt.chat_template_kwargs, options]
        key = json.dumps(told, sort_keys=True, default=str)
        if key in self._complete:
            return
        how = {"add_generation_prompt": options.get("header", False), "tokenize": False}
        how["continue_final_message"] = options.get("continues", False)
        whole = self._rendered(prompt, **how)

        def is_read(changed: ChatPrompt) -> bool:
            try:
                return self._rendered(changed, **how) != whole
            except DataError:
                return True

        if prompt.tools and not is_read(replace(prompt, tools=None)):
            raise DataError(
                f"{self.owner}: its chat template leaves out the tools, so the model would not know of them. Leave "
                "them out, or set another tokenizer.chat_template; where other nodes call them, give them to their "
                "components (CausalLM(tools=[...])) and not to the row."
            )
        for number, message in enumerate(prompt.messages):
            self._check_message(prompt, number, message, whole, is_read, answer_from)
        if len(self._complete) >= _REMEMBERED:
            self._complete.clear()
        self._complete[key] = None

    def _check_message(
        self, prompt: ChatPrompt, number: int, message: Mapping[str, Any], whole: str,
        is_read: Callable[[ChatPrompt], bool], answer_from: int | None,
    ) -> None:  # fmt: skip
        in_history = answer_from is None or number < answer_from
        reasoning = [key for key in REASONING if message.get(key)]
        for key, value in message.items():
            if key == "role" or key in REFERENCES or value == "" or (key in REASONING and key not in reasoning[:1]):
                continue
            if key in REASONING and in_history:
                continue
            names = REASONING if key in REASONING else (key,)  # transformers copies reasoning under each name
            for changed in _changed(value, key):
                others = list(prompt.messages)
                others[number] = {**message, **{name: changed for name in names if name in message}}
                if not is_read(replace(prompt, messages=others)):
                    raise DataError(
                        f"{self.owner}: its chat template leaves out {key!r} of message {number} (role "
                        f"{message['role']!r}), {shown(value)}. Leave it out, too, or set another "
                        "tokenizer.chat_template."
                    )
            written = (str(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]) if isinstance(value, list) else ()
            if key == "content" and message["role"] != "tool" and any(text in whole for text in written):
                raise DataError(
                    f"{self.owner}: its chat template takes text alone, and message {number} has a content of "
                    f"{len(value)} parts. Join them."
                )


def _shape(value: Any) -> str:
    """The type of a value, and of the parts of a content what they are."""
    parts = [part.get("type") if isinstance(part, Mapping) else None for part in value] if type(value) is list else []
    return f"{type(value).__name__} {parts}"


_ARGUMENTS = ("chat_template", "documents")  # of apply_chat_template itself


def schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    """Tools as JSON schemas: a function's is made of its type hints and docstring, as transformers does."""
    if not tools:
        return None
    if all(isinstance(tool, dict) for tool in tools):
        return list(tools)
    from transformers.utils import get_json_schema

    return [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]


def _refusals() -> tuple[type[Exception], ...]:
    """What the code of a template raises, of itself or of the messages that it does not expect."""
    import jinja2

    return (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _names(name: str, template: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", template) is not None


def _changed(value: Any, key: str) -> list[Any]:
    """Other values in place of one, each different in a part that must not be lost."""
    if key == "tool_calls":
        return [_changed_call(value, place, part) for place in range(len(value)) for part in ("name", "arguments")]
    if isinstance(value, str):
        return [value + _MARK]
    texts = (
        [place for place, part in enumerate(value) if isinstance(part, Mapping) and "text" in part]
        if isinstance(value, list)
        else []
    )
    if texts:
        return [
            [*value[:place], {**value[place], "text": value[place]["text"] + _MARK}, *value[place + 1 :]]
            for place in texts
        ]
    return [_MARK]


def _changed_call(calls: Sequence[Mapping[str, Any]], place: int, part: str) -> list[Any]:
    changed = copy.deepcopy(list(calls))
    call: Any = changed[place]
    function: Any = call["function"] if isinstance(call.get("function"), dict) else call
    given = function.get(part)
    if isinstance(given, dict):
        function[part] = {**given, _MARK: _MARK}
    elif isinstance(given, str):
        function[part] = given.removesuffix("}") + _MARK + "}" if given.endswith("}") else given + _MARK
    else:
        call[_MARK] = function[part] = _MARK
    return changed
