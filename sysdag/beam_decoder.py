"""A causal language model that extends many beams by a token at a time, through its forward and its KV cache."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn


class BeamDecoder:
    """A causal language model with the cache of its beams, a row each."""

    def __init__(self, model: nn.Module) -> None:
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "model: expected one that keeps a cache, got train mode with gradient checkpointing, which keeps none; "
                "call model.eval() before the search."
            )
        self.model, self.accepts = model, _argument_names(model)
        self.cache: Any = None

    def start(self, input_ids: Tensor, mask: Tensor, beams: int) -> Tensor:
        """Reads the prompts once, then gives each `beams` rows; returns the logits after them (B,V)."""
        self.mask, self.positions = mask, (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(input_ids)
        rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(beams)
        self.mask, self.positions = mask[rows], self.positions[rows, -1:]
        if not hasattr(self.cache, "reorder_cache"):
            raise ValueError(f"model: expected a past_key_values with reorder_cache, got {type(self.cache).__name__}.")
        if hasattr(self.cache, "layers"):
            for i, layer in enumerate(self.cache.layers):
                self.cache.layers[i] = _with_room(layer, rows)
        else:
            self.cache.reorder_cache(rows)
        return logits

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Appends each of the tokens (B,N) to a row of the call before, `rows` (B,N); returns logits (B,N,V)."""
        shape, rows = tokens.shape, rows.flatten()
        if len(rows) < len(self.mask) or not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
            self.cache.reorder_cache(rows)
        self.mask = nn.functional.pad(self.mask[rows], (0, 1), value=1)
        self.positions = self.positions[rows] + 1
        return self._forward(tokens.reshape(-1, 1)).unflatten(0, shape)

    def _forward(self, input_ids: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": self.positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in self.accepts}
        output = self.model(
            input_ids=input_ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **options
        )
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1].to(input_ids.device)


def _argument_names(model: Any) -> set[str]:
    """What the language model's own forward takes, under a PEFT, DDP or torch.compile wrapper."""
    if callable(getattr(model, "get_base_model", None)):
        return _argument_names(model.get_base_model())
    names = set(inspect.signature(model.forward).parameters)
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    return names if "input_ids" in names or inner is None else _argument_names(inner)


def _with_room(layer: Any, rows: Tensor) -> Any:
    """The cache layer with its rows repeated; a plain `DynamicLayer` becomes one that grows and reorders in place."""
    from transformers.cache_utils import DynamicLayer  # importing sysdag must not import transformers

    if type(layer) is DynamicLayer and layer.is_initialized:
        return _roomy_layer_class()(layer, rows)
    layer.reorder_cache(rows)
    return layer


@functools.cache
def _roomy_layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values (rows, heads, tokens, width) as views of slabs with room for more tokens.

        `DynamicLayer` copies everything at each token and again at each reordering, most of the time of a step. Here a
        token is written in place. Beams only ever descend from beams of their own prompt, so a reordering that keeps
        the number of rows leaves the prompt's part alone.
        """

        room = 128
        keys: Tensor
        values: Tensor

        def __init__(self, layer: Any, rows: Tensor) -> None:
            super().__init__()
            self.__dict__.update(vars(layer))
            self.prompt = layer.keys.shape[-2]
            self.slabs = [part.index_select(0, rows.to(part.device)) for part in (layer.keys, layer.values)]
            self.keys, self.values = self.slabs

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start = self.keys.shape[-2]
            end = start + key_states.shape[-2]
            if end > self.slabs[0].shape[-2]:
                room = (0, 0, 0, end - start + self.room)
                self.slabs = [nn.functional.pad(slab, room) for slab in (self.keys, self.values)]
            for slab, states in zip(self.slabs, (key_states, value_states), strict=True):
                slab[:, :, start:end] = states
            self.keys, self.values = (slab[:, :, :end] for slab in self.slabs)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: Tensor) -> None:
            beam_idx, end = beam_idx.to(self.keys.device), self.keys.shape[-2]
            if len(beam_idx) == len(self.keys):
                for slab in self.slabs:
                    slab[:, :, self.prompt : end] = slab[:, :, self.prompt : end].index_select(0, beam_idx)
                return
            self.slabs = [slab.index_select(0, beam_idx) for slab in self.slabs]
            self.keys, self.values = (slab[:, :, :end] for slab in self.slabs)

    return RoomyLayer
