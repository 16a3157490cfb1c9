"""Scores of options by a classifier that reads each together with the query: a reranker."""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.language.completions import tokenizer_hash
from sysdag.components.precision import widened
from sysdag.components.selection import encoder_footprint
from sysdag.components.selection.bi_encoder import MAX_BATCH_TOKENS
from sysdag.components.selection.encoder_model import PairClassifier
from sysdag.components.selection.prompt import ChoicePrompt
from sysdag.components.selection.scorer import Scorer, as_text
from sysdag.components.text_batches import by_text
from sysdag.errors import DataError, PlanError
from sysdag.files.saved_files import only

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sysdag.components.component import Component
    from sysdag.components.footprint import Footprint


_SAVED: Mapping[str, tuple[type, ...]] = {
    "max_length": (int, type(None)), "max_batch_tokens": (int,), "model": (dict,),
}  # fmt: skip


class CrossEncoder(Scorer):
    """The logit of a sequence classifier on the query and an option, as its tokenizer joins two texts.

    It is the logit itself, whatever activation a reranker's own library puts behind it.

    Args:
        model: a name on the Hub, a folder, or a loaded model with its tokenizer. Its head has one logit; an encoder
            without a head gets a new one, which starts at random.
        max_length: most tokens of a pair; the longer one of the two loses tokens first.
        peft_config: puts a new adapter of the peft library on the model; only the adapter trains, and a new head.
        model_kwargs: of `from_pretrained`; see `CausalLM`.
        max_batch_tokens: most tokens of one forward, padding included.

    Raises:
        PlanError: for a head of another number of logits, or options out of range.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PairClassifier,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        max_length: int | None = None,
        peft_config: PeftConfig | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        for option, value in (("max_length", max_length), ("max_batch_tokens", max_batch_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PlanError(f"CrossEncoder: {option} must be an integer of 1 or more, got {value!r}.")
        if not isinstance(model, PairClassifier):
            model = PairClassifier(model, tokenizer, peft_config=peft_config, model_kwargs=model_kwargs)
        self.lm = model
        self._max_length = max_length
        self.max_batch_tokens = max_batch_tokens

    def __repr__(self) -> str:
        return repr(self.lm)

    @property
    def module(self) -> nn.Module:
        return self.lm.module

    @property
    def max_length(self) -> int | None:
        """Most tokens of a pair; None where nothing limits it."""
        self.lm.check_length(self._max_length)
        return self._max_length or self.lm.longest_text

    def _pairs(self, prompt: ChoicePrompt, element: int) -> list[tuple[str, str]]:
        query = as_text(repr(self), prompt.query, "query", element)
        return [(query, as_text(repr(self), text, "option", element)) for text in prompt.texts]

    def _row(self, pair: tuple[str, str]) -> dict[str, list[int]]:
        longest = self.max_length
        return dict(self.lm.tokenizer(*pair, truncation=longest is not None, max_length=longest))

    def scores(self, prompts: Sequence[ChoicePrompt]) -> list[Float[Tensor, " options"]]:
        own = [self._pairs(prompt, element) for element, prompt in enumerate(prompts)]
        pairs = {pair: place for place, pair in enumerate(dict.fromkeys(pair for row in own for pair in row))}
        rows = [self._row(pair) for pair in pairs]
        for pair, row in zip(pairs, rows, strict=True):
            try:
                if not row["input_ids"]:
                    raise DataError(f"{self!r}: query and option {pair!r} have no tokens together.")
                self.lm.check_ids(row["input_ids"], f"the pair {pair!r:.100}", 0)
            except DataError as error:
                error.element = next(element for element, each in enumerate(own) if pair in each)
                raise
        model: Any = self.module
        with self.lm.at_work() as used:
            logits = by_text(
                model, rows, lambda batch: used(**batch).logits, device=next(model.parameters()).device,
                pad=getattr(model.config.get_text_config(), "pad_token_id", None), most_tokens=self.max_batch_tokens,
            )  # fmt: skip
        found = widened(logits[:, 0])[[pairs[pair] for row in own for pair in row]]
        return list(found.split([len(row) for row in own]))

    def pieces(self, prompts: Sequence[ChoicePrompt]) -> list[dict[Hashable, int]]:
        return [
            {pair: len(self._row(pair)["input_ids"]) for pair in self._pairs(prompt, element)}
            for element, prompt in enumerate(prompts)
        ]

    def cut_from(self, prompt: ChoicePrompt) -> int:
        longest = self.max_length
        if longest is None:
            return 0
        whole = [len(self.lm.tokenizer(*pair)["input_ids"]) for pair in self._pairs(prompt, 0)]
        return sum(max(0, length - longest) for length in whole)

    @property
    def base_model(self) -> str | None:
        return self.lm.base_model

    @property
    def base_key(self) -> Hashable:
        return self.lm.base_key

    def share_base(self, others: Iterable[Component]) -> None:
        scorers = (getattr(other, "scorer", None) for other in others)
        self.lm.share_base_of_one(each.lm for each in scorers if isinstance(each, CrossEncoder))

    def connect(self, components: Mapping[str, Component]) -> None:
        owner = getattr(components.get(self.lm.base_component or ""), "scorer", None)
        if owner is not self and isinstance(owner, CrossEncoder):
            self.lm.share_base(owner.lm)

    def prepare_training(self) -> None:
        self.lm.prepare_training()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return self.lm.own_parameters()

    def _with(self, lm: PairClassifier) -> Self:
        view = copy.copy(self)
        view.lm = lm
        return view

    def reference(self, *, moves: bool = False) -> Self:
        return self._with(self.lm.reference(moves=moves))

    def fresh(self) -> Self | None:
        return self._with(self.lm.fresh()) if self.lm.is_named else None

    def reading(self) -> str:
        return json.dumps([tokenizer_hash(self.lm.tokenizer, [self.max_length])])

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        return encoder_footprint.of_classifier(
            self, tokens=tokens, trains=trains, checkpoints=checkpoints, device=device
        )

    def save(self, folder: Path) -> dict[str, Any]:
        saved = self.lm.save(folder)
        return {"max_length": self._max_length, "max_batch_tokens": self.max_batch_tokens, "model": saved}

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Nothing of an adapter, whose head may be its own."""
        if "base" in options["model"]:
            return []
        kind = "AutoModelForSequenceClassification"
        return [("With transformers:", f"from transformers import {kind}\nmodel = {kind}.from_pretrained(folder)")]

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        options = only(options, _SAVED, cls.__name__, required=_SAVED)
        lm = PairClassifier.load(folder, options["model"])
        return cls(lm, max_length=options["max_length"], max_batch_tokens=options["max_batch_tokens"])

    @property
    def trusts_remote_code(self) -> bool:
        return self.lm.trusts_remote_code

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        self.lm.read_from(folder, trust_remote_code=trust_remote_code)

    def load_weights(self, folder: Path) -> None:
        self.lm.load_weights(folder)
