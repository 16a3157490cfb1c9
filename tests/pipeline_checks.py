"""What is held of a pipeline of diffusers, which is its own oracle: it is run, and what it hands on is read."""

import copy
import functools
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

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
# Pipelines that people bring; the others are tried before a release.
FAMILIES = (
    "sd15", "sd15-pndm", "sd15-safety", "sd21-v", "sd15-zero-snr", "sdxl", "sd3", "pixart-alpha", "pixart-sigma",
    "sana", "auraflow", "lumina2", "lcm", "cogview4", "kolors", "hunyuandit", "flux-schnell", "flux-dev",
    "flux2-klein", "chroma", "qwen-image", "z-image", "hidream", "wan",
)  # fmt: skip
NO_STEP = "its scheduler's step is not called"
GUIDED = "at no setting of its guidance does it call its denoiser once a step with each prompt once"
REFUSED = {
    "sana-sprint": GUIDED,
    "sd15-sag": GUIDED,
    "sd15-attend-excite": GUIDED,
    "hunyuan-image": GUIDED,
    "hunyuan-video-1.5": GUIDED,
    "kandinsky22": NO_STEP,
    "kandinsky": NO_STEP,
    "wan22": "its transformer_2 works between the steps",
    "anyflow": "follows the scheduler's time by no fixed map",
    "text-to-video-sd": "its samples for one prompt are",
    "sd15-ldm3d": "it raises ValueError: Invalid mode for data type",
    "amused": "it raises AttributeError",
    "text-to-video-zero": "it raises TypeError",
    "ideogram4": "it raises ValueError",
    "prx-pixel": "what its scheduler gets is not its denoiser's answer",
}
UNSCORED = {"mochi": "invert_sigmas=True is not supported"}  # sampled as the pipeline does, and refused as it is scored
# How each family is told to leave its guidance out; a guidance that the model reads as an argument stays.
ZERO, PERTURBED = {"guidance_scale": 0.0}, {"guidance_scale": 1.0, "pag_scale": 0.0}
OFF = {name: ZERO for name in ("z-image", "z-image-omni", "krea2")} | {
    name: PERTURBED for name in PIPELINES if name.endswith("-pag")
}
OWN = (
    "flux-dev", "flux-schnell", "flux2", "flux2-klein-distilled", "flux2-klein-kv", "qwen-image", "lcm",
    "hunyuan-video",
)  # fmt: skip


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
        if (made[0] if isinstance(made, tuple) else made).numel() != sample.numel():
            return made  # of a prior's
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


@dataclass
class Model:
    """A pipeline's folder, the pipeline that diffusers opens there, and the component."""

    name: str
    folder: Path
    pipe: DiffusionPipeline
    component: Diffusion

    @functools.cached_property
    def draws(self):
        return self.component.sample(PROMPTS, generator=torch.Generator().manual_seed(3))

    def call(self, pipe, prompt, seed, **options):
        """The pipeline's own call, for one prompt."""
        given = {"num_inference_steps": 2, "output_type": "pil"} | CALL.get(self.name, {}) | options
        return pipe(prompt=prompt, generator=[torch.Generator().manual_seed(seed)], **given)[0][0]


def model_of(name, folder):
    PIPELINES[name]().save_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get(name, {}), "convention": "diffusers"}
    return Model(name, Path(folder), pipe, Diffusion(folder, **options))


def check_samples(model):
    """Images are those of the pipeline's call for each prompt alone, but for how two rows at a time round."""
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(3)).tolist()
    for draw, prompt, seed in zip(model.draws, PROMPTS, seeds, strict=True):
        assert abs(pixels(model.call(model.pipe, prompt, seed)) - pixels(draw.value)).max() <= 2  # of 255 levels
    assert abs(pixels(model.draws[0].value) - pixels(model.draws[1].value)).max() > 2
    return 2


def check_scores(model):
    """A score is the error, by hand, of what the pipeline hands to its scheduler at that time."""
    noise = model.component.noise(model.draws, torch.Generator().manual_seed(4))
    with torch.no_grad():
        scores = model.component.score(PROMPTS, model.draws, noise)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(scores[row], own_score(model, noise, row, prompt), rtol=2e-4, atol=1e-6)
    return 2


def own_score(model, noise, row, prompt, call=None):
    process = ForwardProcess.of(model.pipe.scheduler)
    clean = torch.from_numpy(model.draws[row].record["latents"])
    eps, t = noise.eps[row], noise.timesteps[row]
    alpha, sigma = process.alphas[t], process.sigmas[t]
    options = {"num_inference_steps": 2, **unguided(model.name)}
    given = handed_to_scheduler(
        model.pipe, prompt, alpha * clean + sigma * eps, process.model_times[t], call, **options
    )[: len(clean)]
    return -(target_of(process, clean, eps, alpha, sigma) - given).square().mean()


def check_gradients(model):
    """Gradients reach what trains alone, and are those of the error by hand."""
    noise = model.component.noise(model.draws[:1], torch.Generator().manual_seed(4))
    model.component.module.train()
    model.component.module.zero_grad()
    model.component.score(PROMPTS[:1], model.draws[:1], noise).sum().backward()
    denoiser = model.pipe.components[denoiser_name(model.pipe)]
    denoiser.train().zero_grad()
    denoiser.training = False  # HiDream's answers in another form where it trains, but only its layers do
    own_score(model, noise, 0, PROMPTS[0], call=inspect.unwrap(type(model.pipe).__call__)).backward()
    denoiser.eval()
    own = {key: parameter.grad for key, parameter in denoiser.named_parameters() if parameter.grad is not None}
    trained = model.component.pipeline.denoiser.named_parameters()
    ours = {key: parameter.grad for key, parameter in trained if parameter.grad is not None}
    assert own.keys() == ours.keys()
    assert len(own) > 3
    largest = max(gradient.abs().max() for gradient in own.values())
    for key, gradient in own.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-4 * largest.item())
    others = [p for key, part in model.component.module.items() if key != "denoiser" for p in part.parameters()]
    assert all(parameter.grad is None for parameter in others)
    return len(own)


def check_saved(model):
    """A trained pipeline is saved as one of its class with every part, and comes back."""
    options = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get(model.name, {})}
    component, out = Diffusion(model.folder, **options), model.folder / "saved"
    drift(component.pipeline.denoiser, size=0.02)
    saved = json.loads(json.dumps(component.save_pretrained(out)))
    drawn = component.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(5))[0].value
    opened = DiffusionPipeline.from_pretrained(out)
    opened.set_progress_bar_config(disable=True)
    assert type(opened) is type(model.pipe)
    assert {k: type(v) for k, v in opened.components.items()} == {k: type(v) for k, v in model.pipe.components.items()}
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)).item()
    assert abs(pixels(model.call(opened, PROMPTS[0], seed)) - pixels(drawn)).max() <= 1
    again = Diffusion.from_pretrained(out, saved)
    redrawn = again.sample(PROMPTS[:1], generator=torch.Generator().manual_seed(5))[0].value
    assert abs(pixels(redrawn) - pixels(drawn)).max() <= 1
    return 2


def check_observed(model):
    """An observed image has the latents that the pipeline decodes to what its autoencoder makes of the image."""
    drawn = model.draws[0]
    observed = model.component.observe([drawn.value])[0]
    assert observed.record["latents"].shape == drawn.record["latents"].shape
    latents = torch.from_numpy(observed.record["latents"])
    given = decoded_by(model.pipe, PROMPTS[0], latents, num_inference_steps=2, **unguided(model.name))
    if given is None:  # no autoencoder: latents are pixels
        numpy.testing.assert_allclose((latents.numpy().transpose(1, 2, 0) + 1) * 127.5, pixels(drawn.value)[0], atol=1)
        return 1
    decoder, decoded = given
    image = torch.from_numpy(pixels(drawn.value)).float().permute(3, 0, 1, 2) / 127.5 - 1  # (3, frames, H, W)
    encoded = decoder.encode(image[None] if decoded.ndim == 5 else image.transpose(0, 1))
    encoded = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else next(iter(encoded.values()))
    torch.testing.assert_close(decoded, encoded, rtol=1e-3, atol=1e-3)
    return 1


def check_refused(model):
    """A pipeline that does not fit is refused by its name, and what does not fit is told."""
    with pytest.raises(PlanError, match=re.escape((REFUSED | UNSCORED)[model.name])) as raised:
        model.component.noise(model.component.sample(PROMPTS, generator=torch.Generator().manual_seed(3)))
    named = type(model.pipe.scheduler if model.name in UNSCORED else model.pipe).__name__
    assert named in str(raised.value)
    return 1


def checks_of(name):
    if name in REFUSED:
        return [check_refused]
    if name in UNSCORED:
        return [check_samples, check_saved, check_refused]
    return [check_samples, check_scores, check_gradients, check_saved, check_observed]
