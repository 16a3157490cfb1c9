"""A pretrained encoder-decoder: its languages, its decoder's start, and its generation config."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.components.language.encoder_decoder.generation_rules import KNOWN, GenerationRules
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.errors import PlanError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Encoder-decoders whose scores are no likelihoods of one row, and why.
_NO_LIKELIHOOD = {
    "switch_transformers": "its experts drop the tokens of a batch that exceed their capacity",
    "nllb-moe": "its experts drop the tokens of a batch that exceed their capacity",
    "prophetnet": "its decoder gives a token other logits in a whole target than behind what stands before it",
    "bigbird_pegasus": "its block-sparse attention draws at random what it attends to",
}


class PretrainedSeq2Seq(PretrainedLM):
    """One component's encoder-decoder, tokenizer and adapter.

    Args:
        model, tokenizer, peft_config, model_kwargs: see `Seq2Seq`.

    Attributes:
        src_lang, tgt_lang: the languages that were said; None where the tokenizer's own are meant.
        own_settings: what stands in place of the generation config's settings.
    """

    kind = "Seq2Seq"

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
        *,
        peft_config: PeftConfig | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, tokenizer, peft_config=peft_config, model_kwargs=model_kwargs)
        self.src_lang: str | None = None
        self.tgt_lang: str | None = None
        self.own_settings: dict[str, Any] = {}
        self._spoken: tuple[Any, Any] | None = None

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def _check_architecture(self, config: Mapping[str, Any]) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        kind, name = config.get("model_type") or "?", self._given
        if not config.get("is_encoder_decoder"):
            raise PlanError(f"Seq2Seq({name!r}): {kind} has no encoder beside its decoder; use CausalLM({name!r}).")
        if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise PlanError(
                f"Seq2Seq({name!r}): {kind} is no encoder-decoder of texts (AutoModelForSeq2SeqLM does not know it), "
                "so it reads something else. Use a model as T5, BART or Marian, or a component of your own (a subclass "
                "of sysdag.Component)."
            )
        if kind in _NO_LIKELIHOOD and config.get("attention_type") != "original_full":
            way = ' Set attention_type="original_full" in its config.' if "attention_type" in config else ""
            raise PlanError(
                f"Seq2Seq({name!r}): {kind} has no likelihood of its own for a row: {_NO_LIKELIHOOD[kind]}.{way}"
            )

    def speak(self, src_lang: str | None, tgt_lang: str | None, settings: Mapping[str, Any] | None) -> None:
        """Says the languages, and settings in place of the generation config's.

        Raises:
            PlanError: for a setting that no generation config has, or that is not looked at.
        """
        unknown = sorted(set(settings or {}) - set(KNOWN) - {"eos_token_id"})
        if unknown:
            raise PlanError(
                f"{self!r}: generation_config={{{unknown[0]!r}: ...}} is no setting of what may be written; those are "
                f"{['eos_token_id', *KNOWN]}. How to draw is said by temperature, top_p, top_k and max_new_tokens."
            )
        self.src_lang, self.tgt_lang, self.own_settings = src_lang, tgt_lang, dict(settings or {})

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, in the languages that were said."""
        given = super().tokenizer
        if self._spoken is None or self._spoken[0] is not given:
            self._spoken = given, self._in_languages(given)
        return self._spoken[1]

    def _in_languages(self, given: Any) -> Any:
        """A copy of a tokenizer that writes its language codes; itself where it has none.

        Raises:
            PlanError: for languages that were said to a tokenizer that has none, or a target language that is neither
                said nor forced.
        """
        said = {name: lang for name, lang in (("src_lang", self.src_lang), ("tgt_lang", self.tgt_lang)) if lang}
        if not hasattr(given, "tgt_lang"):
            if said:
                raise PlanError(
                    f"{self!r}: its {type(given).__name__} writes no language codes, so {sorted(said)} would say "
                    "nothing. Leave them out; Marian and T5 models read the language in the text, as their cards say."
                )
            return given
        if "tgt_lang" not in said and given.tgt_lang is None:
            settings = self.settings
            firsts = (settings["forced_bos_token_id"], settings["decoder_start_token_id"])
            named = [lang for lang in (_language_of(given, first) for first in firsts) if lang]
            said |= {"tgt_lang": named[0]} if named else {}
        if "tgt_lang" not in said and given.tgt_lang is None:
            raise PlanError(
                f"{self!r}: its {type(given).__name__} writes a language's code beside a text, and no target language "
                "is said: give src_lang and tgt_lang, as Seq2Seq(..., src_lang='en_XX', tgt_lang='ro_RO')."
            )
        made = copy.deepcopy(given)
        for name, lang in said.items():
            known = getattr(made, "lang_code_to_id", None) or getattr(made, "lang_code_to_token", None)
            code = made.convert_tokens_to_ids(lang)
            if (known and lang not in known) or (not known and code in (None, made.unk_token_id)):
                raise PlanError(f"{self!r}: its tokenizer has no language {lang!r} ({name}).")
            setattr(made, name, lang)
        return made

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the generation config, with what was given in their place; loads no weights."""
        config = self._configured()
        names = ("eos_token_id", "bos_token_id", *KNOWN)
        return {name: getattr(config, name, None) for name in names} | self.own_settings

    def _configured_ends(self) -> Any:
        return self.settings["eos_token_id"]

    def rules(self, max_new_tokens: int) -> GenerationRules:
        """What may be written; loads no weights.

        Raises:
            PlanError: for a model without a decoder's start, or a setting that is refused.
        """
        settings = self.settings
        before, behind = self._codes()
        said = self.tgt_lang is not None
        if before is not None and "forced_bos_token_id" not in self.own_settings:
            settings["forced_bos_token_id"] = before if said else (settings["forced_bos_token_id"] or before)
        start = settings["decoder_start_token_id"]
        if behind is not None and "decoder_start_token_id" not in self.own_settings:
            start = behind if said else (start or behind)
        if start is None:
            start = getattr(self.config, "decoder_start_token_id", None)
        if start is None:
            start = settings["bos_token_id"]
        if isinstance(start, (list, tuple)):
            start = start[0]
        if start is None:
            raise PlanError(
                f"{self!r}: nothing says which token its decoder begins with: set "
                "generation_config={'decoder_start_token_id': ...}."
            )
        return GenerationRules.of(
            settings, start=start, ends=self.eos_token_ids, max_new_tokens=max_new_tokens, owner=repr(self)
        )

    def _codes(self) -> tuple[int | None, int | None]:
        """The target language's code where it stands in front of a target, and where it stands behind its end."""
        tokenizer: Any = self.tokenizer
        if not hasattr(tokenizer, "tgt_lang"):
            return None, None
        ids = list(tokenizer(text_target="")["input_ids"])
        if tokenizer.eos_token_id not in ids:
            return (ids[0] if ids else None), None
        end = ids.index(tokenizer.eos_token_id)
        plain = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        before = [token for token in ids[:end] if token not in plain]
        return (before[0] if before else None), (ids[end + 1] if end + 1 < len(ids) else None)

    def check_target_ids(self, ids: Collection[int], element: int) -> None:
        self._check_below(self.num_target_embeddings, ids, "a completion", element)

    @property
    def num_target_embeddings(self) -> int | None:
        """As `num_embeddings`, of the decoder."""
        if self._model is not None and self._model.get_output_embeddings() is not None:
            return self._model.get_output_embeddings().weight.shape[0]
        return getattr(self.config, "decoder_vocab_size", None) or self.num_embeddings


def _language_of(tokenizer: Any, code: int | None) -> str | None:
    """The name of a language by the token of its code; None for a token that is none."""
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, None}
    if code in others:
        return None
    token = tokenizer.convert_ids_to_tokens(code)
    names = {value: name for name, value in (getattr(tokenizer, "lang_code_to_token", None) or {}).items()}
    known = getattr(tokenizer, "lang_code_to_id", None)
    return names.get(token) if names else token if known is None or token in known else None
