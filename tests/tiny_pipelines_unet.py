"""Tiny pipelines whose denoiser is a UNet: Stable Diffusion and what came of it."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_parts import autoencoder, clip, pipeline

SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def unet(**options: Any) -> Any:
    tiny = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**(tiny | options))


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**(SCHEDULE | dict(clip_sample=False, set_alpha_to_one=False) | options))


def safety() -> dict[str, Any]:
    """A safety checker (which flags nothing: its thresholds stay at one) and its image processor."""
    vision = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    config = transformers.CLIPConfig(vision_config=vision | dict(patch_size=8), text_config={}, projection_dim=6)
    size = {"shortest_edge": 16}
    processor = transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})
    return dict(safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=processor)


def stable_diffusion(scheduler: Any, kind: str = "StableDiffusionPipeline", checked: bool = False, **options: Any) -> Any:
    tokenizer = tokenizers.clip()
    guard = safety() if checked else dict(safety_checker=None, feature_extractor=None)
    return getattr(diffusers, kind)(
        vae=autoencoder(scaling_factor=0.18215), text_encoder=clip(tokenizer), tokenizer=tokenizer,
        unet=unet(**options), scheduler=scheduler, requires_safety_checker=checked, **guard,
    )  # fmt: skip


@pipeline("sd15")
def sd15() -> Any:
    return stable_diffusion(ddim())


@pipeline("sd15-pndm")
def sd15_pndm() -> Any:
    return stable_diffusion(diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False))


@pipeline("sd15-safety")
def sd15_safety() -> Any:
    return stable_diffusion(ddim(), checked=True)


@pipeline("sd21-v")
def sd21_v() -> Any:
    return stable_diffusion(
        ddim(prediction_type="v_prediction"), use_linear_projection=True, attention_head_dim=(2, 4)
    )


@pipeline("sd15-zero-snr", guidance_rescale=0.7)
def sd15_zero_snr() -> Any:
    options = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    return stable_diffusion(ddim(**options))


@pipeline("lcm")
def lcm() -> Any:
    scheduler = diffusers.LCMScheduler(**(SCHEDULE | dict(original_inference_steps=50)))
    return stable_diffusion(scheduler, "LatentConsistencyModelPipeline", time_cond_proj_dim=8)


@pipeline("sdxl")
def sdxl() -> Any:
    first, second = tokenizers.clip(), tokenizers.clip(pad_token="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025), text_encoder=clip(first), tokenizer=first,
        text_encoder_2=clip(second, 12, project=6), tokenizer_2=second,
        unet=unet(
            cross_attention_dim=20, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 + 6 * 4, transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
    )  # fmt: skip
