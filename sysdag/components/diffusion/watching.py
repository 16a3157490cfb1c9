"""A pipeline of diffusers watched while it runs: what reaches its denoiser, its scheduler's step and its decoder.

Methods are shadowed on the objects themselves for the length of one call, so whatever the pipeline's own code does
around them stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components import precision
from sysdag.components.diffusion import rows
from sysdag.errors import PlanError

DENOISERS = ("unet", "transformer")
_OTHER_TEXTS = re.compile(r"(negative_)?prompt(_\d+)?")

OnDenoiser = Callable[[dict[str, Any], Callable[[], Any]], Any]
"""From the arguments by name, and a function that runs the denoiser on them, to the answer that the pipeline gets."""
OnStep = Callable[[Tensor, Any, Tensor, Callable[[], Any]], Any]
"""From model output, time, sample, and a function that runs the step, to the result that the pipeline gets."""
OnDecode = Callable[[nn.Module, Tensor, Callable[[], Any]], Any]
"""From the decoder, what it decodes, and a function that does it, to what the pipeline gets."""


class Stop(BaseException):
    """Leaves a pipeline's call once enough has been seen. No `Exception`, so that no pipeline catches it."""


def denoiser_name(pipe: Any) -> str:
    """Which part a pipeline samples with.

    Raises:
        PlanError: if it has no part that is called `unet` or `transformer`.
    """
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    parts = sorted(name for name, part in pipe.components.items() if isinstance(part, nn.Module))
    raise PlanError(
        f"{type(pipe).__name__} cannot be scored: it has no unet and no transformer, one of which is trained; its "
        f"models are {parts}."
    )


def parameters_of_call(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's call takes."""
    return inspect.signature(type(pipe).__call__).parameters


@contextlib.contextmanager
def shadowed(owner: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`owner.name` is `made(original)` for a while, with the original's signature."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    original = getattr(owner, name)
    own[name] = functools.wraps(original)(made(original))
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            del own[name]


def run(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    on_denoiser: OnDenoiser | None = None,
    on_step: OnStep | None = None,
    on_decode: OnDecode | None = None,
    on_other: Callable[[str], None] | None = None,
    scaled_input: bool = True,
    gradients: bool = False,
    seed: int = 0,
) -> Any:
    """One call of the pipeline, on a copy of its scheduler; None where a callback left it by `Stop`.

    Args:
        on_other: is told the name of any other model that runs.
        scaled_input: False has the scheduler's `scale_model_input` hand its sample on as it is.
        gradients: True leaves out the call's own `torch.no_grad`.
        seed: of torch's global generator meanwhile, which a few schedulers draw from; it is put back afterwards.
    """
    pipe = copy.copy(pipe)
    pipe.scheduler = scheduler = copy.deepcopy(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = inspect.unwrap(type(pipe).__call__) if gradients else type(pipe).__call__
    denoiser = getattr(pipe, denoiser_name(pipe))
    device = next(denoiser.parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        if on_denoiser is not None or _mixed(pipe, denoiser):
            made = functools.partial(_denoising, on_denoiser, denoiser)
            stack.enter_context(shadowed(denoiser, "forward", made))
        if on_other is not None:
            for name, part in pipe.components.items():
                if isinstance(part, nn.Module) and part is not denoiser:
                    stack.enter_context(shadowed(part, "forward", functools.partial(_telling, on_other, name)))
        if on_step is not None:
            stack.enter_context(shadowed(scheduler, "step", functools.partial(_stepping, on_step)))
        if on_decode is not None:
            for decoder in decoders(pipe):
                stack.enter_context(shadowed(decoder, "decode", functools.partial(_decoding, on_decode, decoder)))
        if not scaled_input and hasattr(scheduler, "scale_model_input"):
            stack.enter_context(shadowed(scheduler, "scale_model_input", _handing_on))
        processors = dict(getattr(denoiser, "attn_processors", {}))
        try:
            return call(pipe, **_with_texts_each(arguments))
        except Stop:
            # A pipeline that puts other attention processors in for its call has not put these back.
            if any(now is not processors[name] for name, now in getattr(denoiser, "attn_processors", {}).items()):
                denoiser.set_attn_processor(processors)
            return None


def _with_texts_each(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Has the call's other texts (`negative_prompt`, `prompt_2`) be those of each of several prompts."""
    prompts = arguments.get("prompt")
    if not isinstance(prompts, list):
        return dict(arguments)
    return {
        name: [value] * len(prompts) if _OTHER_TEXTS.fullmatch(name) and isinstance(value, str) else value
        for name, value in arguments.items()
    }


def decoders(pipe: Any) -> list[nn.Module]:
    """The parts that turn latents into images and back."""
    parts = (part for part in pipe.components.values() if isinstance(part, nn.Module))
    return [part for part in parts if hasattr(part, "decode") and hasattr(part, "encode")]


def _mixed(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether the denoiser has been widened to fp32 and other parts have not."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return not _is_half(denoiser) and any(map(_is_half, models))


def _is_half(model: nn.Module) -> bool:
    return any(precision.is_half(parameter.dtype) for parameter in model.parameters())


def _denoising(on_denoiser: OnDenoiser | None, denoiser: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    widened = not _is_half(denoiser)

    def whole(tensor: Tensor) -> Tensor:
        return tensor.float() if widened and precision.is_half(tensor.dtype) else tensor

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = rows.mapped_tensors(args, whole), rows.mapped_tensors(kwargs, whole)
        if on_denoiser is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound |= bound.pop(parameter.name, {})
        return on_denoiser(dict(bound), lambda: original(*args, **kwargs))

    return forward


def _stepping(on_step: OnStep, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        missing = {"model_output", "timestep", "sample"} - bound.keys()
        if missing:
            raise PlanError(f"{original.__qualname__} is called without {sorted(missing)}.")
        return on_step(bound["model_output"], bound["timestep"], bound["sample"], lambda: original(*args, **kwargs))

    return step


def _decoding(on_decode: OnDecode, decoder: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    def decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
        return on_decode(decoder, latents, lambda: original(latents, *args, **kwargs))

    return decode


def _telling(on_other: Callable[[str], None], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        on_other(name)
        return original(*args, **kwargs)

    return forward


def _handing_on(original: Callable[..., Any]) -> Callable[..., Any]:
    def scale_model_input(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        original(sample, *args, **kwargs)  # which notes that it was called
        return sample

    return scale_model_input
