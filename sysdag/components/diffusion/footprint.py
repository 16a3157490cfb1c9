"""The memory of a diffusion model's part in a training step, from its configs alone: no weights are loaded.

As of a language model (see `footprint`), one micro-batch is scored on a model of fake tensors; its backward runs too,
since what convolutions need on the way is as large as what their graph keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sysdag.components import acceleration, adapter_files, adapter_weights
from sysdag.components.adapter_support import needs_numbers
from sysdag.components.diffusion import pipeline_folder
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.footprint import Footprint, bytes_of, make_fake
from sysdag.components.memory import PeakBytes, SavedBytes
from sysdag.components.precision import dtype_named, optimizer_bytes
from sysdag.files.hub import reaching

if TYPE_CHECKING:
    from peft import PeftConfig


def outline(
    source: str | Path | nn.Module,
    given: Mapping[str, Any],
    *,
    peft_config: PeftConfig | None,
    trains_text_encoder: bool,
    index: pipeline_folder.Index | None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> Pipeline:
    """The pipeline that `Pipeline.load` makes of the same arguments, its models on the meta device.

    An adapter that cannot be made there is left out.
    """
    parts = {name: emptied(part) if isinstance(part, nn.Module) else part for name, part in given.items()}
    if isinstance(source, nn.Module):
        denoiser = emptied(source)
    else:
        index = index or pipeline_folder.read_index(source, revision)
        for name in index.keys() - parts.keys():
            parts[name] = from_config(source, name, index[name], dtype, revision)
        denoiser = parts.pop(pipeline_folder.denoiser_name(parts))
        if (saved := Path(source) / pipeline_folder.ADAPTER).is_dir():
            peft_config = adapter_files.read_config(saved)
    if peft_config is not None and needs_numbers(peft_config):
        peft_config = None
    with torch.device("meta"):
        return Pipeline.load(denoiser, parts, peft_config=peft_config, trains_text_encoder=trains_text_encoder)


def emptied(model: Any) -> nn.Module:
    with torch.device("meta"):
        make = getattr(type(model), "from_config", type(model))
        return _cast(make(model.config), model.dtype)


def from_config(
    source: str | Path, name: str, entry: Mapping[str, Any], dtype: torch.dtype | None, revision: str | None
) -> Any:
    made = pipeline_folder.find_class(name, entry)
    if not issubclass(made, nn.Module):
        return pipeline_folder.load_part(source, name, entry, revision=revision)
    options: dict[str, Any] = {"subfolder": name, **({"revision": revision} if revision else {})}
    named = dtype or entry.get("dtype")
    with reaching(source), torch.device("meta"):
        if entry["library"] == "diffusers":
            model = made.from_config(made.load_config(source, **options))
        else:
            config = made.config_class.from_pretrained(source, **options)
            named = named or getattr(config, "dtype", None)
            model = made(config)
        return _cast(model, torch.float32 if named is None else dtype_named(named, f"{source}: {name}"))


def _cast(model: Any, dtype: torch.dtype) -> Any:
    # diffusers' own `to` warns of modules whose numbers it would keep in fp32; there are no numbers here.
    return model if model.dtype == dtype else nn.Module.to(model, dtype)


def of_diffusion(
    pipeline: Pipeline,
    score: Callable[[], Tensor],
    *,
    trains: bool,
    checkpoints: bool,
    new_adapter: bool,
    device: str,
    mode: FakeTensorMode | None = None,
) -> Footprint:
    """A diffusion model's.

    Args:
        pipeline: an outline.
        score: scores one micro-batch on it.
        trains: False for a model that is frozen.
        checkpoints: whether it recomputes its activations (gradient checkpointing).
        new_adapter: whether its reference is the adapter switched off, which takes no memory.
        device: `cpu` or `cuda`, whose kernels are assumed.
        mode: of the fake tensors that its weights have become already; None for an outline on the meta device.
    """
    module = pipeline.module
    if not trains:
        module.requires_grad_(False)
    module.train()
    if checkpoints and trains:
        acceleration.enable_checkpointing(module, {"use_reentrant": False})
    with mode or FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        if mode is None:
            make_fake(module)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        own = (
            [] if pipeline.adapter is None else adapter_weights.parameters(pipeline.denoiser, pipeline.adapter).values()
        )
        base = sum(map(bytes_of, pipeline.denoiser.parameters())) - sum(map(bytes_of, own))
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        saved, peak = SavedBytes(), PeakBytes(module)
        with peak, torch.set_grad_enabled(trains):
            with saved if trains else contextlib.nullcontext():
                total = score().sum()
            if trains:
                total.backward()
        copied = {
            id(parameter): parameter
            for part in module.values()
            if any(p.requires_grad for p in part.parameters()) and part is not pipeline.denoiser
            for parameter in part.parameters()
        }
        if pipeline.adapter is None and trains:
            copied |= {id(parameter): parameter for parameter in pipeline.denoiser.parameters()}
        elif trains and not new_adapter:
            copied |= {id(parameter): parameter for parameter in own}
        return Footprint(
            weights=sum(map(bytes_of, module.parameters())),
            base=0 if pipeline.adapter is None else base,
            trained=sum(map(bytes_of, trained)),
            optimizer=optimizer_bytes(trained),
            reference=sum(map(bytes_of, copied.values())),
            graph=saved.total,
            working=max(0, peak.bytes - saved.total),
        )
