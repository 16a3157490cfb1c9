"""Tiny pipelines whose denoiser is a UNet: Stable Diffusion and what came of it."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import is_sentencepiece_available
from tiny_parts import UNBUILT, autoencoder, clip, pipeline, t5

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


def stable_diffusion(
    scheduler: Any, kind: str = "StableDiffusionPipeline", checked: bool = False, **options: Any
) -> Any:
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
    return stable_diffusion(ddim(prediction_type="v_prediction"), use_linear_projection=True, attention_head_dim=(2, 4))


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


@pipeline("sd15-pag", pag_scale=2.0)
def sd15_pag() -> Any:
    return stable_diffusion(ddim(), "StableDiffusionPAGPipeline")


@pipeline("sdxl-pag", pag_scale=2.0)
def sdxl_pag() -> Any:
    return diffusers.StableDiffusionXLPAGPipeline(**sdxl.__wrapped__().components)


@pipeline("deepfloyd-if")
def deepfloyd_if() -> Any:
    """Over pixels, with learned variances and dynamic thresholding; the length of texts, 77, is the pipeline's own."""
    tokenizer = tokenizers.t5(77)
    return diffusers.IFPipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer), safety_checker=None, feature_extractor=None, watermarker=None,
        requires_safety_checker=False,
        unet=unet(
            in_channels=3, out_channels=6, encoder_hid_dim=8, encoder_hid_dim_type="text_proj",
            addition_embed_type="text", addition_embed_type_num_heads=2, cross_attention_dim=12, act_fn="gelu",
            down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
            time_embedding_act_fn="gelu", class_embed_type=None, only_cross_attention=True,
            mid_block_scale_factor=1.414,
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
            dynamic_thresholding_ratio=0.95, sample_max_value=1.5, prediction_type="epsilon",
        ),
    )  # fmt: skip


def movq(**options: Any) -> Any:
    """Kandinsky's autoencoder, whose norms take the latents, in 32 groups; halves the sides thrice, as is reckoned."""
    tiny = dict(
        in_channels=3, out_channels=3, latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, norm_num_groups=32,
        block_out_channels=(32,) * 4, layers_per_block=1, norm_type="spatial",
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return diffusers.VQModel(**(tiny | options))


@pipeline("kandinsky3", height=64, width=64)
def kandinsky_3() -> Any:
    tokenizer = tokenizers.t5(128)
    return diffusers.Kandinsky3Pipeline(
        tokenizer=tokenizer, text_encoder=t5(tokenizer), movq=movq(),
        unet=diffusers.Kandinsky3UNet(
            in_channels=4, time_embedding_dim=8, groups=2, attention_head_dim=4, layers_per_block=2,
            block_out_channels=(8, 16, 32, 64), cross_attention_dim=8, encoder_hid_dim=8,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
    )  # fmt: skip


@pipeline("latent-diffusion", height=32, width=32)
def latent_diffusion() -> Any:
    """Without an attention mask, and with an unconditional pass of its own; its texts have 77 tokens."""
    tokenizer = tokenizers.bert(77)
    config = LDMBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=16,
        encoder_attention_heads=2, head_dim=4, d_model=8,
    )  # fmt: skip
    return diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder(levels=4, scaling_factor=0.18215), bert=LDMBertModel(config), tokenizer=tokenizer,
        unet=unet(cross_attention_dim=8), scheduler=ddim(),
    )  # fmt: skip


def kolors() -> Any:
    """Its tokenizer needs sentencepiece."""
    tokenizer = tokenizers.chatglm(32)
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=tokenizer.vocab_size, hidden_size=8, ffn_hidden_size=16, kv_channels=4,
        num_attention_heads=2, seq_length=64, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True,
        original_rope=True,
    )  # fmt: skip
    encoder = ChatGLMModel(config)
    for parameter in encoder.parameters():
        parameter.data.fill_(1)  # it leaves them as they lie in memory
    return diffusers.KolorsPipeline(
        vae=autoencoder(scaling_factor=0.13025), tokenizer=tokenizer, text_encoder=encoder,
        unet=unet(
            cross_attention_dim=12, encoder_hid_dim=8, encoder_hid_dim_type="text_proj",
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4, transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**(SCHEDULE | dict(beta_end=0.014)), timestep_spacing="leading"),
    )  # fmt: skip


if is_sentencepiece_available():
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    pipeline("kolors")(kolors)
else:
    UNBUILT["kolors"] = "its tokenizer (ChatGLMTokenizer) and so the pipeline itself need sentencepiece"
