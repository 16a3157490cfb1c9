"""Autoencoders that are passed as parts: sizes and scales are those of diffusers' own pipelines, or refused by name."""

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, SanaPipeline, VQModel
from tiny_diffusion import autoencoder, from_vectors, images, latents_of, seed, vectors
from tiny_pipelines import PIPELINES
from tiny_pipelines_dit import deep_compression
from tiny_pipelines_packed import flux_2_autoencoder, qwen_image_autoencoder
from tiny_pipelines_video import wan_autoencoder

from sysdag.components import Diffusion
from sysdag.errors import PlanError


def tiny():
    return AutoencoderTiny(
        latent_channels=1, encoder_block_out_channels=(4, 4, 4), decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.7,
    )  # fmt: skip


def asymmetric():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AsymmetricAutoencoderKL(
        latent_channels=1, down_block_out_channels=(4, 4), up_block_out_channels=(4, 8), norm_num_groups=2, **kinds
    )


def quantised():
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(latent_channels=1, block_out_channels=(4, 4), norm_num_groups=2, num_vq_embeddings=8, **kinds)


KINDS = {
    "kl": autoencoder, "tiny": tiny, "asymmetric": asymmetric, "vq": quantised,
    "deep compression": lambda: deep_compression(1),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_images_have_the_size_and_the_latents_that_the_autoencoder_gives(kind):
    torch.manual_seed(0)
    vae = KINDS[kind]().eval()
    component = from_vectors(vae=vae)
    with torch.no_grad():
        size = vae.decode(torch.zeros(1, 1, 8, 8)).sample.shape[1:]
    drawn = component.sample(vectors(1), generator=seed(0))[0]
    assert (drawn.value.height, drawn.value.width) == size[1:]
    pixels = images(1, tuple(size))
    found = latents_of(component.observe(pixels))
    with torch.no_grad():
        encoded = vae.encode(torch.stack(pixels), return_dict=False)[0]
        encoded = encoded.mode() if hasattr(encoded, "mode") and not isinstance(encoded, torch.Tensor) else encoded
    shift = 0.2 if kind == "kl" else 0.0
    torch.testing.assert_close(found, (encoded - shift) * vae.config.get("scaling_factor", 1.0), rtol=1e-4, atol=1e-5)


def test_a_deep_compression_autoencoder_decodes_as_sanas_pipeline_does():
    pipe = PIPELINES["sana"]()
    assert isinstance(pipe, SanaPipeline)
    vae, size = pipe.vae, pipe.transformer.config.in_channels
    component = Diffusion(
        pipe.transformer, scheduler=pipe.scheduler, vae=vae, condition=lambda inputs: {}, sample_shape=(size, 4, 4)
    )
    latents = torch.randn(1, size, 4, 4, generator=seed(0))
    with torch.no_grad():
        own = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    torch.testing.assert_close(component.pipeline.decode(latents), own)
    assert component.pipeline.pixel_shape((size, 4, 4)) == tuple(own.shape[1:])
    assert own.shape[-1] == 4 * pipe.vae_scale_factor


@pytest.mark.parametrize("make", [wan_autoencoder, qwen_image_autoencoder, flux_2_autoencoder])
def test_autoencoders_that_need_their_pipeline_are_refused_by_name(make):
    vae = make()
    with pytest.raises(PlanError, match=f"vae={type(vae).__name__} is none of .*Pass the whole pipeline instead"):
        from_vectors(vae=vae).sample(vectors(1))
