"""A diffusion or flow matching model of diffusers as a component: scored by a bound, the denoising error."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from sysdag.components.adapter_support import check_config
from sysdag.components.diffusion import component_folder, diffusion_options, pipeline_folder
from sysdag.components.diffusion.conditioning import Hook
from sysdag.components.diffusion.outlined_diffusion import OutlinedDiffusion
from sysdag.components.diffusion.timestep_density import TimestepDensity
from sysdag.errors import SerializationError
from sysdag.files.atomic import beside

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from peft import PeftConfig


class Diffusion(OutlinedDiffusion):
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
        pipeline_kwargs: what else the call of a pipeline gets. A text (`negative_prompt`) goes with every prompt; what
            the component itself gives (`prompt`, `generator`, `latents`, more than one image a prompt) is refused.
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
        diffusion_options.check_scale(
            convention, weighting, snr_gamma, caption_dropout=caption_dropout, winner_safeguard=winner_safeguard
        )
        density = TimestepDensity(timestep_sampling, logit_mean, logit_std, mode_scale)
        counts = dict(
            num_inference_steps=num_inference_steps, num_noise_draws=num_noise_draws, batch_size=batch_size,
            cache_bytes=cache_bytes,
        )  # fmt: skip
        diffusion_options.check_draws(counts, sample_shape, record_noise=record_noise, score_noise=score_noise)
        diffusion_options.check_call(
            pipeline_kwargs, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps
        )
        loading = diffusion_options.loading_options(model, dtype, revision, variant)
        parts = {"scheduler": scheduler, "text_encoder": text_encoder, "tokenizer": tokenizer, "vae": vae}
        given = {name: part for name, part in parts.items() if part is not None}
        diffusion_options.check_parts(model, given, train_text_encoder=train_text_encoder)
        super().__init__(
            model, given=given, loading=loading, peft_config=peft_config, condition=condition,
            train_text_encoder=train_text_encoder, sample_shape=sample_shape, guidance_scale=guidance_scale,
            pipeline_kwargs=pipeline_kwargs, score_guidance_scale=score_guidance_scale, cache=cache,
            mask_padding=mask_padding, max_text_length=max_text_length, null_class=null_class,
            record_noise=record_noise, density=density, convention=convention, weighting=weighting,
            snr_gamma=snr_gamma, caption_dropout=caption_dropout, winner_safeguard=winner_safeguard,
            score_noise=score_noise, **counts,
        )  # fmt: skip
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

    def _saved_options(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in diffusion_options.names() if name != "sample_shape"}
        return diffusion_options.to_saved({**own, "sample_shape": self._sample_shape})

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        """A component from what `save_pretrained` wrote; the weights load when `module` is first needed.

        Raises:
            SerializationError: if an option or a part's folder is missing or unknown, or a function cannot be had.
        """
        given = diffusion_options.from_saved(options, inspect.signature(cls.__init__).parameters)
        index, base, folder = options["parts"], options.get("base"), Path(folder)
        parts = [*(index or ()), *([pipeline_folder.ADAPTER] if options["adapter"] else ())]
        missing = [name for name in parts if not (folder / name).is_dir()]
        unnamed = index is not None and base is None and not index.keys() <= pipeline_folder.PARTS
        if missing or unnamed:
            raise SerializationError(f"{str(folder)!r} lacks {missing} of the parts {parts} of a saved Diffusion.")
        component_folder.check_base(base, folder)
        pipeline_folder.check_index(index)
        if base is None:
            made = cls(folder, **given)
            made._index, made._saved_here = index, True
            return made
        if "component" in base:
            pipeline_folder.check_index(base["parts"])
            made = cls(beside(folder, base["component"], "system.json"), **given)
            made._index, made._saved_here, made._base_component = base["parts"], True, base["component"]
        else:
            made = cls(base["source"], **{k: v for k, v in base.items() if k != "source"}, **given)
            made._saved_parts = folder, index or {}
        made._adapter_folder = folder / pipeline_folder.ADAPTER if options["adapter"] else None
        return made
