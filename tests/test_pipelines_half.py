"""A pipeline in bfloat16, and one whose denoiser runs under autocast: diffusers' own pipeline is the oracle."""

from functools import wraps

import pytest
import torch
from diffusers import DiffusionPipeline
from pipeline_checks import PROMPTS, Model, decoded_by, denoiser_name, model_of, own_score, pixels, unguided
from tiny_pipelines import CALL

from sysdag.components import Diffusion

NAMES = ["sd15", "sdxl", "flux-dev", "qwen-image", "z-image", "lcm"]


@pytest.fixture(scope="module", params=NAMES)
def plain(request, tmp_path_factory):
    return model_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def half(plain):
    pipe = DiffusionPipeline.from_pretrained(plain.folder, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get(plain.name, {}), "convention": "diffusers"}
    return Model(plain.name, plain.folder, pipe, Diffusion(plain.folder, dtype="bfloat16", **options))


def test_it_samples_as_the_pipeline_does(half):
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)).item()
    drawn = half.component.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(3))[0]
    assert abs(pixels(half.call(half.pipe, PROMPTS[0], seed)) - pixels(drawn.value)).max() == 0


def check_first_score(model, rtol):
    noise = model.component.noise(model.draws[:1], torch.Generator().manual_seed(4))
    with torch.no_grad():
        score = model.component.score(PROMPTS[:1], model.draws[:1], noise)[0]
        torch.testing.assert_close(score, own_score(model, noise, 0, PROMPTS[0]), rtol=rtol, atol=1e-6)


def test_a_score_is_the_error_of_the_pipelines_own_answer(half, plain):
    half.draws = plain.draws
    check_first_score(half, rtol=1e-5)


def test_latents_of_a_picture_lose_nothing_but_in_the_encoder(half, plain):
    picture = plain.draws[0].value
    latents = torch.from_numpy(half.component.observe([picture])[0].record["latents"])
    _, decoded = decoded_by(plain.pipe, PROMPTS[0], latents, num_inference_steps=2, **unguided(plain.name))
    image = torch.from_numpy(pixels(picture)).float().permute(3, 0, 1, 2) / 127.5 - 1  # (3, 1, H, W)
    given = (image[None] if decoded.ndim == 5 else image.transpose(0, 1)).bfloat16()
    encoded = half.pipe.vae.encode(given).latent_dist.mode().float()
    torch.testing.assert_close(decoded, encoded, rtol=1e-5, atol=1e-5)


def test_under_autocast_a_score_is_the_error_with_an_autocast_denoiser(plain, monkeypatch):
    denoiser = getattr(plain.pipe, denoiser_name(plain.pipe))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    monkeypatch.setattr(denoiser, "forward", wraps(denoiser.forward)(autocast(denoiser.forward)))
    options = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get(plain.name, {}), "convention": "diffusers"}
    model = Model(plain.name, plain.folder, plain.pipe, Diffusion(plain.folder, **options))
    model.draws = plain.draws
    monkeypatch.setattr(model.component, "score", autocast(model.component.score))
    check_first_score(model, rtol=1e-5)
