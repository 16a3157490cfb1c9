"""Log-probabilities of targets given sources, by teacher forcing: one forward of the model for a batch of pairs.

Each source is encoded once, whatever targets follow it: the model is called with the sources, a hook gives each target
its own source's hidden states, and backward sums the gradients. The head is applied to the rows that predict a token
alone: what enters the output embedding is taken by another hook (behind T5's `d_model**-0.5`, before BART's
`final_logits_bias`), and whether the logits are the embedding applied to that is checked on the first batch. So the
model is called as ever, and hooks on its forward run.

Whether padding leaves a model's scores as they are is asked once, too; else pairs of one shape go together.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sysdag.components.language.encoder_decoder.generation_rules import GenerationRules
from sysdag.components.language.encoder_decoder.source_rows import (
    check_causal,
    pad_of,
    padded,
    plain_logits,
    source_ids,
    target_ids,
)
from sysdag.components.language.language_head import (
    LinearHead,
    TokenScorer,
    captured_before,
    inner_model,
    output_embedding,
    say_full_logits,
    typical,
)
from sysdag.components.language.probe import RAISED, probing
from sysdag.components.language.token_trie import Ids

logger = logging.getLogger(__name__)
_AT_ONCE = 2**21  # logits under rules that are held at once: a tile of the head's, as where nothing is forbidden


class TargetScorer:
    """Scores (source, target) pairs of token ids with one model.

    Args:
        model: an encoder-decoder of transformers, perhaps inside a PeftModel.
        rules: what its generation config allows to be written.
        is_checked: see `TokenScorer`.
    """

    def __init__(self, model: Any, rules: GenerationRules, *, is_checked: bool = False) -> None:
        self.model, self.rules = model, rules
        self._tokens = _DecoderTokens(model, is_checked=is_checked)
        self._pads: bool | None = True if is_checked else None

    def fits(self, model: Any, rules: GenerationRules) -> bool:
        """Whether this was made for the model as it is now."""
        return self.rules == rules and self._tokens.fits(model)

    def __call__(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        masks: Sequence[Ids | None],
        *,
        weights: tuple[Sequence[int], float] | None = None,
        typicality: bool = False,
    ) -> Float[Tensor, " n"]:
        """Sum of the natural log-probabilities of each target's tokens, given its source, under the rules.

        One forward; for a model that padding changes, one for each shape.

        Args:
            pairs: sources and targets.
            masks: for each target 1 for a token that is scored and 0 for one that is only read; None scores all.
            weights: for each target how many of its scored tokens count whole, and what those behind them weigh.
            typicality: sums log p - log sum p^2 of the tokens instead, without gradient.
        """
        parts, order = [], []
        for group in self._together(pairs):
            some = None if weights is None else ([weights[0][number] for number in group], weights[1])
            of_group = [pairs[number] for number in group], [masks[number] for number in group]
            parts.append(self._scored(*of_group, some, typicality))
            order += group
        back = torch.tensor(order).argsort().to(parts[0].device)
        return torch.cat(parts)[back]

    def _scored(
        self,
        pairs: Sequence[tuple[Ids, Ids]],
        masks: Sequence[Ids | None],
        weights: tuple[Sequence[int], float] | None,
        typicality: bool,
    ) -> Float[Tensor, " n"]:
        device = next(self.model.parameters()).device
        inputs = model_inputs(self.model, pairs, self.rules.start, device)
        width = inputs["decoder_input_ids"].shape[1]
        heads, tail = ([len(target) for _, target in pairs], 1.0) if weights is None else weights
        rows: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        parts: list[float] = []
        forbidden: dict[int, list[int]] = {}
        for number, ((source, target), mask) in enumerate(zip(pairs, masks, strict=True)):
            seen = 0
            along = self.rules.along(source, target)
            for place, (token, no) in enumerate(zip(target, along, strict=True)):
                if mask is not None and not mask[place]:
                    continue
                seen += 1
                if self.rules.forced(place) is not None:
                    continue  # of probability 1
                if no:
                    forbidden[len(labels)] = list(no)
                rows.append(number * width + place)
                labels.append(token)
                owners.append(number)
                parts.append(1.0 if seen <= heads[number] else tail)
        on_host = torch.tensor(rows, dtype=torch.long), torch.tensor(labels, dtype=torch.long)
        found = self._tokens.under_rules(inputs, *on_host, forbidden, typicality=typicality)
        found = found * torch.tensor(parts).to(found)
        return found.new_zeros(len(pairs)).index_add(
            0, torch.tensor(owners, dtype=torch.long, device=found.device), found
        )

    def groups(self, pairs: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[list[int]]:
        """Groups of pairs for which one call computes at most `max_tokens` positions, padding included.

        Those of one source come together, and it counts once. A pair that is longer is a group of its own.
        """
        order = sorted(range(len(pairs)), key=lambda pair: (len(pairs[pair][0]), tuple(pairs[pair][0]), pair))
        found: list[list[int]] = []
        sources: set[tuple[int, ...]] = set()
        longest = 0
        for number in order:
            source, target = tuple(pairs[number][0]), pairs[number][1]
            among, wide = sources | {source}, max(longest, len(target))
            size = len(among) * max(map(len, among)) + wide * (len(found[-1]) + 1 if found else 1)
            if not found or size > max_tokens:
                found.append([])
                among, wide = {source}, len(target)
            found[-1].append(number)
            sources, longest = among, wide
        return found

    def _together(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[list[int]]:
        """The numbers of the pairs that one forward takes."""
        if self._pads is None:
            self._pads = _padding_is_honoured(self.model, self.rules.start)
        if self._pads is not False:
            return [list(range(len(pairs)))]
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, (source, target) in enumerate(pairs):
            shapes.setdefault((len(source), len(target)), []).append(number)
        return list(shapes.values())


def model_inputs(model: Any, pairs: Sequence[tuple[Ids, Ids]], start: int, device: torch.device) -> dict[str, Any]:
    """The arguments of the model's forward, and under `sources` which of the distinct ones is each target's."""
    numbers: dict[tuple[int, ...], int] = {}
    sources = [numbers.setdefault(tuple(source), len(numbers)) for source, _ in pairs]
    pad = pad_of(model)
    ids, mask = padded([list(source) for source in numbers], pad, device)
    targets, _ = padded([[start, *target[:-1]] for _, target in pairs], pad, device)
    return {
        "input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets,
        "sources": torch.tensor(sources, device=device),
    }  # fmt: skip


@contextlib.contextmanager
def _read_once(encoder: nn.Module, mask: Tensor, sources: Tensor) -> Iterator[None]:
    """Has the encoder read each source once, with its own mask, and gives each target the states of its own."""

    def before(module: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        return arguments, {**options, "attention_mask": mask}

    def after(module: nn.Module, arguments: Any, returned: Any) -> Any:
        if isinstance(returned, tuple):
            return (returned[0][sources], *returned[1:])
        returned["last_hidden_state"] = returned.last_hidden_state[sources]
        return returned

    handles = encoder.register_forward_pre_hook(before, with_kwargs=True), encoder.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _DecoderTokens(TokenScorer):
    """Scores the tokens of targets."""

    def _heads(self) -> list[LinearHead]:
        linear = output_embedding(self.model)
        if type(linear) is not nn.Linear:
            say_full_logits(self.model, f"its output embedding is a {type(linear).__name__}, not a plain nn.Linear")
            return []
        inner = inner_model(self.model)
        bias = getattr(inner, "final_logits_bias", None)
        softcap = getattr(getattr(inner.config, "decoder", inner.config), "final_logit_softcapping", None)
        return [LinearHead(linear, linear, 1.0, softcap, None if bias is None else bias[0])]

    def _forward(self, inputs: Mapping[str, Any]) -> Any:
        options = {name: value for name, value in inputs.items() if name != "sources"}
        mask, sources = inputs["attention_mask"], inputs["sources"]
        options["attention_mask"] = mask[sources]
        with _read_once(inner_model(self.model).get_encoder(), mask, sources):
            return self.model(**options, use_cache=False)

    def _hidden(self, inputs: Mapping[str, Any]) -> Any:
        ids = inputs["decoder_input_ids"]
        try:
            with captured_before(self._candidates[0].linear) as output:
                last = self._forward(inputs).logits
        except RAISED as error:
            if self._checked or isinstance(error, torch.OutOfMemoryError):
                raise
            say_full_logits(self.model, f"its head does not take the last position alone ({error!s:.200})")
            self._candidates, self._checked = [], True
            return None
        hidden = output.hidden
        if not self._checked:
            if not last.isfinite().all():  # this tells nothing of the head
                return None
            fits = hidden is not None and hidden.shape[:2] == ids.shape and last.shape[:2] == (len(ids), 1)
            if not self._settled(output, last, fits=fits):
                return None
        return output

    def under_rules(
        self,
        inputs: Mapping[str, Any],
        rows: Int[Tensor, " M"],
        labels: Int[Tensor, " M"],
        forbidden: Mapping[int, Sequence[int]],
        *,
        typicality: bool,
    ) -> Float[Tensor, " M"]:
        """As `TokenScorer`, where some tokens may not stand: `forbidden` has them by the number of the label."""
        if not forbidden:
            return self.typicality(inputs, rows, labels) if typicality else self(inputs, rows, labels)
        rows, labels = (each.to(inputs["input_ids"].device) for each in (rows, labels))
        output = self._hidden(inputs) if self._candidates else None
        if output is None or output.hidden is None:
            whole, head, autocast = self._forward(inputs).logits.flatten(0, 1), None, None
        else:
            whole, head, autocast = output.hidden.flatten(0, 1), self._candidates[0], output.autocast

        def scored(hidden: Tensor, targets: Tensor, no: Tensor) -> Tensor:
            with torch.autocast(targets.device.type, dtype=autocast, enabled=autocast is not None):
                logits = hidden if head is None else head.logits(hidden.to(head.linear.weight.dtype))
            logits = logits.float().masked_fill(no, -torch.inf)
            if typicality:
                return typical(logits, targets)
            return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

        vocabulary = whole.shape[-1] if head is None else head.linear.out_features
        size, found = max(1, _AT_ONCE // vocabulary), []
        for start in range(0, len(labels), size):
            some = slice(start, start + size)
            no = torch.zeros(len(labels[some]), vocabulary, dtype=torch.bool, device=labels.device)
            for place in range(start, start + len(no)):
                if place in forbidden:
                    no[place - start, list(forbidden[place])] = True
            found.append(checkpoint(scored, whole[rows[some]], labels[some], no, use_reentrant=False))
        return torch.cat(found)


_probed: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _padding_is_honoured(model: Any, start: int) -> bool | None:
    """Whether pairs of different lengths may stand side by side; None where weights that are not finite tell nothing.

    Raises:
        PlanError: for a model whose decoder attends to the tokens behind.
    """
    inner = inner_model(model)
    if inner not in _probed:
        a, b, c, d, e, f = source_ids(model, 6)
        t, u, v, w = target_ids(model, 4)
        pairs = [([a, b, c, d, e], [t, u, v]), ([f, b], [w]), ([a, b, c, d, e], [u, w])]
        inputs = [(source, [start, *target]) for source, target in pairs]

        def alone() -> Tensor:
            parts = [
                plain_logits(model, source, target[:end])[-1]
                for source, target in inputs for end in range(1, len(target) + 1)
            ]  # fmt: skip
            return torch.stack(parts)

        def whole() -> Tensor:
            return torch.cat([plain_logits(model, source, target) for source, target in inputs])

        def together() -> Tensor:
            device = next(model.parameters()).device
            made = model_inputs(model, [(source, [*target, t]) for source, target in pairs], start, device)
            logits = _DecoderTokens(model)._forward(made).logits
            return torch.cat([row[: len(target)] for row, (_, target) in zip(logits, inputs, strict=True)])

        with probing(model, alone, whole) as wanted:
            if wanted is None:
                return None
            check_causal(model, wanted.looks_ahead)
            complaint = wanted.complaint(together)
        if complaint:
            logger.warning("%s is scored in rows of one shape: %s.", type(inner).__name__, complaint.rstrip("."))
        _probed[inner] = not complaint
    return _probed[inner]
