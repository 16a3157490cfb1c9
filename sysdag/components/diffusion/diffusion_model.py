"""A diffusion or flow matching model of diffusers as a component: scored by a bound, the denoising error."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components import adapter, adapter_files, hooks
from sysdag.components.adapter_support import check_config, needs_numbers
from sysdag.components.component import Component, named_source
from sysdag.components.diffusion import component_folder, pipeline_folder, watching, whole_folder, whole_outline
from sysdag.components.diffusion import footprint as diffusion_footprint
from sysdag.components.diffusion.conditioning import Conditioner, Hook
from sysdag.components.diffusion.denoising_error import (
    CONVENTIONS,
    denoising_errors,
    error_weights,
    margin_scores,
    usual_beta,
)
from sysdag.components.diffusion.forward_process import DiffusionNoise, ForwardProcess
from sysdag.components.diffusion.images import latents_of, noise_of, read_pixels, stack_latents
from sysdag.components.diffusion.kept_texts import KeptTexts
from sysdag.components.diffusion.loss_weighting import Weighting, check_weighting, min_snr
from sysdag.components.diffusion.pipeline import Pipeline
from sysdag.components.diffusion.pipeline_calls import PipelineCalls
from sysdag.components.diffusion.prompt_limits import PromptLimit, tokens_lost
from sysdag.components.diffusion.separate_parts import SeparateParts
from sysdag.components.diffusion.timestep_density import TimestepDensity
from sysdag.components.diffusion.usage import usage
from sysdag.components.diffusion.whole_pipeline import WholePipeline, check_prompts, picture
from sysdag.components.precision import dtype_named
from sysdag.errors import PlanError, SerializationError
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import PeftConfig

    from sysdag.components.footprint import Footprint

_FUNCTIONS = ("condition", "weighting")
_OPTIONS = (
    "sample_shape", "num_inference_steps", "guidance_scale", "convention", "num_noise_draws", "train_text_encoder",
    "mask_padding", "max_text_length", "null_class", "batch_size", "pipeline_kwargs", "score_guidance_scale",
    "snr_gamma", "timestep_sampling", "logit_mean", "logit_std", "mode_scale", "caption_dropout", "winner_safeguard",
    "cache", "cache_bytes", "record_noise", "score_noise",
)  # fmt: skip


# Systems saved by earlier versions have these and no others, which are then the constructor's defaults.
_FIRST_OPTIONS = frozenset({
    "sample_shape", "num_inference_steps", "guidance_scale", "convention", "num_noise_draws", "train_text_encoder",
    "mask_padding", "max_text_length", "null_class", "batch_size",
})  # fmt: skip


class Diffusion(Component):
    """Any UNet or transformer of diffusers that maps a sample (n, C, H, W) to a prediction (n, C or 2C, H, W).

    The node's function returns the conditioning: text (str), a float vector (D,) or (L, D) that the model attends to, a
    class label (int), or None for an unconditional model. The value is a PIL image; the draw's record holds the
    `latents`, fp32 (C, H, W), exactly as they were sampled (pixels in [-1, 1] where there is no VAE).

    **Scale of the score.** log p has no closed form; a margin takes the policy's score minus the reference's at the
    same times t ~ U{0..T-1} and noise eps. With N = C*H*W and e = |target - prediction|^2 summed over the N elements:

    | convention        | score              | source                                                                |
    |-------------------|--------------------|-----------------------------------------------------------------------|
    | `"sysdpo"`        | -T omega(snr_t) e  | SysDPO, arXiv 2502.17721; omega = 1 unless `weighting` is given       |
    | `"diffusion-dpo"` | -0.5 e / N         | published code of Wallace et al. 2023, arXiv 2311.12908; beta 2000-5000 |
    | `"diffusers"`     | -e / N             | diffusers' Diffusion-DPO script, which leaves the 0.5 out             |

    So "sysdpo" at beta is "diffusion-dpo" at 2 T N beta: give this node its own beta beside language models. By
    Jensen's inequality the loss at random (t, eps) bounds the loss at their expected margin from above; averaging
    `num_noise_draws` of them inside the sigmoid tightens the bound.

    **Times.** `timestep_sampling` draws t from a density p in place of the uniform one, as diffusers' scripts do (see
    `TimestepDensity`). It is no importance sampling: nothing is divided by p, so the objective changes as if omega were
    multiplied by T p(t), in training and in evaluation. Policy and reference, winner and loser share t and eps.

    Args:
        model: a model object of diffusers, or the path or Hub id of a pipeline folder (`unet/` or `transformer/`,
            `scheduler/`, optional `text_encoder/`, `tokenizer/`, `vae/`), read when `module` is first needed. Parts
            that are passed replace those of the folder.
        scheduler: samples, and its training schedule defines the score. Needed with a model object.
        text_encoder, tokenizer: for text; the denoiser attends to its `last_hidden_state`.
        vae: images to latents and back; without one the model works on pixels.
        peft_config: puts a new adapter on the denoiser; only it trains, and the reference is the adapter switched off.
            A LoraConfig without target_modules adapts the layers that diffusers' scripts for the family do.
        condition: makes the denoiser's keyword arguments from the list of inputs, for models such as SD3 that need
            pooled embeddings; tensors have the batch as first axis. Guidance calls it with a list of None.
        sample_shape: (C, H, W) of what is sampled; by default from the denoiser's config.
        num_inference_steps, guidance_scale: of sampling. None is the pipeline's own (guidance 1, which is none, of
            models that are passed as objects). Scores are never guided.
        pipeline_kwargs: what else the call of a pipeline gets.
        score_guidance_scale: of a distilled model that reads its guidance as an argument (Flux dev), the one that its
            scores tell it; None is that of sampling. diffusers' scripts call it `--guidance_scale`.
        convention, weighting: see above; `weighting` maps the signal-to-noise ratios alpha_t^2 / sigma_t^2 to omega, or
            is "min_snr" (Hang et al. 2023, arXiv 2303.09556) at `snr_gamma`: min(snr, gamma) over snr for epsilon, over
            snr + 1 for v-prediction, over 1 for samples.
        num_noise_draws: how many (t, eps) are averaged in each score.
        timestep_sampling, logit_mean, logit_std, mode_scale: see above; "uniform", "logit_normal" or "mode".
        caption_dropout: probability that a pair is scored under the empty text instead of its own, in train mode only
            (of `module`); part of the noise, so the same for policy and reference, winner and loser.
        winner_safeguard: mu in [0, 1] of Diffusion-SDPO (see `sysdag.engine.safeguard`): scales the loser's gradient so
            that, to first order, the winner's error does not grow. None leaves it; the published runs take 0.9.
        cache: keeps what frozen text encoders made of a text, on the host: most `cache_bytes` of it. Latents are in
            the draws' records anyway.
        train_text_encoder: trains the text encoder too; by default it is frozen, as the VAE always is.
        mask_padding, max_text_length, null_class: see `Conditioner`.
        batch_size: most samples drawn side by side.
        record_noise: whether the draw's record also holds the `noise`, fp32 of the latents' shape, that sampling began
            with.
        score_noise: "drawn": eps is drawn anew for each score. "recorded": it is the draw's recorded noise, so that x_t
            lies on the line from the image to the noise that it was sampled from (Lu et al. 2026, arXiv 2605.09433);
            winner and loser then share their times alone. For flow matching, whose paths are nearly straight, and
            draws that were sampled with record_noise=True.
        dtype, revision, variant: of the weights that are loaded from a folder or the Hub. Without a dtype, weights that
            train are fp32.

    Raises:
        PlanError: for options that are unknown, out of range, or that do not go together.
    """

    likelihood = "bound"
    reads_files = True

    def __init__(
        self,
        model: str | Path | nn.Module | DiffusionPipeline,
        *,
        scheduler: Any = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        vae: nn.Module | None = None,
        peft_config: PeftConfig | None = None,
        condition: Hook | None = None,
        sample_shape: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        pipeline_kwargs: Mapping[str, Any] | None = None,
        score_guidance_scale: float | None = None,
        convention: str = "sysdpo",
        weighting: Callable[[Tensor], Tensor] | str | None = None,
        snr_gamma: float = 5.0,
        num_noise_draws: int = 1,
        timestep_sampling: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        caption_dropout: float = 0.0,
        winner_safeguard: float | None = None,
        cache: bool = True,
        cache_bytes: int = 2**30,
        train_text_encoder: bool = False,
        mask_padding: bool | None = None,
        max_text_length: int | None = None,
        null_class: int | None = None,
        batch_size: int = 64,
        record_noise: bool = False,
        score_noise: str = "drawn",
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        if convention not in CONVENTIONS:
            raise PlanError(f"convention must be one of {list(CONVENTIONS)}, got {convention!r}.")
        if weighting is not None and convention != "sysdpo":
            raise PlanError(f"weighting belongs to convention='sysdpo'; {convention!r} has none.")
        check_weighting(weighting, snr_gamma)
        for name, value in (("caption_dropout", caption_dropout), ("winner_safeguard", winner_safeguard)):
            if value is not None and not 0 <= value <= 1:
                raise PlanError(f"{name} must be in [0, 1], got {value}.")
        self._density = TimestepDensity(timestep_sampling, logit_mean, logit_std, mode_scale)
        counts = dict(
            num_inference_steps=num_inference_steps, num_noise_draws=num_noise_draws, batch_size=batch_size,
            cache_bytes=cache_bytes,
        )  # fmt: skip
        if any(count is not None and count < 1 for count in counts.values()):
            raise PlanError(f"Diffusion needs counts of at least 1, got {counts}.")
        if sample_shape is not None and (len(sample_shape) != 3 or min(sample_shape) < 1):
            raise PlanError(f"sample_shape must be (C, H, W), got {tuple(sample_shape)}.")
        if score_noise not in ("drawn", "recorded"):
            raise PlanError(f"score_noise must be 'drawn' or 'recorded', got {score_noise!r}.")
        if score_noise == "recorded" and not record_noise:
            raise PlanError("score_noise='recorded' needs the noise of what is sampled; pass record_noise=True too.")
        dtype = None if dtype is None else dtype_named(dtype, "Diffusion")
        loading = {"dtype": dtype, "revision": revision, "variant": variant}
        if not isinstance(model, (str, Path)) and any(value is not None for value in loading.values()):
            raise PlanError(f"{list(loading)} choose what is loaded, but the model is an object; leave them out.")
        if isinstance(model, nn.Module):
            if scheduler is None:
                raise PlanError("Diffusion(model) was given a model object; pass its scheduler too.")
            if (text_encoder is None) != (tokenizer is None):
                raise PlanError("text_encoder and tokenizer go together; pass both or neither.")
            if train_text_encoder and text_encoder is None:
                raise PlanError("train_text_encoder=True needs a text_encoder.")
        parts = {"scheduler": scheduler, "text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae}
        self._source: Any = model
        self._given = {name: part for name, part in parts.items() if part is not None}
        self._loading: dict[str, Any] = loading
        self._index: pipeline_folder.Index | None = None
        self._peft_config = peft_config
        self._pipeline: Pipeline | None = None
        self._base_owner: Diffusion | None = None
        self._process: ForwardProcess | None = None
        self._calls: PipelineCalls | None = None
        self._is_whole: bool | None = None
        self._limits: list[PromptLimit] | None = None
        self._adapter_folder: Path | None = None
        self._saved_parts: tuple[Path, pipeline_folder.Index] | None = None
        self._base_component: str | None = None
        self._saved_here = False
        self._shapes_of_configs: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None
        self._sample_shape = None if sample_shape is None else (sample_shape[0], sample_shape[1], sample_shape[2])
        self.condition = condition
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.pipeline_kwargs = dict(pipeline_kwargs or {})
        self.convention = convention
        self.weighting = weighting
        self.snr_gamma = snr_gamma
        self.num_noise_draws = num_noise_draws
        self.timestep_sampling, self.logit_mean = timestep_sampling, logit_mean
        self.logit_std, self.mode_scale = logit_std, mode_scale
        self.caption_dropout = caption_dropout
        self.winner_safeguard = winner_safeguard
        self.score_guidance_scale = score_guidance_scale
        self.cache, self.cache_bytes = cache, cache_bytes
        self._texts: KeptTexts | None = KeptTexts(cache_bytes)
        self._residuals: list[Tensor] | None = None
        self.train_text_encoder = train_text_encoder
        self.mask_padding = mask_padding
        self.max_text_length = max_text_length
        self.null_class = null_class
        self.batch_size = batch_size
        self.record_noise = record_noise
        self.score_noise = score_noise
        if peft_config is not None:
            check_config(peft_config, repr(self))

    def __repr__(self) -> str:
        is_object = not isinstance(self._source, (str, Path))
        shown = [type(self._source).__name__ if is_object else repr(str(self._source))]
        shown += [f"{name}={type(part).__name__}" for name, part in self._given.items() if name != "tokenizer"]
        shown += ["adapter"] if self._peft_config is not None else []
        shown += [] if self.num_inference_steps is None else [f"steps={self.num_inference_steps}"]
        shown += [] if self.guidance_scale is None else [f"guidance={self.guidance_scale:g}"]
        shown += [f"scale={self.convention}"]
        shown += ["frozen"] if self._pipeline is not None and self._pipeline.frozen else []
        return f"Diffusion({', '.join(shown)})"

    @property
    def base_model(self) -> str | None:
        return named_source(self._source)

    @property
    def pipeline(self) -> Pipeline:
        """The parts, loaded on first access."""
        if self._pipeline is None:
            self._pipeline = self._loaded()
        return self._pipeline

    def _loaded(self) -> Pipeline:
        options: dict[str, Any] = dict(
            peft_config=self._peft_config, trains_text_encoder=self.train_text_encoder,
            adapter_folder=self._adapter_folder,
        )  # fmt: skip
        if self._base_owner is not None:
            base = self._base_owner.pipeline
            if base.whole is not None:
                return Pipeline.of_whole(base.whole, **options)
            given = {name: part for name, part in base.parts.items() if part is not base.denoiser}
            return Pipeline.load(base.denoiser, given, **options)
        with self._naming_its_base():
            given = {**self._given, **self._loaded_parts()}
            if not self.is_whole:
                return Pipeline.load(self._source, given, index=self._index, **self._loading, **options)
            whole = self._source
            if isinstance(whole, (str, Path)):
                options["adapter_folder"] = self._adapter_folder or Path(whole) / pipeline_folder.ADAPTER
                whole = whole_folder.load(whole, given, **self._loading)
        return Pipeline.of_whole(whole, **options)

    def _loaded_parts(self) -> dict[str, Any]:
        """Those that were saved beside the base."""
        folder, index = self._saved_parts or (Path(), {})
        return {name: pipeline_folder.load_part(folder, name, entry) for name, entry in index.items()}

    @contextlib.contextmanager
    def _naming_its_base(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._saved_parts is None:
                raise
            raise PlanError(
                f"{self!r} was saved without its base model {str(self._source)!r}, which cannot be loaded "
                f"({type(error).__name__}: {error})."
            ) from error

    @property
    def is_whole(self) -> bool:
        """Whether everything is left to a pipeline of diffusers that samples from a prompt."""
        if self._base_owner is not None:
            return self._base_owner.is_whole
        if self._is_whole is None:
            named = isinstance(self._source, (str, Path))
            if named and self.condition is None and self._index is None:
                with self._naming_its_base():
                    self._is_whole = whole_folder.pipeline_class(self._source, self._loading["revision"]) is not None
            else:
                self._is_whole = not named and not isinstance(self._source, nn.Module)
            if self._is_whole:
                self._check_whole()
        return self._is_whole

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
    def module(self) -> nn.Module:
        """Denoiser, text encoder and VAE in one module; frozen parts require no gradient and stay in eval mode."""
        return self.pipeline.module

    @property
    def forward_process(self) -> ForwardProcess:
        """alpha_t, sigma_t and what is predicted, at the scheduler's training resolution."""
        if self._process is None:
            self._process = ForwardProcess.of(self.pipeline.parts["scheduler"])
        return self._process

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

    def sample(self, inputs: Sequence[Any], *, generator: torch.Generator | None = None) -> list[Draw]:
        """Draws an image for each input, in eval mode and without gradients.

        A draw depends on the generator, its input and its place in `inputs`, not on the other inputs or the device.

        Raises:
            DataError: for an input that the model cannot be conditioned on.
        """
        place = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (len(inputs),), generator=generator, device=place).tolist()
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

    def check(self, values: Sequence[Any]) -> list[Draw]:
        """See `Component`; sizes are those of the configs, and the draws have no latents."""
        for element, value in enumerate(values):
            if self.is_whole:
                picture(value, element)
            else:
                read_pixels(value, self._shapes()[1], element=element)
        return [Draw(value) for value in values]

    def check_draws(self, draws: Sequence[Draw]) -> None:
        for element, draw in enumerate(draws):
            if self.score_noise == "recorded":
                noise_of(draw, element)
            if self.is_whole:
                latents_of(draw, element)
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
        if self._limits is None:
            if self._pipeline is not None:
                self._limits = self._whole_calls.limits()
            else:
                outline = self._whole_outline("cpu")
                self._limits = [] if outline is None else outline.calls.limits()
        return tokens_lost(self._limits, input)

    def key(self, draw: Draw) -> Any:
        return numpy.asarray(draw.record["latents"]).tobytes()

    def noise(self, draws: Sequence[Draw], generator: torch.Generator | None = None) -> DiffusionNoise:
        """Times t in 0..T-1 and standard normal eps for each draw, or its recorded noise, on the CPU; in train mode,
        which texts are dropped.

        Pass the same to policy and reference, and to the winner and the loser of a pair. The first k of n draws get the
        noise that k draws would get.
        """
        noise = DiffusionNoise.draw(
            self._sampler.shapes(draws), self.num_noise_draws, self.forward_process.num_timesteps, generator,
            density=self._density, dropout=self.caption_dropout, drops=self.module.training,
        )  # fmt: skip
        return noise if self.score_noise == "drawn" else self._with_recorded(noise, draws)

    def _with_recorded(self, noise: DiffusionNoise, draws: Sequence[Draw]) -> DiffusionNoise:
        if self.forward_process.prediction != "flow":
            raise PlanError(
                f"{self!r}: score_noise='recorded' takes the way from noise to image for a line, which it is nearly in "
                f"flow matching; {type(self.pipeline.parts['scheduler']).__name__} predicts "
                f"{self.forward_process.prediction}."
            )
        return noise.replaced([noise_of(draw, element) for element, draw in enumerate(draws)])

    def fit_noise(
        self, noise: DiffusionNoise, draws: Sequence[Draw], generator: torch.Generator | None = None
    ) -> DiffusionNoise:
        """The same times for other draws; the same eps for those of the same shape, or each one's recorded noise."""
        if self.score_noise == "recorded":
            return self._with_recorded(noise, draws)
        return noise.fitted(self._sampler.shapes(draws), generator)

    def errors(self, inputs: Sequence[Any], draws: Sequence[Draw], noise: DiffusionNoise) -> Float[Tensor, " n"]:
        """|target - prediction|^2 summed over a draw's C*H*W elements, fp32; with several (t, eps), their mean.

        The target is that of the scheduler's prediction type (see `forward_process`); of a model that learns its
        variance too, the first C channels are compared.
        """
        return self._errors(inputs, draws, noise).mean(1)

    def token_counts(self, draws: Sequence[Draw]) -> list[int]:
        """Positions of a draw's latents (pixels where there is no VAE), at each of its (t, eps)."""
        if self.is_whole:
            shapes = self._sampler.shapes(draws)
            return [self.num_noise_draws * _positions(shape, self.pipeline) for shape in shapes]
        _, height, width = self.sample_shape
        return [self.num_noise_draws * height * width] * len(draws)

    def tokens_of_any_draw(self) -> int | None:
        if not self.is_whole:
            return self._outlined().token_counts([Draw(None)])[0]
        outline = self._whole_outline("cpu")
        if outline is None:
            return None
        return self.num_noise_draws * _positions(outline.sample_shape, outline.pipeline)

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
        return diffusion_footprint.of_diffusion(
            view.pipeline, score, trains=trains, checkpoints=checkpoints, new_adapter=new_adapter, device=device
        )

    def _whole_outline(self, device: str) -> whole_outline.Outline | None:
        return whole_outline.outline(
            self._source, self._given, arguments=self._call_arguments, peft_config=self._peft_config,
            adapter_folder=self._saved_adapter, device=device, **self._loading,
        )  # fmt: skip

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
        return diffusion_footprint.of_diffusion(
            view.pipeline, lambda: view.score([outline.prompt] * len(draws), draws, view.noise(draws)), trains=trains,
            checkpoints=checkpoints, new_adapter=new_adapter, device=device, mode=outline.mode,
        )  # fmt: skip

    @property
    def _saved_adapter(self) -> Path | None:
        """Where an adapter of its own would be that it gets back; None for a model that is no folder's."""
        if not isinstance(self._source, (str, Path)):
            return None
        return self._adapter_folder or Path(self._source) / pipeline_folder.ADAPTER

    @property
    def _adapter_config(self) -> PeftConfig | None:
        saved = self._saved_adapter
        if saved is None:
            return self._peft_config
        return adapter_files.read_config(saved) if saved.is_dir() else self._peft_config

    def _outlined(self) -> Diffusion:
        """This component with models of the same shapes that have no weights."""
        view = copy.copy(self)
        view._pipeline = diffusion_footprint.outline(
            self._source, self._given, peft_config=self._adapter_config, trains_text_encoder=self.train_text_encoder,
            index=self._index, **self._loading,
        )  # fmt: skip
        view._texts, view.caption_dropout = None, 0.0  # there are no numbers to keep, nor to choose by
        return view

    @property
    def base_key(self) -> Hashable:
        if self._base_owner is not None:
            return self._base_owner.base_key
        if isinstance(self._source, (str, Path)):
            return id(self)
        source = self._source
        return id(source if isinstance(source, nn.Module) else getattr(source, watching.denoiser_name(source)))

    def share_base(self, others: Iterable[Component]) -> None:
        """Puts its adapter on the pipeline of one of the others that names the same folder, loaded alike."""
        if self._pipeline is None and self._base_owner is None and self._named_base() is not None:
            same = (o for o in others if isinstance(o, Diffusion) and o._named_base() == self._named_base())
            self._base_owner = next(same, None)

    def _named_base(self) -> Any:
        """What tells whether two that put a new adapter each on a denoiser load the same; None for others."""
        has_adapter = self._peft_config is not None or self._adapter_folder is not None
        named = isinstance(self._source, (str, Path)) and not self._saved_here
        if not named or not has_adapter or self._given or self._saved_parts_names or self.train_text_encoder:
            return None
        folder = Path(self._source)
        return str(folder.resolve() if folder.exists() else self._source), tuple(self._loading.values())

    @property
    def _saved_parts_names(self) -> list[str]:
        return [] if self._saved_parts is None else list(self._saved_parts[1])

    def connect(self, components: Mapping[str, Component]) -> None:
        """Shares the loaded base of the component that it was saved with."""
        owner = components.get(self._base_component or "")
        if owner is not self and isinstance(owner, Diffusion):
            self._base_owner = owner

    def prepare_training(self) -> None:
        """Has what trains by itself be fp32, where it was loaded and no dtype was asked for.

        Raises:
            PlanError: for a `weighting` that is not defined for the model.
        """
        self._widen(self.pipeline)
        if isinstance(self.weighting, str):
            _ = self._weighting

    def _widen(self, pipeline: Pipeline) -> None:
        if isinstance(self._source, (str, Path)) and self._loading["dtype"] is None:
            pipeline.widen([name for name in pipeline.trained if name not in self._given])

    def score(self, inputs: Sequence[Any], draws: Sequence[Draw], noise: Any = None) -> Float[Tensor, " n"]:
        """The draw's term in a margin, before the reference's is subtracted, on the scale of `convention`.

        Raises:
            PlanError: without noise, or with noise of another number of draws.
        """
        weighting = self._weighting
        residuals: dict[int, Tensor] | None = {} if self.winner_safeguard is not None else None
        errors = self._errors(inputs, draws, noise, residuals)
        if residuals is not None:
            self._residuals = [residuals[row] for row in range(len(draws))]
            if weighting is not None:
                weights = error_weights(weighting, self.forward_process, noise, errors.detach())
                shaped = [own.reshape(-1, *[1] * (r.ndim - 1)) for own, r in zip(weights, self._residuals, strict=True)]
                self._residuals = [own * each for own, each in zip(shaped, self._residuals, strict=True)]
        return margin_scores(
            errors, noise, self.forward_process, convention=self.convention, weighting=weighting,
            elements=[math.prod(shape) for shape in self._sampler.shapes(draws)],
        )  # fmt: skip

    @property
    def _weighting(self) -> Weighting | None:
        """omega; of min-SNR by what the model predicts.

        Raises:
            PlanError: if it is not defined for this model.
        """
        if not isinstance(self.weighting, str):
            return self.weighting
        return min_snr(self.forward_process.prediction, self.snr_gamma)

    def take_residuals(self) -> list[Tensor] | None:
        taken, self._residuals = self._residuals, None
        return taken

    @property
    def drops_inputs(self) -> bool:
        return self.caption_dropout > 0

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
            if not elements and (outline := self._whole_outline("cpu")) is not None:
                elements = [math.prod(outline.sample_shape)]
        elif not elements:
            elements = [math.prod(view.sample_shape)]
        if not elements:
            return None
        process, weighting = view.forward_process, view._weighting
        times = self._density.draw(4096, process.num_timesteps, generator=torch.Generator().manual_seed(0))
        weight = 1.0 if weighting is None else float(weighting(process.snr(times)).mean())
        return usual_beta(self.convention, process.num_timesteps, sum(elements) / len(elements), weight)

    def _errors(
        self,
        inputs: Sequence[Any],
        draws: Sequence[Draw],
        noise: Any,
        residuals: dict[int, Tensor] | None = None,
    ) -> Float[Tensor, "n M"]:
        if not isinstance(noise, DiffusionNoise) or not len(noise) == len(draws) == len(inputs):
            got = f"that of {len(noise)} draws" if isinstance(noise, DiffusionNoise) else type(noise).__name__
            raise PlanError(
                f"{self!r} scores {len(inputs)} inputs and {len(draws)} draws at the noise that noise(draws) made for "
                f"as many, got {got}."
            )
        if not draws:
            return torch.zeros(0, 1, device=self.device)
        sampler = self._sampler
        if noise.dropped is not None:
            check_prompts(inputs, f"that caption_dropout={self.caption_dropout:g} may drop")
            inputs = ["" if drops else text for text, drops in zip(inputs, noise.dropped.tolist(), strict=True)]

        def predict(rows: list[int], noisy: Tensor, times: Tensor) -> Tensor:
            chosen = [inputs[row] for row in rows], [draws[row] for row in rows]
            return sampler.predictions(*chosen, len(noisy) // len(rows), noisy, times)

        with self.pipeline.running():
            return denoising_errors(
                predict, self.forward_process, sampler.latents(draws), noise, self.device, residuals
            )

    def reference(self) -> Diffusion:
        """This component frozen as it is now; its scores carry no gradient.

        A new adapter is switched off, in weights shared with this component. Otherwise (a full model, or an adapter
        that has been trained) what trains is copied. What is frozen is shared.
        """
        return self if self.pipeline.frozen else self._frozen(self.pipeline.reference())

    def moving_reference(self) -> Diffusion:
        """As `reference`, with a frozen copy of a new adapter on the same denoiser."""
        return self if self.pipeline.frozen else self._frozen(self.pipeline.reference(moves=True))

    def _frozen(self, pipeline: Pipeline) -> Diffusion:
        view = copy.copy(self)
        view._pipeline, view.winner_safeguard = pipeline, None
        if self.train_text_encoder:
            view._calls = None  # what it records is its own text encoders'
        return view

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the denoiser's adapter, where it has one, and of a text encoder that trains with it."""
        pipeline = self.pipeline
        if pipeline.adapter is None:
            return super().own_parameters()
        found = {} if pipeline.adapter_off else adapter.parameters(pipeline.denoiser, pipeline.adapter)
        own = {f"denoiser.{name}": parameter for name, parameter in found.items()}
        for encoder in pipeline.text_encoders if self.train_text_encoder else ():
            own |= {f"{encoder}.{name}": p for name, p in pipeline.parts[encoder].named_parameters()}
        return own

    def fresh(self) -> Component:
        if not isinstance(self._source, (str, Path)) or (self.train_text_encoder and "text_encoder" in self._given):
            return super().fresh()
        made = copy.copy(self)
        made._pipeline = made._process = made._calls = None
        made._texts = KeptTexts(self.cache_bytes)
        return made

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        """Writes each part to the subfolder that its own library loads, and an adapter to `adapter/`.

        A LoRA node whose base has a name writes its adapter alone, for peft and for diffusers (see `component_folder`).

        Raises:
            SerializationError: for a reference, a part that is no class of diffusers or transformers, or a `condition`
                or `weighting` that cannot be imported again.
        """
        alone = self.pipeline.adapter is not None and not self._given and not self._saved_parts_names
        return self._save(Path(folder), only_what_trains=alone and not self.train_text_encoder)

    def save_checkpoint(self, folder: Path) -> Mapping[str, Any]:
        """As `save_pretrained`, without what is frozen and can be had by name."""
        return self._save(Path(folder), only_what_trains=True)

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [] if self._pipeline is None else usage(self._pipeline, folder, options)

    def _save(self, folder: Path, *, only_what_trains: bool) -> Mapping[str, Any]:
        pipeline = self.pipeline
        if pipeline.frozen:
            raise SerializationError(f"{self!r} is a reference; save the component that it was made from.")
        given = {name: getattr(self, name) for name in _FUNCTIONS}
        functions = {n: value if isinstance(value, str) else hooks.describe(n, value) for n, value in given.items()}
        options = {name: getattr(self, name) for name in _OPTIONS if name != "sample_shape"}
        options["sample_shape"] = self._sample_shape
        base, only = None, None
        if only_what_trains and isinstance(self._source, (str, Path)) and not self._saved_here:
            loading = {name: value for name, value in self._loading.items() if value is not None}
            if "dtype" in loading:
                loading["dtype"] = str(loading["dtype"]).removeprefix("torch.")
            base = {"source": str(self._source), **loading}
            only = {*pipeline.trained, *self._given, *self._saved_parts_names}
        written = component_folder.save(pipeline, folder, base, only)
        return {**written, "adapter": pipeline.adapter is not None, **functions, **options}

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        """A component from what `save_pretrained` wrote; the weights load when `module` is first needed.

        Raises:
            SerializationError: if an option or a part's folder is missing or unknown, or a function cannot be had.
        """
        defaults = inspect.signature(cls.__init__).parameters
        later = {name: defaults[name].default for name in _OPTIONS if name not in _FIRST_OPTIONS}
        options = {"base": None, **later, **options}
        known = {"parts", "base", "adapter", *_FUNCTIONS, *_OPTIONS}
        if unknown := sorted(options.keys() ^ known):
            raise SerializationError(
                f"These are not the options of a saved Diffusion: {unknown} are unknown or missing."
            )
        saved = {name: options.get(name) for name in _FUNCTIONS}
        functions: dict[str, Any] = {n: v if isinstance(v, str) else hooks.load(n, v) for n, v in saved.items()}
        given = {name: options[name] for name in _OPTIONS}
        index, base, folder = options["parts"], options["base"], Path(folder)
        parts = [*(index or ()), *([pipeline_folder.ADAPTER] if options["adapter"] else ())]
        missing = [name for name in parts if not (folder / name).is_dir()]
        unnamed = index is not None and base is None and not index.keys() <= pipeline_folder.PARTS
        if missing or unnamed:
            raise SerializationError(f"{str(folder)!r} lacks {missing} of the parts {parts} of a saved Diffusion.")
        component_folder.check_base(base, folder)
        if base is None:
            made = cls(folder, **functions, **given)
            made._index, made._saved_here = index, True
            return made
        if "component" in base:
            made = cls(folder.parent / base["component"], **functions, **given)
            made._index, made._saved_here, made._base_component = base["parts"], True, base["component"]
        else:
            made = cls(base["source"], **{k: v for k, v in base.items() if k != "source"}, **functions, **given)
            made._saved_parts = folder, index or {}
        made._adapter_folder = folder / pipeline_folder.ADAPTER if options["adapter"] else None
        return made

    def load_weights(self, folder: Path) -> None:
        """Replaces every tensor that was saved of denoiser, adapter, text encoder and VAE in place, bit by bit.

        Raises:
            SerializationError: if a part that trains is missing in the folder, or one has other tensors.
        """
        component_folder.load_weights(self.pipeline, Path(folder))


def _positions(shape: tuple[int, ...], pipeline: Pipeline) -> int:
    """Of latents as a whole pipeline has them: pixels of the latent picture, packed or not."""
    return max(1, math.prod(shape) // pipeline.latent_channels)
