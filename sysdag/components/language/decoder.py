"""How a model extends rows of tokens: with padding and a cache, with a cache alone, or from whole sequences.

Left padding must not reach a model's states and positions, and a cache must follow rows that change places. Configs do
not tell whether a model sees to that, so each is asked once: a few tokens, decoded, against plain forwards of the same
tokens without cache or padding. The fastest way that agrees is taken:

1. left-padded rows and a cache that rows leave and enter, which nearly all transformers serve; what prompts begin with
   is read once;
2. the same in batches that no row enters: caches of a kind of their own;
3. a cache for each length of prompt: recurrent models that take no mask, positions that count padding;
4. whole sequences again for each token: models without a cache, or with one inside their modules.

None agrees where a token's logits depend on the tokens behind it: such a model is no causal language model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sysdag.components.language.cached_decoder import CachedDecoder
from sysdag.components.language.language_head import argument_names, inner_model
from sysdag.components.language.probe import forwards, probing, token_ids
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)


@runtime_checkable
class Decoder(Protocol):
    """Rows of tokens that grow by one token a call.

    Attributes:
        joins: whether prompts may enter while rows are there; known once the first have entered.
    """

    joins: bool

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        """Reads prompts, longest first, and gives each so many rows behind those that are there.

        Returns:
            the logits (P,V) after each prompt.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Puts earlier row `rows[i]` at i; the rows behind are dropped. Cheapest as `arranged` orders them."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Appends a token to each row (R,); the logits after them (R,V)."""


@dataclass(frozen=True, eq=False)
class PromptInputs:
    """What the prompts of a model hold beside text.

    Attributes:
        opening: a prompt that holds such a thing, which probes begin with.
        offset_of: what is added to the positions behind a prompt: an image may take fewer of them than tokens.
    """

    opening: Sequence[int]
    offset_of: Callable[[Sequence[int]], int]


def arranged(rows: Sequence[int]) -> list[int]:
    """Places for rows that are kept, some of them several times, such that few move: place `i` is of `rows[i]`."""
    places = [-1] * len(rows)
    taken = [False] * len(rows)
    for number, row in enumerate(rows):
        if row < len(rows) and not taken[row]:
            places[number], taken[row] = row, True
    free = (place for place, used in enumerate(taken) if not used)
    return [next(free) if place < 0 else place for place in places]


class ByLength:
    """A decoder for the prompts of each length, so that none has padding."""

    joins = False

    def __init__(self, make: Callable[[], Decoder]) -> None:
        self._make = make
        self._decoders: list[Decoder] = []
        self._rows: list[tuple[int, int]] = []  # the decoder of each row, and its place there

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        lengths = list(map(len, prompts))
        found = []
        for length in dict.fromkeys(lengths):
            which = [number for number, each in enumerate(lengths) if each == length]
            counts = [repeats[number] for number in which]
            self._decoders.append(self._make())
            found.append(self._decoders[-1].enter([prompts[number] for number in which], counts))
            self._rows += [(len(self._decoders) - 1, place) for place in range(sum(counts))]
        return torch.cat(found)  # longest first, so in the order of the prompts

    def keep(self, rows: Sequence[int]) -> None:
        kept = [self._rows[row] for row in rows]
        self._rows = [(-1, -1)] * len(kept)
        if not kept:
            self._decoders = []
        for number, decoder in enumerate(self._decoders):
            which = [place for place, (owner, _) in enumerate(kept) if owner == number]
            sources = [kept[place][1] for place in which]
            places = arranged(sources)
            decoder.keep([source for _, source in sorted(zip(places, sources, strict=True))])
            for place, there in zip(which, places, strict=True):
                self._rows[place] = (number, there)

    def extend(self, tokens: Tensor) -> Tensor:
        found = None
        for number, decoder in enumerate(self._decoders):
            which = [place for place, (owner, _) in enumerate(self._rows) if owner == number]
            if not which:
                continue
            places = torch.tensor([self._rows[place][1] for place in which], device=tokens.device)
            index = torch.tensor(which, device=tokens.device)
            logits = decoder.extend(torch.empty_like(tokens[index]).index_copy(0, places, tokens[index]))
            if found is None:
                found = logits.new_empty(len(tokens), logits.shape[-1])
            found[index] = logits[places]
        assert found is not None
        return found


class UncachedDecoder:
    """Computes whole sequences of one length again for each token."""

    joins = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in argument_names(model) else {}

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(prompt) for prompt in prompts], device=next(self._model.parameters()).device)
        self._ids = ids.repeat_interleave(torch.tensor(repeats, device=ids.device), 0)
        return self._logits(ids)

    def keep(self, rows: Sequence[int]) -> None:
        self._ids = self._ids[torch.tensor(rows, device=self._ids.device, dtype=torch.long)]

    def extend(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        return self._logits(self._ids)

    def _logits(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids, use_cache=False, **self._options).logits[:, -1].to(ids.device)


def _whole(model: nn.Module) -> Decoder:
    return ByLength(partial(UncachedDecoder, model))


_WHOLE = "whole sequences for each token, which takes longer"
_BATCHES = "batches that no prompt enters before they end"
_WAYS: dict[str, Callable[..., Decoder]] = {
    "": CachedDecoder,
    _BATCHES: lambda model, offset_of=None, **_: CachedDecoder(model, joins=False, offset_of=offset_of),
    "a batch for each length of prompt": lambda model, **_: ByLength(
        partial(CachedDecoder, model, pass_positions=False, joins=False)
    ),
    _WHOLE: lambda model, **_: _whole(model),
}
_chosen: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module, inputs: PromptInputs | None = None) -> Decoder:
    """The decoder that gives the model's own logits; found out on the first call for a model.

    Args:
        inputs: what its prompts hold beside text.

    Raises:
        PlanError: for a model that none serves: its logits depend on tokens behind them.
    """
    inner = _innermost(model)
    if inner not in _chosen:
        config = getattr(inner, "config", None)
        ids = [] if config is None else token_ids(config.get_text_config(decoder=True), 22)
        chosen = None if config is None else _choose(model, ids, inputs)
        if chosen is None:  # no model of transformers, or weights that are not finite: nothing can be told
            return CachedDecoder(model, joins=False)
        _chosen[inner] = chosen
    return _WAYS[_chosen[inner]](model, offset_of=None if inputs is None else inputs.offset_of)


def _choose(model: nn.Module, ids: list[int], inputs: PromptInputs | None = None) -> str | None:
    tokens = _Tokens(model, ids, () if inputs is None else inputs.opening)
    offset_of = None if inputs is None else inputs.offset_of
    with probing(model, lambda: tokens.decoded(_whole(model)), tokens.alone) as wanted:
        if wanted is None:
            return None
        if wanted.looks_ahead:
            raise PlanError(
                f"{_name(model)} cannot be sampled or searched: its logits after a prompt are not those that it gives "
                f"when more tokens follow ({wanted.looks_ahead}), so it is no causal language model as it is. Some are "
                "with is_decoder=True in their config."
            )
        reason = ""
        for way, make in _WAYS.items():
            made: list[Decoder] = []

            def tried(make: Callable[..., Decoder] = make, made: list[Decoder] = made) -> Tensor:
                made.append(make(model, least_shared=1, offset_of=offset_of))
                return tokens.decoded(made[0])

            complaint = "" if way == _WHOLE else wanted.complaint(tried)
            if not way and not complaint and not made[0].joins:
                complaint = "its cache takes no rows in"
            if not complaint:
                if way:
                    logger.warning("%s decodes %s: %s.", _name(model), way, reason.rstrip("."))
                return way
            reason = complaint
    raise AssertionError("whole sequences always serve")


class _Tokens:
    """Two prompts of different lengths, each continued in two ways, whose rows change places; then one prompt ends.

    Two more prompts enter, which begin as those did, or where none may are read after all.
    """

    def __init__(self, model: nn.Module, ids: list[int], opening: Sequence[int] = ()) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.prompts = [[*opening, *ids[:7]], [*opening, *ids[:2], *ids[7:9]]]
        self.steps = [(ids[10:14], [0, 1, 2, 3]), (ids[14:18], [1, 1, 3, 2]), (ids[18:20], [3, 2])]
        self.later = [[*opening, *ids[:1], *ids[3:8]], [*ids[:2], ids[19]]]
        self.last = ids[18:22]

    def histories(self) -> list[list[int]]:
        """The sequences whose last logits are asked for, in the order of `decoded`."""
        found, rows = list(self.prompts), [prompt for prompt in self.prompts for _ in range(2)]
        for tokens, parents in self.steps:
            rows = [[*rows[parent], token] for token, parent in zip(tokens, parents, strict=True)]
            found += rows
        rows += self.later
        return [*found, *self.later, *([*row, token] for row, token in zip(rows, self.last, strict=True))]

    def alone(self) -> Tensor:
        """Their logits by plain forwards without padding; what begins a longer one is read there."""
        histories = self.histories()
        longest = [ids for ids in histories if not any(one[: len(ids)] == ids != one for one in histories)]
        logits = {}
        for ids, found in forwards(self.model, longest).items():
            logits.update({ids[: end + 1]: found[end] for end in range(len(ids))})
        return torch.stack([logits[tuple(ids)] for ids in histories])

    def decoded(self, decoder: Decoder) -> Tensor:
        tensor = partial(torch.tensor, device=self.device)
        found = [decoder.enter(self.prompts, [2, 2])]
        for tokens, parents in self.steps:
            decoder.keep(parents)
            found.append(decoder.extend(tensor(tokens)))
        if decoder.joins:
            found += [decoder.enter(self.later, [1, 1]), decoder.extend(tensor(self.last))]
        else:
            first = decoder.extend(tensor(self.last[:2]))
            decoder.keep([])
            found += [decoder.enter(self.later, [1, 1]), first, decoder.extend(tensor(self.last[2:]))]
        return torch.cat(found)


def _innermost(model: Any) -> Any:
    """The model of transformers under the wrappers of peft, DDP and torch.compile."""
    inner = inner_model(model)
    wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return inner if wrapped is None or not isinstance(wrapped, nn.Module) else _innermost(wrapped)


def _name(model: Any) -> str:
    return type(_innermost(model)).__name__
