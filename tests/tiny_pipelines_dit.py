"""Tiny pipelines whose denoiser is a transformer that takes latents of channels, height and width."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from tiny_parts import autoencoder, clip, decoder, flow, pipeline, t5


@pipeline("sd3", max_sequence_length=12)
def sd3() -> Any:
    first, second, third = tokenizers.clip(), tokenizers.clip(pad_token="!"), tokenizers.t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4,
            num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=8, pooled_projection_dim=14,
            pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        scheduler=flow(shift=3.0), vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                                                   use_post_quant_conv=False),
        text_encoder=clip(first, 8, project=8), tokenizer=first,
        text_encoder_2=clip(second, 12, project=6), tokenizer_2=second,
        text_encoder_3=t5(third, 24), tokenizer_3=third,
    )  # fmt: skip


@pipeline("sd3-pag", max_sequence_length=12, pag_scale=2.0)
def sd3_pag() -> Any:
    parts = sd3.__wrapped__().components
    return diffusers.StableDiffusion3PAGPipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    )


def pixart(kind: str, sample_size: int, extra: bool, **options: Any) -> Any:
    tokenizer = tokenizers.t5(32)
    return getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=t5(tokenizer), vae=autoencoder(**options),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=2,
            sample_size=sample_size, patch_size=2, cross_attention_dim=12, caption_channels=8, norm_num_groups=2,
            use_additional_conditions=extra,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2
        ),
    )  # fmt: skip


@pipeline("pixart-alpha", max_sequence_length=20, use_resolution_binning=False)
def pixart_alpha() -> Any:
    return pixart("PixArtAlphaPipeline", 8, False, scaling_factor=0.18215)


@pipeline("pixart-alpha-1024", max_sequence_length=20, height=16, width=24, use_resolution_binning=False)
def pixart_alpha_1024() -> Any:
    """With the size and the aspect ratio as conditions, as only the checkpoints of 1024 have them."""
    return pixart("PixArtAlphaPipeline", 128, True, scaling_factor=0.18215)


@pipeline("pixart-sigma", max_sequence_length=20, use_resolution_binning=False)
def pixart_sigma() -> Any:
    return pixart("PixArtSigmaPipeline", 8, False, scaling_factor=0.13025)


@pipeline("pixart-sigma-pag", max_sequence_length=20, use_resolution_binning=False, pag_scale=2.0)
def pixart_sigma_pag() -> Any:
    return diffusers.PixArtSigmaPAGPipeline(**pixart_sigma.__wrapped__().components)


def deep_compression(channels: int = 4) -> Any:
    """An AutoencoderDC that halves the sides twice."""
    return diffusers.AutoencoderDC(
        in_channels=3, latent_channels=channels, attention_head_dim=2, scaling_factor=0.41407,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), (5,)),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), decoder_block_out_channels=(8, 8, 8),
        decoder_layers_per_block=(1, 1, 1), decoder_qkv_multiscales=((), (), (5,)),
        decoder_norm_types="rms_norm", decoder_act_fns="silu", upsample_block_type="interpolate",
        downsample_block_type="conv",
    )  # fmt: skip


def sana_transformer(**options: Any) -> Any:
    tiny = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    return diffusers.SanaTransformer2DModel(**(tiny | options))


def of_sana(kind: str, scheduler: Any, **options: Any) -> Any:
    tokenizer = tokenizers.gemma(512)
    return getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=decoder("Gemma2Model", tokenizer), vae=deep_compression(),
        transformer=sana_transformer(**options), scheduler=scheduler,
    )  # fmt: skip


@pipeline("sana", height=32, width=32, max_sequence_length=20, use_resolution_binning=False)
def sana() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
        final_sigmas_type="zero", solver_order=2, solver_type="midpoint", lower_order_final=True,
    )  # fmt: skip
    return of_sana("SanaPipeline", scheduler)


@pipeline("sana-pag", height=32, width=32, max_sequence_length=20, use_resolution_binning=False, pag_scale=2.0)
def sana_pag() -> Any:
    return of_sana("SanaPAGPipeline", flow(shift=3.0))


@pipeline("sana-sprint", height=32, width=32, max_sequence_length=20, use_resolution_binning=False)
def sana_sprint() -> Any:
    options = dict(guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0)
    return of_sana("SanaSprintPipeline", diffusers.SCMScheduler(), **options)


@pipeline("auraflow", height=16, width=16, max_sequence_length=8)
def auraflow() -> Any:
    tokenizer = tokenizers.llama()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer, kind="UMT5"), vae=autoencoder(scaling_factor=0.13025),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8,
            pos_embed_max_size=64,
        ),
        scheduler=flow(shift=1.73),
    )  # fmt: skip


@pipeline("lumina2", max_sequence_length=200)
def lumina2() -> Any:
    """Its latents have an eighth of the sides whatever the autoencoder, which halves them thrice here too."""
    tokenizer = tokenizers.gemma(512)
    return diffusers.Lumina2Pipeline(
        tokenizer=tokenizer, text_encoder=decoder("Gemma2Model", tokenizer, layers=3),
        vae=autoencoder(levels=4, scaling_factor=0.3611, shift_factor=0.1159),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 16, 16),
            cap_feat_dim=8,
        ),
        scheduler=flow(shift=6.0),
    )  # fmt: skip


@pipeline("cogview4", max_sequence_length=32)
def cogview4() -> Any:
    tokenizer = tokenizers.glm()
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer, text_encoder=decoder("GlmModel", tokenizer, pad_token_id=0),
        vae=autoencoder(levels=2, scaling_factor=1.0, shift_factor=0.0),
        transformer=diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=8, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        scheduler=flow(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
    )  # fmt: skip


@pipeline("hunyuandit", height=64, width=64, use_resolution_binning=False)
def hunyuandit() -> Any:
    """The lengths of both texts, 77 and 256, and the eightfold shrinking of the sides, are the pipeline's own."""
    first, second = tokenizers.bert(77), tokenizers.t5(256)
    bert = transformers.BertConfig(
        vocab_size=len(first), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        tokenizer=first, text_encoder=transformers.BertModel(bert), tokenizer_2=second, text_encoder_2=t5(second, 16),
        vae=autoencoder(levels=4, scaling_factor=0.13025), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
        transformer=diffusers.HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
            num_layers=2, mlp_ratio=2.0, learn_sigma=True, cross_attention_dim=8, cross_attention_dim_t5=16,
            pooled_projection_dim=8, text_len=77, text_len_t5=256,
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction",
            steps_offset=1, clip_sample=False,
        ),
    )  # fmt: skip


@pipeline("hunyuandit-pag", height=64, width=64, use_resolution_binning=False, pag_scale=2.0)
def hunyuandit_pag() -> Any:
    return diffusers.HunyuanDiTPAGPipeline(**hunyuandit.__wrapped__().components, requires_safety_checker=False)


def z_image_parts(**options: Any) -> dict[str, Any]:
    tokenizer = tokenizers.qwen3()
    return dict(
        tokenizer=tokenizer, text_encoder=decoder("Qwen3Model", tokenizer, layers=3), scheduler=flow(shift=3.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
            axes_dims=[4, 4, 4], axes_lens=[512, 16, 16], **options,
        ),
    )  # fmt: skip


@pipeline("z-image", height=16, width=16, max_sequence_length=48)
def z_image() -> Any:
    return diffusers.ZImagePipeline(**z_image_parts())


@pipeline("z-image-omni", height=16, width=16, max_sequence_length=48)
def z_image_omni() -> Any:
    """Without an image, which it may be given beside the text."""
    vision = transformers.Siglip2VisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    return diffusers.ZImageOmniPipeline(
        siglip=transformers.Siglip2VisionModel(vision),
        siglip_processor=transformers.Siglip2ImageProcessor(patch_size=4),
        **z_image_parts(siglip_feat_dim=8),
    )  # fmt: skip
