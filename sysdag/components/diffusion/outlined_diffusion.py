"""What is known of a diffusion component before its weights are loaded: sizes, limits and memory, from its configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy
import torch
from torch import Tensor

from sysdag.components.adapter_support import needs_numbers
from sysdag.components.diffusion import footprint as diffusion_footprint
from sysdag.components.diffusion import whole_folder, whole_outline
from sysdag.components.diffusion.conditioning import Conditioner
from sysdag.components.diffusion.denoising_error import usual_beta
from sysdag.components.diffusion.forward_process import ForwardProcess
from sysdag.components.diffusion.images import latents_of, noise_of, read_pixels, stack_latents
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.diffusion.pipeline_calls import ANY_PROMPT, PipelineCalls
from sysdag.components.diffusion.prompt_limits import PromptLimit, tokens_lost
from sysdag.components.diffusion.scored_diffusion import ScoredDiffusion
from sysdag.components.diffusion.separate_parts import SeparateParts
from sysdag.components.diffusion.whole_pipeline import check_latents, check_size, picture
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from sysdag.components.footprint import Footprint


@dataclass(frozen=True)
class _WholeFacts:
    """Of a whole pipeline.

    Attributes:
        limits: where its tokenizers cut a prompt.
        sample_shape: of the latents of what it draws by itself; None where that is not known.
        factor: pixels of an image for each of its latents, along an axis; None likewise.
        channels: of the latents that its decoder takes.
    """

    limits: list[PromptLimit]
    sample_shape: tuple[int, ...] | None
    factor: int | None
    channels: int = 1

    @classmethod
    def of(cls, calls: PipelineCalls | None, pipeline: Pipeline | None) -> _WholeFacts:
        """Those of a watched pipeline; None for a model that has to load before it can be watched."""
        if calls is None or pipeline is None:
            return cls([], None, None)
        names = ("vae_scale_factor", "vae_scale_factor_spatial")
        factors = [getattr(calls.pipe(), name, None) for name in names]
        factor = next((factor for factor in factors if isinstance(factor, int)), None)
        shape = calls.recorded(ANY_PROMPT, ()).form.sample_shape
        return cls(calls.limits(), shape, factor, pipeline.latent_channels)


class OutlinedDiffusion(ScoredDiffusion):
    """A component that tells its sizes and its memory without its weights.

    Args:
        scored: of `ScoredDiffusion`.
    """

    def __init__(self, source: Any, **scored: Any) -> None:
        super().__init__(source, **scored)
        self._facts: _WholeFacts | None = None
        self._shapes_of_configs: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None

    def check(self, values: Sequence[Any]) -> list[Draw]:
        """See `Component`; sizes are those of the configs, and the draws have no latents."""
        for element, value in enumerate(values):
            if self.is_whole:
                check_size(picture(value, element), self._whole_facts.factor, element)
            else:
                read_pixels(value, self._shapes()[1], element=element)
        return [Draw(value) for value in values]

    def check_draws(self, draws: Sequence[Draw]) -> None:
        for element, draw in enumerate(draws):
            if self.score_noise == "recorded":
                noise_of(draw, element)
            if self.is_whole:
                check_latents(draw, self._whole_facts.sample_shape, element)
            else:
                stack_latents([draw], self._shapes()[0], first=element)

    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(C, H, W) of latents and of pixels, by the configs alone."""
        if self._shapes_of_configs is None:
            view = self if self._pipeline is not None else self._outlined()
            self._shapes_of_configs = view.sample_shape, view.pipeline.pixel_shape(view.sample_shape)
        return self._shapes_of_configs

    def cut_from(self, input: Any) -> int:
        """Tokens of a text that none of its text encoders has room for."""
        if not isinstance(input, str):
            return 0
        if not self.is_whole:
            encoder, tokenizer = self._given.get("text_encoder"), self._given.get("tokenizer")
            if encoder is None or tokenizer is None or self.condition is not None:
                return 0
            return Conditioner(None, encoder, tokenizer, max_text_length=self.max_text_length).tokens_lost(input)
        return tokens_lost(self._whole_facts.limits, input)

    @property
    def _whole_facts(self) -> _WholeFacts:
        """What is known of a whole pipeline, loaded or not; found out once."""
        if self._facts is None:
            if self._pipeline is not None:
                self._facts = _WholeFacts.of(self._whole_calls, self._pipeline)
            else:
                outline = self._whole_outline("cpu")
                known = (None, None) if outline is None else (outline.calls, outline.pipeline)
                self._facts = _WholeFacts.of(*known)
        return self._facts

    def token_counts(self, draws: Sequence[Draw]) -> list[int]:
        """Positions of a draw's latents (pixels where there is no VAE), at each of its (t, eps)."""
        if self.is_whole:
            shapes = self._sampler.shapes(draws)
            return [self.num_noise_draws * _positions(shape, self.pipeline.latent_channels) for shape in shapes]
        _, height, width = self.sample_shape
        return [self.num_noise_draws * height * width] * len(draws)

    def tokens_of_any_draw(self) -> int | None:
        if not self.is_whole:
            return self._outlined().token_counts([Draw(None)])[0]
        facts = self._whole_facts
        if facts.sample_shape is None:
            return None
        return self.num_noise_draws * _positions(facts.sample_shape, facts.channels)

    def usual_beta(self, draws: Sequence[Draw]) -> tuple[float, float] | None:
        """The published betas of Diffusion-DPO, 2000 to 5000, on the scale of this component's scores."""
        if self.convention != "sysdpo":
            return usual_beta(self.convention, 0, 0)
        view, origin = copy.copy(self), (self._source, self._given, self._loading["revision"])
        if self.is_whole and self._pipeline is None:
            view._process = ForwardProcess.of(whole_folder.scheduler_of(*origin))
        elif self._pipeline is None:
            view = self._outlined()
        elements = [latents_of(draw, 0).numel() for draw in draws if "latents" in draw.record]
        if not elements and self.is_whole:
            pixels = [picture(draw.value) for draw in draws]
            found = [whole_folder.latent_elements(*origin, (p.shape[1], p.shape[2])) for p in pixels if p.ndim == 3]
            elements = [count for count in found if count]
            if not elements and (shape := self._whole_facts.sample_shape) is not None:
                elements = [math.prod(shape)]
        elif not elements:
            elements = [math.prod(view.sample_shape)]
        if not elements:
            return None
        process, weighting = view.forward_process, view._weighting
        times = self._density.draw(4096, process.num_timesteps, generator=torch.Generator().manual_seed(0))
        weight = 1.0 if weighting is None else float(weighting(process.snr(times)).mean())
        return usual_beta(self.convention, process.num_timesteps, sum(elements) / len(elements), weight)

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        """See `Component`; reads configs. What conditions the model is taken to be text where it has a text encoder.

        None where `condition` makes the denoiser's arguments, whose sizes are its own say, for a pipeline's own text
        encoders that train, and for models or adapters that cannot be run without numbers (Lumina2, LoHa, BOFT ...).
        """
        config = self._adapter_config
        if self.condition is not None or (config is not None and needs_numbers(config)):
            return None
        if self.is_whole:
            return self._whole_footprint(tokens, trains, checkpoints, device)
        view = self._outlined()
        if trains:
            self._widen(view.pipeline)
        latents = numpy.zeros(view.sample_shape, dtype=numpy.float32)
        draws = [Draw(None, {"latents": latents})] * max(1, tokens // view.token_counts([Draw(None)])[0])

        def score() -> Tensor:
            sampler = view._sampler
            assert isinstance(sampler, SeparateParts)
            return view.score(sampler.conditioner.typical(len(draws)), draws, view.noise(draws))

        new_adapter = view.pipeline.adapter is not None and self._peft_config is not None
        found = diffusion_footprint.of_diffusion(
            view.pipeline, score, trains=trains, checkpoints=checkpoints, new_adapter=new_adapter, device=device
        )
        has_text = bool(view.pipeline.text_encoders) and not self.train_text_encoder
        return replace(found, host_cache=self.cache_bytes if self.cache and has_text else 0)

    def _whole_footprint(self, tokens: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        if self.train_text_encoder:
            return None  # what is recorded of a prompt has a graph of its own
        outline, view = self._whole_outline(device), copy.copy(self)
        if outline is None:
            return None
        view._pipeline, view._calls = outline.pipeline, outline.calls
        view.caption_dropout = 0.0  # the outline knows one prompt
        if trains:
            self._widen(view.pipeline)
        draw = Draw(None, {"latents": numpy.zeros(outline.sample_shape, dtype=numpy.float32)})
        draws = [draw] * max(1, tokens // view.token_counts([draw])[0])
        new_adapter = view.pipeline.adapter is not None and self._peft_config is not None
        found = diffusion_footprint.of_diffusion(
            view.pipeline, lambda: view.score([outline.prompt] * len(draws), draws, view.noise(draws)), trains=trains,
            checkpoints=checkpoints, new_adapter=new_adapter, device=device, mode=outline.mode,
        )  # fmt: skip
        return replace(found, host_cache=self.cache_bytes if self.cache else 0)

    def _outlined(self) -> Self:
        """This component with models of the same shapes that have no weights."""
        view = copy.copy(self)
        view._pipeline = diffusion_footprint.outline(
            self._source, self._given, peft_config=self._adapter_config, trains_text_encoder=self.train_text_encoder,
            index=self._index, **self._loading,
        )  # fmt: skip
        view._texts, view.caption_dropout = None, 0.0  # there are no numbers to keep, nor to choose by
        return view

    def _whole_outline(self, device: str) -> whole_outline.Outline | None:
        return whole_outline.outline(
            self._source, self._given, arguments=self._call_arguments, peft_config=self._peft_config,
            adapter_folder=self._saved_adapter, device=device, **self._loading,
        )  # fmt: skip


def _positions(shape: tuple[int, ...], channels: int) -> int:
    """Of latents as a whole pipeline has them: pixels of the latent picture, packed or not."""
    return max(1, math.prod(shape) // channels)
