"""A causal language model that extends many rows by a token at a time, through its forward and its cache.

A cache is keys and values, states of a recurrence, or both: whatever the model returns from one call and takes at the
next. Whether a model's goes with padding and with rows that change places is asked by `decoder`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.language.language_head import argument_names

_CACHES = ("past_key_values", "cache_params", "state")  # the names that forwards have for it


class CachedDecoder:
    """A causal language model with the cache of its rows.

    Args:
        pass_positions: say each token's place among those that are no padding, where the forward takes it; False
            leaves that to the model, which is right without padding whatever it counts from.

    Raises:
        ValueError: for a model that takes no cache, or that keeps none as it is now.
    """

    def __init__(self, model: nn.Module, *, pass_positions: bool = True) -> None:
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "model: expected one that keeps a cache, got train mode with gradient checkpointing, which keeps none; "
                "call model.eval() before the search."
            )
        self.model, self.accepts = model, argument_names(model)
        name = next((each for each in _CACHES if each in self.accepts), None)
        if name is None:
            raise ValueError(f"model: expected a forward that takes a cache ({', '.join(_CACHES)}), got none of them.")
        if not pass_positions:
            self.accepts = self.accepts - {"position_ids"}
        self._name: str = name
        self.cache: Any = None

    def start(self, input_ids: Tensor, mask: Tensor, beams: int) -> Tensor:
        """Reads the prompts once, then gives each `beams` rows; returns the logits after them (B,V)."""
        self.mask, self.positions = mask, (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(input_ids)
        rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(beams)
        self.mask, self.positions = mask[rows], self.positions[rows, -1:]
        if self.cache is None:
            raise ValueError(f"model: expected an output with {self._name}, got None.")
        if not _has_layers(self.cache):
            self._select(rows)
            return logits
        for i, layer in enumerate(self.cache.layers):
            if _is_plain(layer):
                self.cache.layers[i] = _roomy_layer_class()(layer, beams)
            else:
                layer.reorder_cache(rows)
        return logits

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Appends each of the tokens (B,N) to a row of the call before, `rows` (B,N); returns logits (B,N,V).

        Where no row is dropped, each is followed by a row of the same prompt: its prompt's part stays where it is.
        """
        shape, rows = tokens.shape, rows.flatten()
        self._reorder(rows)
        self.mask = nn.functional.pad(self.mask[rows], (0, 1), value=1)
        self.positions = self.positions[rows] + 1
        return self._forward(tokens.reshape(-1, 1)).unflatten(0, shape)

    def _reorder(self, rows: Tensor) -> None:
        """Puts earlier row `rows[i]` at i."""
        if len(rows) < len(self.mask):
            self._select(rows)
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        if not len(moved):
            return
        if not _has_layers(self.cache):
            self._select(rows)
            return
        for layer in self.cache.layers:
            if isinstance(layer, _roomy_layer_class()):
                layer.copy_rows(rows[moved], moved)
            else:
                layer.reorder_cache(rows)

    def _select(self, rows: Tensor) -> None:
        if _has_layers(self.cache):
            self.cache.reorder_cache(rows)
        elif hasattr(self.cache, "batch_select_indices"):  # a cache with more in it than layers
            self.cache.batch_select_indices(rows)
        else:
            self.cache = _selected(self.cache, rows)

    def _forward(self, input_ids: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": self.positions, "logits_to_keep": 1, self._name: self.cache}
        if self._name == "past_key_values" or self.cache is None:  # states hold no padding
            options["attention_mask"] = self.mask
        options = {name: value for name, value in options.items() if name in self.accepts}
        output = self.model(input_ids=input_ids, use_cache=True, **options)
        self.cache = getattr(output, self._name, None)
        return output.logits[:, -1].to(input_ids.device)


def _has_layers(cache: Any) -> bool:
    """Whether everything in the cache is in its layers, each of which can reorder its rows."""
    from transformers.cache_utils import Cache  # importing sysdag must not import transformers

    if not isinstance(cache, Cache):
        return False
    return type(cache).batch_select_indices is Cache.batch_select_indices


def _selected(cache: Any, rows: Tensor) -> Any:
    """The rows of states that stand in plain containers, the first dimension of each being the rows."""
    if isinstance(cache, Tensor):
        return cache.index_select(0, rows.to(cache.device))
    if isinstance(cache, (list, tuple)):
        return type(cache)(_selected(each, rows) for each in cache)
    if isinstance(cache, dict):
        return {key: _selected(each, rows) for key, each in cache.items()}
    held = {name: value for name, value in vars(cache).items() if isinstance(value, (list, tuple, dict))}
    for name, value in held.items():
        setattr(cache, name, _selected(value, rows))
    return cache


def _is_plain(layer: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return type(layer) is DynamicLayer and layer.is_initialized


@functools.cache
def _roomy_layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values (rows, heads, tokens, width) as views of slabs with room for more tokens.

        `DynamicLayer` copies everything at each token and again at each reordering, which takes most of a step's time.
        Here a token is written in place, and a beam that takes the place of another of its prompt is copied alone,
        without the prompt's part.
        """

        room = 128
        keys: Tensor
        values: Tensor

        def __init__(self, layer: Any, beams: int) -> None:
            super().__init__()
            self.__dict__.update(vars(layer))
            self.prompt = layer.keys.shape[-2]
            self.slabs = []
            for part in (layer.keys, layer.values):
                self.slabs.append(self._slab(part, len(part) * beams))
                self.slabs[-1].unflatten(0, (len(part), beams))[..., : self.prompt, :] = part[:, None]
            self._show(self.prompt)

        def _slab(self, part: Tensor, rows: int) -> Tensor:
            return part.new_empty(rows, part.shape[1], part.shape[2] + self.room, part.shape[3])

        def _show(self, tokens: int) -> tuple[Tensor, Tensor]:
            self.keys, self.values = (slab[:, :, :tokens] for slab in self.slabs)
            return self.keys, self.values

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start = self.keys.shape[-2]
            end = start + key_states.shape[-2]
            for i, (seen, new) in enumerate([(self.keys, key_states), (self.values, value_states)]):
                if end > self.slabs[i].shape[-2]:
                    self.slabs[i] = self._slab(seen, len(seen))
                    self.slabs[i][:, :, :start] = seen
                self.slabs[i][:, :, start:end] = new
            return self._show(end)

        def copy_rows(self, sources: Tensor, places: Tensor) -> None:
            """Copies the new tokens of some rows over those of rows of the same prompts."""
            for part in (self.keys, self.values):
                new = part[:, :, self.prompt :]
                new.index_copy_(0, places.to(part.device), new.index_select(0, sources.to(part.device)))

        def reorder_cache(self, beam_idx: Tensor) -> None:
            tokens = self.keys.shape[-2]
            self.slabs = [slab.index_select(0, beam_idx.to(slab.device)) for slab in self.slabs]
            self._show(tokens)

    return RoomyLayer
