"""One adapter of the peft library as a folder: written, read back into its model, and described.

Folders have peft's own layout, which `PeftModel.from_pretrained(base, folder)` reads.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sysdag.components.adapter import check_scale
from sysdag.components.adapter_weights import PEFT_PREFIX, base_state, cast, fill, state
from sysdag.errors import SerializationError, shown
from sysdag.files.atomic import write_text
from sysdag.files.saved_files import is_a, read_strict_json

if TYPE_CHECKING:
    from peft import PeftConfig

_CONFIG, _FILE = "adapter_config.json", "adapter_model.safetensors"


def save(model: Any, name: str, folder: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, the same bytes for the same adapter.

    Raises:
        PlanError: for one whose scale is not the config's.
    """
    from safetensors.torch import save_file

    check_scale(model, name, f"The {type(model).__name__}")

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config[name])
    config.inference_mode = True
    mapping = None
    if config.task_type is None:  # as peft does, so that its AutoPeftModel finds the class
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=mapping)
    path = folder / _CONFIG
    written = json.loads(path.read_text(encoding="utf-8"))
    for key, value in vars(config).items():
        if isinstance(value, set) and key in written:
            written[key] = sorted(value)  # peft writes them in the order of their hashes
    write_text(path, json.dumps(written, indent=2, sort_keys=True))
    weights = {key: value.detach().cpu().contiguous() for key, value in state(model, name).items()}
    seen: set[int] = set()
    for key, tensor in weights.items():
        if tensor.untyped_storage().data_ptr() in seen:  # of layers that share it; the format does not
            weights[key] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    save_file(weights, folder / _FILE, metadata={"format": "pt"})


def load(model: nn.Module, name: str, folder: Path) -> None:
    """Replaces the adapter's weights in place, bit by bit, by those that `save` wrote.

    Raises:
        SerializationError: if the folder's adapter has other tensors than this one.
    """
    from safetensors.torch import load_file

    saved = load_file(folder / _FILE)
    own = state(model, name)
    brought = {key: saved.pop(key) for key in saved_embeddings(folder) if key not in own}
    check_same_tensors(own, saved, folder)
    # What was saved in a wider dtype than the adapter has keeps it; what was saved in a narrower one loses nothing.
    cast(model, own, {key: torch.promote_types(own[key].dtype, saved[key].dtype) for key in own})
    fill(model, name, saved)
    _fill_embeddings(model, brought, folder)


def saved_embeddings(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole embeddings and heads in a saved adapter: of a vocabulary that was extended.

    Raises:
        SerializationError: for an adapter that is not in safetensors.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES
    from safetensors import safe_open

    if not (folder / _FILE).is_file():
        raise SerializationError(f"{str(folder)!r} has no {_FILE}: adapters are read from safetensors only.")
    with safe_open(folder / _FILE, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    return {
        key: shape
        for key, shape in found.items()
        if key.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        and key.endswith(".weight")
    }


def brings_embeddings(folder: Path) -> bool:
    """Whether a saved adapter changes the base it is put on: it holds embeddings that are no part of the adapter."""
    kept = getattr(read_config(folder), "modules_to_save", None) or ()
    return any(not any(f".{name}." in key for name in kept) for key in saved_embeddings(folder))


@torch.no_grad()
def _fill_embeddings(model: nn.Module, brought: dict[str, Tensor], folder: Path) -> None:
    own = base_state(model)
    for key, tensor in brought.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else None
            raise SerializationError(
                f"{str(folder)!r} holds {name!r} of shape {tuple(tensor.shape)}, and the base model has {shape}."
            )
        own[name].copy_(tensor)


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
    """The config that `save` wrote, ready to train; its weights are read, so that no start is computed for them.

    Raises:
        SerializationError: for a field that no config of its type has, one that names code or files, or a value of
            another type.
    """
    from peft import PeftConfig

    _check_config(folder / _CONFIG)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config


# Fields of peft's configs by which a file would choose a module, or other files, that peft reads.
_OF_CODE_AND_FILES = ("megatron_config", "tokenizer_name_or_path", "tokenizer_kwargs", "loftq_config", "adapters")


def _check_config(file: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    content = read_strict_json(file)
    kinds = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise SerializationError(f"{file}: peft_type must be a kind of adapter, got {shown(kind)}.")
    fields = {
        field.name: re.sub(r"typing\.|<class '|'>", "", str(field.type)) for field in dataclasses.fields(kinds[kind])
    }
    for name, value in content.items():
        if name not in fields:
            if not value:  # of a later peft, which writes every option: switched off
                continue
            raise SerializationError(f"{file}: {kind} has no {shown(name)}; use the version of peft that wrote it.")
        if name in _OF_CODE_AND_FILES and value:
            raise SerializationError(f"{file}: {name} would have peft read code or other files, got {shown(value)}.")
        if value is not None and fields[name] in _PLAIN and not is_a(value, _PLAIN[fields[name]]):
            raise SerializationError(f"{file}: {name} must be of type {fields[name]}, got {shown(value)}.")


_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "Optional[str]": (str,),
    "Optional[dict]": (dict,), "Optional[int]": (int,), "Optional[float]": (int, float), "Optional[bool]": (bool,),
    "Optional[Union[list[str], str]]": (list, str), "Optional[list[str]]": (list,),
    "Optional[Union[list[int], int]]": (list, int),
}  # fmt: skip
