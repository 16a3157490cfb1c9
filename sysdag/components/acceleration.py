"""Gradient checkpointing and compilation of the models inside a component, whichever library they come from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


def enable_checkpointing(module: nn.Module, options: dict[str, Any], **others: Any) -> bool:
    """Turns checkpointing on in every model of transformers and diffusers inside; whether there was one.

    Args:
        options: of `torch.utils.checkpoint.checkpoint`, where the library takes any.
        others: of transformers' `activation_checkpointing_enable`.
    """
    found = list(_models(module))
    for model in found:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options, **others)
        elif hasattr(model, "gradient_checkpointing_enable"):  # transformers before 5.20
            model.gradient_checkpointing_enable(options)
        else:
            model.enable_gradient_checkpointing()
    return bool(found)


def _models(module: nn.Module) -> Iterator[Any]:
    """The outermost models that support it and have weights to train."""
    supports = getattr(type(module), "supports_gradient_checkpointing", False)
    supports = supports or getattr(type(module), "_supports_gradient_checkpointing", False)
    if supports and any(parameter.requires_grad for parameter in module.parameters()):
        yield module
        return
    for child in module.children():
        yield from _models(child)


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile` was given, of its wrapper; anything else as it is.

    The wrapper changes the names of the weights, so that no library would read what is saved of it.
    """
    inner = getattr(model, "_orig_mod", None)
    if not isinstance(inner, nn.Module):
        return model
    logger.warning(
        "The %s is taken out of torch.compile. A training compiles its models by itself: "
        "SysDPOConfig(torch_compile=True).", type(inner).__name__,
    )  # fmt: skip
    return inner


def compile_blocks(module: nn.Module, options: dict[str, Any]) -> None:
    """Compiles, in place, the repeated blocks of the models inside, each once for all.

    Blocks rather than whole models: what surrounds them (tries, heads, adapters that are switched) changes from call to
    call and would be compiled anew.

    Args:
        options: of `torch.compile`.
    """
    for layers in module.modules():
        if isinstance(layers, nn.ModuleList) and len(layers) > 1 and len({type(layer) for layer in layers}) == 1:
            for layer in layers:
                if any(parameter.numel() for parameter in layer.parameters()):
                    layer.compile(**options)
