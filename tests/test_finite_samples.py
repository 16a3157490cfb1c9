"""Samplers, denoisers and autoencoders that yield numbers that are not finite are told by name, not drawn as black."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_diffusion import autoencoder, from_text, from_vectors, seed, vectors
from tiny_pipelines import PIPELINES

from sysdag.components import Diffusion
from sysdag.errors import PlanError

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
SCHEDULERS = {
    # log of the posterior's variance at the last time, which is 0 at t = 0
    "fixed_large_log": DDPMScheduler(variance_type="fixed_large_log"),
    # the first sample is noise alone: x_0 = (x_t - sigma eps) / 0
    "zero-snr ddim": DDIMScheduler(prediction_type="epsilon", **ZERO_SNR),
    "zero-snr ddpm": DDPMScheduler(prediction_type="epsilon", **ZERO_SNR),
}


def whole(**parts):
    pipe = PIPELINES["sd15"]()
    pipe.register_modules(**parts)
    return Diffusion(pipe, num_inference_steps=3)


def separate(**parts):
    return from_text(num_inference_steps=3, **parts)


@pytest.mark.parametrize("make", [whole, separate])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_yields_nan_is_named_with_its_step(make, name):
    scheduler = SCHEDULERS[name]
    kind, options = type(scheduler).__name__, options_of(name)
    match = rf"{kind} left numbers that are not finite at step \d \(time \d+\); it has .*{options}"
    with pytest.raises(PlanError, match=match):
        make(scheduler=scheduler).sample(["dark"], generator=seed(0))


def options_of(name):
    return "variance_type': 'fixed_large_log'" if name == "fixed_large_log" else "rescale_betas_zero_snr': True"


@pytest.mark.parametrize("make", [whole, separate])
def test_a_denoiser_that_yields_nan_is_named(make):
    component = make()
    with torch.no_grad():
        component.pipeline.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(PlanError, match=r"enoiser's answer has numbers that are not finite"):
        component.sample(["dark"], generator=seed(0))


@pytest.mark.parametrize("make", [whole, separate])
def test_a_denoiser_that_diverges_after_it_was_first_sampled_is_named_with_its_step(make):
    component = make()
    component.sample(["dark"], generator=seed(0))
    with torch.no_grad():
        component.pipeline.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(PlanError, match=r"denoiser's answer has numbers that are not finite at step 1 \(time \d+\)"):
        component.sample(["dark"], generator=seed(0))


def test_an_autoencoder_that_yields_nan_is_named():
    for component, inputs in ((whole(), ["dark"]), (from_vectors(vae=autoencoder()), vectors(1))):
        with torch.no_grad():
            component.pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
        with pytest.raises(PlanError, match="AutoencoderKL decodes latents to numbers that are not finite"):
            component.sample(inputs, generator=seed(0))
