"""Each pipeline of diffusers is its own oracle: what it hands to its scheduler, its images, its folder."""

import copy
import inspect
import json

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_diffusion import drift
from tiny_pipelines import CALL, PIPELINES

from sysdag.components import Diffusion
from sysdag.components.diffusion.forward_process import ForwardProcess
from sysdag.errors import PlanError

PROMPTS = ["a dark square", "a light circle on a dark square"]
# How each family is told to leave its guidance out; a guidance that the model reads as an argument stays.
OFF = {
    "z-image": {"guidance_scale": 0.0},
    "sd15-pag": {"guidance_scale": 1.0, "pag_scale": 0.0},
    "sdxl-pag": {"guidance_scale": 1.0, "pag_scale": 0.0},
}
OWN = ("flux-dev", "flux-schnell", "flux2", "flux2-klein-distilled", "qwen-image", "lcm", "hunyuan-video")
REFUSED = {
    "sana-sprint": "none of its denoiser's arguments|once a step",
    "kandinsky22": "step is not called",
    "kandinsky": "step is not called",
    "skyreels-v2": "ftfy|",
    "anyflow": "r_timestep follows the scheduler's time by no fixed map",
    "text-to-video-sd": "its samples for one prompt are",
    "wan22": "transformer_2 works between the steps",
}
RIGHT = [name for name in PIPELINES if name not in REFUSED]
UNSCORED = {"mochi": "invert_sigmas=True is not supported"}  # sampled as the pipeline does, and refused as it is scored


class Handed(BaseException):
    pass


def handed_to_scheduler(pipe, prompt, sample, time, call=None, **options):
    """What the pipeline itself hands to its scheduler's step for this sample at this time: run, and read."""
    pipe = copy.copy(pipe)
    scheduler = pipe.scheduler = copy.deepcopy(pipe.scheduler)
    preparing = next((name for name in ("prepare_latents", "prepare_intermediate_images") if hasattr(pipe, name)), None)
    own_times, own_latents = scheduler.set_timesteps, getattr(pipe, preparing or "", None)
    if preparing is None:
        options["latents"] = sample[None]

    def set_timesteps(*args, **kwargs):
        own_times(*args, **kwargs)
        scheduler.timesteps = time.reshape(1).to(scheduler.timesteps.dtype)  # whole numbers of some schedulers

    def prepare_latents(*args, **kwargs):
        made = own_latents(*args, **kwargs)
        return (sample[None].to(made[0]), *made[1:]) if isinstance(made, tuple) else sample[None].to(made)

    def step(model_output, *args, **kwargs):
        raise Handed(model_output)

    set_timesteps.__signature__ = inspect.signature(own_times)
    step.__signature__ = inspect.signature(scheduler.step)
    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    if preparing is not None:
        setattr(pipe, preparing, prepare_latents)
    scheduler.scale_model_input = lambda sample, *_: sample
    try:
        (call or type(pipe).__call__)(pipe, prompt=prompt, generator=[torch.Generator().manual_seed(0)], **options)
    except Handed as handed:
        return handed.args[0][0]
    raise AssertionError("no step was made")


def target_of(process, clean, eps, alpha, sigma):
    targets = {"flow": eps - clean, "epsilon": eps, "sample": clean, "v_prediction": alpha * eps - sigma * clean}
    return targets[process.prediction]


def decoded_by(pipe, prompt, latents, **options):
    """The decoder, and what it is given where the last step leaves these latents; None where none decodes."""
    pipe = copy.copy(pipe)
    scheduler = pipe.scheduler = copy.deepcopy(pipe.scheduler)
    own_step = scheduler.step

    def step(*args, **kwargs):
        result = own_step(*args, **kwargs)
        if hasattr(result, "prev_sample"):
            result.prev_sample = latents[None]
            return result
        return (latents[None], *[latents[None] for _ in result[1:]])

    def decode(given, *args, **kwargs):
        raise Handed(given)

    step.__signature__ = inspect.signature(own_step)
    scheduler.step = step
    parts = [part for part in pipe.components.values() if hasattr(part, "decode") and hasattr(part, "encode")]
    decoders = [part for part in parts if isinstance(part, torch.nn.Module)]
    for part in decoders:
        part.decode = decode
    try:
        pipe(prompt=prompt, generator=[torch.Generator().manual_seed(0)], **options)
    except Handed as handed:
        return decoders[0], handed.args[0]
    finally:
        for part in decoders:
            del part.decode
    return None


def denoiser_name(pipe):
    return "unet" if "unet" in pipe.components else "transformer"


def unguided(name):
    return {**CALL.get(name, {}), **({} if name in OWN else OFF.get(name, {"guidance_scale": 1.0}))}


def pixels(value):
    frames = value if isinstance(value, list) else [value]
    return numpy.stack([numpy.asarray(frame, dtype=float) for frame in frames])


@pytest.fixture(scope="module")
def made():
    return {}


def model_of(name, made, tmp_path_factory):
    if name not in made:
        folder = tmp_path_factory.mktemp(name)
        PIPELINES[name]().save_pretrained(folder)
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        component = Diffusion(folder, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}), convention="diffusers")
        made[name] = folder, pipe, component
    return made[name]


@pytest.mark.parametrize("name", RIGHT)
def test_samples_are_the_pipelines_own(name, made, tmp_path_factory):
    _, pipe, component = model_of(name, made, tmp_path_factory)
    draws = component.sample(PROMPTS, generator=torch.Generator().manual_seed(3))
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(3)).tolist()
    output = {"output_type": "pil"}
    for draw, prompt, seed in zip(draws, PROMPTS, seeds, strict=True):
        alone = [torch.Generator().manual_seed(seed)]
        own = pipe(prompt=prompt, generator=alone, num_inference_steps=2, **output, **CALL.get(name, {}))[0][0]
        assert abs(pixels(own) - pixels(draw.value)).max() <= 2  # of 255 levels, for two rows at a time round otherwise
    assert abs(pixels(draws[0].value) - pixels(draws[1].value)).max() > 2


@pytest.mark.parametrize("name", [name for name in RIGHT if name not in UNSCORED])
def test_a_score_is_the_error_of_what_the_pipeline_hands_to_its_scheduler(name, made, tmp_path_factory):
    _, pipe, component = model_of(name, made, tmp_path_factory)
    draws = component.sample(PROMPTS, generator=torch.Generator().manual_seed(3))
    noise = component.noise(draws, torch.Generator().manual_seed(4))
    with torch.no_grad():
        scores = component.score(PROMPTS, draws, noise)
    process = ForwardProcess.of(pipe.scheduler)
    for row, (prompt, draw) in enumerate(zip(PROMPTS, draws, strict=True)):
        clean, eps, t = torch.from_numpy(draw.record["latents"]), noise.eps[row], noise.timesteps[row]
        alpha, sigma = process.alphas[t], process.sigmas[t]
        given = handed_to_scheduler(
            pipe, prompt, alpha * clean + sigma * eps, process.model_times[t], num_inference_steps=2, **unguided(name)
        )[: len(clean)]
        target = target_of(process, clean, eps, alpha, sigma)
        torch.testing.assert_close(scores[row], -(target - given).square().mean(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_fit_is_refused_by_name(name, made, tmp_path_factory):
    _, pipe, component = model_of(name, made, tmp_path_factory)
    with pytest.raises(PlanError, match=f"{type(pipe).__name__} cannot be scored.*({REFUSED[name]})"):
        component.sample(PROMPTS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", sorted(UNSCORED))
def test_a_scheduler_that_cannot_score_is_refused_by_name(name, made, tmp_path_factory):
    _, pipe, component = model_of(name, made, tmp_path_factory)
    draws = component.sample(PROMPTS, generator=torch.Generator().manual_seed(3))
    with pytest.raises(PlanError, match=f"{type(pipe.scheduler).__name__}.*{UNSCORED[name]}"):
        component.noise(draws)


@pytest.mark.parametrize("name", [name for name in RIGHT if name not in UNSCORED])
def test_gradients_are_those_of_the_pipelines_own_error(name, made, tmp_path_factory):
    _, pipe, component = model_of(name, made, tmp_path_factory)
    draw = component.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(3))
    noise = component.noise(draw, torch.Generator().manual_seed(4))
    component.module.train()
    component.module.zero_grad()
    component.score(PROMPTS[:1], draw, noise).sum().backward()
    denoiser = pipe.components[denoiser_name(pipe)]
    denoiser.train().zero_grad()
    denoiser.training = False  # HiDream's answers in another form where it trains, but only its layers do
    process = ForwardProcess.of(pipe.scheduler)
    clean, eps, t = torch.from_numpy(draw[0].record["latents"]), noise.eps[0], noise.timesteps[0]
    alpha, sigma = process.alphas[t], process.sigmas[t]
    given = handed_to_scheduler(
        pipe, PROMPTS[0], alpha * clean + sigma * eps, process.model_times[t], call=inspect.unwrap(type(pipe).__call__),
        num_inference_steps=2, **unguided(name),
    )[: len(clean)]  # fmt: skip
    (-(target_of(process, clean, eps, alpha, sigma) - given).square().mean()).backward()
    own = {key: parameter.grad for key, parameter in denoiser.named_parameters() if parameter.grad is not None}
    ours = {key: p.grad for key, p in component.pipeline.denoiser.named_parameters() if p.grad is not None}
    assert own.keys() == ours.keys()
    assert len(own) > 3
    largest = max(gradient.abs().max() for gradient in own.values())
    for key, gradient in own.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-4 * largest.item())
    others = [p for key, part in component.module.items() if key != "denoiser" for p in part.parameters()]
    assert not any(parameter.requires_grad for parameter in others)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_saved_is_the_trained_pipeline_with_every_part(name, made, tmp_path_factory):
    folder, pipe, _ = model_of(name, made, tmp_path_factory)
    component = Diffusion(folder, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}))
    drift(component.pipeline.denoiser, size=0.02)
    out = tmp_path_factory.mktemp("saved")
    options = component.save_pretrained(out)
    drawn = component.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(5))[0].value
    opened = DiffusionPipeline.from_pretrained(out)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is type(pipe)
    assert {k: type(v) for k, v in opened.components.items()} == {k: type(v) for k, v in pipe.components.items()}
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)).item()
    own = opened(
        prompt=PROMPTS[0], generator=[torch.Generator().manual_seed(seed)], num_inference_steps=2, output_type="pil",
        **CALL.get(name, {}),
    )[0][0]  # fmt: skip
    assert abs(pixels(own) - pixels(drawn)).max() <= 1
    again = Diffusion.from_pretrained(out, json.loads(json.dumps(options)))
    redrawn = again.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(5))[0].value
    assert abs(pixels(redrawn) - pixels(drawn)).max() <= 1


@pytest.mark.parametrize("name", [name for name in RIGHT if name not in UNSCORED])
def test_an_observed_image_has_the_latents_that_the_pipeline_decodes_to_its_reconstruction(
    name, made, tmp_path_factory
):
    _, pipe, component = model_of(name, made, tmp_path_factory)
    drawn = component.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(3))[0]
    observed = component.observe([drawn.value])[0]
    assert observed.record["latents"].shape == drawn.record["latents"].shape
    # The pipeline's own decoding of those latents is what its autoencoder makes of the image.
    latents = torch.from_numpy(observed.record["latents"])
    given = decoded_by(pipe, PROMPTS[0], latents, num_inference_steps=2, **unguided(name))
    if given is None:  # no autoencoder: latents are pixels
        numpy.testing.assert_allclose((latents.numpy().transpose(1, 2, 0) + 1) * 127.5, pixels(drawn.value)[0], atol=1)
        return
    decoder, decoded = given
    image = torch.from_numpy(pixels(drawn.value)).float().permute(3, 0, 1, 2) / 127.5 - 1  # (3, frames, H, W)
    films = isinstance(drawn.value, list)
    batch = image[None] if decoded.ndim == 5 else image.transpose(0, 1)
    assert films or len(batch) == 1
    encoded = decoder.encode(batch)
    encoded = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else next(iter(encoded.values()))
    torch.testing.assert_close(decoded, encoded, rtol=1e-3, atol=1e-3)
