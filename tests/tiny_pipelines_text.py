"""Tiny pipelines of the years after Flux, whose transformers read a language model's states."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from tiny_parts import UNBUILT, autoencoder, clip, decoder, flow, pipeline, t5
from tiny_pipelines_packed import (
    DYNAMIC,
    KL,
    QWEN_SHIFT,
    flux_2_autoencoder,
    qwen_image_autoencoder,
    qwen_vl,
)
from tiny_pipelines_video import wan_autoencoder


@pipeline("ovis-image", height=16, width=16, max_sequence_length=32)
def ovis_image() -> Any:
    tokenizer = tokenizers.qwen3()
    return diffusers.OvisImagePipeline(
        scheduler=flow(shift=3.0, **DYNAMIC), vae=autoencoder(**KL), tokenizer=tokenizer,
        text_encoder=decoder("Qwen3Model", tokenizer),
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
        ),
    )  # fmt: skip


@pipeline("bria", height=32, width=32, max_sequence_length=16)
def bria() -> Any:
    tokenizer = tokenizers.t5(32)
    return diffusers.BriaPipeline(
        scheduler=flow(shift=3.0, **DYNAMIC), vae=autoencoder(**KL), tokenizer=tokenizer, text_encoder=t5(tokenizer),
        transformer=diffusers.BriaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=8, axes_dims_rope=[2, 2, 4],
        ),
    )  # fmt: skip


@pipeline("bria-fibo", height=64, width=64, max_sequence_length=32)
def bria_fibo() -> Any:
    """Its empty prompt is the token 128000, which the text encoder must know; it takes all of its layers."""
    tokenizer = tokenizers.llama_3(64)
    return diffusers.BriaFiboPipeline(
        scheduler=flow(shift=3.0, **DYNAMIC), vae=wan_autoencoder(), tokenizer=tokenizer,
        text_encoder=decoder("SmolLM3ForCausalLM", tokenizer, layers=2, vocab_size=128001),
        transformer=diffusers.BriaFiboTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=[2, 2, 4], text_encoder_dim=8,
        ),
    )  # fmt: skip


@pipeline("longcat-image", height=16, width=16, enable_prompt_rewrite=False)
def longcat_image() -> Any:
    """With a tokenizer in the place of its processor, which needs torchvision and is for rewriting prompts alone."""
    tokenizer = tokenizers.qwen2(1024)
    return diffusers.LongCatImagePipeline(
        scheduler=flow(shift=3.0, **DYNAMIC), vae=autoencoder(16, **KL), tokenizer=tokenizer, text_processor=tokenizer,
        text_encoder=qwen_vl(tokenizer),
        transformer=diffusers.LongCatImageTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[2, 2, 4],
        ),
    )  # fmt: skip


@pipeline("krea2", height=16, width=16, max_sequence_length=32)
def krea2() -> Any:
    tokenizer = tokenizers.qwen2(512)
    return diffusers.Krea2Pipeline(
        scheduler=flow(shift=1.0, **DYNAMIC), vae=qwen_image_autoencoder(), tokenizer=tokenizer,
        text_encoder=qwen_vl(tokenizer, "Qwen3_VL", 3).model, text_encoder_select_layers=(1, 2, 3),
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=16, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
        ),
    )  # fmt: skip


@pipeline("nucleus-moe-image", height=16, width=16, max_sequence_length=256, return_index=-2)
def nucleus_moe_image() -> Any:
    """With a tokenizer in the place of its processor, which needs torchvision."""
    tokenizer = tokenizers.qwen2(512, tokenizers.PARTS)
    return diffusers.NucleusMoEImagePipeline(
        scheduler=flow(shift=1.0, **QWEN_SHIFT), vae=qwen_image_autoencoder(), processor=tokenizer,
        text_encoder=qwen_vl(tokenizer, "Qwen3_VL", 3),
        transformer=diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            num_key_value_heads=1, joint_attention_dim=16, axes_dims_rope=(2, 2, 4), num_experts=2,
            moe_intermediate_dim=8, dense_moe_strategy="all_moe", capacity_factors=[1.0, 1.0],
        ),
    )  # fmt: skip


@pipeline("ernie-image", height=16, width=16)
def ernie_image() -> Any:
    tokenizer = tokenizers.mistral(64)
    text = dict(
        model_type="ministral3", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        head_dim=4, image_size=16, patch_size=8,
    )  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    return diffusers.ErnieImagePipeline(
        scheduler=flow(shift=4.0), vae=flux_2_autoencoder(), tokenizer=tokenizer,
        text_encoder=transformers.Mistral3Model(config),
        transformer=diffusers.ErnieImageTransformer2DModel(
            hidden_size=16, num_attention_heads=2, num_layers=2, ffn_hidden_size=16, in_channels=16, out_channels=16,
            text_in_dim=8, rope_axes_dim=(4, 2, 2),
        ),
    )  # fmt: skip


@pipeline("lumina", height=32, width=32, max_sequence_length=32)
def lumina() -> Any:
    tokenizer = tokenizers.gemma(64)
    return diffusers.LuminaPipeline(
        scheduler=flow(), vae=autoencoder(levels=4, scaling_factor=0.13025), tokenizer=tokenizer,
        text_encoder=decoder("GemmaModel", tokenizer, layers=3),
        transformer=diffusers.LuminaNextDiT2DModel(
            sample_size=4, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2, num_kv_heads=1,
            multiple_of=8, cross_attention_dim=8,
        ),
    )  # fmt: skip


@pipeline("cogview3plus", max_sequence_length=32)
def cogview3plus() -> Any:
    tokenizer = tokenizers.t5(64)
    return diffusers.CogView3PlusPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer), vae=autoencoder(scaling_factor=1.0),
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=8,
            time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0,
            timestep_spacing="trailing", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            clip_sample=False,
        ),
    )  # fmt: skip


def prx_pixel() -> Any:
    """Over pixels; its noise is twice the usual."""
    tokenizer = tokenizers.qwen2(64)
    return diffusers.PRXPixelPipeline(
        scheduler=flow(shift=3.0), tokenizer=tokenizer, text_encoder=decoder("Qwen3Model", tokenizer),
        default_sample_size=8, prompt_max_tokens=16,
        transformer=diffusers.PRXTransformer2DModel(
            in_channels=3, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
        ),
    )  # fmt: skip


if diffusers.utils.is_ftfy_available():
    pipeline("prx-pixel", height=8, width=8, use_resolution_binning=False)(prx_pixel)
else:
    UNBUILT["prx-pixel"] = "it reads its prompts with ftfy, without a check whether that is installed"
UNBUILT["prx"] = (
    "diffusers 0.42.1 does not open what it saved: the text encoder's configuration is written without the one that it "
    "is read from (T5GemmaConfig); it needs ftfy, too, without a check"
)


@pipeline("hunyuan-image", height=64, width=64)
def hunyuan_image() -> Any:
    """Its texts have 1000 tokens, and 128 bytes of what the prompt quotes."""
    tokenizer, glyphs = tokenizers.qwen2(1100), transformers.ByT5Tokenizer(extra_ids=0)
    return diffusers.HunyuanImagePipeline(
        scheduler=flow(shift=5.0), tokenizer=tokenizer, text_encoder=qwen_vl(tokenizer, layers=3),
        tokenizer_2=glyphs, text_encoder_2=t5(glyphs, 12),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1,
            spatial_compression_ratio=8, sample_size=64, scaling_factor=0.75,
        ),
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=12, rope_axes_dim=(4, 4),
        ),
        guider=diffusers.AdaptiveProjectedMixGuidance(), ocr_guider=diffusers.AdaptiveProjectedMixGuidance(),
    )  # fmt: skip


@pipeline("kandinsky5-image")
def kandinsky_5_image() -> Any:
    """Its sizes are a list, all of a million pixels for an autoencoder that shrinks eightfold; this one does not."""
    tokenizer, second = tokenizers.qwen2(1100), tokenizers.clip(77)
    return diffusers.Kandinsky5T2IPipeline(
        scheduler=flow(shift=3.0), tokenizer=tokenizer, text_encoder=qwen_vl(tokenizer), tokenizer_2=second,
        text_encoder_2=clip(second), vae=autoencoder(levels=1, mid_block_add_attention=False, scaling_factor=0.3611),
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, patch_size=(1, 2, 2),
            model_dim=8, ff_dim=16, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2),
        ),
    )  # fmt: skip


@pipeline("ideogram4", height=16, width=16, max_sequence_length=32, guidance_schedule=(7.0, 3.0))
def ideogram_4() -> Any:
    """Two denoisers, the second for no text; the states of 13 of 36 layers are the text's."""
    tokenizer = tokenizers.qwen2(64, tokenizers.PARTS)
    tiny = dict(
        in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, intermediate_size=16, adaln_dim=8,
        llm_features_dim=16 * 13, mrope_section=(2, 1, 1),
    )  # fmt: skip
    return diffusers.Ideogram4Pipeline(
        scheduler=flow(), vae=flux_2_autoencoder(), tokenizer=tokenizer,
        text_encoder=qwen_vl(tokenizer, "Qwen3_VL", 36).model,
        transformer=diffusers.Ideogram4Transformer2DModel(**tiny),
        unconditional_transformer=diffusers.Ideogram4Transformer2DModel(**tiny),
    )  # fmt: skip


UNBUILT |= dict.fromkeys(
    ("qwen-image-2.1", "bria-fibo2", "dreamlite"), "its processor (Qwen3VLProcessor) needs torchvision"
)
UNBUILT["omnigen"] = "its own processor of texts, OmniGenMultiModalProcessor, needs torchvision"
UNBUILT["glm-image"] = "a language model draws tokens of the image before the denoiser runs; not tried"
UNBUILT["joyimage"] = "only edits: it needs an image"
