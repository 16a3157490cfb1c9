"""Tiny pipelines that make videos from texts: their latents have a frame axis."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
from tiny_parts import pipeline, t5


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
