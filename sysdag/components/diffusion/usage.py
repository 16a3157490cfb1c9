"""How diffusers and peft load what a diffusion component saved, as Python for its system's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sysdag.components.diffusion import lora_file, pipeline_folder
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.files.hub import is_repository


def usage(pipeline: Pipeline, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Words, and the code below them, in which `folder` stands for the saved folder.

    Args:
        folder: where the component was saved.
        options: what saving it returned.
    """
    base = options["base"]
    if pipeline.adapter is None:
        return [] if base is not None else [("With diffusers:", _opening(pipeline, folder, "folder", {}))]
    where, loading, imports = _base(base)
    denoiser = pipeline_folder.denoiser_name(pipeline.parts)
    if pipeline.whole is None:
        model, opening = denoiser, imports + _denoiser(pipeline, where, loading)
    else:
        model, opening = f"pipe.{denoiser}", imports + _opening(pipeline, folder, where, loading)
    trained = ""
    if pipeline.trains_text_encoder:
        trained = f" The folder's {' and '.join(pipeline.text_encoders)} trained too, all of their weights."
    found = []
    if (folder / lora_file.FILE).is_file():
        found.append((f"With diffusers.{trained}", f"{opening}\n{lora_file.loading_call(pipeline)}"))
        words = "With peft:"
    else:
        reason = lora_file.no_layout(pipeline) or "it would read another adapter from its own layout"
        words = f"With peft; diffusers alone cannot load this adapter: {reason}.{trained}"
    put_on = f"{model} = PeftModel.from_pretrained({model}, f'{{folder}}/{pipeline_folder.ADAPTER}')"
    return [*found, (words, f"from peft import PeftModel\n{opening}\n{put_on}")]


def _base(base: Mapping[str, Any] | None) -> tuple[str, dict[str, str], str]:
    """Expressions for the base's place and for what it is loaded with, and what has to be imported for them."""
    if base is None:
        return "folder", {}, ""
    if "component" in base:
        return f"f'{{folder}}/../{base['component']}'", {}, ""
    source = base["source"] if is_repository(base["source"]) else Path(base["source"]).name
    loading = {name: repr(base[name]) for name in ("revision", "variant") if name in base}
    if "dtype" not in base:
        return repr(source), loading, ""
    return repr(source), loading | {"torch_dtype": f"torch.{base['dtype']}"}, "import torch\n"


def _opening(pipeline: Pipeline, folder: Path, where: str, loading: Mapping[str, str]) -> str:
    if pipeline.whole is None and not _opens_whole(folder):
        return _denoiser(pipeline, where, loading)
    given = "".join(f", {name}={value}" for name, value in loading.items())
    return f"from diffusers import DiffusionPipeline\npipe = DiffusionPipeline.from_pretrained({where}{given})"


def _denoiser(pipeline: Pipeline, where: str, loading: Mapping[str, str]) -> str:
    name, kind = pipeline_folder.denoiser_name(pipeline.parts), type(pipeline.denoiser).__name__
    given = "".join(f", {key}={value}" for key, value in {"subfolder": repr(name), **loading}.items())
    return f"from diffusers import {kind}\n{name} = {kind}.from_pretrained({where}{given})"


def _opens_whole(folder: Path) -> bool:
    """Whether the folder names a pipeline, and not only its parts."""
    file = folder / "model_index.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["_class_name"] != "DiffusionPipeline"
