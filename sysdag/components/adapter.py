"""One adapter of the peft library inside a model: put on, switched, saved and read back.

The layers are injected in place, so the model keeps its class and any model of torch can carry one. Several components
may put an adapter each on one base model. Saved adapters have peft's own layout, which
`PeftModel.from_pretrained(base, folder)` reads.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sysdag.errors import PlanError, SerializationError

if TYPE_CHECKING:
    from peft import PeftConfig

_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."  # the names inside a PeftModel
_NAME, _REFERENCE = "sysdag", "reference"
_adopted: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # what PeftModels brought, by model


def attach(model: Any, config: PeftConfig) -> str:
    """Puts a new adapter on `model` in place and returns its name; of the weights, only adapters require gradients.

    Raises:
        PlanError: for a model that carries adapters from elsewhere, or a config whose adapter, switched off, would not
            leave the model as it was.
    """
    _check(config)
    foreign = [name for name in _all_names(model) if name not in names(model)]
    if foreign:
        raise PlanError(
            f"The {type(model).__name__} already carries adapters {foreign} of its own. Merge them into its weights "
            "(merge_and_unload; fuse_lora and unload_lora in diffusers) before it gets one to train."
        )
    config = copy.deepcopy(config)  # peft writes into it, and several components may be given the same
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    return _inject(model, config, _NAME)


def adopt(peft_model: Any) -> tuple[Any, str]:
    """The model inside a PeftModel, and the name of the adapter that is active in it.

    Raises:
        PlanError: for a kind of adapter that `attach` refuses, several active ones, or one that is merged.
    """
    active = peft_model.active_adapters
    if len(active) != 1:
        raise PlanError(f"The PeftModel has the active adapters {active}; activate one of them (set_adapter).")
    config = peft_model.peft_config[active[0]]
    _check(config, given=True)
    model = peft_model.get_base_model()
    if any(getattr(layer, "merged", False) for layer in _layers(model)):
        raise PlanError("The PeftModel's adapter is merged into its weights; call unmerge_adapter() first.")
    _adopted.setdefault(model, set()).add(active[0])
    return model, active[0]


def names(model: Any) -> list[str]:
    """The adapters on the model that belong to components; not those that its owner put there."""
    adopted = _adopted.get(model, ())
    return [name for name in _all_names(model) if name.startswith((_NAME, _REFERENCE)) or name in adopted]


def _all_names(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", {}))


def freeze_copy(model: Any, name: str) -> str:
    """Puts a copy of an adapter as it is now on the same model, to be its reference; it never requires gradients."""
    config = copy.deepcopy(model.peft_config[name])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the weights are replaced, so no costlier start is needed
    made = _inject(model, config, _REFERENCE)
    _fill(model, made, state(model, name))
    for parameter in parameters(model, made).values():
        parameter.requires_grad_(False)
    activate(model, name)
    return made


def _check(config: Any, given: bool = False) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kind = getattr(config.peft_type, "value", config.peft_type)
    bias, start = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", None)
    if bias != "none":
        raise PlanError(
            f"peft_config has bias={bias!r}, which trains biases of the base model: the reference could not be "
            "the adapter switched off. Use bias='none'."
        )
    if isinstance(start, str) and (start.startswith("pissa") or start in ("olora", "loftq", "corda")):
        raise PlanError(
            f"peft_config has init_lora_weights={start!r}, which changes the base model's weights: switched off, the "
            "adapter would not leave the model that you gave. Use init_lora_weights=True."
        )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False) or tuner is None:
        raise PlanError(
            f"peft_config is of type {kind}, which puts virtual tokens before each row or changes the model's forward; "
            "it cannot be switched layer by layer. Use LoraConfig or another config that adapts layers."
        )
    if getattr(tuner, "uses_shared_state", False) and not given:
        raise PlanError(
            f"peft_config is of type {kind}, whose layers share state. Pass the model with the adapter on it: "
            "peft.get_peft_model(model, peft_config), and leave peft_config out."
        )


def _inject(model: Any, config: PeftConfig, wanted: str) -> str:
    """Adds an adapter under a free name; what trained before still does, beside it only the new one."""
    from peft import inject_adapter_in_model

    taken = _all_names(model)
    free = [wanted, *(f"{wanted}_{number}" for number in range(1, len(taken) + 1))]
    name = next(candidate for candidate in free if candidate not in taken)
    trained = {id(parameter): parameter.requires_grad and bool(taken) for parameter in model.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, model, adapter_name=name)
    for parameter in model.parameters():
        if id(parameter) in trained:  # some versions of peft freeze the adapters that were there
            parameter.requires_grad_(trained[id(parameter)])
    return name


def prepare_quantized(model: Any) -> None:
    """What training an adapter on a base that bitsandbytes quantised needs beyond `attach`.

    Of peft's `prepare_model_for_kbit_training`: inputs of the first layer require gradients, so that gradient
    checkpointing reaches the adapters (the base is frozen by `attach`). Its cast of every 16-bit weight to fp32 is left
    out: policy and reference share those weights, and autocast computes norms in fp32 by itself.
    """
    if is_quantized(model):
        model.enable_input_require_grads()


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the model's weights in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def _layers(model: nn.Module) -> list[Any]:
    return [layer for _, layer in _named_layers(model)]


def _named_layers(model: nn.Module) -> list[tuple[str, Any]]:
    if "peft" not in sys.modules:  # an optional library; nothing is adapted before someone has imported it
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [(prefix, layer) for prefix, layer in model.named_modules() if isinstance(layer, kinds)]


def activate(model: nn.Module, name: str) -> None:
    """Makes `name` the adapter that the model runs with; no parameter's `requires_grad` changes.

    (peft's own `set_adapter` freezes every other adapter, so two adapters on one base could not train together.)
    """
    for layer in _layers(model):
        layer._active_adapter = [name] if name in layer._get_available_adapters() else []


@contextlib.contextmanager
def activated(model: nn.Module, name: str) -> Iterator[None]:
    """Runs the model with the adapter `name`, then with the one that was active before.

    Where gradient checkpointing runs a forward again, in the backward, it must find the adapter of that forward.
    """
    before = [(layer, layer._active_adapter) for layer in _layers(model)]
    activate(model, name)
    try:
        yield
    finally:
        for layer, active in before:
            layer._active_adapter = active


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Runs the model as it is without any adapter."""
    layers = _layers(model)
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in _layers(model):
        if name not in layer._get_available_adapters():
            continue
        if hasattr(layer, "trainable_tokens_delta"):
            if not torch.equal(layer.trainable_tokens_delta[name], layer.trainable_tokens_original[name]):
                return False
        elif not isinstance(layer, BaseTunerLayer):
            if hasattr(layer, "token_adapter"):  # a wrapper of the layer above
                continue
            original, trained = layer.original_module.state_dict(), getattr(layer, "modules_to_save", {})
            if name not in trained or not _same(original, trained[name].state_dict()):
                return False
        elif not hasattr(layer, "get_delta_weight") or layer.get_delta_weight(name).any():
            return False
    return True


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters, under names that do not hold the adapter's own."""
    found = {}
    for prefix, layer in _named_layers(model):
        for key, parameter in layer.named_parameters():
            parts = key.split(".")
            if name in parts:
                parts.remove(name)
                found[".".join([prefix, *parts])] = parameter
    return found


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model without adapters, under the names they have there."""
    adapted: dict[str, str] = {}
    for prefix, layer in _named_layers(model):
        if not any(prefix.startswith(outer) for outer in adapted):  # adapters inside adapters go with the outer one
            inner = "base_layer" if hasattr(layer, "base_layer") else "original_module"
            inner = "token_adapter.base_layer" if hasattr(layer, "token_adapter") else inner
            adapted[prefix + "."] = f"{prefix}.{inner}."
    found = {}
    for key, tensor in model.state_dict().items():
        owners = [prefix for prefix in adapted if key.startswith(prefix)]
        if not owners:
            found[key] = tensor
        elif key.startswith(adapted[owners[0]]):
            found[owners[0] + key.removeprefix(adapted[owners[0]])] = tensor
    return found


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's weights, under the names peft saves them by."""
    from peft import get_peft_model_state_dict

    # What peft adds by itself, embeddings that were resized or targeted, belongs to the base, which is frozen.
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {_PEFT_PREFIX + key: value for key, value in own.items()}


def save(model: Any, name: str, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[name].save_pretrained(str(folder))
    weights = {key: value.detach().cpu().contiguous() for key, value in state(model, name).items()}
    save_file(weights, folder / _FILE, metadata={"format": "pt"})


def load(model: nn.Module, name: str, folder: Path) -> None:
    """Replaces the adapter's weights in place, bit by bit, by those that `save` wrote.

    Raises:
        SerializationError: if the folder's adapter has other tensors than this one.
    """
    from safetensors.torch import load_file

    saved = load_file(folder / _FILE)
    own = state(model, name)
    check_same_tensors(own, saved, folder)
    dtypes = {own[key].data_ptr(): saved[key].dtype for key in saved}
    for parameter in model.parameters():
        dtype = dtypes.get(parameter.data_ptr())
        if dtype is not None and parameter.dtype != dtype:  # a trainer may keep adapters in another dtype than the base
            parameter.data = parameter.data.to(dtype)
    _fill(model, name, saved)


@torch.no_grad()
def _fill(model: nn.Module, name: str, weights: dict[str, Tensor]) -> None:
    # In place and not by `load_state_dict`, whose hooks would have sharded parameters under FSDP2.
    for key, tensor in state(model, name).items():
        tensor.copy_(weights[key])


def check_same_tensors(own: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    """Raises a SerializationError where names or shapes differ."""
    mine, theirs = ({key: tuple(value.shape) for key, value in state.items()} for state in (own, saved))
    different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if different:
        key = different[0]
        raise SerializationError(
            f"{str(folder)!r} holds other weights than this model: {len(different)} tensors differ, the first is "
            f"{key!r} (expected shape {mine.get(key)}, got {theirs.get(key)})."
        )


def read_config(folder: Path) -> PeftConfig:
    """The config that `save` wrote, ready to train."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config
