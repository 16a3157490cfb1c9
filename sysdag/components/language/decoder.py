"""How a model extends rows of tokens: with padding and a cache, with a cache alone, or from whole sequences.

Left padding must not reach a model's states and positions, and a cache must follow rows that change places. Configs do
not tell whether a model sees to that, so each is asked once: a few tokens, decoded, against plain forwards of the same
tokens without cache or padding. The fastest way that agrees is taken:

1. left-padded rows and a cache, which nearly all transformers serve;
2. a cache for each length of prompt: recurrent models that take no mask, positions that count padding;
3. whole sequences again for each token: models without a cache, or with one inside their modules.

None agrees where a token's logits depend on the tokens behind it: such a model is no causal language model.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sysdag.components.language.cached_decoder import CachedDecoder
from sysdag.components.language.language_head import argument_names, inner_model
from sysdag.components.language.probe import forwards, probing, token_ids
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """Rows of tokens that grow by one token a call."""

    def start(self, input_ids: Tensor, mask: Tensor, beams: int) -> Tensor:
        """Reads left-padded prompts (B,P), then gives each `beams` rows; the logits after them (B,V)."""

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Appends each of the tokens (B,N) to a row of the call before, `rows` (B,N); returns logits (B,N,V).

        Prompts may be left out, in order. The rows of one prompt stand together and number N.
        """


class ByLength:
    """A decoder for the prompts of each length, so that none has padding."""

    def __init__(self, make: Callable[[], Decoder]) -> None:
        self._make = make
        self._decoders: list[Decoder] = []

    def start(self, input_ids: Tensor, mask: Tensor, beams: int) -> Tensor:
        lengths = mask.sum(-1)
        found: list[tuple[Tensor, Tensor]] = []
        device = input_ids.device
        self._owner = torch.zeros(len(input_ids), dtype=torch.long, device=device)
        self._place = torch.zeros_like(self._owner)
        for number, length in enumerate(lengths.unique().tolist()):
            which = (lengths == length).nonzero()[:, 0]
            self._owner[which], self._place[which] = number, torch.arange(len(which), device=device)
            self._decoders.append(self._make())
            ids = input_ids[which, input_ids.shape[1] - length :]
            found.append((which, self._decoders[-1].start(ids, torch.ones_like(ids), beams)))
        self._owner = self._owner.repeat_interleave(beams)
        self._place = (self._place[:, None] * beams + torch.arange(beams, device=device)).flatten()
        return _joined(found, len(input_ids))

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        owner, place = self._owner[rows.flatten()], self._place[rows.flatten()]
        self._owner, self._place = owner, torch.empty_like(place)
        found = []
        for number in owner.unique().tolist():
            which = (owner == number).nonzero()[:, 0]
            self._place[which] = torch.arange(len(which), device=which.device)
            shape = (-1, tokens.shape[1])
            logits = self._decoders[number].extend(tokens.flatten()[which].view(shape), place[which].view(shape))
            found.append((which, logits.flatten(0, 1)))
        return _joined(found, len(owner)).unflatten(0, tokens.shape)


def _joined(parts: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    logits = parts[0][1].new_empty(count, parts[0][1].shape[-1])
    for which, part in parts:
        logits[which] = part
    return logits


class UncachedDecoder:
    """Computes whole sequences of one length again for each token."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in argument_names(model) else {}

    def start(self, input_ids: Tensor, mask: Tensor, beams: int) -> Tensor:
        self._ids = input_ids.repeat_interleave(beams, 0)
        return self._logits(input_ids)

    def extend(self, tokens: Tensor, rows: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids[rows.flatten()], tokens.reshape(-1, 1)], dim=1)
        return self._logits(self._ids).unflatten(0, tokens.shape)

    def _logits(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids, use_cache=False, **self._options).logits[:, -1].to(ids.device)


def _whole(model: nn.Module) -> Decoder:
    return ByLength(partial(UncachedDecoder, model))


_WHOLE = "whole sequences for each token, which takes longer"
_WAYS: dict[str, Callable[[nn.Module], Decoder]] = {
    "": CachedDecoder,
    "a batch for each length of prompt": lambda model: ByLength(partial(CachedDecoder, model, pass_positions=False)),
    _WHOLE: _whole,
}
_chosen: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder that gives the model's own logits; found out on the first call for a model.

    Raises:
        PlanError: for a model that none serves: its logits depend on tokens behind them.
    """
    inner = _innermost(model)
    if inner not in _chosen:
        config = getattr(inner, "config", None)
        chosen = None if config is None else _choose(model, token_ids(config.get_text_config(decoder=True), 22))
        if chosen is None:  # no model of transformers, or weights that are not finite: nothing can be told
            return CachedDecoder(model)
        _chosen[inner] = chosen
    return _WAYS[_chosen[inner]](model)


def _choose(model: nn.Module, ids: list[int]) -> str | None:
    tokens = _Tokens(model, ids)
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
            complaint = "" if way == _WHOLE else wanted.complaint(lambda: tokens.decoded(make(model)))  # noqa: B023
            if not complaint:
                if way:
                    logger.warning("%s decodes %s: %s.", _name(model), way, reason.rstrip("."))
                return way
            reason = complaint
    raise AssertionError("whole sequences always serve")


class _Tokens:
    """Two prompts of different lengths, each continued in two ways, whose rows change places; then one prompt ends."""

    def __init__(self, model: nn.Module, ids: list[int]) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.prompts = [ids[:7], ids[7:10]]
        self.steps = [
            (ids[10:14], [0, 1, 2, 3]),
            (ids[14:18], [1, 1, 3, 2]),
            (ids[18:20], [3, 2]),
            (ids[20:22], [1, 0]),
        ]

    def histories(self) -> list[list[int]]:
        """The sequences whose last logits are asked for, in the order of `decoded`."""
        found, rows = list(self.prompts), [prompt for prompt in self.prompts for _ in range(2)]
        for tokens, parents in self.steps:
            rows = [[*rows[parent], token] for token, parent in zip(tokens, parents, strict=True)]
            found += rows
        return found

    def alone(self) -> Tensor:
        """Their logits by plain forwards without padding; what begins a longer one is read there."""
        histories = self.histories()
        longest = [ids for ids in histories if not any(one[: len(ids)] == ids != one for one in histories)]
        logits = {}
        for ids, found in forwards(self.model, longest).items():
            logits.update({ids[: end + 1]: found[end] for end in range(len(ids))})
        return torch.stack([logits[tuple(ids)] for ids in histories])

    def decoded(self, decoder: Decoder) -> Tensor:
        width = max(map(len, self.prompts))
        ids = [[0] * (width - len(prompt)) + prompt for prompt in self.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        tensor = partial(torch.tensor, device=self.device)
        found = [decoder.start(tensor(ids), tensor(mask), 2)]
        for tokens, parents in self.steps:
            found.append(decoder.extend(tensor(tokens).view(-1, 2), tensor(parents).view(-1, 2)).flatten(0, 1))
        return torch.cat(found)


def _innermost(model: Any) -> Any:
    """The model of transformers under the wrappers of peft, DDP and torch.compile."""
    inner = inner_model(model)
    wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    return inner if wrapped is None or not isinstance(wrapped, nn.Module) else _innermost(wrapped)


def _name(model: Any) -> str:
    return type(_innermost(model)).__name__
