"""How a diffusion component draws: through diffusers' pipeline as a whole, or part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy

from sysdag.components.diffusion import watching
from sysdag.components.diffusion.conditioning import Conditioner
from sysdag.components.diffusion.kept_texts import KeptTexts
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.diffusion.pipeline_calls import PipelineCalls
from sysdag.components.diffusion.pretrained_diffusion import PretrainedDiffusion
from sysdag.components.diffusion.separate_parts import SeparateParts
from sysdag.components.diffusion.whole_pipeline import WholePipeline
from sysdag.components.random_streams import RowGenerator, row_seeds
from sysdag.errors import PlanError
from sysdag.traces.cells import Draw


class SampledDiffusion(PretrainedDiffusion):
    """A component that draws images and takes given ones.

    Args:
        pretrained: of `PretrainedDiffusion`; for the others see `Diffusion`.
    """

    reads_files = True
    takes_row_seeds = True

    def __init__(
        self,
        source: str | Path | Any,
        *,
        sample_shape: Sequence[int] | None,
        num_inference_steps: int | None,
        guidance_scale: float | None,
        pipeline_kwargs: Mapping[str, Any] | None,
        score_guidance_scale: float | None,
        cache: bool,
        cache_bytes: int,
        mask_padding: bool | None,
        max_text_length: int | None,
        null_class: int | None,
        batch_size: int,
        record_noise: bool,
        **pretrained: Any,
    ) -> None:
        super().__init__(source, **pretrained)
        self._sample_shape = None if sample_shape is None else (sample_shape[0], sample_shape[1], sample_shape[2])
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.pipeline_kwargs = dict(pipeline_kwargs or {})
        self.score_guidance_scale = score_guidance_scale
        self.cache, self.cache_bytes = cache, cache_bytes
        self.mask_padding = mask_padding
        self.max_text_length = max_text_length
        self.null_class = null_class
        self.batch_size = batch_size
        self.record_noise = record_noise
        self._calls: PipelineCalls | None = None
        self._texts: KeptTexts | None = KeptTexts(cache_bytes)

    def _check_whole(self) -> None:
        given = {name: getattr(self, name) for name in ("mask_padding", "max_text_length", "null_class")}
        given["sample_shape"] = self._sample_shape
        if found := [name for name, value in given.items() if value is not None]:
            raise PlanError(
                f"{self!r}: {found} are of models that are passed as objects; a pipeline of diffusers encodes "
                "and sizes by itself. Pass pipeline_kwargs, arguments of its call, as {'height': 512, 'width': 512} or "
                "{'max_sequence_length': 256}."
            )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents, or of the pixels where there is no VAE; of models that are passed as objects."""
        if self._sample_shape is not None:
            return self._sample_shape
        config = self.pipeline.denoiser.config
        size = config.get("sample_size")
        if size is None:
            raise PlanError(f"{self!r}: the denoiser's config has no sample_size; pass sample_shape=(C, H, W).")
        return (config["in_channels"], *((size, size) if isinstance(size, int) else size))

    @property
    def _sampler(self) -> SeparateParts | WholePipeline:
        pipeline = self.pipeline
        if pipeline.whole is not None:
            return WholePipeline(self._whole_calls, pipeline.denoiser, self.batch_size)
        if self.score_guidance_scale is not None:
            raise PlanError(
                f"{self!r}: score_guidance_scale is of pipelines whose denoiser reads its guidance; of models that are "
                "passed as objects condition= makes the arguments."
            )
        conditioner = Conditioner(
            pipeline.denoiser, text_encoder=pipeline.parts.get("text_encoder"),
            tokenizer=pipeline.parts.get("tokenizer"), hook=self.condition,
            train_text_encoder=pipeline.trains_text_encoder, mask_padding=self.mask_padding,
            max_text_length=self.max_text_length, null_class=self.null_class, kept=self._texts if self.cache else None,
        )  # fmt: skip
        return SeparateParts(
            pipeline, conditioner, self.sample_shape,
            guidance_scale=1.0 if self.guidance_scale is None else self.guidance_scale,
            num_inference_steps=self.num_inference_steps or 50, batch_size=self.batch_size,
        )  # fmt: skip

    @property
    def _whole_calls(self) -> PipelineCalls:
        if self._calls is None:
            pipeline = self.pipeline
            self._calls = PipelineCalls(
                pipeline.now, self._call_arguments(pipeline.whole), self.num_inference_steps,
                pipeline.trains_text_encoder, self.cache_bytes if self.cache else 0, self.score_guidance_scale,
            )  # fmt: skip
        return self._calls

    def _call_arguments(self, whole: Any) -> dict[str, Any]:
        """What the pipeline's call gets beside prompts, generators and steps."""
        taken = watching.parameters_of_call(whole)
        given = dict(self.pipeline_kwargs)
        if self.guidance_scale is not None:
            given["guidance_scale"] = self.guidance_scale
        if unknown := sorted(given.keys() - taken.keys()):
            raise PlanError(f"{self!r}: {type(whole).__name__}'s call takes no {unknown}; it takes {list(taken)[1:]}.")
        return {**({"output_type": "pil"} if "output_type" in taken else {}), **given}

    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        """Draws an image for each input, in eval mode and without gradients.

        A draw depends on its input and its seed, or the generator and its place in `inputs`; not on the other inputs or
        the device.

        Raises:
            DataError: for an input that the model cannot be conditioned on.
        """
        seeds = row_seeds(generator, len(inputs))
        with self.pipeline.running(evaluate=True):
            draws = self._sampler.sample(inputs, seeds)
        if not self.record_noise:
            draws = [Draw(d.value, {name: kept for name, kept in d.record.items() if name != "noise"}) for d in draws]
        return draws

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        """Draws for given images: PIL images, files (path or bytes), or float arrays (C, H, W) in [-1, 1].

        Raises:
            DataError: for an unreadable image, or one of another size or number of channels than the model draws.
        """
        return self._sampler.observe(values)

    def key(self, draw: Draw) -> Any:
        return numpy.asarray(draw.record["latents"]).tobytes()

    def _frozen(self, pipeline: Pipeline) -> Self:
        view = super()._frozen(pipeline)
        if self.train_text_encoder:
            view._calls = None  # what it records is its own text encoders'
        return view

    def _forget(self) -> None:
        super()._forget()
        self._calls, self._texts = None, KeptTexts(self.cache_bytes)
