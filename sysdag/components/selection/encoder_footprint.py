"""The memory of an encoder's part in a training step, from its config alone: no weights are loaded.

As for language models (`sysdag.components.language.footprint`), the model is built of fake tensors, and autograd says
what the graph of one micro-batch saves. Its texts are taken to be as long as they may be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sysdag.components import acceleration, adapter, adapter_layers
from sysdag.components.adapter_support import needs_numbers
from sysdag.components.footprint import Footprint, bytes_of, make_fake
from sysdag.components.memory import PeakBytes, SavedBytes
from sysdag.components.precision import optimizer_bytes
from sysdag.components.selection import sentence_folder
from sysdag.errors import PlanError

_ADDED = ("weights", "base", "trained", "optimizer", "reference", "graph")

if TYPE_CHECKING:
    from sysdag.components.selection.cross_encoder import CrossEncoder
    from sysdag.components.selection.encoder_model import EncoderModel, PairClassifier
    from sysdag.components.selection.text_encoder import TextEncoder


def of_towers(
    towers: Sequence[TextEncoder],
    *,
    tokens: int,
    trains: bool,
    checkpoints: bool,
    device: str,
    options: int | None = None,
) -> Footprint | None:
    """A bi-encoder's, of one tower or two.

    Args:
        tokens: of a micro-batch's queries and options; of its queries alone where the options' tower does not train.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        device: `cpu` or `cuda`, whose kernels are assumed.
        options: how many of the tokens are options', which a second tower that trains encodes.

    Raises:
        PlanError: for two towers of different models that both train, and no `options`.
    """
    if len(towers) == 1 or not (trains and towers[1].trains):
        found = _of_tower(towers[0], tokens=tokens, trains=trains, checkpoints=checkpoints, device=device)
        beside = 0 if len(towers) == 1 else sum(map(bytes_of, _built(towers[1].lm, False).parameters()))
        return None if found is None else replace(found, weights=found.weights + beside)
    if options is None:
        if _shape_of(towers[0]) != _shape_of(towers[1]):
            raise PlanError(
                f"{towers[0]!r}: queries and options are encoded by different models that both train. Give the "
                "options' tokens as the third number of the node's lengths."
            )
        options = tokens // 2  # of equal models one takes what the other does not
    parts = [
        _of_tower(tower, tokens=max(1, own), trains=True, checkpoints=checkpoints, device=device)
        for tower, own in zip(towers, (tokens - options, options), strict=True)
    ]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    sums = {name: sum(getattr(part, name) for part in known) for name in _ADDED}
    return Footprint(**sums, working=max(part.working for part in known))


def _of_tower(tower: TextEncoder, *, tokens: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
    def vectors(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return sentence_folder.pooled(model(**batch).last_hidden_state, batch["attention_mask"], tower.recipe.pooling)

    return _of(
        tower.lm, vectors, tower.max_length, tokens=tokens, trains=trains, checkpoints=checkpoints, device=device
    )


def _shape_of(tower: TextEncoder) -> Any:
    """What a tower's memory depends on beside the number of tokens."""
    config = {name: value for name, value in tower.lm.config.to_dict().items() if name != "_name_or_path"}
    return config, tower.lm.adapter_config, tower.max_length


def of_classifier(
    scorer: CrossEncoder, *, tokens: int, trains: bool, checkpoints: bool, device: str
) -> Footprint | None:
    """A cross-encoder's; the arguments are those of `of_towers`, of pairs."""

    def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).logits

    return _of(
        scorer.lm, logits, scorer.max_length, tokens=tokens, trains=trains, checkpoints=checkpoints, device=device
    )


def _built(lm: EncoderModel | PairClassifier, trains: bool) -> Any:
    """The model, without numbers."""
    kind, given = lm.loader()
    with torch.device("meta"):
        return kind.from_config(given.get("config", lm.config), dtype=lm.dtype(trains))


def _of(
    lm: EncoderModel | PairClassifier,
    run: Callable[[Any, dict[str, Tensor]], Tensor],
    longest: int | None,
    *,
    tokens: int,
    trains: bool,
    checkpoints: bool,
    device: str,
) -> Footprint | None:
    adapted = lm.adapter_config
    if adapted is not None and needs_numbers(adapted):
        return None
    model: nn.Module = _built(lm, trains)
    base = sum(map(bytes_of, model.parameters()))
    if adapted is not None:
        with torch.device("meta"):
            adapter.attach(model, adapted)
    if not trains:
        model.requires_grad_(False)
    model.train()
    adapter_layers.disable_dropout(model)
    length = min(tokens, longest or tokens)
    with FakeTensorMode(), torch.device(device):
        make_fake(model)
        shape = (max(1, tokens // length), length)
        batch = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}

        def graph() -> int:
            saved, peak = SavedBytes(), PeakBytes(model)
            with peak, saved if trains else contextlib.nullcontext(), torch.set_grad_enabled(trains):
                held = run(model, batch)
                alive = peak.now if held.requires_grad else 0
            return min(saved.total, alive)  # without what only a dropped output had, as a pooler

        held, again = graph(), 0
        if checkpoints and trains and acceleration.enable_checkpointing(model, {"use_reentrant": False}):
            whole, held = held, graph()
            again = (whole - held) // max(
                1, lm.config.get_text_config().num_hidden_layers
            )  # one layer's, computed anew
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = sum(map(bytes_of, model.parameters()))
        largest = max((bytes_of(p) for p in trained), default=0) if adapted is None else 0
        return Footprint(
            weights=weights,
            base=0 if adapted is None else base,
            trained=sum(map(bytes_of, trained)),
            optimizer=optimizer_bytes(trained),
            reference=weights if trained and adapted is None else 0,
            graph=held,
            working=largest + again,
        )
