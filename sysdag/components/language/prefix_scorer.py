"""Log-probabilities of completions from a causal language model, shared prefixes computed once where the model can.

A packed row holds tries (`token_trie`): its attention mask lets a token see its ancestors (`packed_inputs`), its
positions are depths.

A model qualifies by its config and structure: attention that takes such masks, positions that are arguments, nothing
that depends on a token's place in the row or on the row's length. What config cannot tell, a probe does: a few tokens
as tries, and each from nothing but the tokens before it. Models that do not qualify are scored in rows of their own;
where padding on the right changes them, too, in rows of one length. The probe also says whether attention may be
computed piece by piece (`trie_mask`); where it may not, the mask is dense.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.language import token_trie
from sysdag.components.language.language_head import TokenScorer, inner_model
from sysdag.components.language.packed_inputs import config_of, device_of, implementation, model_inputs
from sysdag.components.language.probe import forwards, probing, token_ids
from sysdag.components.language.router_loss import RouterLoss
from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.components.language.token_trie import Ids, TokenTrie
from sysdag.components.language.trie_mask import TrieMask
from sysdag.errors import PlanError

logger = logging.getLogger(__name__)

_MASKABLE = ("eager", "sdpa", "flex_attention")
_LAYERS = ("full_attention", "attention", "sliding_attention", "chunked_attention")
# Options of configs under which attention goes by the place in the row, and what they do.
_BY_PLACE = {
    "attn_temperature_tuning": "scales queries by their place in the row",
    "attention_layers": "masks by the place in the row",
    "index_topk": "attends to a number of keys that it selects",
    "alibi": "biases attention by the distance in the row",
}
_said: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


class PrefixScorer:
    """Scores (prompt, completion) pairs of token ids with one model.

    Args:
        model: a causal language model of transformers, perhaps inside a PeftModel.
        pack_prefixes: False scores each sequence in a row of its own.
        opening: a prompt that holds something beside text, which probes begin with.
    """

    def __init__(self, model: Any, *, pack_prefixes: bool = True, opening: Ids = ()) -> None:
        self.model, self._opening = model, opening
        self._tokens = TokenScorer(model)
        self.router_loss = RouterLoss.of(model)
        self._implementation = implementation(model)
        self._may_pack = pack_prefixes
        self._packs = self._pads = self._by_pieces = False
        self._decided = False
        self._longest = math.inf

    def fits(self, model: Any) -> bool:
        """Whether this was made for the model as it is now."""
        return self._tokens.fits(model) and self._implementation == implementation(model)

    def __call__(
        self,
        sequences: Sequence[tuple[Ids, Ids]],
        pad_token_id: int,
        masks: Sequence[Ids | None] | None = None,
        *,
        balances: bool = False,
        weights: tuple[Sequence[int], float] | None = None,
        typicality: bool = False,
        grammar: TokenGrammar | None = None,
    ) -> Float[Tensor, " n"]:
        """Sum of the natural log-probabilities of each completion's tokens, given its prompt.

        One forward; for a model that padding changes, one for each length.

        Args:
            sequences: prompts and completions.
            pad_token_id: what fills rows.
            masks: for each completion 1 for a token that is scored and 0 for one that is only read; None scores all.
            balances: whether `router_loss`, where the model has one, records the loss of these sequences.
            weights: for each completion how many of its scored tokens count whole, and what those behind them weigh.
            typicality: sums log p - log sum p^2 of the tokens instead, without gradient (see `Component.typicality`).
            grammar: what the completions are texts of, or begin; log-probabilities are over the tokens that it allows.

        Raises:
            PlanError: for a model whose logits depend on the tokens behind them.
        """
        hidden_size = self._hidden_size(sequences)
        if self._pads:
            return self._scored(sequences, hidden_size, pad_token_id, masks, balances, weights, typicality, grammar)
        masks = [None] * len(sequences) if masks is None else masks
        lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
        order: list[int] = []
        parts = []
        for length in sorted(set(lengths)):
            group = [number for number, each in enumerate(lengths) if each == length]
            own = [masks[number] for number in group]
            heads = None if weights is None else ([weights[0][number] for number in group], weights[1])
            some = [sequences[number] for number in group]
            parts.append(self._scored(some, 0, pad_token_id, own, balances, heads, typicality, grammar))
            order += group
        back = torch.tensor(order).argsort().to(parts[0].device)
        return torch.cat(parts)[back]

    def _scored(
        self,
        sequences: Sequence[tuple[Ids, Ids]],
        hidden_size: float,
        pad: int,
        masks: Sequence[Ids | None] | None,
        balances: bool,
        weights: tuple[Sequence[int], float] | None,
        typicality: bool,
        grammar: TokenGrammar | None,
    ) -> Float[Tensor, " n"]:
        trie = token_trie.pack(sequences, hidden_size, pad, masks)
        device = device_of(self.model)
        inputs = model_inputs(self.model, trie, device, by_pieces=self._by_pieces)
        records = self.router_loss.recording(trie) if balances and self.router_loss else contextlib.nullcontext()
        with records:
            score = self._tokens.typicality if typicality else self._tokens
            if grammar is None:
                found = score(inputs, trie.rows, trie.labels)
                found = found[trie.label.to(found.device, non_blocking=True)]
            else:  # a label that several sequences share may stand at other places of their completions
                rows, labels = trie.rows[trie.label], trie.labels[trie.label]
                states = _states(trie, sequences, masks, grammar)
                found = score(inputs, rows, labels, lambda logits: grammar.constrained(logits, states))
        _say_dense(self.model, inputs["attention_mask"])
        sequence = trie.sequence.to(found.device, non_blocking=True)
        values = found if weights is None else found * _tail_weights(trie, *weights).to(found)
        return found.new_zeros(trie.num_sequences).index_add(0, sequence, values)

    def groups(self, sequences: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[list[int]]:
        """Groups of sequences for which one call computes at most `max_tokens` positions; see `token_trie.groups`."""
        return token_trie.groups(sequences, self._hidden_size(sequences), max_tokens)

    def _hidden_size(self, sequences: Sequence[tuple[Ids, Ids]]) -> int:
        """The width that decides what is shared; 0 where nothing may be."""
        if not self._decided:
            self._decide()
        longest = max((len(prompt) + len(completion) for prompt, completion in sequences), default=0)
        if self._packs and longest > self._longest:
            _say_unpacked(self.model, f"some sequences are longer than its attention's {self._longest:g} tokens")
        return config_of(self.model).hidden_size if self._packs and longest <= self._longest else 0

    def _decide(self) -> None:
        reason = obstacle(self.model) if self._may_pack else None
        tries = self._may_pack and reason is None
        found = _found(self.model, tries=tries, opening=self._opening)
        self._decided = found is not None  # weights that are not finite tell nothing; another call may
        self._pads = found is None or not found.padding
        self._packs = found is not None and tries and not found.tries
        self._by_pieces = found is not None and not found.pieces
        if found is None:
            return
        self._longest = window(config_of(self.model))
        if self._packs:
            _say(self.model, logging.INFO, "computes shared prefixes once: a probe agreed")
            if not self._by_pieces:
                _say(self.model, logging.INFO, f"attends to shared prefixes through dense masks: {found.pieces}")
        elif self._may_pack:
            _say_unpacked(self.model, reason or found.tries)
        if not self._pads:
            _say(self.model, logging.WARNING, f"is scored in rows of one length: {found.padding}")


def _states(
    trie: TokenTrie, sequences: Sequence[tuple[Ids, Ids]], masks: Sequence[Ids | None] | None, grammar: TokenGrammar
) -> list[int]:
    """The grammar's state before each label of each sequence (P,)."""
    known = []
    for number, (_, completion) in enumerate(sequences):
        mask = masks[number] if masks is not None else None
        known += [s for place, s in enumerate(grammar.states(completion)) if mask is None or mask[place]]
    found = [0] * len(known)
    for place, state in zip(trie.sequence.argsort(stable=True).tolist(), known, strict=True):
        found[place] = state
    return found


def _tail_weights(trie: TokenTrie, heads: Sequence[int], tail: float) -> Float[Tensor, " P"]:
    """1 for the first `heads` labels of each sequence, `tail` for those behind them."""
    counts = torch.bincount(trie.sequence, minlength=trie.num_sequences)
    order = trie.sequence.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[trie.sequence[order]]
    whole = place < torch.tensor(list(heads))[trie.sequence]
    return torch.where(whole, 1.0, torch.tensor(tail, dtype=torch.float64))


def obstacle(model: Any) -> str | None:
    """Why the model's config or structure does not allow tries, or None."""
    inner, config = inner_model(model), config_of(model)
    if any(getattr(each, "is_prompt_learning", False) for each in getattr(model, "peft_config", {}).values()):
        return "its adapter puts virtual tokens before each row"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return "its forward takes no position_ids"
    if implementation(model) not in _MASKABLE:
        return f"its attention is {implementation(model)!r}, which takes no such mask; {list(_MASKABLE)} do"
    for name, does in _BY_PLACE.items():
        if getattr(config, name, None):
            return f"it {does} ({name})"
    other = sorted({kind for kind in _layer_types(config) if kind not in _LAYERS})
    if other:
        return f"it has layers of type {other[0]!r}"
    if any(isinstance(module, nn.Conv1d) for module in inner.modules()):
        return "it convolves over the row, as state space and recurrent layers do"
    scaled = [kind for kind in _rope_types(config) if "dynamic" in kind or kind == "longrope"]
    return f"its rotary embedding depends on the row's length ({scaled[0]})" if scaled else None


def _layer_types(config: Any) -> list[str]:
    return [*(getattr(config, "layer_types", None) or []), *(getattr(config, "layers_block_type", None) or [])]


def window(config: Any) -> float:
    """How many tokens of a sequence every layer sees, itself included."""
    types = _layer_types(config)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    slides = "sliding_attention" in types if types else getattr(config, "use_sliding_window", True) is not False
    found = [float(window)] if window and slides else []
    return min([*found, float(chunk)] if chunk else found, default=math.inf)


def _rope_types(config: Any) -> Iterator[str]:
    """Of all layers: transformers 5 keeps them in rope_parameters, perhaps by layer type; before, in rope_scaling."""
    waiting = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while waiting:
        options = waiting.pop()
        if isinstance(options, dict):
            waiting += options.values()
            yield from (str(options[key]) for key in ("rope_type", "type") if options.get(key))


@dataclass(frozen=True)
class _Found:
    """What a probe of a model found.

    Attributes:
        padding: what differs in rows that are padded on the right; "" where nothing does.
        tries: what differs in rows of tries; "" where nothing does, or where none were tried.
        pieces: what differs where attention to tries is computed by pieces; "" where nothing does, or none were tried.
    """

    padding: str
    tries: str
    pieces: str = ""


_probed: weakref.WeakKeyDictionary[Any, dict[tuple[str | None, bool, bool], _Found]] = weakref.WeakKeyDictionary()


def _found(model: Any, *, tries: bool, opening: Ids = ()) -> _Found | None:
    """The probe's answer, asked once for a model, whichever components score with it; None where it tells nothing.

    Raises:
        PlanError: for a model whose logits depend on the tokens behind them: a forward of a text is no likelihood.
    """
    known = _probed.setdefault(inner_model(model), {})
    key = (implementation(model), tries, bool(opening))
    if key not in known:
        found = _probe(model, tries=tries, opening=opening)
        if found is None:
            return None
        known[key] = found
    return known[key]


def _probe(model: Any, *, tries: bool, opening: Ids = ()) -> _Found | None:
    a, b, c, d, e, f, g, h = token_ids(config_of(model), 8)
    sequences = [([a, b], [c, d, e]), ([a, b], [c, f]), ([a, b], [g, h, c]), ([d, e], [a, g, b]), ([b], [f, d])]
    sequences = [([*opening, *prompt], completion) for prompt, completion in sequences]
    before = [(*prompt, *completion[:place]) for prompt, completion in sequences for place in range(len(completion))]
    device = device_of(model)

    def alone() -> Tensor:
        """Each label's logits from what stands before it, and nothing else."""
        logits = forwards(model, before)
        return torch.stack([logits[ids][-1] for ids in before])

    def together() -> Tensor:
        """The same from whole sequences."""
        logits = forwards(model, [[*prompt, *completion] for prompt, completion in sequences])
        return torch.cat([logits[*prompt, *completion][len(prompt) - 1 : -1] for prompt, completion in sequences])

    def packed(width: float, *, by_pieces: bool = False) -> Tensor:
        trie = token_trie.pack(sequences, width)
        inputs = model_inputs(model, trie, device, by_pieces=by_pieces, call=0)
        logits = model(**inputs, use_cache=False).logits
        return logits.flatten(0, 1)[trie.rows.to(device)[trie.label.to(device)]]

    with probing(model, alone, together) as wanted:
        if wanted is None:
            return None
        if wanted.looks_ahead:
            raise PlanError(
                f"{type(inner_model(model)).__name__} cannot be scored: its logits depend on the tokens behind them "
                f"({wanted.looks_ahead}), so it is no causal language model as it is. Some are with is_decoder=True in "
                "their config."
            )
        padding = wanted.complaint(lambda: packed(0))
        pieces = wanted.complaint(lambda: packed(math.inf, by_pieces=True)) if tries else ""
        return _Found(padding, wanted.complaint(lambda: packed(math.inf)) if pieces else "", pieces)


def _say_unpacked(model: Any, reason: str) -> None:
    _say(model, logging.WARNING, f"computes shared prefixes for each sequence anew: {reason}")


def _say_dense(model: Any, mask: Any) -> None:
    if isinstance(mask, TrieMask) and mask.use.dense_because:
        _say(model, logging.INFO, f"attends to shared prefixes through dense masks: {mask.use.dense_because}")


def _say(model: Any, level: int, text: str) -> None:
    """Once for each model, whichever components score with it."""
    said = _said.setdefault(model, set())
    if text not in said:
        said.add(text)
        logger.log(level, "%s %s.", type(model).__name__, text)
