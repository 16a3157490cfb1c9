"""The tensors of a model that carries adapters of the peft library: each adapter's own, and the base's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.adapter_layers import all_names, layers_of, named_layers_of

PEFT_PREFIX = "base_model.model."
"""Of the names inside a PeftModel."""
SHELL = "_sysdag_peft_model"  # where a model keeps the PeftModel around it, whose state its adapter's layers share
_NO_MATTER = ("base_model_name_or_path", "inference_mode", "peft_version")  # of a config, to the scores
_WRAPPED = ("base_layer", "original_module", "token_adapter")  # inside a layer of peft, what leads to the base's own


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters, each once, under names that do not hold the adapter's own."""
    return _own(model, name, lambda layer: layer.named_parameters())


def buffers(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's tensors that never train, each once, named as its parameters are."""
    return _own(model, name, lambda layer: layer.named_buffers())


def _own(model: nn.Module, name: str, of: Callable[[Any], Iterable[tuple[str, Any]]]) -> dict[str, Any]:
    found: dict[int, tuple[str, Any]] = {}
    for prefix, layer in named_layers_of(model):
        for key, tensor in of(layer):
            parts = key.split(".")
            if name in parts:
                parts.remove(name)
                found.setdefault(id(tensor), (".".join([prefix, *parts]), tensor))  # layers may share it
    return dict(found.values())


def fingerprint(model: Any, own: Iterable[Tensor]) -> dict[str, Any]:
    """What the scores of an adapter depend on beside its parameters: its config and buffers, by name.

    Args:
        own: the parameters of one component; adapters that hold none of them are left out.
    """
    held = {id(parameter) for parameter in own}
    found: dict[str, Any] = {}
    adapted = [("", model)] if all_names(model) else [each for each in model.named_modules() if all_names(each[1])]
    for prefix, part in adapted:
        for name in all_names(part):
            if any(id(parameter) in held for parameter in parameters(part, name).values()):
                options = {k: v for k, v in part.peft_config[name].to_dict().items() if k not in _NO_MATTER}
                config = json.dumps(options, sort_keys=True, default=_sorted)
                found |= {f"{prefix}{key}": buffer for key, buffer in buffers(part, name).items()}
                found["config"] = found.get("config", "") + config
    return found


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model without adapters, under the names they have there."""
    base_name = _base_names(model)
    return {name: tensor for key, tensor in model.state_dict().items() if (name := base_name(key)) is not None}


def _base_names(model: nn.Module) -> Callable[[str], str | None]:
    """From the name of a tensor to the one that it has without adapters, or None for one of an adapter."""
    adapted = {id(layer) for layer in layers_of(model)}

    def name_of(key: str) -> str | None:
        parts: list[str] = []
        module: Any = model
        for part in key.split("."):
            if id(module) not in adapted:
                parts.append(part)
            elif part not in _WRAPPED:
                return None
            module = getattr(module, part, None)
        return ".".join(parts)

    return name_of


def base_storage(model: nn.Module) -> dict[str, Any]:
    """Where the base's tensors lie and how often they were written to: the same, as long as nothing changes them."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    base_name = _base_names(model)
    return {
        name: (tensor.data_ptr(), tensor._version) for key, tensor in tensors if (name := base_name(key)) is not None
    }


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's weights, under the names peft saves them by."""
    from peft import get_peft_model_state_dict

    # What peft adds by itself, embeddings that were resized or targeted, belongs to the base, which is frozen.
    shell = model.__dict__.get(SHELL)
    own = get_peft_model_state_dict(shell or model, adapter_name=name, save_embedding_layers=False)
    return own if shell is not None else {PEFT_PREFIX + key: value for key, value in own.items()}


def inner_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's weights, under their names inside the model itself."""
    return {key.removeprefix(PEFT_PREFIX): value for key, value in state(model, name).items()}


def cast(model: nn.Module, own: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> None:
    """Gives an adapter's weights, as `state` has them, other dtypes."""
    wanted = {tensor.data_ptr(): dtypes[key] for key, tensor in own.items()}
    for parameter in model.parameters():
        dtype = wanted.get(parameter.data_ptr(), parameter.dtype)
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def fill(model: nn.Module, name: str, weights: dict[str, Tensor]) -> None:
    """Replaces an adapter's weights in place by others that `state` names alike."""
    # In place and not by `load_state_dict`, whose hooks would have sharded parameters under FSDP2.
    for key, tensor in state(model, name).items():
        tensor.copy_(weights[key])
