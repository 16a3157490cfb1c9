"""A pipeline of diffusers without weights, and its calls all the same: for sizes and memory, from configs alone.

Its models are on the meta device. While the pipeline is watched they run on fake tensors and hand on zeros
of the shapes that these have; everything else that the pipeline does is done.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from sysdag.components import adapter_files
from sysdag.components.adapter_support import needs_numbers
from sysdag.components.diffusion import footprint, rows, watching, whole_folder
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.diffusion.pipeline_calls import ANY_PROMPT, PipelineCalls
from sysdag.components.footprint import make_fake

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, eq=False)
class Outline:
    """A pipeline of fake tensors that has been watched.

    Attributes:
        calls: hold the call of its denoiser for one prompt, `prompt`.
        mode: of the fake tensors.
    """

    pipeline: Pipeline
    calls: PipelineCalls
    mode: FakeTensorMode
    prompt: str = ANY_PROMPT

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one row's latents."""
        return self.calls.recorded(self.prompt, ()).form.sample_shape


def outline(
    source: Any,
    given: Mapping[str, Any],
    *,
    arguments: Callable[[Any], Mapping[str, Any]],
    peft_config: PeftConfig | None,
    adapter_folder: Path | None,
    device: str,
    dtype: torch.dtype | None,
    revision: str | None,
    **others: Any,
) -> Outline | None:
    """The outline of what `whole_folder.load` makes of the same arguments; None where a model needs its numbers.

    Args:
        arguments: of the pipeline's call, given the pipeline.
        adapter_folder: of an adapter, where there is one.
        device: `cpu` or `cuda`, where its fake tensors are.
    """
    whole = _bare(source, given, dtype, revision)
    if adapter_folder is not None and adapter_folder.is_dir():
        peft_config = adapter_files.read_config(adapter_folder)
    if peft_config is not None and needs_numbers(peft_config):
        peft_config = None
    with torch.device("meta"):
        pipeline = Pipeline.of_whole(whole, peft_config=peft_config, trains_text_encoder=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.device(device):
        make_fake(pipeline.module)
    with _running_on_shapes(whole, mode) as running:
        calls = PipelineCalls(lambda: running, arguments(whole))
        try:
            calls.recorded(ANY_PROMPT, ())
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
    return Outline(pipeline, calls, mode)


def _bare(source: Any, given: Mapping[str, Any], dtype: torch.dtype | None, revision: str | None) -> Any:
    """The pipeline with its models on the meta device."""
    if not isinstance(source, (str, Path)):
        parts = {name: _without_weights(part) for name, part in source.components.items()}
        made = copy.copy(source)
        for name, part in parts.items():
            setattr(made, name, part)
        return made
    kind = whole_folder.pipeline_class(source, revision)
    index = whole_folder.model_index(source, revision)
    parts = {name: _without_weights(part) for name, part in given.items()}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and name not in parts:
            library, class_name = entry
            if library is None:
                parts[name] = None
                continue
            described = {"library": library, "class": class_name}
            # diffusers loads its own models in fp32 where it is not told a dtype.
            known = dtype or (torch.float32 if library == "diffusers" else None)
            parts[name] = footprint.from_config(source, name, described, known, revision)
    options = {name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)}
    return kind(**parts, **options)


def _without_weights(part: Any) -> Any:
    return footprint.emptied(part) if isinstance(part, nn.Module) else part


@contextlib.contextmanager
def _running_on_shapes(pipe: Any, mode: FakeTensorMode) -> Iterator[Any]:
    """The pipeline with models that give zeros of the shapes that they would give.

    Args:
        mode: of the fake tensors that its weights have become.
    """
    kind = type(pipe)
    cpu = property(lambda self: torch.device("cpu"))
    made = copy.copy(pipe)
    made.__class__ = type(kind.__name__, (kind,), {"_execution_device": cpu, "device": cpu})
    with contextlib.ExitStack() as stack:
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                stack.enter_context(watching.shadowed(part, "forward", functools.partial(_zeros, mode)))
        yield made


def _zeros(mode: FakeTensorMode, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode, torch.no_grad():
            given = rows.mapped_tensors((args, kwargs), mode.from_tensor)
            answer = original(*given[0], **given[1])
        return rows.mapped_tensors(answer, _real)

    return forward


def _real(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, FakeTensor) else tensor
