"""Tiny pipelines that make videos from texts: their latents have a frame axis."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
from tiny_parts import UNBUILT, autoencoder, clip, decoder, flow, pipeline, t5
from tiny_pipelines_unet import unet


def wan_autoencoder() -> Any:
    """Halves the sides twice and the frames once."""
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.3, -0.2], latents_std=[2.8, 1.4, 2.3, 0.9], scale_factor_temporal=2,
        scale_factor_spatial=4,
    )  # fmt: skip


def wan_transformer(**options: Any) -> Any:
    tiny = dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=16, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.WanTransformer3DModel(**(tiny | options))


def wan_of(**options: Any) -> Any:
    tokenizer = tokenizers.t5(32)
    return diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer, kind="UMT5"), vae=wan_autoencoder(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=wan_transformer(), **options,
    )  # fmt: skip


@pipeline("wan", height=16, width=16, num_frames=5, max_sequence_length=16)
def wan() -> Any:
    return wan_of()


@pipeline("wan-image", height=16, width=16, num_frames=1, max_sequence_length=16)
def wan_image() -> Any:
    return wan_of()


@pipeline("wan22", height=16, width=16, num_frames=5, max_sequence_length=16)
def wan_22() -> Any:
    """Two denoisers: one for times of 875 and above, one for those below."""
    return wan_of(transformer_2=wan_transformer(num_layers=1), boundary_ratio=0.875)


@pipeline("wan22-ti2v", height=16, width=16, num_frames=5, max_sequence_length=16)
def wan_22_ti2v() -> Any:
    """Its time is a tensor with one value for each patch."""
    return wan_of(expand_timesteps=True)


@pipeline("skyreels-v2", height=16, width=16, num_frames=5, max_sequence_length=16)
def skyreels_v2() -> Any:
    tokenizer = tokenizers.t5(32)
    return diffusers.SkyReelsV2Pipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer, kind="UMT5"), vae=wan_autoencoder(),
        transformer=diffusers.SkyReelsV2Transformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
            ffn_dim=16, num_layers=2, rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
    )  # fmt: skip


@pipeline("anyflow", height=16, width=16, num_frames=5, max_sequence_length=16)
def anyflow() -> Any:
    tokenizer = tokenizers.t5(32)
    return diffusers.AnyFlowPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer, kind="UMT5"), vae=wan_autoencoder(),
        transformer=diffusers.AnyFlowTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
            ffn_dim=16, num_layers=2, rope_max_seq_len=32,
        ),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip


@pipeline("sana-video", height=32, width=32, frames=5, max_sequence_length=20, use_resolution_binning=False)
def sana_video() -> Any:
    tokenizer = tokenizers.gemma(512)
    return diffusers.SanaVideoPipeline(
        tokenizer=tokenizer, text_encoder=decoder("Gemma2Model", tokenizer), vae=wan_autoencoder(),
        transformer=diffusers.SanaVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
            sample_size=8, rope_max_seq_len=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )  # fmt: skip


@pipeline("ltx", height=32, width=32, num_frames=9, max_sequence_length=16)
def ltx() -> Any:
    tokenizer = tokenizers.t5(32)
    one, halved = (1,) * 5, (True, True, False, False)
    return diffusers.LTXPipeline(
        scheduler=flow(
            base_image_seq_len=1024, base_shift=0.95, max_image_seq_len=4096, max_shift=2.05, shift_terminal=0.1,
            use_dynamic_shifting=True,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
            layers_per_block=one, decoder_layers_per_block=one, patch_size=2,
            spatio_temporal_scaling=halved, decoder_spatio_temporal_scaling=halved,
        ),
        text_encoder=t5(tokenizer), tokenizer=tokenizer,
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
            num_layers=2, caption_channels=8,
        ),
    )  # fmt: skip


@pipeline("cogvideox", height=32, width=32, num_frames=9, max_sequence_length=16)
def cogvideox() -> Any:
    tokenizer = tokenizers.t5(32)
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer),
        vae=diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, sample_height=32,
            sample_width=32,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=8, num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=16,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
            timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            clip_sample=False,
        ),
    )  # fmt: skip


@pipeline("mochi", height=32, width=32, num_frames=7, max_sequence_length=16)
def mochi() -> Any:
    tokenizer = tokenizers.t5(32)
    return diffusers.MochiPipeline(
        scheduler=flow(invert_sigmas=True),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
        ),
        text_encoder=t5(tokenizer, 16), tokenizer=tokenizer,
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=8, text_embed_dim=16,
            time_embed_dim=8, max_sequence_length=16,
        ),
    )  # fmt: skip


@pipeline("latte", height=16, width=16, video_length=2)
def latte() -> Any:
    """Its texts have 120 tokens."""
    tokenizer = tokenizers.t5(128)
    return diffusers.LattePipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer), vae=autoencoder(scaling_factor=0.18215),
        transformer=diffusers.LatteTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
            cross_attention_dim=16, attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
            caption_channels=8, video_length=2,
        ),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )  # fmt: skip


@pipeline("animatediff", num_frames=4)
def animatediff() -> Any:
    tokenizer = tokenizers.clip()
    return diffusers.AnimateDiffPipeline(
        vae=autoencoder(scaling_factor=0.18215), text_encoder=clip(tokenizer), tokenizer=tokenizer, unet=unet(),
        motion_adapter=diffusers.MotionAdapter(
            block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2,
            motion_norm_num_groups=4, motion_max_seq_length=8,
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="linspace",
            steps_offset=1,
        ),
    )  # fmt: skip


@pipeline("text-to-video-sd", num_frames=3)
def text_to_video_sd() -> Any:
    tokenizer = tokenizers.clip()
    return diffusers.TextToVideoSDPipeline(
        vae=autoencoder(scaling_factor=0.18215), text_encoder=clip(tokenizer), tokenizer=tokenizer,
        unet=diffusers.UNet3DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    )  # fmt: skip


UNBUILT["allegro"] = "its autoencoder decodes only after `vae.enable_tiling()`, which no saved folder holds"
UNBUILT["cosmos"] = "it makes a safety checker of its own where it is given none, which needs cosmos_guardrail"
