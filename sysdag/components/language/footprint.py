"""The memory of a language model's part in a training step, from its config alone: no weights are loaded.

The model is built of fake tensors, which have shapes and devices and no numbers, and one micro-batch is scored on it;
autograd then says what its graph would save, kernel by kernel as the device would choose them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sysdag.components import acceleration, adapter
from sysdag.components.footprint import Footprint, bytes_of, make_fake
from sysdag.components.language import key_value_slabs, packed_inputs, prefix_scorer, trie_pieces
from sysdag.components.language.language_head import TokenScorer, argument_names, output_embedding
from sysdag.components.language.model_cache import cache_of
from sysdag.components.memory import PeakBytes, SavedBytes
from sysdag.components.precision import optimizer_bytes
from sysdag.ops import _head_walk

if TYPE_CHECKING:
    from peft import PeftConfig

_TILE = {"cpu": 8 << 20, "cuda": 192 << 20}  # of logits, in `linear_logprob`; on a GPU with what they are folded into


def of_language_model(
    auto_class: Any,
    config: Any,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
    *,
    tokens: int,
    labels: int,
    trains: bool,
    checkpoints: bool,
    device: str,
    rows: int = 1,
    tries: bool = True,
    constrained: bool = False,
    ids: torch.Tensor | None = None,
    reading: Callable[[Any], AbstractContextManager[Any]] | None = None,
) -> Footprint:
    """A language model's.

    Args:
        auto_class: of transformers, which makes such a model of its config.
        config: of transformers.
        tokens: of a micro-batch.
        labels: how many of them are scored.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        device: `cpu` or `cuda`, whose kernels are assumed.
        rows: that they are in, all of one length.
        tries: whether these are packed as tries, whose mask is dense.
        constrained: whether a grammar constrains the logits, for which all of them are made.
        ids: the tokens (rows, tokens / rows), where more than their number counts.
        reading: what a model is called in, where it reads something beside ids.
    """

    def constrain(logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool), -torch.inf)

    def score(model: Any) -> torch.Tensor:
        length = tokens // rows
        given = torch.zeros(rows, length, dtype=torch.int64) if ids is None else ids
        inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
        if tries:
            if packed_inputs.takes_pieces(model, torch.device(device)):
                pieces = trie_pieces.one_branch(length - labels // rows, length, rows)
                mask = packed_inputs.tries_mask(model, torch.zeros_like(given), pieces, torch.device(device))
            else:
                mask = output_embedding(model).weight.new_zeros(rows, 1, length, length, dtype=dtype)
            inputs |= {"attention_mask": mask, "position_ids": torch.arange(length).expand(rows, length)}
        at = torch.zeros(labels, dtype=torch.int64)
        return TokenScorer(model, is_checked=True)(inputs, at, at, constrain if constrained else None)

    found = of_model(
        auto_class, config, dtype, peft_config, score, trains=trains, checkpoints=checkpoints, device=device,
        reading=reading,
    )  # fmt: skip
    if not constrained:
        return found
    # All logits and, backward, their gradient; of the labels' rows a log-softmax in fp32 and its gradient.
    vocabulary = config.get_text_config(decoder=True).vocab_size
    logits = vocabulary * (tokens * dtype.itemsize + 2 * labels * torch.float32.itemsize)
    return replace(found, working=found.working + logits)


def shares_prefixes(auto_class: Any, config: Any, longest: int) -> bool:
    """Whether tries serve a model's sequences of at most so many tokens, as far as its config and structure tell.

    What tells tokens apart by an argument of their number has no place for tries, either.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config)
    by_tokens = "token_type_ids" in argument_names(model)
    return not by_tokens and prefix_scorer.obstacle(model) is None and longest <= prefix_scorer.window(config)


def of_model(
    auto_class: Any,
    config: Any,
    dtype: torch.dtype,
    peft_config: PeftConfig | None,
    score: Callable[[Any], torch.Tensor],
    *,
    trains: bool,
    checkpoints: bool,
    device: str,
    reading: Callable[[Any], AbstractContextManager[Any]] | None = None,
) -> Footprint:
    """A language model's whose micro-batch is what `score` does.

    Args:
        auto_class: of transformers, which builds the model of its config.
        score: scores one micro-batch with the model, whose tensors are fake.
        trains, checkpoints, device, reading: see `of_language_model`.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype)
        base = sum(bytes_of(parameter) for parameter in model.parameters())
        if peft_config is not None:
            adapter.attach(model, peft_config)
    if not trains:
        model.requires_grad_(False)
    model.train()
    if checkpoints and trains:
        acceleration.enable_checkpointing(model, {"use_reentrant": False})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        make_fake(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        saved, peak = SavedBytes(), PeakBytes(model)
        within = contextlib.nullcontext() if reading is None else reading(model)
        with peak, within, torch.set_grad_enabled(trains):
            with saved if trains else contextlib.nullcontext():
                scores = score(model)
            graph = min(saved.total, peak.now)  # without what only a dropped output had, as a tower's last layers
            if trained:
                scores.sum().backward()
        head = model.get_output_embeddings().weight
        tile = min(_TILE[device], scores.numel() * len(head) * torch.float32.itemsize)
        of_head = tile + (bytes_of(head) if head.requires_grad else 0)
        weights = sum(bytes_of(parameter) for parameter in model.parameters())
        return Footprint(
            weights=weights,
            base=0 if peft_config is None else base,
            trained=sum(map(bytes_of, trained)),
            optimizer=optimizer_bytes(trained),
            reference=weights if trained and peft_config is None else 0,
            graph=graph,
            working=max(of_head, peak.bytes - graph) - _given_way(head, scores.numel(), device),
        )


def _given_way(head: torch.Tensor, labels: int, device: str) -> int:
    """Bytes of kept tiles of logits, which count in the graph, whose place a trained head's gradient takes on a CPU."""
    if not head.requires_grad or device != "cpu":
        return 0
    rows, tokens = _head_walk.tile_shape(labels, len(head), device)
    element = _head_walk.compute_dtype(head.dtype).itemsize
    kept = _head_walk.tiles_kept(labels, len(head), device, element, _head_walk.keep_budget(head, labels))
    return min(kept * rows * tokens * element, bytes_of(head))


def of_decoding(auto_class: Any, config: Any, dtype: torch.dtype, *, rows: int, longest: int, device: str) -> int:
    """Bytes that decoding rows of at most so many tokens side by side takes beside the weights.

    Slabs of keys and values, those of one layer twice while rows enter or room is made; states; and three copies of
    the logits. What reads the prompts takes less, as a rule.
    """
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype).eval()
    read = 8
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        make_fake(model)
        output = model(input_ids=torch.zeros(1, read, dtype=torch.int64), use_cache=True)
        cache, vocabulary = cache_of(output), output.logits.shape[-1]
        grows, stays = [0], 0
        for layer in getattr(cache, "layers", ()):
            tensors = [
                part for part in (getattr(layer, "keys", None), getattr(layer, "values", None)) if part is not None
            ]
            grows.append(sum(map(bytes_of, tensors)) // read)
            states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
            stays += sum(bytes_of(state) for state in states if state is not None)
        logits = 3 * vocabulary * torch.float32.itemsize
    return rows * ((longest + key_value_slabs.ROOM) * (sum(grows) + max(grows)) + stays + logits)
