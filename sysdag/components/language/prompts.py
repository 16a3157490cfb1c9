"""Prompts as token ids, remembered from one pass of a training step to the next."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

from sysdag.errors import DataError, shown

REMEMBERED = 2048


class PromptEncoder:
    """Tokenises prompts: strings as they stand, chat messages by the tokenizer's template with a generation prompt.

    One optimizer step asks for the same prompts several times (policy and reference, winner and loser, every
    candidate), so the latest `REMEMBERED` are kept, for as long as the tokenizer keeps its vocabulary and template.

    Args:
        owner: whose prompts they are, for errors.
        tokenizer: of transformers.
    """

    def __init__(self, owner: str, tokenizer: Any) -> None:
        self.owner, self.tokenizer = owner, tokenizer
        self._kept: dict[tuple[bool, str], array[int]] = {}
        self._state: tuple[Any, ...] = ()

    def __call__(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of each prompt.

        Raises:
            DataError: for a prompt that is neither a string nor chat messages, or that has no tokens.
        """
        state = (len(self.tokenizer), self.tokenizer.chat_template)
        if state != self._state:
            self._kept, self._state = {}, state
        return [self._remembered(prompt, element) for element, prompt in enumerate(prompts)]

    def _remembered(self, prompt: Any, element: int) -> list[int]:
        try:
            key = (isinstance(prompt, str), prompt if isinstance(prompt, str) else json.dumps(prompt))
        except (TypeError, ValueError):  # messages with something in them that only the template can read
            return self._encode(prompt, element)
        ids = self._kept.pop(key, None)
        if ids is None:
            ids = array("q", self._encode(prompt, element))
        self._kept[key] = ids  # the latest stand last
        if len(self._kept) > REMEMBERED:
            del self._kept[next(iter(self._kept))]
        return ids.tolist()

    def _encode(self, prompt: Any, element: int) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self.tokenizer(prompt)["input_ids"])
        elif isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
            if self.tokenizer.chat_template is None:
                raise DataError(
                    f"{self.owner}: the prompt is a list of chat messages, but the tokenizer has no chat template. "
                    "Return a string, or set tokenizer.chat_template.",
                    element=element,
                )
            ids = list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        else:
            raise DataError(
                f"{self.owner}: a prompt must be a string or a list of chat messages, got {shown(prompt, 200)}.",
                element=element,
            )
        if not ids:
            raise DataError(
                f"{self.owner}: the prompt {prompt!r} has no tokens; a model needs at least one.", element=element
            )
        return ids
