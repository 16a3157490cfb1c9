"""A folder or Hub repository that a text-to-image pipeline of diffusers is loaded from, and written to, as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sysdag.components import loading_info
from sysdag.components.diffusion import pipeline_folder
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.errors import PlanError, SerializationError
from sysdag.files.hub import reaching
from sysdag.files.saved_files import read_strict_json


def pipeline_class(source: str | Path, revision: str | None = None) -> Any:
    """The class of diffusers that the folder is a pipeline of, if it samples from a prompt; None for another folder.

    Raises:
        PlanError: if it names classes of other libraries than diffusers and transformers.
    """
    import diffusers

    index = model_index(source, revision)
    found = getattr(diffusers, index["_class_name"], None) if isinstance(index.get("_class_name"), str) else None
    if not isinstance(found, type) or "prompt" not in inspect.signature(found.__call__).parameters:
        return None
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None and not _is_known(entry[0]):
            raise PlanError(
                f"Part {name!r} of {str(source)!r} is {entry[1]!r} of {entry[0]!r}; only classes of diffusers and "
                "transformers are loaded."
            )
    return found


def _is_known(library: Any) -> bool:
    from diffusers import pipelines

    return library in pipeline_folder.LIBRARIES or hasattr(pipelines, str(library))


def model_index(source: str | Path, revision: str | None) -> Mapping[str, Any]:
    """What the folder's or repository's `model_index.json` holds; nothing where there is none."""
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.is_dir():
        file = folder / "model_index.json"
        return read_strict_json(file) if file.exists() else {}
    with reaching(source):
        return DiffusionPipeline.load_config(source, revision=revision)


def load(
    source: str | Path,
    given: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """The pipeline, by diffusers' own `from_pretrained`: safetensors only, no code from the Hub.

    Args:
        given: parts that replace the folder's.
    """
    from diffusers import DiffusionPipeline

    with reaching(source):
        return DiffusionPipeline.from_pretrained(
            source, torch_dtype=dtype, revision=revision, variant=variant, use_safetensors=True, **given
        )


def check_read(pipe: Any, folder: Path, given: Mapping[str, Any]) -> None:
    """Refuses the pipeline of a folder that lacks some of its weights, which diffusers then draws at random.

    Args:
        given: parts that are not the folder's.

    Raises:
        SerializationError: naming the part.
    """
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in given:
            loading_info.check_read(part, folder / name)


def scheduler_of(source: Any, given: Mapping[str, Any], revision: str | None) -> Any:
    """The scheduler of a pipeline, which has no weights, or of the folder or repository that it is in."""
    import diffusers

    if "scheduler" in given or not isinstance(source, (str, Path)):
        return given.get("scheduler") or source.scheduler
    made = getattr(diffusers, model_index(source, revision)["scheduler"][1])
    pipeline_folder.check_kind("scheduler", made)
    with reaching(source):
        return made.from_pretrained(source, subfolder="scheduler", revision=revision)


def latent_elements(source: Any, given: Mapping[str, Any], revision: str | None, size: tuple[int, int]) -> int | None:
    """Numbers in the latents of an image (height, width), by its autoencoder's config; None where that does not say.

    One that patches latents leaves their number as it is.
    """
    vae = given.get("vae") or (None if isinstance(source, (str, Path)) else getattr(source, "vae", None))
    config = None if vae is None else vae.config
    if config is None and isinstance(source, (str, Path)) and (entry := model_index(source, revision).get("vae")):
        import diffusers

        kind = getattr(diffusers, str(entry[1]), None)
        with reaching(source):
            config = None if kind is None else kind.load_config(source, subfolder="vae", revision=revision)
    levels = (config or {}).get("block_out_channels") or (config or {}).get("encoder_block_out_channels")
    channels = (config or {}).get("latent_channels")
    if not levels or not channels:
        return None
    factor = 2 ** (len(levels) - 1)
    return channels * (size[0] // factor) * (size[1] // factor)


def save(pipeline: Pipeline, folder: Path) -> None:
    """Writes the pipeline as diffusers does, with every part it came with, the denoiser without its adapter.

    Raises:
        SerializationError: for a part whose class is not one of diffusers or transformers.
    """
    pipe = pipeline.now()
    for name, part in pipe.components.items():
        if part is not None and type(part).__module__.partition(".")[0] not in pipeline_folder.LIBRARIES:
            raise SerializationError(
                f"Part {name!r} is of class {type(part).__module__}.{type(part).__name__}, which diffusers and "
                "transformers could not load again."
            )
    if pipeline.adapter is not None:
        name = pipeline_folder.denoiser_name(pipeline.parts)
        setattr(pipe, name, pipeline_folder.without_adapters(pipeline.denoiser))
    pipe.save_pretrained(folder, safe_serialization=True)
