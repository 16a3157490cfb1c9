"""A vision-language model of transformers as a component: texts and images in, text out, exact log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sysdag.components.footprint import Footprint
from sysdag.components.language.causal_lm import CausalLM
from sysdag.components.language.decoder import PromptInputs
from sysdag.components.language.engines.choice import LOCAL, Decoder, kind_of
from sysdag.components.language.messages import ChatPrompt
from sysdag.components.language.prompts import Prompt, PromptEncoder
from sysdag.components.language.sampling import MAX_BATCH_TOKENS
from sysdag.components.language.vision import footprint
from sysdag.components.language.vision.image_template import ImageChatTemplate
from sysdag.components.language.vision.pretrained_vlm import PretrainedVLM
from sysdag.components.language.vision.prompt_images import HELD_BYTES, PromptImages
from sysdag.errors import DataError, PlanError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, ProcessorMixin

_REMEMBERED = 256  # prompts, whose images are held as long


class ImageTextToText(CausalLM):
    """Any vision-language model of transformers (`AutoModelForImageTextToText`) whose processor has a chat template.

    The node's function returns chat messages, or a `ChatPrompt`, whose contents are texts or lists of parts:
    `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}` with a PIL image, a path, the bytes of a file,
    or another node's image, as a diffusion model draws it; any number of images a row, of any sizes. All else is as for
    `CausalLM`: draws hold the `token_ids` that were sampled, scores are over exactly those, given the pixels that the
    processor makes of the same images.

    Args:
        model: a name on the Hub, a folder, or a loaded model.
        processor: a name, folder or processor; by default the model's.
        peft_config, max_new_tokens, max_length, temperature, top_p, top_k, stop, max_batch_tokens, batch_size,
            model_kwargs, tools, chat_template_kwargs, sanitize_control_tokens, grammar: see `CausalLM`. Placeholders
            of images count as tokens.
        pack_prefixes: as for `CausalLM`; what is shared then is the image, too, which is encoded once. Models that tell
            tokens of images apart in their attention (Gemma 3) are scored in rows of their own.

    Raises:
        PlanError: for options out of range; a model or a processor of another kind.
    """

    pretrained = PretrainedVLM
    parts_objection = "its prompts hold images, which parts do not read yet; CausalLM can"
    lm: PretrainedVLM
    not_taken: ClassVar[Mapping[str, str]] = {
        "tokenizer": "its processor has one; give processor=",
        "decoder": "other engines than sysdag's own are not given images; leave it out",
    }

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PretrainedVLM,
        processor: str | Path | ProcessorMixin | None = None,
        *,
        peft_config: PeftConfig | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        batch_size: int | None = None,
        pack_prefixes: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        grammar: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model, processor,  # type: ignore[arg-type]
            peft_config=peft_config, model_kwargs=model_kwargs, max_new_tokens=max_new_tokens, max_length=max_length,
            temperature=temperature, top_p=top_p, top_k=top_k, stop=stop, max_batch_tokens=max_batch_tokens,
            batch_size=batch_size, pack_prefixes=pack_prefixes, tools=tools, chat_template_kwargs=chat_template_kwargs,
            sanitize_control_tokens=sanitize_control_tokens, grammar=grammar,
        )  # fmt: skip
        self._opening: tuple[list[int], PromptImages | None] | None = None

    @property
    def processor(self) -> ProcessorMixin:
        """The model's, loaded on first access."""
        return self.lm.processor

    def with_decoder(self, decoder: Decoder) -> Self:
        """Itself for `local`, sysdag's own; no other engine is given images.

        Raises:
            PlanError: for another one.
        """
        if decoder != LOCAL:
            raise PlanError(
                f"{self!r}: decoder={kind_of(decoder)!r} takes prompts as token ids, and images are none. Leave its "
                "node out (--decoder NODE=... names the others), or use decoder='local'."
            )
        return super().with_decoder(decoder)

    @property
    def prompt_inputs(self) -> PromptInputs:
        if self._opening is None:
            self._opening = self._with_pictures([(48, 32)])
        return PromptInputs(self._opening[0], self._offset_of)

    def _with_pictures(self, sizes: Sequence[tuple[int, int]]) -> tuple[list[int], PromptImages | None]:
        """A prompt with pictures of such sizes (width, height)."""
        from PIL import Image

        parts = [{"type": "image", "image": Image.linear_gradient("L").resize(size)} for size in sizes]
        template = self._encoder().template
        assert isinstance(template, ImageChatTemplate)
        chat = template.prompt(ChatPrompt([{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}]))
        return template.ids_and_images(chat, header=True)

    def _offset_of(self, prompt: Sequence[int]) -> int:
        return self.lm.forward_of(self.lm.module).offset(prompt)

    def _encoder(self) -> PromptEncoder:
        tokenizer = self.tokenizer  # with the template that the processor has now
        if self._prompt_encoder is None:
            template = ImageChatTemplate(
                repr(self), tokenizer, self.lm.processing, tools=self.tools,
                chat_template_kwargs=self.chat_template_kwargs, sanitize_control_tokens=self.sanitize_control_tokens,
            )  # fmt: skip
            self._prompt_encoder = PromptEncoder(repr(self), tokenizer, template, remembered=_REMEMBERED)
        return self._prompt_encoder

    def _prompts(self, prompts: Sequence[Any]) -> list[Prompt]:
        found = super()._prompts(prompts)
        placeholder = self.lm.processing.image_token
        for element, prompt in enumerate(found):
            if placeholder in prompt.ids:
                spelled = self.tokenizer.convert_ids_to_tokens(placeholder)
                raise DataError(
                    f"{self!r}: a prompt has the token {spelled!r}, which stands for an image, and no image. Return "
                    "messages with parts {'type': 'image', 'image': ...} from the node's function.",
                    element=element,
                )
        return found

    def _span_of(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        return footprint.span_of_images(self._with_pictures(sizes)[0])

    def tokens_of_images(self, sizes: Sequence[tuple[int, int]]) -> int:
        return len(self._span_of(sizes))

    def footprint(
        self,
        *,
        tokens: int,
        labels: int,
        trains: bool,
        checkpoints: bool,
        device: str,
        rows: int = 1,
        images: Sequence[tuple[int, int]] = (),
        **others: Any,
    ) -> Footprint | None:
        """As for `CausalLM`, with images; see `sysdag.components.language.vision.footprint`.

        None, too, for a model whose course depends on numbers that weights enter.
        """
        processing = self.lm.processing
        filler = 0 if processing.image_token else 1
        ids = footprint.tokens_of(self._span_of(images), rows, tokens // rows, filler)
        try:
            found = super().footprint(
                tokens=tokens, labels=labels, trains=trains, checkpoints=checkpoints, device=device, rows=rows, ids=ids,
                reading=partial(footprint.reading, processing=processing), **others,
            )  # fmt: skip
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
        return None if found is None else replace(found, host_cache=HELD_BYTES)

    def reading(self) -> str:
        processor = self.processor.to_json_string()
        return hashlib.sha256((super().reading() + processor).encode()).hexdigest()
