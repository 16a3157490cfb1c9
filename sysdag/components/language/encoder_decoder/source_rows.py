"""How an encoder-decoder extends rows of tokens: the source read once, the decoder by a token a call.

The rows of a batch begin with the same start token and grow together, so they have one length and no padding, whatever
positions a decoder counts. A source is encoded once, and its first step computed once, for all its rows; keys and
values of cross-attention stay as they are until rows of other sources change places.

What padding does to an encoder, and whether a cache follows its rows, configs do not tell: as for causal models (see
`sysdag.components.language.decoder`) each model is asked once, against its plain forward, and the fastest way that
agrees is taken: padded sources and a cache; a batch for each length of source; whole targets again for each token.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.language import key_value_slabs
from sysdag.components.language.decoder import ByLength, Decoder
from sysdag.components.language.encoder_decoder.generation_rules import GenerationRules, Ngrams
from sysdag.components.language.key_value_slabs import Entering
from sysdag.components.language.language_head import argument_names, inner_model
from sysdag.components.language.model_cache import argument_of, cache_of
from sysdag.components.language.probe import probing, token_ids
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)


def padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) padded on the right, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def pad_of(model: Any) -> int:
    """What fills the sources of a batch; any token does where the model's config names none."""
    pad = getattr(inner_model(model).config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


class SourceRows:
    """Rows of one encoder-decoder with their cache; a `Decoder` whose prompts are sources.

    Args:
        model: of transformers.
        start: the decoder's first token.
    """

    joins = False

    def __init__(self, model: nn.Module, start: int) -> None:
        self.model, self.start = model, start
        self._device = next(model.parameters()).device
        self._name = argument_of(argument_names(model)) or "past_key_values"
        self._clear()

    def _clear(self) -> None:
        self._owners: list[int] = []
        self._cache: Any = None
        self._read: tuple[Tensor, Tensor] | None = None  # hidden states of the sources of the rows, and their mask

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        """See `sysdag.components.language.decoder.Decoder`."""
        ids, mask = padded(prompts, pad_of(self.model), self._device)
        encoder: Any = inner_model(self.model).get_encoder()
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        self._read = hidden, mask
        logits = self._logits(torch.full((len(prompts), 1), self.start, device=self._device))
        self._owners = [number for number, count in enumerate(repeats) for _ in range(count)]
        index = torch.tensor(self._owners, device=self._device)
        self._read = hidden[index], mask[index]
        own = self._cache.self_attention_cache
        if key_value_slabs.takes_rows_in(own):
            key_value_slabs.merged(None, own, Entering(index.cpu(), [1] * len(prompts), 0, 1))
        else:
            own.reorder_cache(index)
        self._cache.cross_attention_cache.reorder_cache(index)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """See `sysdag.components.language.decoder.Decoder`."""
        if not rows:
            self._clear()
        elif list(rows) != list(range(len(self._owners))):
            index, owners = torch.tensor(rows, device=self._device), [self._owners[row] for row in rows]
            assert self._read is not None
            if owners != self._owners:
                self._read = self._read[0][index], self._read[1][index]
                self._cache.cross_attention_cache.reorder_cache(index)
            key_value_slabs.keep(self._cache.self_attention_cache, rows, [None] * len(rows))
            self._owners = owners

    def extend(self, tokens: Tensor) -> Tensor:
        """See `sysdag.components.language.decoder.Decoder`."""
        return self._logits(tokens[:, None])

    def _logits(self, targets: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        assert self._read is not None
        options = {} if self._cache is None else {self._name: self._cache}
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._read[0]), attention_mask=self._read[1],
            decoder_input_ids=targets, use_cache=True, **options,
        )  # fmt: skip
        self._cache = cache_of(output)
        if not hasattr(self._cache, "cross_attention_cache"):
            raise TypeError(f"its cache is a {type(self._cache).__name__}, not one of an encoder and a decoder")
        return output.logits[:, -1]


class WholeRows:
    """Rows of sources of one length, both computed again for each token by the model's plain forward."""

    joins = False

    def __init__(self, model: nn.Module, start: int) -> None:
        self.model, self.start = model, start

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        device = next(self.model.parameters()).device
        index = torch.tensor(repeats, device=device)
        sources = torch.tensor([list(prompt) for prompt in prompts], device=device)
        self._sources, self._targets = sources, torch.full((len(prompts), 1), self.start, device=device)
        logits = self._logits()
        self._sources, self._targets = (each.repeat_interleave(index, 0) for each in (sources, self._targets))
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self._sources.device, dtype=torch.long)
        self._sources, self._targets = self._sources[index], self._targets[index]

    def extend(self, tokens: Tensor) -> Tensor:
        self._targets = torch.cat([self._targets, tokens[:, None]], dim=1)
        return self._logits()

    def _logits(self) -> Tensor:
        return self.model(
            input_ids=self._sources, decoder_input_ids=self._targets, use_cache=False
        ).logits[:, -1]  # fmt: skip


class RuledRows:
    """Rows whose logits are minus infinity where a generation config forbids a token."""

    joins = False

    def __init__(self, rows: Decoder, rules: GenerationRules) -> None:
        self.rows, self.rules = rows, rules
        self._written: list[tuple[Ngrams, list[int]]] = []  # of the source of each row, and its new tokens

    def enter(self, prompts: Sequence[Sequence[int]], repeats: Sequence[int]) -> Tensor:
        logits = self.rows.enter(prompts, repeats)
        sources = [self.rules.of_source(prompt) for prompt in prompts]
        self._written = [(source, []) for source, count in zip(sources, repeats, strict=True) for _ in range(count)]
        return self._ruled(logits, [(source, []) for source in sources])

    def keep(self, rows: Sequence[int]) -> None:
        self.rows.keep(rows)
        self._written = [self._written[row] for row in rows]

    def extend(self, tokens: Tensor) -> Tensor:
        self._written = [
            (source, [*target, token]) for (source, target), token in zip(self._written, tokens.tolist(), strict=True)
        ]
        return self._ruled(self.rows.extend(tokens), self._written)

    def _ruled(self, logits: Tensor, written: Sequence[tuple[Ngrams, list[int]]]) -> Tensor:
        found = logits.clone()
        for row, (source, target) in enumerate(written):
            forced = self.rules.forced(len(target))
            if forced is not None:
                found[row] = -torch.inf
                found[row, forced] = 0
            elif forbidden := self.rules.forbidden(source, target):
                found[row, list(forbidden)] = -torch.inf
        return found


_WHOLE = "whole targets for each token, which takes longer"
_WAYS: dict[str, Callable[[nn.Module, int], Decoder]] = {
    "": SourceRows,
    "a batch for each length of source": lambda model, start: ByLength(partial(SourceRows, model, start)),
    _WHOLE: lambda model, start: ByLength(partial(WholeRows, model, start)),
}
_chosen: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def rows_of(model: nn.Module, rules: GenerationRules) -> Decoder:
    """The decoder that gives the model's own logits, under the rules; found out on the first call for a model.

    Raises:
        PlanError: for a model whose decoder attends to the tokens behind.
    """
    inner = inner_model(model)
    if inner not in _chosen:
        chosen = _choose(model, rules.start)
        if chosen is None:  # weights that are not finite tell nothing
            return _WAYS[_WHOLE](model, rules.start)
        _chosen[inner] = chosen
    rows = _WAYS[_chosen[inner]](model, rules.start)
    return rows if rules.forbid_nothing else RuledRows(rows, rules)


def _choose(model: nn.Module, start: int) -> str | None:
    tokens = _Tokens(model, start)
    with probing(model, tokens.alone, tokens.whole) as wanted:
        if wanted is None:
            return None
        check_causal(model, wanted.looks_ahead)
        reason = ""
        for way, make in _WAYS.items():
            complaint = "" if way == _WHOLE else wanted.complaint(partial(tokens.tried, make))
            if not complaint:
                if way:
                    logger.warning("%s decodes %s: %s.", type(inner_model(model)).__name__, way, reason.rstrip("."))
                return way
            reason = complaint
    raise AssertionError("whole targets always serve")


def check_causal(model: Any, looks_ahead: str) -> None:
    """Raises a PlanError for a model that two plain computations of the same targets differ for."""
    if looks_ahead:
        raise PlanError(
            f"{type(inner_model(model)).__name__} has no likelihood: the logits of its decoder depend on the tokens "
            f"behind them, or on what is beside a row ({looks_ahead})."
        )


class _Tokens:
    """Two sources of different lengths, each with two targets, whose rows change places."""

    def __init__(self, model: nn.Module, start: int) -> None:
        ids, out = source_ids(model, 12), target_ids(model, 10)
        self.model, self.start = model, start
        self.sources = [ids[:7], ids[7:11]]
        self.steps = [(out[:4], [0, 1, 2, 3]), (out[4:8], [1, 1, 3, 2]), (out[8:10], [3, 2])]

    def histories(self) -> list[tuple[list[int], list[int]]]:
        found = [(source, [self.start]) for source in self.sources]
        rows = [row for row in found for _ in range(2)]
        for tokens, parents in self.steps:
            rows = [(rows[parent][0], [*rows[parent][1], token]) for token, parent in zip(tokens, parents, strict=True)]
            found += rows
        return found

    def alone(self) -> Tensor:
        """Their last logits by plain forwards, each row by itself."""
        return torch.stack([plain_logits(self.model, source, target)[-1] for source, target in self.histories()])

    def whole(self) -> Tensor:
        """The same, read off the targets that go on."""
        histories = self.histories()
        found = []
        for source, target in histories:
            longest = max((long for of, long in histories if of == source and long[: len(target)] == target), key=len)
            found.append(plain_logits(self.model, source, longest)[len(target) - 1])
        return torch.stack(found)

    def tried(self, make: Callable[[nn.Module, int], Decoder]) -> Tensor:
        """The same from rows that a decoder extends."""
        decoder = make(self.model, self.start)
        tensor = partial(torch.tensor, device=next(self.model.parameters()).device)
        found = [decoder.enter(self.sources, [2, 2])]
        for tokens, parents in self.steps:
            decoder.keep(parents)
            found.append(decoder.extend(tensor(tokens)))
        return torch.cat(found)


def source_ids(model: Any, count: int) -> list[int]:
    """Different ordinary tokens of sources."""
    return token_ids(getattr(inner_model(model).config, "encoder", None) or inner_model(model).config, count)


def target_ids(model: Any, count: int) -> list[int]:
    """Different ordinary tokens of targets, whose vocabulary may be another one (Marian)."""
    config = copy.copy(getattr(inner_model(model).config, "decoder", None) or inner_model(model).config)
    config.vocab_size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
    return token_ids(config, count)


def plain_logits(model: Any, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """The logits (T, V) after each of the decoder's tokens, by a plain forward of one row."""
    device = next(model.parameters()).device
    ids = {
        "input_ids": torch.tensor([source], device=device),
        "decoder_input_ids": torch.tensor([target], device=device),
    }
    return model(**ids, use_cache=False).logits[0]
