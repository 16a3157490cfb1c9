"""The layers that adapters of the peft library put into a model: found, and switched between adapters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from sysdag.components.adapter_effect import effect
from sysdag.components.module_walk import modules_of

_PROBABILITIES = ("dropout", "layerdrop", "dropout_p", "dropout_prob", "drop_prob", "pdrop")  # attributes of modules


def layers_of(model: nn.Module) -> list[Any]:
    kinds = _kinds()
    if not kinds:
        return []
    parts = modules_of(model)
    adapting = {kind for kind in set(map(type, parts)) if issubclass(kind, kinds)}
    return [part for part in parts if type(part) in adapting]


def named_layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    kinds = _kinds()
    return [(prefix, part) for prefix, part in model.named_modules() if isinstance(part, kinds)] if kinds else []


def _kinds() -> tuple[type, ...]:
    if "peft" not in sys.modules:  # an optional library; nothing is adapted before someone has imported it
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def is_carried_by(model: nn.Module) -> bool:
    """Whether any adapter is on the model or a part of it, whoever put it there."""
    return any(getattr(part, "peft_config", None) for part in model.modules())


def activate(model: nn.Module, name: str) -> None:
    """Makes `name` the adapter that the model runs with; no parameter's `requires_grad` changes.

    (peft's own `set_adapter` freezes every other adapter, so two adapters on one base could not train together.)
    """
    _activate(layers_of(model), name)


def _activate(layers: Sequence[Any], name: str) -> None:
    for layer in layers:
        if layer._active_adapter != [name]:
            layer._active_adapter = [name] if name in layer._get_available_adapters() else []


@contextlib.contextmanager
def activated(model: nn.Module, name: str) -> Iterator[None]:
    """Runs the model with the adapter `name`, then with the one that was active before.

    Where gradient checkpointing runs a forward again, in the backward, it must find the adapter of that forward.
    """
    layers = layers_of(model)
    before = [(layer, layer._active_adapter) for layer in layers]
    _activate(layers, name)
    try:
        yield
    finally:
        for layer, active in before:
            layer._active_adapter = active


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Runs the model as it is without any adapter."""
    layers = layers_of(model)
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def is_identity(model: nn.Module, name: str) -> bool:
    """Whether the model computes the same with the adapter as without, as a new LoRA adapter does; False if unsure."""
    return effect(layers_of(model), name) == 0


def disable_dropout(model: nn.Module) -> None:
    """Sets the probability of every dropout in the model to 0, those of peft's layers included.

    Beside torch's modules these are what modules of transformers keep as numbers (`attention_dropout`, `layerdrop`),
    OFT's and BOFT's own, and what LoHa and LoKr draw by options of their layers.
    """
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0  # type: ignore[assignment]
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and name.endswith(_PROBABILITIES):
                setattr(module, name, 0.0)
    for layer in layers_of(model):
        for options in (getattr(layer, "rank_dropout", None), getattr(layer, "module_dropout", None)):
            if isinstance(options, dict):
                options.update(dict.fromkeys(options, 0.0))


def settle_modes(model: nn.Module) -> None:
    """Puts each layer of an adapter into the mode of the layer that it adapts; new modules come in train mode."""
    for layer in layers_of(model):
        base = layer.original_module if hasattr(layer, "original_module") else layer.get_base_layer()
        layer.train(base.training)


def all_names(model: Any) -> list[str]:
    """Of all adapters on the model, whoever put them there."""
    return list(getattr(model, "peft_config", {}))
