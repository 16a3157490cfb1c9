"""The folder of a diffusion component: all of its pipeline, or what trains, beside a base that has a name.

    what is written             where the base has a name           else
    a LoRA node, saved          adapter/, the file of `lora_file`   those and every part, without the adapter
    a full node, saved          every part                          every part
    either, in a checkpoint     what trains and what was passed     as saved

Components that share a base without a name, and are saved into one parent folder, write it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sysdag.components import adapter_files
from sysdag.components.diffusion import lora_file, pipeline_folder, whole_folder
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.errors import SerializationError
from sysdag.files.hub import is_repository

_BASE_FIELDS = frozenset({"source", "revision", "variant", "dtype"})
_SHARED_FIELDS = frozenset({"component", "parts"})

# By denoiser: the component folder that it was last written to with its other parts, and their index.
_bases_written: weakref.WeakKeyDictionary[nn.Module, tuple[Path, dict[str, Any], Any]] = weakref.WeakKeyDictionary()


def save(
    pipeline: Pipeline, folder: Path, base: Mapping[str, Any] | None = None, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Writes a pipeline, or some parts of it, and its adapter.

    Args:
        base: its `source` and what it was loaded with, where that has a name.
        only: the parts that are written beside that base; None for all of them.

    Returns:
        `parts`, the index of what was written, None for a pipeline that diffusers loads whole; and `base`, what else is
        needed.

    Raises:
        SerializationError: for a part whose class is not one of diffusers or transformers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if pipeline.adapter is not None:
        adapter_files.save(pipeline.denoiser, pipeline.adapter, folder / pipeline_folder.ADAPTER)
        lora_file.write(pipeline, folder)
    if only is not None:
        chosen = {name: part for name, part in pipeline.parts.items() if name in only}
        return {"parts": pipeline_folder.save_parts(chosen, folder), "base": dict(base or {})}
    if pipeline.adapter is not None and (shared := _written_beside(pipeline, folder)) is not None:
        return {"parts": None, "base": shared}
    index = None
    if pipeline.whole is not None:
        whole_folder.save(pipeline, folder)
    else:
        index = pipeline_folder.save_parts(pipeline.parts, folder)
        pipeline_folder.write_model_index(index, folder)
    others = {name: part for name, part in pipeline.parts.items() if part is not pipeline.denoiser}
    _bases_written[pipeline.denoiser] = folder, others, index
    return {"parts": index, "base": None}


def _written_beside(pipeline: Pipeline, folder: Path) -> dict[str, Any] | None:
    written, others, index = _bases_written.get(pipeline.denoiser, (None, {}, None))
    if written is None or written.parent != folder.parent or written == folder or not written.is_dir():
        return None
    own = {name: part for name, part in pipeline.parts.items() if part is not pipeline.denoiser}
    same = own.keys() == others.keys() and all(part is others[name] for name, part in own.items())
    return {"component": written.name, "parts": index} if same and not pipeline.trains_text_encoder else None


def check_base(base: Any, folder: Path) -> None:
    """Refuses a saved `base` that is not as `save` returned it, or that has gone.

    Raises:
        SerializationError: naming it.
    """
    if base is None:
        return
    fields = set(base) if isinstance(base, Mapping) else set()
    if fields == _SHARED_FIELDS and str(base["component"]).replace("-", "_").isidentifier():
        return
    texts = [isinstance(base[name], str) for name in fields]
    if "source" not in fields or not fields <= _BASE_FIELDS or not all(texts):
        raise SerializationError(
            f"The base of a saved Diffusion has the fields {sorted(_BASE_FIELDS)}, or {sorted(_SHARED_FIELDS)}; got "
            f"{base!r}."
        )
    source = base["source"]
    if not Path(source).is_dir() and not is_repository(source):
        raise SerializationError(
            f"{str(folder)!r} holds what was trained on the base model {source!r}, and there is no such folder. Put "
            "the base back there, or write its place or its name on the Hub as the component's base.source in "
            "system.json."
        )


def load_weights(pipeline: Pipeline, folder: Path) -> None:
    """Replaces the weights that `save` wrote to a folder in place; what is not there has not been trained.

    Raises:
        SerializationError: if a part that trains is missing there, or has other tensors.
    """
    if (folder / pipeline_folder.ADAPTER).is_dir() != (pipeline.adapter is not None):
        have, want = ("an adapter", "none") if pipeline.adapter is None else ("no adapter", "one")
        raise SerializationError(f"{str(folder)!r} holds {have}, but the component has {want}.")
    models = {name: part for name, part in pipeline.parts.items() if isinstance(part, nn.Module)}
    for name in pipeline.trained:
        if not (folder / name).is_dir():
            raise SerializationError(f"{str(folder)!r} lacks the subfolder {name!r}.")
    pipeline_folder.load_models({n: part for n, part in models.items() if (folder / n).is_dir()}, folder)
    if pipeline.adapter is not None:
        adapter_files.load(pipeline.denoiser, pipeline.adapter, folder / pipeline_folder.ADAPTER)
