"""Scores of options by the similarity of two vectors: of the query, and of the option."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.language.completions import tokenizer_hash
from sysdag.components.selection import encoder_footprint
from sysdag.components.selection.encoder_model import EncoderModel
from sysdag.components.selection.prompt import ChoicePrompt
from sysdag.components.selection.scorer import Scorer, as_text
from sysdag.components.selection.text_encoder import TextEncoder, saved_tower
from sysdag.errors import DataError, PlanError, SerializationError
from sysdag.files.saved_files import only

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sysdag.components.component import Component
    from sysdag.components.footprint import Footprint

MAX_BATCH_TOKENS, CACHE_SIZE = 16384, 65536
_SAVED: Mapping[str, tuple[type, ...]] = {
    "towers": (dict,), "train_documents": (bool,), "cache_size": (int,), "max_batch_tokens": (int,),
}  # fmt: skip


class BiEncoder(Scorer):
    """Cosines or dot products of the vectors of a query and of each option.

    A folder or repository of sentence-transformers is read with its pooling, its Dense and Normalize modules, its
    prompts and its similarity; of any other encoder of transformers the mean over the tokens is taken, and the cosine.
    Each text is encoded once in a call, however many rows have it. Vectors of options are kept between calls until the
    weights change, where no gradient or dropout is wanted: in sampling, in a search and in a reference, and always of
    documents that do not train.

    Args:
        model: a name on the Hub, a folder, or a loaded model, which then needs its tokenizer. It encodes the queries,
            and the options, too, where there is no `document_model`.
        document_model, document_tokenizer: encode the options.
        train_documents: False leaves a `document_model` as it is: a corpus is encoded once for a whole training.
        pooling: `mean`, `cls`, `max`, `lasttoken`, `weightedmean` or `mean_sqrt_len_tokens`, or several, whose vectors
            are joined.
        similarity: `cosine` or `dot`.
        query_prompt, document_prompt: stand before every query, and before every option.
        max_length: most tokens of a text; longer ones lose tokens at their end.
        peft_config: puts a new adapter of the peft library on the model, and on a `document_model` that trains; only
            the adapter trains.
        model_kwargs: of `from_pretrained`; see `CausalLM`.
        cache_size: most options whose vectors are kept.
        max_batch_tokens: most tokens of one forward, padding included.

    Raises:
        PlanError: for options out of range, or a folder whose modules make another vector (named).
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        *,
        document_model: str | Path | PreTrainedModel | None = None,
        document_tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        train_documents: bool = True,
        pooling: str | Sequence[str] | None = None,
        similarity: str | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        max_length: int | None = None,
        peft_config: PeftConfig | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        cache_size: int = CACHE_SIZE,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        if document_model is None and (document_tokenizer is not None or not train_documents):
            raise PlanError(
                "BiEncoder: document_tokenizer and train_documents=False are of a document_model, which encodes the "
                "options by itself; give one."
            )
        for option, value, least in (("cache_size", cache_size, 0), ("max_batch_tokens", max_batch_tokens, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(f"BiEncoder: {option} must be an integer of {least} or more, got {value!r}.")
        pooling = pooling if pooling is None or isinstance(pooling, str) else tuple(pooling)
        common = {"pooling": pooling, "similarity": similarity, "max_length": max_length}
        limits: Any = {"max_batch_tokens": max_batch_tokens, "cache_size": cache_size}
        prompts = {"query_prompt": query_prompt, "document_prompt": document_prompt}
        lm = EncoderModel(model, tokenizer, peft_config=peft_config, model_kwargs=model_kwargs)
        self.query = self.document = TextEncoder(lm, {**common, **prompts}, **limits)
        if document_model is not None:
            adapted = peft_config if train_documents else None
            lm = EncoderModel(document_model, document_tokenizer, peft_config=adapted, model_kwargs=model_kwargs)
            self.document = TextEncoder(lm, {**common, **prompts}, trains=train_documents, **limits)
        self._module: nn.Module | None = None

    @classmethod
    def _of(cls, query: TextEncoder, document: TextEncoder) -> Self:
        made = cls.__new__(cls)
        made.query, made.document, made._module = query, document, None
        return made

    def __repr__(self) -> str:
        return repr(self.query)

    @property
    def is_shared(self) -> bool:
        """Whether one tower encodes both."""
        return self.query is self.document

    @property
    def _towers(self) -> dict[str, TextEncoder]:
        return {"query": self.query} if self.is_shared else {"query": self.query, "document": self.document}

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            parts = [
                (f"{name}_{part}", module)
                for name, tower in self._towers.items()
                for part, module in tower.parts.items()
            ]
            self._module = parts[0][1] if len(parts) == 1 else nn.ModuleDict(dict(parts))
        return self._module

    def _texts(self, prompt: ChoicePrompt, element: int) -> tuple[str, list[str]]:
        """What is encoded of a row."""
        query = self.query.recipe.query_prompt + as_text(repr(self), prompt.query, "query", element)
        before = self.document.recipe.document_prompt
        return query, [before + as_text(repr(self), text, "option", element) for text in prompt.texts]

    def scores(self, prompts: Sequence[ChoicePrompt]) -> list[Float[Tensor, " options"]]:
        texts = [self._texts(prompt, element) for element, prompt in enumerate(prompts)]
        queries = list(dict.fromkeys(query for query, _ in texts))
        options = list(dict.fromkeys(text for _, own in texts for text in own))
        ours, theirs = (
            self._encoded(self.query, queries, False, texts),
            self._encoded(self.document, options, True, texts),
        )
        if ours.shape[1] != theirs.shape[1]:
            raise PlanError(
                f"{self!r}: queries have vectors of {ours.shape[1]} numbers and options of {theirs.shape[1]}; both "
                "models must have one width."
            )
        if self.query.recipe.similarity == "cosine":
            ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
        query_at = {text: place for place, text in enumerate(queries)}
        option_at = {text: place for place, text in enumerate(options)}
        left = [query_at[query] for query, own in texts for _ in own]
        right = [option_at[text] for _, own in texts for text in own]
        found = (ours[left] * theirs[right].to(ours.dtype)).sum(-1)
        return list(found.split([len(own) for _, own in texts]))

    def _encoded(
        self, tower: TextEncoder, texts: Sequence[str], keeps: bool, rows: Sequence[tuple[str, list[str]]]
    ) -> Float[Tensor, "n D"]:
        try:
            return tower.encode(texts, keeps=keeps)
        except DataError as error:
            if error.element is not None:
                text = texts[error.element]
                error.element = next(row for row, (query, own) in enumerate(rows) if text == query or text in own)
            raise

    def pieces(self, prompts: Sequence[ChoicePrompt]) -> list[dict[Hashable, int]]:
        found = []
        for element, prompt in enumerate(prompts):
            query, options = self._texts(prompt, element)
            own: dict[Hashable, int] = {("query", query): self.query.lengths([query])[0]}
            if self.document.trains:
                own |= {("option", text): n for text, n in zip(options, self.document.lengths(options), strict=True)}
            found.append(own)
        return found

    def cut_from(self, prompt: ChoicePrompt) -> int:
        query, options = self._texts(prompt, 0)
        return self.query.cut_from(query) + sum(map(self.document.cut_from, options))

    @property
    def base_model(self) -> str | None:
        return self.query.lm.base_model

    @property
    def base_key(self) -> Hashable:
        return self.query.lm.base_key if self.is_shared else None

    def share_base(self, others: Iterable[Component]) -> None:
        if self.is_shared:
            scorers = (getattr(other, "scorer", None) for other in others)
            self.query.lm.share_base_of_one(each.query.lm for each in scorers if isinstance(each, BiEncoder))

    def connect(self, components: Mapping[str, Component]) -> None:
        owner = getattr(components.get(self.query.lm.base_component or ""), "scorer", None)
        if self.is_shared and owner is not self and isinstance(owner, BiEncoder):
            self.query.lm.share_base(owner.query.lm)

    def prepare_training(self) -> None:
        for tower in self._towers.values():
            if tower.trains:
                tower.lm.prepare_training()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": parameter
            for name, tower in self._towers.items()
            for key, parameter in tower.own_parameters().items()
        }

    def reference(self, *, moves: bool = False) -> Self:
        query = self.query.reference(moves=moves)
        return self._of(query, query if self.is_shared else self.document.reference(moves=moves))

    def fresh(self) -> Self | None:
        if not all(tower.lm.is_named for tower in self._towers.values()):
            return None
        query = self.query.fresh()
        return self._of(query, query if self.is_shared else self.document.fresh())

    def reading(self) -> str:
        return json.dumps([
            tokenizer_hash(tower.lm.tokenizer, [str(tower.recipe), tower.max_length]) for tower in self._towers.values()
        ])  # fmt: skip

    @property
    def tells_options_apart(self) -> bool:
        return not self.is_shared and self.document.trains

    def footprint(
        self,
        *,
        tokens: int,
        labels: int,
        trains: bool,
        checkpoints: bool,
        device: str,
        options: int | None = None,
    ) -> Footprint | None:
        return encoder_footprint.of_towers(
            list(self._towers.values()), tokens=tokens, trains=trains, checkpoints=checkpoints, device=device,
            options=options,
        )  # fmt: skip

    def save(self, folder: Path) -> dict[str, Any]:
        towers = self._towers
        saved = {name: tower.save(_below(folder, name, len(towers))) for name, tower in towers.items()}
        return {
            "towers": saved, "train_documents": self.document.trains, "cache_size": self.document.cache.size,
            "max_batch_tokens": self.query.max_batch_tokens,
        }  # fmt: skip

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Nothing of an adapter on a base without a name, which only sysdag finds again."""
        saved = options["towers"]
        if any(tower.get("base", "named") is None for tower in saved.values()):
            return []
        places = {"model": "folder"} if len(saved) == 1 else {name: f"f'{{folder}}/{name}'" for name in saved}
        lines = [f"{name} = SentenceTransformer({place})" for name, place in places.items()]
        return [
            (
                "With sentence-transformers:",
                "\n".join(["from sentence_transformers import SentenceTransformer", *lines]),
            )
        ]

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        options = only(options, _SAVED, cls.__name__, required=_SAVED)
        limits = {name: options[name] for name in ("cache_size", "max_batch_tokens")}
        saved = options["towers"]
        if "query" not in saved or not set(saved) <= {"query", "document"}:
            raise SerializationError(
                f"{cls.__name__}: towers must be a query's and perhaps a document's, got {set(saved)}."
            )
        query = saved_tower(_below(folder, "query", len(saved)), saved["query"], **limits)
        if "document" not in saved:
            return cls._of(query, query)
        trains = options["train_documents"]
        return cls._of(query, saved_tower(folder / "document", saved["document"], trains=trains, **limits))

    @property
    def trusts_remote_code(self) -> bool:
        return any(tower.lm.trusts_remote_code for tower in self._towers.values())

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        for name, tower in self._towers.items():
            place = _below(folder, name, len(self._towers))
            tower.lm.read_from(place, trust_remote_code=trust_remote_code)

    def load_weights(self, folder: Path) -> None:
        for name, tower in self._towers.items():
            tower.load_weights(_below(folder, name, len(self._towers)))


def _below(folder: Path, name: str, towers: int) -> Path:
    """Where a tower is: one by itself in the folder, so that other libraries find it there."""
    return folder if towers == 1 else folder / name
