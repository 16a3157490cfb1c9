"""What a library says of a model that it has loaded: whether every weight came from the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sysdag.errors import PlanError, SerializationError
from sysdag.files.saved_files import safetensors_shapes


def complete(loaded: Any, folder: str | Path) -> Any:
    """The model, all of whose weights were in the files: what a library cannot find, it draws at random.

    Args:
        loaded: what `from_pretrained(..., output_loading_info=True)` of transformers or diffusers returned, the model
            and what is said of it.

    Raises:
        SerializationError: naming the first weight that is missing, of another shape, or unknown.
    """
    model, info = loaded
    for kind, what in (
        ("missing_keys", "is missing"),
        ("mismatched_keys", "has another shape than the config says"),
        ("unexpected_keys", "is of no such model"),
    ):
        found = sorted(str(key[0] if isinstance(key, (tuple, list)) else key) for key in info.get(kind) or ())
        if found:
            raise SerializationError(f"{folder}: the weight {found[0]!r} {what} (of {len(found)} like it).")
    return model


def without_new(loaded: Any, owner: str, may_be_new: Callable[[Any, str], bool] = lambda model, name: False) -> Any:
    """The model of another's checkpoint, none of whose parameters a library has drawn at random for want of it.

    What the checkpoint has beside them, as a head of another kind, is left out; buffers begin as their class says.

    Args:
        loaded: as in `complete`.
        owner: whose model it is, for the message.
        may_be_new: by the model and a parameter's name, whether no checkpoint need have it; none by default.

    Raises:
        PlanError: naming the first parameter that is missing.
    """
    model, info = loaded
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(each for each in parameters.intersection(info["missing_keys"]) if not may_be_new(model, each))
    if missing:
        raise PlanError(
            f"{owner}: its checkpoint has no weight {missing[0]!r} (of {len(missing)} like it), which transformers "
            f"then draws at random. Give a whole checkpoint of a {type(model).__name__}."
        )
    return model


def is_of_head(model: Any, name: str) -> bool:
    """Whether a parameter is of the head on a base model of transformers, or of the pooler under it."""
    return not name.startswith(f"{model.base_model_prefix}.") or "pooler" in name


def check_read(model: nn.Module, folder: Path) -> None:
    """Refuses a model some of whose weights are not in a folder's files, where its library does not say which.

    Names may differ, as where a library joins or renames weights while it reads them, so numbers are counted.

    Raises:
        SerializationError: naming the folder, and the first weight that no file has the name of.
    """
    saved = {
        name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in safetensors_shapes(file).items()
    }
    own = {tensor.data_ptr() or name: (name, tensor) for name, tensor in model.state_dict().items()}  # ties once
    needed, there = sum(tensor.numel() for _, tensor in own.values()), sum(map(math.prod, saved.values()))
    if there < needed and getattr(model, "hf_quantizer", None) is None:
        missing = sorted(name for name, _ in own.values() if name not in saved) or ["?"]
        raise SerializationError(
            f"{folder}: the weight {missing[0]!r} is missing: its files hold {there} numbers, and a "
            f"{type(model).__name__} has {needed}."
        )
