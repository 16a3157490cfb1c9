"""A vision-language model of transformers as a component: texts and images in, text out, exact log-probabilities."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sysdag.components.language.causal_lm import CausalLM
from sysdag.components.language.decoder import PromptInputs
from sysdag.components.language.engines.choice import LOCAL, Decoder, kind_of
from sysdag.components.language.messages import ChatPrompt
from sysdag.components.language.prompts import Prompt, PromptEncoder
from sysdag.components.language.sampling import MAX_BATCH_TOKENS
from sysdag.components.language.vision.image_template import ImageChatTemplate
from sysdag.components.language.vision.pretrained_vlm import PretrainedVLM
from sysdag.components.language.vision.prompt_images import PromptImages
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
        if not isinstance(model, PretrainedVLM):
            model = PretrainedVLM(model, processor, peft_config=peft_config, model_kwargs=model_kwargs)
        super().__init__(
            model, max_new_tokens=max_new_tokens, max_length=max_length, temperature=temperature, top_p=top_p,
            top_k=top_k, stop=stop, max_batch_tokens=max_batch_tokens, batch_size=batch_size,
            pack_prefixes=pack_prefixes, tools=tools, chat_template_kwargs=chat_template_kwargs,
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
            from PIL import Image

            image = Image.linear_gradient("L").resize((48, 32))
            content = [{"type": "image", "image": image}, {"type": "text", "text": "a"}]
            template = self._encoder().template
            assert isinstance(template, ImageChatTemplate)
            chat = template.prompt(ChatPrompt([{"role": "user", "content": content}]))
            self._opening = template.ids_and_images(chat, header=True)
        return PromptInputs(self._opening[0], self._offset_of)

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

    def footprint(self, **_: Any) -> None:
        """Not known: what images take depends on how many a micro-batch has, and of what sizes."""
        return

    def reading(self) -> str:
        processor = self.processor.to_json_string()
        return hashlib.sha256((super().reading() + processor).encode()).hexdigest()
