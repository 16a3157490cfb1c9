"""Conversations with images as token ids, by a processor's chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sysdag.components.language.chat_template import ChatTemplate
from sysdag.components.language.control_tokens import ControlTokens, Marks
from sysdag.components.language.messages import ChatPrompt, Message
from sysdag.components.language.prompts import put_around
from sysdag.components.language.vision.image_parts import HeldImage, checked_with_images, images_of, without_pixels
from sysdag.components.language.vision.prompt_images import FIRST, ImageProcessing, PromptImages
from sysdag.errors import DataError


class ImageChatTemplate(ChatTemplate):
    """The chat template of one processor.

    As transformers' processors have it, and its tokenizers do not: a rendering that does not begin with the tokenizer's
    beginning token gets what the tokenizer puts in front of a text.

    Args:
        owner, tokenizer, options: see `ChatTemplate`.
        processing: what becomes of images.
    """

    def __init__(self, owner: str, tokenizer: Any, processing: ImageProcessing, **options: Any) -> None:
        super().__init__(owner, tokenizer, **options)
        self.processing = processing

    def _messages(self, given: Sequence[Any]) -> list[Message]:
        try:
            return checked_with_images(given)
        except DataError as error:
            raise DataError(f"{self.owner}: {error}") from error

    def _rendered(self, prompt: ChatPrompt, **options: Any) -> Any:
        return super()._rendered(replace(prompt, messages=without_pixels(prompt.messages)), **options)

    def _controls(self, template: str) -> ControlTokens:
        tokens = [getattr(self.processing.processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        placeholder = self.tokenizer.convert_ids_to_tokens(self.processing.image_token)
        return super()._controls("\n".join([template, placeholder, *filter(None, tokens)]))

    def ids(self, prompt: ChatPrompt, *, header: bool = False, continues: bool = False) -> list[int]:
        return self.ids_and_images(prompt, header=header, continues=continues)[0]

    def ids_and_images(
        self, prompt: ChatPrompt, *, header: bool = False, continues: bool = False
    ) -> tuple[list[int], PromptImages | None]:
        """Token ids of a conversation, and its images; see `ChatTemplate.ids`."""
        images = images_of(prompt.messages)
        marked = self._marked(prompt)
        controls, told, marks = (None, prompt, None) if marked is None else marked
        options = {"add_generation_prompt": header, "continue_final_message": continues}
        rendered = self._rendered(told, tokenize=False, **options)
        if not images:
            ids = self._tokenised(rendered, controls, marks)
            return [*self._before(rendered), *ids], None
        if marks is None:
            ids, found = self.processing(rendered, images)
        else:
            ids, found = self._ids_of_marked(rendered, images, controls, marks)
        return [*self._before(rendered), *ids], found

    def _ids_of_marked(
        self, rendered: str, images: Sequence[HeldImage], controls: ControlTokens | None, marks: Marks
    ) -> tuple[list[int], PromptImages]:
        """As the processing's own; what only spells a placeholder is none: the processor must not see it."""
        spellings: list[str] = []

        def hidden(found: re.Match[str]) -> str:
            spellings.append(found.group())
            return f"{marks[0]}{len(spellings) - 1}{marks[1]}"

        def shown(written: str) -> list[int]:
            text = re.sub(f"{marks[0]}(\\d+){marks[1]}", lambda match: spellings[int(match.group(1))], written)
            return self._tokenised(text, controls, marks)

        text = re.sub(f"{marks[0]}.*?{marks[1]}", hidden, rendered, flags=re.DOTALL)
        return self.processing(text, images, retokenised=shown)

    def _marked(self, prompt: ChatPrompt) -> tuple[ControlTokens, ChatPrompt, Marks] | None:
        """The messages with what only spells a control token marked; None where nothing does."""
        if not self.sanitizes:
            return None
        controls = self._controls(self._source(prompt))
        return self._told(controls, prompt)

    def _tokenised(self, text: str, controls: ControlTokens | None, marks: Marks | None) -> list[int]:
        if controls is None or marks is None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._encoded(controls, text, marks)

    def _before(self, rendered: str) -> list[int]:
        """What the tokenizer puts in front of a rendering, as processors have it."""
        first = self.tokenizer.bos_token
        if first is not None and rendered.startswith(first):
            return []
        return put_around(self.tokenizer)[0]

    def plain(self, ids: Sequence[int]) -> list[int]:
        return self.processing.plain(ids)

    def beside(self, ids: Sequence[int]) -> Any:
        return next((self.processing.known(token) for token in ids if token >= FIRST), None)
