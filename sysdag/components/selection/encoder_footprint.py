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

from sysdag.components import acceleration, adapter
from sysdag.components.adapter_support import needs_numbers
from sysdag.components.footprint import Footprint, bytes_of, make_fake
from sysdag.components.memory import SavedBytes
from sysdag.components.precision import optimizer_bytes
from sysdag.components.selection import sentence_folder

if TYPE_CHECKING:
    from sysdag.components.selection.cross_encoder import CrossEncoder
    from sysdag.components.selection.encoder_model import EncoderModel, PairClassifier
    from sysdag.components.selection.text_encoder import TextEncoder


def of_towers(
    towers: Sequence[TextEncoder], *, tokens: int, trains: bool, checkpoints: bool, device: str
) -> Footprint | None:
    """A bi-encoder's; None for two towers that both train, among which the tokens are shared in a way not known.

    Args:
        tokens: of a micro-batch's queries and options; of its queries alone where the options' tower does not train.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        device: `cpu` or `cuda`, whose kernels are assumed.
    """
    if trains and sum(tower.trains for tower in towers) > 1:
        return None
    tower, beside = towers[0], towers[1:]

    def vectors(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return sentence_folder.pooled(model(**batch).last_hidden_state, batch["attention_mask"], tower.recipe.pooling)

    found = _of(
        tower.lm, vectors, tower.max_length, tokens=tokens, trains=trains, checkpoints=checkpoints, device=device
    )
    if found is None or not beside:
        return found
    return replace(found, weights=found.weights + sum(map(bytes_of, _built(beside[0].lm, False).parameters())))


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
    adapter.disable_dropout(model)
    length = min(tokens, longest or tokens)
    with FakeTensorMode(), torch.device(device):
        make_fake(model)
        shape = (max(1, tokens // length), length)
        batch = {name: torch.ones(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask")}

        def graph() -> int:
            saved = SavedBytes()
            with saved if trains else contextlib.nullcontext(), torch.set_grad_enabled(trains):
                run(model, batch)
            return saved.total

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
