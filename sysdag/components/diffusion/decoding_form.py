"""What a pipeline of diffusers does to its last latents before they are decoded, learnt by watching, and its inverse.

    decoded = scale * unpack(latents) + shift,  element by element

So images become latents by the decoder's own encoder and the inverse.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components.diffusion import rows, watching
from sysdag.components.diffusion.autoencoder import latents_of
from sysdag.components.diffusion.call_form import CallForm
from sysdag.components.diffusion.gathering import Gather, digit, places
from sysdag.components.diffusion.watched_steps import Misfit, run_quietly, with_samples
from sysdag.components.precision import is_half

_BASE = 16  # low, since what arrives has been scaled and shifted
_DIGITS = 6


@dataclass(frozen=True, eq=False)
class DecodingForm:
    """From latents to what the decoder gets.

    Attributes:
        decoder: the name of the part that decodes; None where the latents are pixels.
        to_latents: from the decoder's input, scale and shift taken off, to latents.
        shape: of the decoder's input for one row.
        scale, shift: () or of `shape`.
        frames_are_rows: whether the frames of a film are decoded as so many images.
        place: which tensor of the last step's result is decoded, among those of the sample's shape.
    """

    decoder: str | None
    to_latents: Gather
    shape: tuple[int, ...]
    scale: Tensor
    shift: Tensor
    place: int
    frames_are_rows: bool = False

    def latents(self, pipe: Any, pixels: Tensor) -> Tensor:
        """(1, *sample_shape), fp32, of an image or a film: pixels (c, h, w) or (c, f, h, w) in [-1, 1].

        The mode of the posterior, where the encoder gives one.

        Raises:
            Misfit: if the encoder's latents are of another shape than what the pipeline decodes.
        """
        if self.decoder is None:
            encoded = pixels[None].float()
        else:
            decoder = getattr(pipe, self.decoder)
            if self.frames_are_rows:
                batch = pixels.transpose(0, 1) if pixels.ndim == 4 else pixels[None]
            else:
                batch = (pixels[:, None] if len(self.shape) == 4 and pixels.ndim == 3 else pixels)[None]
            with torch.no_grad():
                encoded = latents_of(decoder.encode(batch.to(next(decoder.parameters()))))
            encoded = encoded[None] if self.frames_are_rows else encoded
        if tuple(encoded.shape[1:]) != self.shape:
            raise Misfit(f"latents of shape {tuple(encoded.shape[1:])} where it decodes {self.shape}")
        plain = (encoded.float() - self.shift.to(encoded.device)) / self.scale.to(encoded.device)
        return self.to_latents(plain.flatten(1))


def learn_decoding(pipe: Any, prompt: str, arguments: Mapping[str, Any], form: CallForm) -> DecodingForm:
    """How the pipeline decodes latents of one size.

    Args:
        arguments: of the pipeline's call, without guidance.

    Raises:
        Misfit: for a pipeline that does anything else.
    """
    if not watching.decoders(pipe):
        count = math.prod(form.sample_shape)
        plain = Gather(torch.arange(count), form.sample_shape)
        return DecodingForm(None, plain, form.sample_shape, torch.tensor(1.0), torch.tensor(0.0), 0)
    try:
        return _learnt(_in_full_precision(pipe, watching.decoders(pipe)), prompt, arguments, form)
    except Misfit:
        denoiser = getattr(pipe, watching.denoiser_name(pipe))
        models: list[Any] = [
            part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not denoiser
        ]
        if not any(is_half(part.dtype) for part in models if part not in watching.decoders(pipe)):
            raise
    # LCM's casts what it decodes to the dtype of its text encoder.
    return _learnt(_in_full_precision(pipe, models), prompt, arguments, form)


def _learnt(pipe: Any, prompt: str, arguments: Mapping[str, Any], form: CallForm) -> DecodingForm:
    count = math.prod(form.sample_shape)
    told = [torch.zeros(count), torch.ones(count), *(digit(count, power, _BASE) for power in range(_DIGITS))]
    told.append(torch.randn(count, generator=torch.Generator().manual_seed(0)))
    for place in (0, 1):
        decoder, seen, films = _decoded(pipe, prompt, arguments, form, torch.stack(told), place)
        if not torch.equal(seen[0], seen[-1]):
            break
    else:
        raise Misfit("what it decodes does not follow from its last sample")
    shift, scale = seen[0], seen[1] - seen[0]
    if not bool((scale != 0).all()):
        raise Misfit("what it decodes is no scaled and shifted sample")
    numbers = (seen - shift) / scale
    order = places([row.flatten().round() for row in numbers[2:-1]], _BASE)
    taken = None if order is None else Gather(order, tuple(seen.shape[1:])).inverse(form.sample_shape)
    if order is None or taken is None:
        raise Misfit("what it decodes is not its last sample in another order")
    sent = told[-1][order].reshape(shift.shape)
    if not torch.allclose(numbers[-1], sent, rtol=1e-3, atol=1e-3):
        raise Misfit("what it decodes is no scaled and shifted sample")
    return DecodingForm(decoder, taken, tuple(shift.shape), _shrunk(scale), _shrunk(shift), place, films)


def _shrunk(values: Tensor) -> Tensor:
    return values.flatten()[0].clone() if bool((values == values.flatten()[0]).all()) else values


def _in_full_precision(pipe: Any, models: Collection[nn.Module]) -> Any:
    """The pipeline with fp32 copies of these of its models, so that what is measured is not rounded."""
    made = copy.copy(pipe)
    for name, part in pipe.components.items():
        if part in models and is_half(part.dtype):
            setattr(made, name, copy.deepcopy(part).float())
    return made


def _decoded(
    pipe: Any, prompt: str, arguments: Mapping[str, Any], form: CallForm, told: Tensor, place: int
) -> tuple[str, Tensor, bool]:
    """What the decoder gets where the last sample holds each row of `told`: its name, (rows, ...), fp32, and whether
    those are images of a film."""
    together = _decoded_in_blocks(pipe, prompt, arguments, form, told, place, len(told)) if form.takes_batches else None
    made = together or _decoded_in_blocks(pipe, prompt, arguments, form, told, place, 1)
    if made is None:
        raise Misfit(f"what it decodes for {len(told)} prompts are not as many rows")
    return made


def _decoded_in_blocks(
    pipe: Any, prompt: str, arguments: Mapping[str, Any], form: CallForm, told: Tensor, place: int, size: int
) -> tuple[str, Tensor, bool] | None:
    found: list[tuple[nn.Module, Tensor]] = []
    for start in range(0, len(told), size):
        block = told[start : start + size]
        made = form.zero_answer(len(block))

        def on_denoiser(given: dict[str, Any], own: Any, made: Any = made) -> Any:
            return made

        def on_step(output: Tensor, time: Any, sample: Tensor, step: Any, block: Tensor = block) -> Any:
            return with_samples(rows.mapped_tensors(step(), Tensor.float), sample, block, place)

        def on_decode(decoder: nn.Module, latents: Tensor, decode: Any) -> Any:
            found.append((decoder, latents.detach().float().cpu().clone()))
            raise watching.Stop

        run_quietly(
            pipe, [prompt] * len(block), {**arguments, "num_inference_steps": 2},
            on_denoiser=on_denoiser, on_step=on_step, on_decode=on_decode,
        )  # fmt: skip
    seen = torch.cat([latents for _, latents in found]) if found else torch.zeros(0)
    if not len(seen) or len(seen) % len(told):
        return None
    films = len(seen) > len(told)
    if films:
        seen = seen.reshape(len(told), -1, *seen.shape[1:])
    return next(name for name, part in pipe.components.items() if part is found[0][0]), seen, films
