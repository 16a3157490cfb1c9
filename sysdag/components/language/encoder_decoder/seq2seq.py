"""An encoder-decoder of transformers as a component: a source in, a target out, exact log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from sysdag.components.adapter_support import needs_numbers
from sysdag.components.footprint import Footprint
from sysdag.components.language.completer import Completer
from sysdag.components.language.encoder_decoder import memory
from sysdag.components.language.encoder_decoder.generation_rules import GenerationRules
from sysdag.components.language.encoder_decoder.pretrained_seq2seq import PretrainedSeq2Seq
from sysdag.components.language.encoder_decoder.source_rows import plain_logits, rows_of
from sysdag.components.language.encoder_decoder.target_scorer import TargetScorer
from sysdag.components.language.encoder_decoder.targets import TargetEncoder
from sysdag.components.language.language_model import LanguageModel
from sysdag.components.language.sampling import MAX_BATCH_TOKENS
from sysdag.errors import DataError, PlanError
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Seq2Seq(LanguageModel):
    """Any encoder-decoder of texts of transformers: T5, BART, Marian, mBART, NLLB, Pegasus and their like.

    The node's function returns the source: a string, tokenised as the model's tokenizer does, its end token included;
    or chat messages, where the tokenizer has a template. The value of a draw is its text. The draw's record holds its
    `token_ids`, the labels of transformers: what stands behind the decoder's start token, the end token included, and a
    token that the generation config forces. An observed target is a text, whose labels are those of
    `tokenizer(text_target=...)` up to the first end token.

    What the model's generation config says of what may be written (`forced_bos_token_id`, `no_repeat_ngram_size`,
    `min_length`, ...) holds for draws, searches and log-probabilities alike; see
    `sysdag.components.language.encoder_decoder.generation_rules`.

    Args:
        model, tokenizer, peft_config, model_kwargs, temperature, top_p, top_k, stop, max_batch_tokens, batch_size,
            sanitize_control_tokens: see `CausalLM`. A source is computed once for all targets that it has in a call.
        max_new_tokens: most tokens of a draw, counted as `generate` does; by default 256, or the decoder's positions
            where there are fewer.
        max_source_length: most tokens of a source; by default the encoder's positions. A longer one loses tokens at its
            end, before its end token, which is logged.
        max_target_length: most tokens of an observed target; by default the decoder's positions. A longer one loses
            tokens at its end, which is logged.
        src_lang, tgt_lang: codes of the languages, for a tokenizer that writes them (mBART, NLLB, M2M100). The target's
            is forced on what is drawn.
        generation_config: settings in place of those of the model's own generation config, as
            `{"no_repeat_ngram_size": 0}`.

    Raises:
        PlanError: for options out of range, or a model that is no encoder-decoder of texts.
    """

    pretrained = PretrainedSeq2Seq
    saved_options = (*LanguageModel.saved_options, "max_source_length", "src_lang", "tgt_lang", "generation_config")
    saved_types: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **LanguageModel.saved_types, "max_source_length": (int, type(None)), "max_target_length": (int, type(None)),
        "src_lang": (str, type(None)), "tgt_lang": (str, type(None)), "generation_config": (dict,),
    }  # fmt: skip
    limits_prompts = "max_source_length"
    closes_prompts = True
    not_taken: ClassVar[Mapping[str, str]] = {
        "grammar": "no grammar constrains targets; what its generation_config can say holds for draws and scores, and "
        "CausalLM(grammar=...) serves models with a decoder alone",
        "max_length": "a source and its target do not share their room; give max_source_length and max_target_length",
        "pack_prefixes": "a source is always computed once for all its targets",
        "decoder": "sysdag's own draws; CausalLM(decoder=...) serves models with a decoder alone",
        "tools": "sources have no template that would tell of them; write them into the source",
        "chat_template_kwargs": "sources are texts as a rule; give a ChatPrompt(..., chat_template_kwargs=...) where "
        "the tokenizer has a template",
        "processor": "its sources are texts; ImageTextToText(processor=...) reads images",
    }
    lm: PretrainedSeq2Seq

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PretrainedSeq2Seq,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        peft_config: PeftConfig | None = None,
        max_new_tokens: int | None = None,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        batch_size: int | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        generation_config: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
    ) -> None:
        limits = {
            "max_new_tokens": max_new_tokens, "max_source_length": max_source_length,
            "max_target_length": max_target_length,
        }  # fmt: skip
        for option, value in limits.items():
            if value is not None and not (type(value) is int and value >= 1):
                raise PlanError(f"Seq2Seq: {option} must be an integer of 1 or more, or None, got {value!r}.")
        if generation_config is not None and hasattr(generation_config, "to_diff_dict"):
            raise PlanError("Seq2Seq: generation_config takes a dict of settings, not a GenerationConfig.")
        if not isinstance(model, PretrainedSeq2Seq):
            model = PretrainedSeq2Seq(model, tokenizer, peft_config=peft_config, model_kwargs=model_kwargs)
        model.speak(src_lang, tgt_lang, generation_config)
        super().__init__(
            model, temperature=temperature, top_p=top_p, top_k=top_k, max_batch_tokens=max_batch_tokens,
            batch_size=batch_size, max_new_tokens=max_new_tokens, max_length=max_target_length, stop=stop, tools=None,
            chat_template_kwargs=None, sanitize_control_tokens=sanitize_control_tokens,
        )  # fmt: skip
        self.max_source_length = max_source_length
        self.src_lang, self.tgt_lang = src_lang, tgt_lang
        self.generation_config = dict(generation_config or {})
        self._rules: tuple[Any, GenerationRules] | None = None

    @property
    def max_length(self) -> int | None:
        """Most tokens of a target; None where nothing limits it."""
        positions = memory.positions_of(self.config, of_decoder=True)
        memory.check_length(repr(self), self.config, "max_target_length", self._max_length, of_decoder=True)
        return self._max_length or positions

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of a draw."""
        if self._max_new_tokens is not None:
            return self._max_new_tokens
        return 256 if self.max_length is None else min(256, self.max_length)

    @property
    def _room(self) -> int | None:
        """Most tokens of a source."""
        memory.check_length(repr(self), self.config, "max_source_length", self.max_source_length, of_decoder=False)
        return self.max_source_length or memory.positions_of(self.config, of_decoder=False)

    @property
    def rules(self) -> GenerationRules:
        """What the generation config allows to be written; loads no weights."""
        limit = self.max_new_tokens
        state = (limit, self.lm.settings, id(self.lm.tokenizer))
        if self._rules is None or self._rules[0] != state:
            self._rules = state, self.lm.rules(limit)
        return self._rules[1]

    def _completion_encoder(self) -> Any:
        rules = self.rules
        made: Any = self._completions
        if made is None or (made.rules, made.stop) != (rules, self.stop):
            made = self._completions = TargetEncoder(repr(self), self._encoder(), rules, self.stop)  # type: ignore[assignment]
        return made

    def _completer(self, stop: str | Sequence[str] | None = None) -> Completer:
        return replace(super()._completer(stop), decoder_of=partial(rows_of, rules=self.rules))

    def longest_draw(self, input: Any = None) -> int | None:
        """See `Component`; what is longer loses tokens at its end."""
        return self.max_length

    def _fit(self, prompt: list[int], draw: Draw, longest: int | None) -> tuple[list[int], list[int]]:
        target: Sequence[int] = draw.record["token_ids"]
        if longest is not None and len(target) > longest:
            self._warn_once("completion", f"a target of {len(target)} tokens was cut to {longest} (max_target_length)")
            target = target[:longest]
        return prompt, list(target)

    def _scored(
        self,
        inputs: Sequence[Any],
        draws: Sequence[Draw],
        *,
        weights: tuple[Sequence[int], float] | None = None,
        typicality: bool = False,
    ) -> Float[Tensor, " n"]:
        pairs, masks = self._scored_sequences(inputs, draws)
        rules, spelled = self.rules, self._completion_encoder().spelled
        for element, (source, target) in enumerate(pairs):
            try:
                rules.check(source, target, repr(self), spelled)
            except DataError as error:
                error.element = element
                raise
        with self.lm.at_work() as model:
            return self._scorer_of(model)(pairs, masks, weights=weights, typicality=typicality)

    def _scorer_of(self, model: Any) -> TargetScorer:
        if self._scorer is None or not self._scorer.fits(model, self.rules):
            self._scorer = TargetScorer(model, self.rules)
        return self._scorer

    def _logits_after(self, model: Any, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
        return plain_logits(model, prompt, [self.rules.start, *written])[-1]

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        """See `sysdag.components.language.encoder_decoder.memory`; None as for `CausalLM`."""
        if self.lm.adapter_config is not None and needs_numbers(self.lm.adapter_config):
            return None
        return memory.of_seq2seq(
            self.config, self.lm.dtype(trains), self.lm.adapter_config, source=max(1, tokens - labels), target=labels,
            trains=trains, checkpoints=checkpoints, device=device,
        )  # fmt: skip

    def decoding_bytes(self, *, rows: int, tokens: int, device: str) -> int:
        """See `Component`; of the rows that `max_batch_tokens` and `batch_size` let be decoded side by side."""
        rows, target = self._rows_at_once(rows, tokens), min(self.max_new_tokens, tokens - 1)
        return memory.of_decoding(
            self.config, self.lm.dtype(False), rows=rows, source=tokens - target, target=target, device=device
        )

    def _saved_limits(self) -> dict[str, Any]:
        return {"max_new_tokens": self._max_new_tokens, "max_target_length": self._max_length}

    def _saved_chat(self) -> dict[str, Any]:
        return {}

    def reading(self) -> str:
        return f"{super().reading()} {self.rules}"
