"""Tiny pipelines that make videos, whose transformers read a language model's states."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from tiny_parts import UNBUILT, clip, decoder, flow, pipeline, t5
from tiny_pipelines_packed import qwen_vl


def hunyuan_autoencoder() -> Any:
    """Halves the sides thrice and the frames twice."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
    )


@pipeline("hunyuan-video", height=32, width=32, num_frames=5, max_sequence_length=64)
def hunyuan_video() -> Any:
    first, second = tokenizers.llama(512), tokenizers.clip(77)
    return diffusers.HunyuanVideoPipeline(
        text_encoder=decoder("LlamaModel", first, layers=4), tokenizer=first, text_encoder_2=clip(second),
        tokenizer_2=second, scheduler=flow(shift=7.0), vae=hunyuan_autoencoder(),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8,
            rope_axes_dim=(4, 2, 2),
        ),
    )  # fmt: skip


@pipeline("hunyuan-video-1.5", height=64, width=64, num_frames=5)
def hunyuan_video_1_5() -> Any:
    """Its latents come with channels of a first frame and a mask, all zero; its texts have 1000 tokens."""
    tokenizer, glyphs = tokenizers.qwen2(1200, tokenizers.PARTS), transformers.ByT5Tokenizer(extra_ids=0)
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=qwen_vl(tokenizer, layers=4).model.language_model, tokenizer=tokenizer, tokenizer_2=glyphs,
        text_encoder_2=t5(glyphs, 12), scheduler=flow(shift=7.0), guider=diffusers.ClassifierFreeGuidance(6.0),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1
        ),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 2, 2),
            target_size=64, task_type="t2v",
        ),
    )  # fmt: skip


@pipeline("kandinsky5", height=32, width=32, num_frames=5, max_sequence_length=1000)
def kandinsky_5() -> Any:
    tokenizer, second = tokenizers.qwen2(1400), tokenizers.clip(77)
    return diffusers.Kandinsky5T2VPipeline(
        scheduler=flow(shift=5.0), tokenizer=tokenizer, text_encoder=qwen_vl(tokenizer), tokenizer_2=second,
        text_encoder_2=clip(second), vae=hunyuan_autoencoder(),
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, model_dim=16, ff_dim=16,
            num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2),
        ),
    )  # fmt: skip


@pipeline("easyanimate", height=16, width=16, num_frames=5, negative_prompt="")
def easyanimate() -> Any:
    tokenizer = tokenizers.qwen2(256, tokenizers.PARTS)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0),
    )  # fmt: skip
    vision = dict(depth=1, embed_dim=8, hidden_size=16, num_heads=2, patch_size=4, temporal_patch_size=1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return diffusers.EasyAnimatePipeline(
        tokenizer=tokenizer, text_encoder=transformers.Qwen2VLForConditionalGeneration(config),
        vae=diffusers.AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=[8, 8, 8], layers_per_block=1, norm_num_groups=2,
            down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
            up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"],
        ),
        transformer=diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=4,
            sample_height=4, num_layers=2, mmdit_layers=1, time_embed_dim=8, text_embed_dim=16,
        ),
        scheduler=flow(shift=5.0),
    )  # fmt: skip


UNBUILT["ltx2"] = "draws a sound track beside the video, with an autoencoder and a vocoder of its own; not tried"
UNBUILT["helios"] = "draws chunk after chunk, each with the earlier ones among the denoiser's arguments; not tried"
UNBUILT["motif-video"] = "its text encoder is that of a T5Gemma2 with vision; not tried"
