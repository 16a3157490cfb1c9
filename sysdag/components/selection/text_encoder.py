"""A tower of a bi-encoder: a pretrained encoder, and what makes one vector of its tokens' vectors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components import adapter_weights
from sysdag.components.component import evaluating
from sysdag.components.precision import widened
from sysdag.components.selection import sentence_folder
from sysdag.components.selection.embedding_cache import EmbeddingCache, state_of
from sysdag.components.selection.encoder_model import EncoderModel
from sysdag.components.selection.sentence_folder import Recipe
from sysdag.components.text_batches import Batch, by_text, is_sharded
from sysdag.errors import DataError, PlanError
from sysdag.files.saved_files import only

logger = logging.getLogger(__name__)


class TextEncoder:
    """Vectors of texts.

    Args:
        lm: the encoder.
        options: of its recipe, where they are not to be what its folder says; see `sentence_folder.Recipe`.
        recipe: in place of the one that the folder says.
        max_batch_tokens: most tokens of one forward, padding included.
        cache_size: most texts whose vectors are kept.
        trains: False runs it in evaluation mode and without gradient, always.
    """

    def __init__(
        self,
        lm: EncoderModel,
        options: Mapping[str, Any],
        *,
        max_batch_tokens: int,
        cache_size: int,
        recipe: Recipe | None = None,
        trains: bool = True,
    ) -> None:
        self.lm, self._options = lm, dict(options)
        self.max_batch_tokens, self.trains = max_batch_tokens, trains
        self.cache = EmbeddingCache(cache_size)
        self._layers: nn.ModuleList | None = None
        self._said = False
        if recipe is not None:
            self.recipe = recipe
        elif not lm.is_named or lm.is_folder:
            assert self.recipe is not None  # so that what is wrong with a folder is told at once

    def __repr__(self) -> str:
        return repr(self.lm)

    @cached_property
    def recipe(self) -> Recipe:
        """How it makes a vector; that of its folder with the options that were given."""
        lm, found = self.lm, None
        if lm.is_named:
            found = sentence_folder.read(repr(lm), lm.file)
            if found is not None and found.transformer:
                lm.model_kwargs = {**lm.model_kwargs, "subfolder": found.transformer}
        return (found or Recipe()).changed(repr(lm), **self._options)

    @property
    def layers(self) -> nn.ModuleList:
        """Those of the recipe, with their weights; those of an encoder with an adapter do not train."""
        if self._layers is None:
            made = [nn.Identity() if layer is None else layer.build() for layer in self.recipe.layers]
            device = next(self.model.parameters()).device
            self._layers = nn.ModuleList(made).to(device, self.lm.dtype(True) if made else torch.float32)
            if self.lm.adapter is not None or not self.trains:
                self._layers.requires_grad_(False)
        return self._layers

    @property
    def model(self) -> Any:
        """The transformer, loaded on first access."""
        assert self.recipe is not None  # which says in which folder it is
        found = self.lm.module
        if not self.trains:
            found.requires_grad_(False)
        return found

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules with weights, by name."""
        own = {"transformer": self.model}
        return own | {"layers": self.layers} if any(True for _ in self.layers.parameters()) else own

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those that train as this tower's."""
        if not self.trains:
            return {}
        found = {f"transformer.{name}": each for name, each in self.lm.own_parameters().items()}
        if self.lm.adapter is None and not self.lm.adapter_off:
            found |= {f"layers.{name}": each for name, each in self.layers.named_parameters()}
        return found

    @property
    def max_length(self) -> int | None:
        """Most tokens of a text; None where nothing limits it."""
        own = self.recipe.max_length  # first: the recipe says in which folder lm is
        self.lm.check_length(own)
        return own or self.lm.longest_text

    def rows(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        """The tokens of each text, as far as there is room."""
        longest, found = self.max_length, []
        for text in texts:
            row = self._tokens(text, longest)
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
            found.append(row)
        return found

    def _tokens(self, text: str, most: int | None) -> dict[str, list[int]]:
        text = text.lower() if self.recipe.lower_case else text
        return dict(self.lm.tokenizer(text, truncation=most is not None, max_length=most))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each text are read; loads no weights."""
        return [len(row["input_ids"]) for row in self.rows(texts)]

    def cut_from(self, text: str) -> int:
        """How many tokens of a text there is no room for."""
        longest = self.max_length
        return 0 if longest is None else max(0, len(self._tokens(text, None)["input_ids"]) - longest)

    def encode(self, texts: Sequence[str], *, keeps: bool) -> Float[Tensor, "n D"]:
        """The vector of each text, fp32 or better.

        Args:
            texts: with their prompts, all different.
            keeps: whether vectors are kept for the next call, where they do not depend on a gradient or dropout.
        """
        if is_sharded(self.model):
            keeps = False  # processes must call it equally often
        if not self.trains:
            with torch.no_grad(), evaluating(self.model), evaluating(self.layers):
                return self.cache(texts, self._state(), self._encoded) if keeps else self._encoded(texts)
        if keeps and not torch.is_grad_enabled() and not self.model.training:
            return self.cache(texts, self._state(), self._encoded)
        return self._encoded(texts)

    def _state(self) -> tuple[Any, ...]:
        model = self.model
        own: list[Tensor] = [*self.layers.parameters()]
        own += adapter_weights.base_state(model).values()
        if self.lm.adapter is not None and not self.lm.adapter_off:
            own += adapter_weights.parameters(model, self.lm.adapter).values()
            own += adapter_weights.buffers(model, self.lm.adapter).values()
        kind = own[0].device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (cast, *state_of(own))

    def _encoded(self, texts: Sequence[str]) -> Float[Tensor, "n D"]:
        rows, model = self.rows(texts), self.model
        for element, row in enumerate(rows):
            if not row["input_ids"]:
                raise DataError(
                    f"{self!r}: the text {texts[element]!r} has no tokens, so it has no vector.", element=element
                )
            self.lm.check_ids(row["input_ids"], f"the text {texts[element]!r:.100}", element)
        config = model.config.get_text_config()
        pad = getattr(config, "pad_token_id", None)
        pad = self.lm.tokenizer.pad_token_id if pad is None else pad

        def read(batch: Batch) -> Tensor:
            output = used(**batch)
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is None:
                raise PlanError(
                    f"{self!r}: a {type(model).__name__} gives no vector of each token (last_hidden_state)."
                )
            mask = batch.get("attention_mask")
            mask = torch.ones(hidden.shape[:2], device=hidden.device, dtype=torch.int64) if mask is None else mask
            return sentence_folder.pooled(hidden, mask, self.recipe.pooling)

        with self.lm.at_work() as used:
            found = by_text(
                model, rows, read, device=next(model.parameters()).device, pad=pad or 0,
                most_tokens=self.max_batch_tokens,
            )  # fmt: skip
        for layer, module in zip(self.recipe.layers, self.layers, strict=True):
            found = F.normalize(found, dim=-1) if layer is None else module(found.to(next(module.parameters()).dtype))
        return widened(found)

    def _with(self, lm: EncoderModel) -> Self:
        view = copy.copy(self)
        view.lm, view.cache = lm, EmbeddingCache(self.cache.size)
        return view

    def reference(self, *, moves: bool) -> Self:
        """A frozen one; itself where it does not train."""
        if not self.trains:
            return self
        layers = self.layers
        view = self._with(self.lm.reference(moves=moves))
        if self.lm.adapter is None:
            view._layers = copy.deepcopy(layers).requires_grad_(False).eval()
        return view

    def fresh(self) -> Self:
        """As it was before anything was loaded."""
        view = self._with(self.lm.fresh())
        view._layers = None
        return view

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes a folder that sentence-transformers reads."""
        options = self.lm.save(folder)
        recipe = self.recipe.changed(repr(self), max_length=self.max_length)
        dense = [layer.inputs for layer in recipe.layers if layer is not None]
        width = dense[0] // len(recipe.pooling) if dense else self.lm.config.get_text_config().hidden_size
        sentence_folder.write(folder, recipe, list(self.layers), width)
        return options

    def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those that `save` wrote."""
        self.lm.load_weights(folder)
        saved = sentence_folder.read(repr(self), _in(folder))
        assert saved is not None
        for own, layer in zip(self.layers, saved.layers, strict=True):
            if layer is not None:
                own.load_state_dict(layer.build().state_dict())


def _in(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: path if (path := folder / name.lstrip("/")).is_file() else None


def saved_tower(folder: Path, options: Mapping[str, Any], **others: Any) -> TextEncoder:
    """A tower from what `TextEncoder.save` wrote and returned."""
    kinds: dict[str, tuple[type, ...]] = {"base": (str, type(None)), "base_of": (str,), "model_kwargs": (dict,)}
    lm = EncoderModel.load(folder, only(options, kinds, EncoderModel.kind))
    recipe = sentence_folder.read(repr(lm), _in(folder))
    return TextEncoder(lm, {}, recipe=recipe, **others)
