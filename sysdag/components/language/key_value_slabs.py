"""Keys and values of rows that grow, leave and enter, in slabs with room: layers of a cache of transformers.

`DynamicLayer` copies everything at each token and again whenever rows change places. Here a token is written in place,
a row that changes places is copied alone, and all is copied only when the room is used up or rows enter.

All rows end at the same column and are padded on the left, as masks and sliding windows of transformers expect.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROOM = 32  # columns for tokens to come: the least that a slab is made with


@dataclass(frozen=True)
class Entering:
    """Rows that a cache takes in.

    Attributes:
        rows: for each, the row of the cache that its prompt was read into, ascending.
        lengths: tokens of each prompt of that cache, longest first.
        shared: how many of them all prompts begin with and were read once: they are the cache's first columns, the rest
            of a prompt is its last ones, and what is between is padding.
        columns: of the slabs after they entered, at least the longest prompt's.
    """

    rows: Tensor
    lengths: Sequence[int]
    shared: int
    columns: int


def takes_rows_in(cache: Any) -> bool:
    """Whether each layer's rows can stand beside those of another cache: attention over all or a window, or states."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, *_slab_classes())
    return all(type(layer) in known for layer in cache.layers)


def keeps_all_columns(cache: Any) -> bool:
    """Whether a prefix's cache serves whatever follows it: attention over all columns and nothing else."""
    from transformers.cache_utils import DynamicLayer

    return bool(cache.layers) and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def merged(cache: Any | None, read: Any, entering: Entering) -> Any:
    """The cache with rows that were read by themselves; `read` is used up."""
    for place, layer in enumerate(read.layers):
        before = None if cache is None else cache.layers[place]
        if hasattr(layer, "conv_states"):
            _append_states(before, layer, entering.rows)
        elif layer.is_initialized:
            plain, sliding = _slab_classes()
            made = plain() if not layer.is_sliding else sliding(layer.sliding_window)
            made.fill(before, layer, entering)
            layer = made
        read.layers[place] = layer
        if cache is not None:
            cache.layers[place] = None  # so that one layer at a time is there twice
    return read


def keep(cache: Any, sources: Sequence[int], since: Sequence[int | None]) -> None:
    """Puts earlier row `sources[i]` at i, and drops the rows behind.

    Args:
        since: how many of a row's last columns differ from those that are there; None is all.
    """
    moved = [place for place, source in enumerate(sources) if source != place]
    whole = [place for place in moved if since[place] is None]
    short = [place for place in moved if since[place] is not None]
    last = max((since[place] or 0 for place in short), default=0)
    everything = torch.tensor(sources)
    for layer in cache.layers:
        if isinstance(layer, _slab_classes()):
            layer.narrow(sources, [(whole, None), (short, last)])
        else:
            layer.reorder_cache(everything)


def _append_states(before: Any, layer: Any, rows: Tensor) -> None:
    layer.reorder_cache(rows)
    if before is None:
        return
    for name in ("conv_states", "recurrent_states"):
        own, others = getattr(layer, name), getattr(before, name)
        for number, state in own.items():
            if state is not None:
                own[number] = torch.cat([others[number], state])


@functools.cache
def _slab_classes() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicLayer  # importing sysdag must not import transformers

    class Slabs(DynamicLayer):
        """Keys and values (rows, heads, tokens, width) as views of slabs with room for more tokens."""

        keys: Tensor
        values: Tensor

        def fill(self, before: Any, layer: Any, entering: Entering) -> None:
            """Takes over the rows of the layer before, if any, and the entering ones of a layer that read prompts."""
            kept = 0 if before is None else len(before.keys)
            rows, columns = kept + len(entering.rows), entering.columns
            self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.device, True
            self.slabs = []
            for name in ("keys", "values"):
                part = getattr(layer, name)
                slab = part.new_empty(rows, part.shape[1], columns + ROOM, part.shape[3])
                if before is not None:
                    old = getattr(before, name)
                    there = min(old.shape[-2], columns)
                    slab[:kept, :, : columns - there].zero_()
                    slab[:kept, :, columns - there : columns] = old[:, :, old.shape[-2] - there :]
                    setattr(before, name, None)
                _enter(slab[kept:, :, :columns], part, entering)
                self.slabs.append(slab)
                setattr(layer, name, None)
            if before is not None:
                before.slabs = []
            self._show(rows, columns)

        def _show(self, rows: int, tokens: int) -> None:
            self.keys, self.values = (slab[:rows, :, :tokens] for slab in self.slabs)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            rows, _, start, _ = self.keys.shape
            end = start + key_states.shape[-2]
            for i, (seen, new) in enumerate([(self.keys, key_states), (self.values, value_states)]):
                if end > self.slabs[i].shape[-2]:
                    self.slabs[i] = seen.new_empty(rows, seen.shape[1], end + ROOM, seen.shape[3])
                    self.slabs[i][:, :, :start] = seen
                self.slabs[i][:rows, :, start:end] = new
            self._show(rows, end)
            return self._seen(key_states.shape[-2])

        def _seen(self, queries: int) -> tuple[Tensor, Tensor]:
            return self.keys, self.values

        def narrow(self, sources: Sequence[int], moves: Sequence[tuple[list[int], int | None]]) -> None:
            tokens = self.keys.shape[-2]
            for part in (self.keys, self.values):
                written = []
                for places, last in moves:
                    shown = part if last is None else part[:, :, tokens - min(last, tokens) :]
                    from_ = torch.tensor([sources[place] for place in places], device=part.device, dtype=torch.long)
                    written.append((shown, places, shown.index_select(0, from_)))
                for shown, places, rows in written:
                    if places:
                        shown.index_copy_(0, torch.tensor(places, device=part.device), rows)
            self._show(len(sources), tokens)

    class SlidingSlabs(Slabs):
        """Of a sliding window: everything is kept, the last columns are seen."""

        is_sliding = True

        def __init__(self, sliding_window: int) -> None:
            super().__init__()
            self.sliding_window = sliding_window

        def _seen(self, queries: int) -> tuple[Tensor, Tensor]:
            first = max(0, self.keys.shape[-2] - queries - self.sliding_window + 1)
            return self.keys[:, :, first:], self.values[:, :, first:]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            tokens = self.keys.shape[-2]
            offset = max(0, tokens - self.sliding_window + 1)
            return tokens - offset + query_length, offset

        def get_max_length(self) -> int:
            return self.sliding_window

    return Slabs, SlidingSlabs


def _enter(slab: Tensor, read: Tensor, entering: Entering) -> None:
    """Writes rows of `read` (prompts, heads, tokens, width), of which a window may have left the last columns alone."""
    columns, rows, shared = slab.shape[-2], entering.rows, entering.shared
    after = read.shape[-2] - shared
    source = read if torch.equal(rows.cpu(), torch.arange(len(read))) else read.index_select(0, rows.to(read.device))
    slab[:, :, : columns - after].zero_()
    slab[:, :, columns - after :] = source[:, :, shared:]
    if not shared:
        return
    lengths = torch.tensor(entering.lengths)[rows.cpu()]
    for length in lengths.unique().tolist():  # equal ones stand together
        places = (lengths == length).nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1]) + 1
        slab[first:last, :, columns - length : columns - length + shared] = source[first:last, :, :shared]
