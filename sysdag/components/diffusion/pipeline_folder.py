"""A diffusers pipeline folder: one subfolder for each part, in the layout of the library that the part belongs to.

    unet/ or transformer/    the denoiser
    scheduler/               its noise schedule
    text_encoder/, tokenizer/, vae/, adapter/    where there are any
    model_index.json         the class of each part, as diffusers writes it

Classes are looked up by name in diffusers and transformers and nowhere else; weights are safetensors.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sysdag.components import adapter as adapters
from sysdag.components import adapter_files, adapter_weights
from sysdag.components.loading_info import complete, without_new
from sysdag.components.precision import dtype_named
from sysdag.errors import PlanError, SerializationError, shown
from sysdag.files.hub import reaching
from sysdag.files.saved_files import read_strict_json

DENOISERS = ("unet", "transformer")
PARTS = frozenset({*DENOISERS, "scheduler", "text_encoder", "tokenizer", "vae"})
ADAPTER = "adapter"
LIBRARIES = ("diffusers", "transformers")
_PIPELINES = {
    ("UNet2DModel",): "DDPMPipeline",
    ("DiTTransformer2DModel", "AutoencoderKL"): "DiTPipeline",
    ("UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL"): "StableDiffusionPipeline",
}
# Parts that StableDiffusionPipeline asks for and may be null.
_OPTIONAL = {"StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder")}

Index = Mapping[str, Mapping[str, Any]]
"""For each part its `library`, `class` and, for models, `dtype`."""


def read_index(source: str | Path, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """Which parts the folder or Hub repository has, and their classes.

    Raises:
        PlanError: if it holds no denoiser or no scheduler.
    """
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        index = {name: _class_from_config(folder / name) for name in sorted(PARTS) if (folder / name).is_dir()}
    else:
        with reaching(source):
            config = DiffusionPipeline.load_config(source, revision=revision)
        index = {name: config[name] for name in sorted(PARTS) if (config.get(name) or (None,))[0] is not None}
    if "scheduler" not in index or not any(name in index for name in DENOISERS):
        raise PlanError(
            f"{str(source)!r} is no pipeline folder: expected the subfolders scheduler/ and unet/ or transformer/, "
            f"found {sorted(index)}."
        )
    return {name: {"library": library, "class": class_name} for name, (library, class_name) in index.items()}


def _class_from_config(folder: Path) -> tuple[str, str]:
    if folder.name == "tokenizer":
        return "transformers", "AutoTokenizer"
    file = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    config = read_strict_json(folder / file)
    if "_class_name" in config:
        return "diffusers", config["_class_name"]
    return "transformers", config["architectures"][0]


def denoiser_name(parts: Mapping[str, Any]) -> str:
    """The denoiser's subfolder among the names of parts: `unet` or `transformer`."""
    return next(name for name in DENOISERS if name in parts)


def find_class(name: str, entry: Mapping[str, Any]) -> Any:
    """The class of a part; only diffusers, its pipelines and transformers are searched.

    Raises:
        SerializationError: for another library or a name that it does not have.
    """
    library, class_name = entry["library"], entry["class"]
    found = getattr(_module(library), class_name, None)
    if not isinstance(found, type):
        raise SerializationError(
            f"Part {name!r} is {class_name!r} of {library!r}; only classes of diffusers and transformers are loaded."
        )
    return found


def _module(library: Any) -> Any:
    """diffusers, transformers, or a package of pipelines in diffusers, which some parts' classes are in."""
    if library in LIBRARIES:
        return importlib.import_module(library)
    from diffusers import pipelines

    found = getattr(pipelines, library, None) if isinstance(library, str) and library.isidentifier() else None
    inside = isinstance(found, ModuleType) and found.__name__ == f"{pipelines.__name__}.{library}"
    return found if inside else None


def check_index(index: Any) -> None:
    """Refuses what a saved system tells of its parts unless each is a class of the kind that `save_parts` writes.

    Raises:
        SerializationError: naming the part.
    """
    for name, entry in (index or {}).items():
        fields = entry.keys() if isinstance(entry, Mapping) else set()
        texts = isinstance(entry, Mapping) and all(isinstance(value, str) for value in entry.values())
        if not texts or not {"library", "class"} <= fields <= {"library", "class", "dtype"} or not name.isidentifier():
            raise SerializationError(
                f"Part {shown(name)} must have a library, a class and a dtype, got {shown(entry)}."
            )
        if "dtype" in entry:
            dtype_named(entry["dtype"], f"Part {name!r}")
        check_kind(name, find_class(name, entry))


def check_kind(name: str, made: Any) -> None:
    """Refuses a class of diffusers or transformers that is no model, scheduler, tokenizer or processor.

    Raises:
        SerializationError: naming the part.
    """
    from diffusers import ConfigMixin
    from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.image_processing_base import ImageProcessingMixin

    known = (ConfigMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, ImageProcessingMixin)
    if made is not AutoTokenizer and not issubclass(made, known):
        raise SerializationError(f"Part {name!r} is of class {made.__name__}, which is no part of a pipeline.")


def load_part(
    source: str | Path,
    name: str,
    entry: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """One part, by its own library's `from_pretrained`: safetensors only, no code from the Hub.

    Args:
        dtype: of a model's weights; by default the one that the index records, else the library's own default.
    """
    made = find_class(name, entry)
    recorded = entry.get("dtype")
    options: dict[str, Any] = {"subfolder": name, **({"revision": revision} if revision else {})}
    if issubclass(made, nn.Module):
        options |= {"use_safetensors": True, **({"variant": variant} if variant else {})}
        dtype = dtype or (recorded and dtype_named(recorded, f"Part {name!r}"))
        if dtype is not None:
            options[_dtype_option(made)] = dtype
    elif entry["class"] == "AutoTokenizer":
        options["trust_remote_code"] = False
    check_kind(name, made)
    with reaching(source):
        if not issubclass(made, nn.Module):
            return made.from_pretrained(source, **options)
        loaded = made.from_pretrained(source, output_loading_info=True, **options)
    if recorded:  # what `save_parts` wrote says in which dtype
        return complete(loaded, Path(source) / name)
    return without_new(loaded, f"Part {name!r} of {str(source)!r}")


def save_parts(parts: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Writes every part to its subfolder, models without the adapters that they carry.

    Returns:
        The index of what was written, ready for JSON.

    Raises:
        SerializationError: for a part whose class is not one of diffusers or transformers.
    """
    index = {}
    for name, part in parts.items():
        entry = _entry(part)
        if find_class(name, entry) is not type(part):
            raise SerializationError(
                f"Part {name!r} is of class {type(part).__module__}.{type(part).__name__}, which diffusers and "
                "transformers could not load again."
            )
        index[name] = entry | ({"dtype": _dtype_name(part)} if isinstance(part, nn.Module) else {})
    for name, part in parts.items():
        carries = isinstance(part, nn.Module) and adapters.names(part)
        (without_adapters(part) if carries else part).save_pretrained(folder / name)
    return index


def write_model_index(index: Index, folder: Path) -> None:
    """Writes `model_index.json`, as diffusers does for a pipeline of these parts."""
    import diffusers

    classes = {entry["class"] for entry in index.values() if "dtype" in entry}
    pipeline = next((made for needed, made in _PIPELINES.items() if set(needed) == classes), "DiffusionPipeline")
    model_index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    model_index |= {name: [entry["library"], entry["class"]] for name, entry in index.items()}
    model_index |= {name: [None, None] for name in _OPTIONAL.get(pipeline, ())}
    (folder / "model_index.json").write_text(json.dumps(model_index, indent=2) + "\n")


def _entry(part: Any) -> dict[str, str]:
    """A part's class as diffusers names it: one that only a pipeline's folder has, by that folder."""
    import diffusers

    kind = type(part)
    path = kind.__module__.split(".")
    inside = path[:2] == ["diffusers", "pipelines"] and not hasattr(diffusers, kind.__name__)
    return {"library": path[2] if inside else path[0], "class": kind.__name__}


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _dtype_option(made: type) -> str:
    from diffusers import ModelMixin

    return "torch_dtype" if issubclass(made, ModelMixin) else "dtype"


def without_adapters(model: Any) -> Any:
    """A model of the same weights that carries no adapter; it is only to be written, never run."""
    with torch.device("meta"):
        bare = type(model).from_config(model.config)
    # Buffers that are not saved stay on the meta device.
    bare.load_state_dict(adapter_weights.base_state(model), assign=True)
    return bare


def load_models(models: Mapping[str, nn.Module], folder: Path) -> None:
    """Replaces models' own weights in place by those in the subfolders of their names, adapters aside.

    Raises:
        SerializationError: if one there has other tensors.
    """
    for name, part in models.items():
        entry = _entry(part)
        made = find_class(name, entry)
        options: dict[str, Any] = {"subfolder": name, "use_safetensors": True}
        options[_dtype_option(made)] = getattr(torch, _dtype_name(part))
        loaded = made.from_pretrained(folder, output_loading_info=True, **options)
        saved = complete(loaded, folder / name).state_dict()
        own = adapter_weights.base_state(part)
        adapter_files.check_same_tensors(own, saved, folder / name)
        for key, tensor in own.items():
            tensor.copy_(saved[key])
