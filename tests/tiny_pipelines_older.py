"""Tiny pipelines that few use now, most of them of Stable Diffusion's time; they ask the most of whoever calls them."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tiny_parts import UNBUILT, autoencoder, clip, pipeline
from tiny_pipelines_stages import unclip_prior
from tiny_pipelines_unet import SCHEDULE, ddim, sdxl, stable_diffusion, unet


def as_another(kind: str, **options: Any) -> Any:
    """Stable Diffusion's parts in another of its pipelines."""
    parts = stable_diffusion(ddim(), **options).components
    return getattr(diffusers, kind)(**parts, requires_safety_checker=False)


@pipeline("sd15-sag")
def sd15_sag() -> Any:
    """Self-attention guidance: a third pass, of latents that are blurred where the second attends."""
    return as_another("StableDiffusionSAGPipeline")


@pipeline("sd15-panorama", height=16, width=32)
def sd15_panorama() -> Any:
    """Denoises overlapping crops, and averages them."""
    return as_another("StableDiffusionPanoramaPipeline")


@pipeline("sd15-ldm3d")
def sd15_ldm3d() -> Any:
    """Makes an image and its depth."""
    parts = stable_diffusion(ddim()).components | {"vae": autoencoder(in_channels=6, out_channels=6)}
    return diffusers.StableDiffusionLDM3DPipeline(**parts, requires_safety_checker=False)


@pipeline("sd15-attend-excite", token_indices=[2, 3], max_iter_to_alter=1, attn_res=(8, 8))
def sd15_attend_excite() -> Any:
    """Moves the latents by a gradient of the denoiser's attention before each step."""
    parts = stable_diffusion(ddim()).components
    parts.pop("image_encoder")
    return diffusers.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)


@pipeline("sd15-semantic")
def sd15_semantic() -> Any:
    parts = stable_diffusion(ddim()).components
    parts.pop("image_encoder")
    return diffusers.SemanticStableDiffusionPipeline(**parts, requires_safety_checker=False)


@pipeline("gligen", gligen_phrases=["square"], gligen_boxes=[[0.1, 0.1, 0.6, 0.8]])
def gligen() -> Any:
    """Given a box and what it holds, beside the text."""
    parts = stable_diffusion(ddim(), attention_type="gated").components
    parts.pop("image_encoder")
    return diffusers.StableDiffusionGLIGENPipeline(**parts, requires_safety_checker=False)


@pipeline("stable-unclip", prior_num_inference_steps=2)
def stable_unclip() -> Any:
    """Two stages: the embedding of an image, which is noised, and the image."""
    prior = {name: part for name, part in unclip_prior().items() if "image" not in name}
    prior["prior"] = prior.pop("prior_prior")
    tokenizer = tokenizers.clip()
    return diffusers.StableUnCLIPPipeline(
        **prior, image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=8),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer, text_encoder=clip(tokenizer), vae=autoencoder(), scheduler=ddim(),
        unet=unet(class_embed_type="projection", projection_class_embeddings_input_dim=16),
    )  # fmt: skip


@pipeline("amused", height=16, width=16)
def amused() -> Any:
    """Draws tokens of a codebook, and no noise; takes one generator, and no list of them."""
    tokenizer = tokenizers.clip()
    return diffusers.AmusedPipeline(
        vqvae=diffusers.VQModel(
            block_out_channels=(8,) * 3, down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, norm_num_groups=2,
            num_vq_embeddings=16, lookup_from_codebook=True,
        ),
        tokenizer=tokenizer, text_encoder=clip(tokenizer, 8, project=8),
        transformer=diffusers.UVit2DModel(
            hidden_size=16, cond_embed_dim=8, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=8,
            vocab_size=18, codebook_size=16, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2,
            num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, sample_size=4, downsample=True,
            upsample=True,
        ),
        scheduler=diffusers.AmusedScheduler(mask_token_id=17),
    )  # fmt: skip


@pipeline("text-to-video-zero", video_length=2, t0=1, t1=1)
def text_to_video_zero() -> Any:
    """Frames are an image's latents, moved; it opens with a safety checker alone."""
    parts = stable_diffusion(ddim(), checked=True).components
    parts.pop("image_encoder")
    return diffusers.TextToVideoZeroPipeline(**parts, requires_safety_checker=False)


@pipeline("animatediff-sdxl", num_frames=4)
def animatediff_sdxl() -> Any:
    parts = sdxl.__wrapped__().components | {"scheduler": diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)}
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
        motion_max_seq_length=8, use_motion_mid_block=False,
    )  # fmt: skip
    return diffusers.AnimateDiffSDXLPipeline(**parts, motion_adapter=motion)


UNBUILT["alt-diffusion"] = (
    "diffusers 0.42.1 does not open what it saved: its text encoder is written as a class of diffusers"
)
UNBUILT["unclip"] = "diffusers 0.42.1 does not open what it saved: UnCLIPTextProjModel is written as one of diffusers"
