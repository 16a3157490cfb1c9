"""Tiny pipelines of several stages, each with a denoiser of its own: a prior, and a decoder that it conditions."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny_tokenizers as tokenizers
import transformers
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from tiny_parts import UNBUILT, clip, pipeline
from tiny_pipelines_unet import movq, unet

EMBEDDED = dict(
    in_channels=4, out_channels=8, encoder_hid_dim=8, cross_attention_dim=12,
    down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift",
)  # fmt: skip


def unclip_prior() -> dict[str, Any]:
    """Samples the embedding of an image from that of a text."""
    tokenizer = tokenizers.clip()
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    return dict(
        prior_prior=diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8, num_embeddings=16
        ),
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        prior_text_encoder=clip(tokenizer, 8, project=8),
        prior_tokenizer=tokenizer,
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", clip_sample_range=5.0, prediction_type="sample"
        ),
        prior_image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    )  # fmt: skip


def kandinsky_schedule(kind: str, **options: Any) -> Any:
    tiny = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, thresholding=True, sample_max_value=2.0)
    return getattr(diffusers, kind)(**tiny, **options)


@pipeline("kandinsky22", height=64, width=64, prior_num_inference_steps=2)
def kandinsky_22() -> Any:
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet(**EMBEDDED, addition_embed_type="image", encoder_hid_dim_type="image_proj"), movq=movq(),
        scheduler=kandinsky_schedule("DDPMScheduler", variance_type="learned_range"), **unclip_prior(),
    )  # fmt: skip


@pipeline("kandinsky", height=64, width=64, prior_num_inference_steps=2)
def kandinsky() -> Any:
    """Kandinsky 2.1, whose decoder reads the text too; its texts have 77 tokens."""
    tokenizer = tokenizers.xlm_roberta(77)
    config = MCLIPConfig(
        vocab_size=len(tokenizer), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=80, pad_token_id=1, transformerDimSize=12, imageDimSize=8,
    )  # fmt: skip
    text_image = EMBEDDED | dict(
        addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj", encoder_hid_dim=12,
        cross_attention_dim=8,
    )  # fmt: skip
    return diffusers.KandinskyCombinedPipeline(
        text_encoder=MultilingualCLIP(config), tokenizer=tokenizer, unet=unet(**text_image), movq=movq(),
        scheduler=kandinsky_schedule("DDIMScheduler", set_alpha_to_one=False, steps_offset=1), **unclip_prior(),
    )  # fmt: skip


UNBUILT["wuerstchen"] = UNBUILT["stable-cascade"] = (
    "diffusers 0.42.1 does not open what it saved: PaellaVQModel (and Wuerstchen's denoisers) are written as classes "
    "of diffusers itself, where they are not found"
)
