"""A pretrained vision-language model with its processor, and the adapter of whoever uses it."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sysdag.components.language import model_source
from sysdag.components.language.language_head import inner_model
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.language.vision import image_forward
from sysdag.components.language.vision.image_forward import ImageForward
from sysdag.components.language.vision.prompt_images import FIRST, ImageProcessing
from sysdag.errors import PlanError
from sysdag.files.hub import reaching

_checked: weakref.WeakSet[Any] = weakref.WeakSet()


class PretrainedVLM(PretrainedLM):
    """One component's model, processor and adapter; what it is asked for beside is `PretrainedLM`'s.

    Args:
        model, tokenizer, peft_config, model_kwargs: see `ImageTextToText`, whose `processor` the second is.
    """

    kind = "ImageTextToText"
    reader = "processor"
    reader_files = ("processor_config.json", "preprocessor_config.json")

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self._processor: Any = None
        self._processing: ImageProcessing | None = None
        self._forwards: weakref.WeakKeyDictionary[Any, ImageForward] = weakref.WeakKeyDictionary()
        super().__init__(model, tokenizer, **options)

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def _check_architecture(self, config: Mapping[str, Any]) -> None:
        kind = config.get("model_type") or "?"
        if config.get("is_encoder_decoder") or _mapped(config.get("text_config")).get("is_encoder_decoder"):
            raise PlanError(
                f"{self.kind}({self._given!r}): {kind} is an encoder-decoder, whose completions do not follow the "
                "prompt's tokens. Use a model with a decoder alone."
            )
        if _image_token(config) is None:
            raise PlanError(
                f"{self.kind}({self._given!r}): {kind} names no token that stands for images (image_token_id in its "
                f"config), so it takes none in prompts. For a text model use CausalLM({self._given!r})."
            )

    @property
    def processor(self) -> Any:
        """The model's, loaded on first access."""
        if self._processor is None:
            self._resolve()
            self._processor = self._tokenizer_source
            if isinstance(self._tokenizer_source, (str, Path)):
                self._processor = self._load_processor(self._tokenizer_source)
            self._check_processor(self._processor)
        return self._processor

    def _load_processor(self, source: str | Path) -> Any:
        from transformers import AutoProcessor

        named = model_source.finding(self.model_kwargs) if source == self._source else {}
        try:
            with reaching(source):
                return AutoProcessor.from_pretrained(source, **named)
        except (OSError, ValueError) as error:
            raise OSError(f"{self!r}: its processor cannot be loaded. {error}") from error

    def _check_processor(self, processor: Any) -> None:
        kind = type(processor).__name__
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise PlanError(
                f"{self!r}: its processor is a {kind}, which has no tokenizer and image processor; pass processor=, a "
                "processor of transformers (AutoProcessor.from_pretrained)."
            )
        if getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
            raise PlanError(
                f"{self!r}: its {kind} has no chat template, which says where images stand in a prompt. Set "
                "processor.chat_template, or use a model that was trained on conversations."
            )
        if processor.tokenizer.eos_token_id is None:
            raise PlanError(f"{self!r}: the tokenizer has no end-of-sequence token; set tokenizer.eos_token.")

    @property
    def tokenizer(self) -> Any:
        """The processor's, with the processor's chat template."""
        own = self.processor.tokenizer
        template = getattr(self.processor, "chat_template", None) or own.chat_template
        if self._tokenizer is None or len(self._tokenizer) != len(own):
            self._tokenizer = copy.copy(own)
        self._tokenizer.chat_template = template
        return self._tokenizer

    @property
    def processing(self) -> ImageProcessing:
        """What becomes of images; shared with references."""
        if self._processing is None:
            token = _image_token(self.config.to_dict())
            assert token is not None
            self._processing = ImageProcessing(repr(self), self.processor, token)
        return self._processing

    def forward_of(self, model: Any) -> ImageForward:
        """What a model is called through."""
        found = self._forwards.get(model)
        if found is None or found.processing is not self.processing:  # another view's, which share the dict
            found = self._forwards[model] = ImageForward(model, self.processing)
        return found

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Any]:
        with super().at_work() as model:
            forward = self.forward_of(model)
            self._check_forward(model, forward)
            with image_forward.installed(model, forward):
                yield model

    def _check_forward(self, model: Any, forward: ImageForward) -> None:
        """Refuses a model that is not called here as its processor has it; asked once for a model."""
        inner = inner_model(model)
        if inner in _checked:
            return
        if different := image_forward.complaint(model, forward):
            raise PlanError(
                f"{self!r}: {type(inner).__name__} needs more than is served: for a prompt with an image {different}, "
                f"beside the model's own forward of what its {type(self.processor).__name__} makes of it. Use another "
                "model."
            )
        _checked.add(inner)

    def check_ids(self, ids: Any, what: str, element: int) -> None:
        super().check_ids([token for token in ids if token < FIRST], what, element)

    def _save_reader(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)


def _mapped(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _image_token(config: Mapping[str, Any]) -> int | None:
    names = ("image_token_id", "image_token_index")
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
