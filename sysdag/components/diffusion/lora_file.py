"""A denoiser's LoRA adapter as the one file that diffusers' `load_lora_weights` reads.

    pytorch_lora_weights.safetensors    tensors unet.* or transformer.*; the adapter's config is in the metadata

The pipeline's class writes it, so that its layout is diffusers' own, and reads it again: a file that diffusers would
take for another adapter than this one is not left behind.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from sysdag.components import adapter_weights
from sysdag.components.diffusion import pipeline_folder
from sysdag.components.diffusion.pipeline import Pipeline

logger = logging.getLogger(__name__)

FILE = "pytorch_lora_weights.safetensors"


def write(pipeline: Pipeline, folder: Path) -> None:
    """Writes the adapter of a pipeline beside `adapter/`, where diffusers has a layout for it."""
    if (reason := no_layout(pipeline)) is not None:
        if pipeline.adapter is not None:
            logger.info("%s is not written: %s.", FILE, reason)
        return
    part, weights, config = _part(pipeline), _weights(pipeline), _config(pipeline)
    writer: Any = _writer(pipeline)
    writer.save_lora_weights(
        folder, **{f"{part}_lora_layers": weights, f"{part}_lora_adapter_metadata": config}, safe_serialization=True
    )
    if (difference := _difference(writer, folder, part, weights, config)) is not None:
        (folder / FILE).unlink()
        logger.warning(
            "%s is not written: diffusers would read another adapter from it (%s). The folder adapter/ holds it for "
            "peft.", FILE, difference,
        )  # fmt: skip


def no_layout(pipeline: Pipeline) -> str | None:
    """Why diffusers could not load the adapter of a pipeline, in words; None where it can."""
    if pipeline.adapter is None:
        return "there is no adapter"
    denoiser = pipeline.denoiser
    kind = denoiser.peft_config[pipeline.adapter].peft_type
    if getattr(kind, "value", kind) != "LORA":
        return f"diffusers loads LoRA adapters, and this is {getattr(kind, 'value', kind)}"
    if not hasattr(denoiser, "load_lora_adapter"):
        return f"diffusers' {type(denoiser).__name__} loads no LoRA"
    if other := [key for key in _weights(pipeline) if "lora" not in key]:
        return f"diffusers loads LoRA layers alone, and this adapter also holds {other[0]!r}"
    return None


def loading_call(pipeline: Pipeline) -> str:
    """The call by which diffusers puts the file in `folder` on the pipeline `pipe`, or on a denoiser of its own."""
    part = _part(pipeline)
    if _has_loader(pipeline):
        return f"pipe.load_lora_weights(folder, weight_name={FILE!r})"
    model = part if pipeline.whole is None else f"pipe.{part}"
    return f"{model}.load_lora_adapter(folder, prefix={part!r}, weight_name={FILE!r})"


def _part(pipeline: Pipeline) -> str:
    return pipeline_folder.denoiser_name(pipeline.parts)


def _has_loader(pipeline: Pipeline) -> bool:
    kind = type(pipeline.whole)
    return hasattr(kind, "save_lora_weights") and hasattr(kind, "load_lora_weights")


def _writer(pipeline: Pipeline) -> Any:
    """The class whose `save_lora_weights` writes the file: the pipeline's, or one that writes the denoiser alone."""
    from diffusers import loaders

    if _has_loader(pipeline):
        return type(pipeline.whole)
    of_unet, of_transformer = loaders.StableDiffusionLoraLoaderMixin, loaders.QwenImageLoraLoaderMixin
    return of_unet if _part(pipeline) == "unet" else of_transformer


def _weights(pipeline: Pipeline) -> dict[str, Tensor]:
    assert pipeline.adapter is not None
    own = adapter_weights.inner_state(pipeline.denoiser, pipeline.adapter)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in own.items()}


def _config(pipeline: Pipeline) -> dict[str, Any]:
    """The adapter's config as plain values, in a fixed order, ready to be put on a model whose weights are read."""
    config = pipeline.denoiser.peft_config[pipeline.adapter].to_dict()
    if isinstance(config.get("init_lora_weights"), str):
        config["init_lora_weights"] = True  # some starts would change the base's weights again
    config["lora_dropout"] = 0.0  # `load_lora_weights` leaves it in train mode, so that images would be drawn with it
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.loads(json.dumps(plain))


def _difference(writer: Any, folder: Path, part: str, weights: dict[str, Tensor], config: dict[str, Any]) -> str | None:
    """How what diffusers reads from the file differs from what was written; None where it does not."""
    from peft import LoraConfig

    try:
        # Some classes give alphas between the two, for layouts of other libraries.
        read, *_, metadata = writer.lora_state_dict(
            folder, weight_name=FILE, local_files_only=True, return_lora_metadata=True
        )
        LoraConfig(**{key.removeprefix(f"{part}."): value for key, value in (metadata or {}).items()})
    except Exception as error:  # noqa: BLE001 - each class reads in a way of its own, and whatever it raises is told
        return f"{type(error).__name__}: {error}"
    mine = {f"{part}.{key}": tensor for key, tensor in weights.items()}
    if read.keys() != mine.keys():
        return f"it has {sorted(read.keys() ^ mine.keys())[0]!r}"
    if changed := [key for key, tensor in mine.items() if not tensor.equal(read[key])]:
        return f"it changes {changed[0]!r}"
    if metadata != {f"{part}.{key}": value for key, value in config.items()}:
        return "it has another config"
    return None
