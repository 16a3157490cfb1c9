"""Chat messages as users bring them: what one may hold, and prompts and completions that are made of them.

Nothing here needs a tokenizer; what its template makes of messages is `sysdag.components.language.chat_template`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sysdag.errors import DataError, shown
from sysdag.graph.parts import PartPrompt

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of the field; a template may name others."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's reasoning; templates leave that of earlier turns out."""
REFERENCES = ("name", "tool_call_id")
"""Keys that tell a tool's result apart, which many templates have no use for."""
ROW_OPTIONS = ("tools", "chat_template_kwargs")
"""Columns of a row that reach the chat templates of its nodes, as in TRL; an input of that name is an input."""
_MEDIA = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos")

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt of chat messages with what else its template is given; a node's function may return one.

    Attributes:
        messages: the conversation so far.
        tools: JSON schemas of functions, or functions with type hints and a docstring; None for those of the component.
        chat_template_kwargs: further variables of the template, added to those of the component.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_defaults(self, tools: Sequence[Any] | None, kwargs: Mapping[str, Any]) -> ChatPrompt:
        """With the component's tools where it has none of its own, and the component's variables beside its own."""
        own = {name: value for name, value in self.chat_template_kwargs.items() if value is not None}
        return replace(self, tools=self.tools or tools, chat_template_kwargs={**kwargs, **own})


def with_row_options(prompt: Any, options: Mapping[str, Any]) -> Any:
    """A node's prompt with the `tools` and `chat_template_kwargs` of its row; a text is rendered by no template.

    What the node's function gives in a `ChatPrompt` of its own comes first.
    """
    if isinstance(prompt, PartPrompt):
        return replace(prompt, prompt=with_row_options(prompt.prompt, options))
    if isinstance(prompt, list):
        prompt = ChatPrompt(prompt)
    if not isinstance(prompt, ChatPrompt):
        return prompt
    return prompt.with_defaults(read_tools(options.get("tools")), options.get("chat_template_kwargs") or {})


def read_tools(tools: Any) -> list[Any] | None:
    """The tools of a row: a list, or as JSON text, which columns of Arrow keep as it is.

    Raises:
        DataError: for anything else.
    """
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools)
        except ValueError as error:
            raise DataError(
                f"tools must be a list of JSON schemas, or that as JSON text, got {shown(tools)}."
            ) from error
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        raise DataError(f"tools must be a list of JSON schemas, or that as JSON text, got {shown(tools)}.")
    return found or None


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, as far as its type says."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


def checked(messages: Sequence[Any]) -> list[Message]:
    """Messages without the keys that hold None, and with a single part of text as that text.

    Raises:
        DataError: naming the message, for one without a role or without content, calls and reasoning; or with content
            that no text model reads.
    """
    return [_checked(message, f"message {number}") for number, message in enumerate(messages)]


def _checked(given: Any, place: str) -> Message:
    if not isinstance(given, Mapping):
        raise DataError(f"{place} is no dict with 'role' and 'content', but {shown(given)}.")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        hint = " Rename 'from' to 'role' and 'value' to 'content'." if {"from", "value"} <= given.keys() else ""
        raise DataError(f"{place} has no role; it has the keys {sorted(map(str, given))}.{hint}")
    place = f"{place} (role {role!r})"
    for key in _MEDIA:
        if key in message:
            raise DataError(
                f"{place} has the key {key!r}, but this is a text model: it takes no images, sound or video. Images "
                "are parts of a message's content (ImageTextToText)."
            )
    if message.get("tool_calls") in ([], ()):
        del message["tool_calls"]
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise DataError(f"{place}: tool_calls must be a list of dicts, got {shown(calls)}.")
    if "content" in message:
        message["content"] = _content(message["content"], role, place)
    elif calls is None and not any(key in message for key in REASONING):
        raise DataError(f"{place} has no content and no tool_calls; it has the keys {sorted(map(str, given))}.")
    for key, value in message.items():
        _check_plain(value, f"{place}: {key!r}")
    return message


def _content(content: Any, role: str, place: str) -> Any:
    if isinstance(content, str):
        return content
    parts: list[Message] = []
    is_list = isinstance(content, list) and bool(content)
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content] if is_list else []
    if role == "tool" and not any(kind == "text" or kind in _MEDIA for kind in kinds):
        return content  # a result may be any JSON, which templates write as such
    if not is_list:
        raise DataError(f"{place}: its content must be text, got {shown(content)}.")
    for part, kind in zip(content, kinds, strict=True):
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {kind!r}" if kind else shown(part)
            hint = " ImageTextToText reads images in prompts." if kind == "image" else ""
            raise DataError(
                f"{place}: this is a text model; its content may have parts of text alone, got {what}.{hint}"
            )
        parts.append({key: value for key, value in part.items() if value is not None})
    return parts[0]["text"] if len(parts) == 1 else parts


def _check_plain(value: Any, place: str) -> None:
    """Templates write down whatever they are given: of an object, its repr."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_plain(key, place)
            _check_plain(part, place)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _check_plain(part, place)
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise DataError(f"{place} holds {shown(value)}, which is no text; a template would write down its name.")


def completion_value(value: Any) -> str | list[Message]:
    """The value of an observed completion: its text, or its messages where they say more than one text does.

    Raises:
        DataError: for anything that is neither a text nor messages of which one is the assistant's.
    """
    if isinstance(value, str):
        return value
    if not is_conversation(value):
        raise DataError(f"a completion must be a string or a list of messages, got {shown(value, 200)}.")
    messages = checked(value)
    if not any(message["role"] == "assistant" for message in messages):
        roles = [message["role"] for message in messages]
        raise DataError(f"a completion needs a message of the assistant, got the roles {roles}.")
    if len(messages) == 1 and messages[0].keys() == {"role", "content"} and isinstance(messages[0]["content"], str):
        return messages[0]["content"]
    return messages


def is_blank(value: str | Sequence[Message]) -> bool:
    """Whether a completion says nothing: no text but white space, no call and no reasoning of the assistant."""
    if isinstance(value, str):
        return not value.strip()
    own = [message for message in value if message["role"] == "assistant"]
    return not any(_says(message) for message in own)


def _says(message: Message) -> bool:
    content = message.get("content", "")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    return bool(
        message.get("tool_calls") or any(text.strip() for text in texts) or any(message.get(k) for k in REASONING)
    )
