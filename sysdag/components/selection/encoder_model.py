"""Pretrained encoders and classifiers of texts: loaded, adapted and saved as language models are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sysdag.components import rotary
from sysdag.components.language.model_source import finding_a_file
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.loading_info import is_of_head
from sysdag.errors import PlanError
from sysdag.files.hub import reaching

_HEADS = ("classifier", "score")  # what peft trains whole beside an adapter of a sequence classifier


class _Pretrained(PretrainedLM):
    def _check_tokenizer(self, tokenizer: Any) -> None:
        return

    @property
    def longest_text(self) -> int | None:
        """How many tokens tokenizer and model have room for; None where nothing limits it."""
        limits = (self.tokenizer.model_max_length, rotary.positions_of(self.config.get_text_config()))
        return min((limit for limit in limits if limit is not None and 0 < limit < 10**9), default=None)

    def check_length(self, length: int | None) -> None:
        """Refuses more tokens than the model has fixed frequencies for; see `sysdag.components.rotary`."""
        rotary.check_length(repr(self), self.config.get_text_config(), "max_length", length)


class EncoderModel(_Pretrained):
    """A model that gives each token of a text a vector."""

    kind = "BiEncoder"

    @property
    def is_folder(self) -> bool:
        """Whether it was named by a folder that is here."""
        return self.is_named and Path(self._source).is_dir()

    def file(self, name: str) -> Path | None:
        """The local path of a file beside the model; None where there is none."""
        self._resolve()
        source = self._source if self._adapter_folder is None else self._adapter_folder
        if Path(source).is_dir():
            path = Path(source) / name
            return path if path.is_file() else None
        from transformers.utils import cached_file

        options = finding_a_file(self.model_kwargs)
        with reaching(source):
            found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **options)
        return None if found is None else Path(found)

    def _may_be_new(self, model: Any, name: str) -> bool:
        return "pooler" in name  # which is not asked: vectors are pooled of all tokens' own

    def _check_architecture(self, config: Mapping[str, Any]) -> None:
        if config.get("is_encoder_decoder") and not self._has_encoder(config):
            raise PlanError(
                f"{self.kind}({self._given!r}): {config.get('model_type')} is an encoder-decoder, of which "
                "transformers gives no encoder by itself. Use an encoder, as a model of sentence-transformers is."
            )

    def _has_encoder(self, config: Mapping[str, Any]) -> bool:
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

        return self.is_named and config.get("model_type") in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    def loader(self) -> tuple[Any, dict[str, Any]]:
        """See `PretrainedLM`; of an encoder-decoder, the encoder is loaded."""
        from transformers import AutoModel, AutoModelForTextEncoding
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

        config = self.config
        alone = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type) in (config.architectures or [])
        is_part = getattr(config, "is_encoder_decoder", False) or alone
        return AutoModelForTextEncoding if is_part else AutoModel, {}


class PairClassifier(_Pretrained):
    """A sequence classifier with one logit; one that has no head yet gets a new one."""

    kind = "CrossEncoder"

    def _check_architecture(self, config: Mapping[str, Any]) -> None:
        labels = len(config.get("id2label") or "01")  # two where the config says nothing
        if not self._wants_head(config) and labels != 1:
            raise PlanError(
                f"{self.kind}({self._given!r}): its head has {labels} logits, and a score is one. Give a model that "
                "was made with num_labels=1, as rerankers are."
            )

    def _wants_head(self, config: Mapping[str, Any]) -> bool:
        """Whether the checkpoint is of a model without a head for classifying."""
        made_for = config.get("architectures") or []
        return self.is_named and not any(name.endswith("ForSequenceClassification") for name in made_for)

    def _may_be_new(self, model: Any, name: str) -> bool:
        return self._wants_head(self.config.to_dict()) and is_of_head(model, name)

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    @property
    def adapter_config(self) -> Any:
        """See `PretrainedLM`; a new head trains beside the adapter, as in peft's own sequence classifiers."""
        found = super().adapter_config
        if found is None or self._adapter_folder is not None or not self._wants_head(self.config.to_dict()):
            return found
        found = copy.deepcopy(found)
        if hasattr(found, "modules_to_save"):
            found.modules_to_save = sorted({*(found.modules_to_save or ()), *_HEADS})
        return found

    def loader(self) -> tuple[Any, dict[str, Any]]:
        """See `PretrainedLM`; with the config of a head that has one logit."""
        config = copy.deepcopy(self.config)
        if self._wants_head(config.to_dict()):
            config.num_labels = 1
        return self.auto_class(), {"config": config}
