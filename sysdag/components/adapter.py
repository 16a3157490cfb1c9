"""One adapter of the peft library inside a model: put on, switched, saved and read back.

The layers are injected in place, so the model keeps its class and any model of torch can carry one. Several components
may put an adapter each on one base model. Saved adapters have peft's own layout, which
`PeftModel.from_pretrained(base, folder)` reads.
"""

from __future__ import annotations

import contextlib
import warnings
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
_NAME = "sysdag"


def attach(model: Any, config: PeftConfig) -> str:
    """Puts a new adapter on `model` in place and returns its name; of the weights, only adapters require gradients.

    Raises:
        PlanError: for a model that carries adapters from elsewhere, or a config that trains biases of the base model,
            which switching the adapter off does not undo.
    """
    from peft import inject_adapter_in_model

    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise PlanError(
            f"peft_config has bias={bias!r}, which trains biases of the base model: the reference could not be "
            "the adapter switched off. Use bias='none'."
        )
    taken = list(getattr(model, "peft_config", {}))
    foreign = [name for name in taken if not name.startswith(_NAME)]
    if foreign:
        raise PlanError(
            f"The {type(model).__name__} already carries adapters {foreign} of its own. Merge them into its weights "
            "(fuse_lora, then unload_lora) before it gets one to train."
        )
    name = f"{_NAME}_{len(taken)}" if taken else _NAME
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, model, adapter_name=name)
    return name


def _layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [layer for layer in model.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


def activate(model: nn.Module, name: str) -> None:
    """Makes `name` the adapter that the model runs with; no parameter's `requires_grad` changes.

    (peft's own `set_adapter` freezes every other adapter, so two adapters on one base could not train together.)
    """
    for layer in _layers(model):
        layer._active_adapter = [name]


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
        if not isinstance(layer, BaseTunerLayer):
            original, trained = layer.original_module.state_dict(), getattr(layer, "modules_to_save", {})
            if name not in trained or not _same(original, trained[name].state_dict()):
                return False
        elif not hasattr(layer, "get_delta_weight") or layer.get_delta_weight(name).any():
            return False
    return True


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model without adapters, under the names they have there."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    adapted = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner = "base_layer" if isinstance(layer, BaseTunerLayer) else "original_module"
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

    return {_PEFT_PREFIX + key: value for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


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
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / _FILE)
    own = state(model, name)
    check_same_tensors(own, saved, folder)
    dtypes = {own[key].data_ptr(): saved[key].dtype for key in saved}
    for parameter in model.parameters():
        dtype = dtypes.get(parameter.data_ptr())
        if dtype is not None and parameter.dtype != dtype:  # a trainer may keep adapters in another dtype than the base
            parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(model, {key.removeprefix(_PEFT_PREFIX): v for key, v in saved.items()}, adapter_name=name)


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
