"""A causal language model that extends many rows by a token at a time, through its forward and its cache.

A cache is keys and values, states of a recurrence, or both: whatever the model returns from one call and takes at the
next. Whether a model's goes with padding, and with rows that enter, leave and change places, is asked by `decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.language import key_value_slabs, model_cache
from sysdag.components.language.language_head import argument_names


class CachedDecoder:
    """A causal language model with the cache of its rows.

    Args:
        pass_positions: say each token's place among those that are no padding, where the forward takes it; False
            leaves that to the model, which is right without padding whatever it counts from.
        joins: whether prompts may be read while rows are there, and what they begin with once for all.
        least_shared: fewest tokens that prompts must have in common to be read once.
        offset_of: what is added to the positions behind a prompt; None adds nothing.

    Raises:
        ValueError: for a model that takes no cache, or that keeps none as it is now.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pass_positions: bool = True,
        joins: bool = True,
        least_shared: int = 16,
        offset_of: Callable[[Sequence[int]], int] | None = None,
    ) -> None:
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ValueError(
                "model: expected one that keeps a cache, got train mode with gradient checkpointing, which keeps none; "
                "call model.eval() before the search."
            )
        self.model, self.accepts = model, argument_names(model)
        name = model_cache.argument_of(self.accepts)
        if name is None:
            raise ValueError(
                f"model: expected a forward that takes a cache ({', '.join(model_cache.NAMES)}), got none of them."
            )
        if not pass_positions:
            self.accepts = self.accepts - {"position_ids"}
        self._name: str = name
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.joins = joins
        self._least_shared = least_shared if joins else None
        self._shared: tuple[list[int], Any] | None = None  # what prompts begin with, and its cache
        self._cache: Any = None
        self._prompts_read = 0
        self._offset_of = offset_of
        self._clear()

    def _clear(self) -> None:
        self._cache = None
        self._mask = torch.ones(0, 0, dtype=torch.long, device=self.device)
        self._positions = torch.zeros(0, 1, dtype=torch.long, device=self.device)
        self._offsets = self._positions
        self._owners: list[int] = []
        self._ages: list[int] = []

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        """See `sysdag.components.language.decoder.Decoder`."""
        shared = self._shared_by(prompts)
        logits, read, mask = self._read(prompts, shared)
        rows = torch.arange(len(prompts)).repeat_interleave(torch.tensor(repeats)).to(self.device)
        self._take_in(read, mask, rows, [len(prompt) for prompt in prompts], shared)
        offsets = torch.tensor([self._offset(prompt) for prompt in prompts], device=self.device)
        self._offsets = torch.cat([self._offsets, offsets[rows][:, None]])
        return logits

    def _offset(self, prompt: Sequence[int]) -> int:
        return 0 if self._offset_of is None else self._offset_of(prompt)

    def _read(self, prompts: Sequence[Sequence[int]], shared: int) -> tuple[Tensor, Any, Tensor]:
        """Logits after prompts, their cache, and its mask."""
        width = max(map(len, prompts)) - shared
        ids = [[0] * (width + shared - len(prompt)) + list(prompt[shared:]) for prompt in prompts]
        mask = [
            [1] * shared + [0] * (width + shared - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts
        ]
        input_ids, made = torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)
        positions = (made.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        cache = None
        if shared:
            assert self._shared is not None
            positions = positions + self._offset(self._shared[0][:shared])
            cache = _expanded(self._shared[1], len(prompts), shared)
        logits, cache = self._forward(input_ids, made, positions, cache)
        if cache is None:
            raise ValueError(f"model: expected an output with {self._name}, got None.")
        return logits, cache, made

    def _shared_by(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens all prompts begin with whose cache is there; it is read where that pays."""
        if self._least_shared is None:
            return 0
        first = list(prompts[0]) if self._shared is None else self._shared[0]
        if self._shared is None and len(prompts) == 1:
            return 0
        count = min(_common(first, prompt) for prompt in prompts)
        count = min(count, min(map(len, prompts)) - 1)  # a token of its own gives a prompt its logits
        if count < self._least_shared:
            return 0
        if self._shared is None:
            _, cache, _ = self._read([first[:count]], 0)
            if not (_has_layers(cache) and key_value_slabs.keeps_all_columns(cache)):
                self._least_shared = None
                return 0
            self._shared = (first[:count], cache)
        return count

    def _take_in(self, read: Any, mask: Tensor, rows: Tensor, lengths: Sequence[int], shared: int) -> None:
        count, there = len(rows), len(self._owners)
        mergeable = self.joins and _has_layers(read) and key_value_slabs.takes_rows_in(read)
        if there and not mergeable:
            raise ValueError("model: no prompt may enter while rows are there.")
        longest = max(lengths)
        if mergeable:
            used = int(self._positions.max()) + 1 if there else 0
            columns = max(used, longest)
            entering = key_value_slabs.Entering(rows, lengths, shared, columns)
            self._cache = key_value_slabs.merged(self._cache if there else None, read, entering)
            old = self._mask[:, self._mask.shape[1] - used :] if there else self._mask.new_zeros(0, columns)
            old = nn.functional.pad(old, (columns - old.shape[1], 0))
            counts = torch.tensor(lengths, device=self.device)[rows]
            new = (torch.arange(columns, device=self.device) >= columns - counts[:, None]).long()
            self._mask = torch.cat([old, new])
        else:
            self.joins = False
            self._cache, self._mask = read, mask[rows]
            self._select(rows)
        self._positions = torch.cat([self._positions, torch.tensor(lengths, device=self.device)[rows][:, None] - 1])
        self._owners += [self._prompts_read + row for row in rows.tolist()]
        self._ages += [0] * count
        self._prompts_read += len(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """See `sysdag.components.language.decoder.Decoder`."""
        if list(rows) == list(range(len(self._owners))):
            return
        if not rows:
            self._clear()
            return
        index = torch.tensor(rows, device=self.device)
        if self.joins:
            there = self._owners + [-1] * len(rows)
            same = [self._owners[source] == there[place] for place, source in enumerate(rows)]
            since = [
                max(self._ages[source], self._ages[place]) if alike else None
                for place, (source, alike) in enumerate(zip(rows, same, strict=True))
            ]
            key_value_slabs.keep(self._cache, rows, since)
        else:
            self._select(index)
        self._mask, self._positions, self._offsets = self._mask[index], self._positions[index], self._offsets[index]
        self._owners, self._ages = [self._owners[row] for row in rows], [self._ages[row] for row in rows]

    def extend(self, tokens: Tensor) -> Tensor:
        """See `sysdag.components.language.decoder.Decoder`."""
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        self._positions = self._positions + 1
        self._ages = [age + 1 for age in self._ages]
        positions = self._positions + self._offsets
        logits, self._cache = self._forward(tokens[:, None], self._mask, positions, self._cache)
        return logits

    def _select(self, rows: Tensor) -> None:
        if _has_layers(self._cache):
            self._cache.reorder_cache(rows)
        elif hasattr(self._cache, "batch_select_indices"):  # a cache with more in it than layers
            self._cache.batch_select_indices(rows)
        else:
            self._cache = _selected(self._cache, rows)

    def _forward(self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, Any]:
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1, self._name: cache}
        if cache is None or model_cache.takes_mask(self._name, cache):
            options["attention_mask"] = mask
        options = {name: value for name, value in options.items() if name in self.accepts}
        output = self.model(input_ids=input_ids, use_cache=True, **options)
        return output.logits[:, -1].to(input_ids.device), model_cache.cache_of(output)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _has_layers(cache: Any) -> bool:
    """Whether everything in the cache is in its layers, each of which can reorder its rows."""
    from transformers.cache_utils import Cache  # importing sysdag must not import transformers

    if not isinstance(cache, Cache):
        return False
    return type(cache).batch_select_indices is Cache.batch_select_indices


def _expanded(cache: Any, rows: int, tokens: int) -> Any:
    """A cache like that of one row's first tokens, for many rows, without copies."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    found = DynamicCache()
    found.layer_class_to_replicate = None
    for layer in cache.layers:
        made = DynamicLayer()
        made.dtype, made.device, made.is_initialized = layer.keys.dtype, layer.device, True
        made.keys, made.values = (part[:, :, :tokens].expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        found.layers.append(made)
    return found


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
