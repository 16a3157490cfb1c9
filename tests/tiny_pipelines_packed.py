"""Tiny pipelines whose denoiser is a transformer that takes its latents packed: a sequence of patches."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from tiny_parts import autoencoder, clip, decoder, flow, pipeline, t5

KL = dict(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
DYNAMIC = dict(
    base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, use_dynamic_shifting=True
)


def flux(guidance: bool, **schedule: Any) -> Any:
    first, second = tokenizers.clip(), tokenizers.t5()
    return diffusers.FluxPipeline(
        scheduler=flow(**schedule), vae=autoencoder(**KL), text_encoder=clip(first), tokenizer=first,
        text_encoder_2=t5(second, 12), tokenizer_2=second,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=guidance, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


@pipeline("flux-dev", height=16, width=16, max_sequence_length=12)
def flux_dev() -> Any:
    return flux(True, shift=3.0, **DYNAMIC)


@pipeline("flux-schnell", height=16, width=16, max_sequence_length=12)
def flux_schnell() -> Any:
    return flux(False, shift=1.0)


def flux_2_autoencoder() -> Any:
    return diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def flux_2_transformer(guidance: bool) -> Any:
    """Takes the states of three layers of its text encoder, side by side."""
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=guidance,
    )  # fmt: skip


@pipeline("flux2-klein", height=16, width=16, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3))
def flux_2_klein() -> Any:
    tokenizer = tokenizers.qwen3()
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(shift=3.0, **DYNAMIC), vae=flux_2_autoencoder(), tokenizer=tokenizer,
        text_encoder=decoder("Qwen3ForCausalLM", tokenizer, layers=4), transformer=flux_2_transformer(False),
        is_distilled=False,
    )  # fmt: skip


@pipeline("flux2-klein-distilled", height=16, width=16, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3))
def flux_2_klein_distilled() -> Any:
    pipe = flux_2_klein.__wrapped__()
    pipe.register_to_config(is_distilled=True)
    return pipe


@pipeline("flux2-klein-kv", height=16, width=16, max_sequence_length=32, text_encoder_out_layers=(1, 2, 3))
def flux_2_klein_kv() -> Any:
    return diffusers.Flux2KleinKVPipeline(**flux_2_klein.__wrapped__().components)


@pipeline("flux2", height=16, width=16, max_sequence_length=400, text_encoder_out_layers=(1, 2, 3))
def flux_2() -> Any:
    """With the tokenizer of its processor alone: the processor itself needs torchvision."""
    tokenizer = tokenizers.mistral(512)
    text = dict(
        model_type="mistral", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        head_dim=4, image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    return diffusers.Flux2Pipeline(
        scheduler=flow(shift=3.0, **DYNAMIC), vae=flux_2_autoencoder(), tokenizer=tokenizer,
        text_encoder=transformers.Mistral3ForConditionalGeneration(config), transformer=flux_2_transformer(True),
    )  # fmt: skip


@pipeline("chroma", height=16, width=16, max_sequence_length=12)
def chroma() -> Any:
    tokenizer = tokenizers.t5()
    return diffusers.ChromaPipeline(
        scheduler=flow(use_beta_sigmas=True), vae=autoencoder(**KL), text_encoder=t5(tokenizer, 12),
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, axes_dims_rope=(2, 2, 4), approximator_num_channels=8,
            approximator_hidden_dim=16, approximator_layers=1,
        ),
    )  # fmt: skip


def qwen_vl(tokenizer: Any, kind: str = "Qwen2_5_VL", layers: int = 2) -> Any:
    """Qwen2.5-VL (or Qwen3-VL), text and vision."""
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
        rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=8, intermediate_size=16, num_heads=2, patch_size=4, out_hidden_size=16,
        spatial_merge_size=1, temporal_patch_size=1,
    )  # fmt: skip
    if kind == "Qwen3_VL":
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
        name = "Qwen3VL"
    else:
        name = "Qwen2_5_VL"
    ids = {f"{part}_token_id": tokenizer.convert_tokens_to_ids(f"<|{part}_pad|>") for part in ("image", "video")}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def qwen_image_autoencoder() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.3, -0.2], latents_std=[2.8, 1.4, 2.3, 0.9],
    )  # fmt: skip


QWEN_SHIFT = DYNAMIC | dict(
    base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential"
)


@pipeline("qwen-image", height=16, width=16, max_sequence_length=400)
def qwen_image() -> Any:
    tokenizer = tokenizers.qwen2(1200)
    return diffusers.QwenImagePipeline(
        scheduler=flow(shift=1.0, **QWEN_SHIFT), vae=qwen_image_autoencoder(), text_encoder=qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


@pipeline("hidream", max_sequence_length=16)
def hidream() -> Any:
    """Its latents have 128² places whatever size is asked for; so the patches are large here."""
    first, second, third, fourth = tokenizers.clip(), tokenizers.clip(), tokenizers.t5(), tokenizers.llama_3()
    llama = decoder("LlamaForCausalLM", fourth, 12, attn_implementation="eager")
    return diffusers.HiDreamImagePipeline(
        scheduler=flow(shift=3.0), vae=autoencoder(levels=1, mid_block_add_attention=False, **KL),
        text_encoder=clip(first, project=6), tokenizer=first, text_encoder_2=clip(second, 12, project=10),
        tokenizer_2=second,
        text_encoder_3=t5(third, 8), tokenizer_3=third, text_encoder_4=llama, tokenizer_4=fourth,
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=16, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, caption_channels=[8, 12], text_emb_dim=16, num_routed_experts=2,
            num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(128, 128), llama_layers=[0, 1],
        ),
    )  # fmt: skip
