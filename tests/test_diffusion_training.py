"""What diffusers' training scripts offer: densities of times, weights, dropped captions, LoRA layers, guidance."""

import json
import logging

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from peft import LoraConfig
from pipeline_checks import handed_to_scheduler
from tiny_diffusion import Diffusion, T, from_text, from_vectors, images, scheduler_of, seed, text_unet, vectors
from tiny_pipelines import CALL, PIPELINES

from sysdag import Input, System, node
from sysdag.components.diffusion.forward_process import ForwardProcess
from sysdag.components.diffusion.timestep_density import TimestepDensity
from sysdag.data import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.errors import DataError, PlanError
from sysdag.objectives.options import ObjectiveOptions

# Times


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}),
        ("logit_normal", {"logit_mean": -0.5, "logit_std": 0.4}),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.6}),
    ],
)
def test_times_have_the_density_of_diffusers_scripts(name, constants):
    scheduler = scheduler_of("flow")
    component = from_vectors("flow", timestep_sampling=name, num_noise_draws=20_000, **constants)
    ours = component.noise(component.observe(images(1, shape=(1, 8, 8)))[:1], seed(3)).timesteps[0]
    u = compute_density_for_timestep_sampling(name, 20_000, generator=seed(3), **constants)
    # In the words of the scripts; diffusers keeps times from noise to data, ours count from data to noise.
    theirs = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    torch.testing.assert_close(component.forward_process.model_times[ours], theirs, rtol=1e-5, atol=1e-4)
    assert len(ours.unique()) > T // 2
    assert torch.bincount(ours, minlength=T).float().std() > 50  # far from uniform


def test_times_of_noisy_samples_are_likelier_at_a_low_logit_mean():
    def mean(logit_mean):
        return TimestepDensity("logit_normal", logit_mean=logit_mean).draw(4000, T, generator=seed(0)).float().mean()

    assert mean(-1.0) > mean(0.0) + 5 > mean(1.0) + 10


def test_a_density_does_not_change_the_score_at_given_noise():
    plain, other = from_vectors(), from_vectors(timestep_sampling="mode")
    draws = plain.observe(images(2))
    noise = plain.noise(draws, seed(0))
    assert torch.equal(plain.score(vectors(2), draws, noise), other.score(vectors(2), draws, noise))
    assert not torch.equal(other.noise(draws, seed(0)).timesteps, noise.timesteps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_sampling": "sigma_sqrt"}, "timestep_sampling must be one of .*'logit_normal'.*got 'sigma_sqrt'"),
        ({"timestep_sampling": "mode", "logit_mean": 1.0}, "logit_mean belongs to timestep_sampling='logit_normal'"),
        ({"mode_scale": 1.0}, "mode_scale belongs to timestep_sampling='mode'; 'uniform' has none"),
        ({"timestep_sampling": "mode", "mode_scale": 2.0}, "mode_scale must be from -1 to 1.75"),
        ({"timestep_sampling": "logit_normal", "logit_std": 0.0}, "logit_std must be positive"),
        ({"weighting": "min-snr"}, "weighting must be 'min_snr' or a function"),
        ({"weighting": "min_snr", "snr_gamma": 0.0}, "snr_gamma must be positive"),
        ({"snr_gamma": 3.0}, "snr_gamma belongs to weighting='min_snr'"),
        ({"weighting": "min_snr", "convention": "diffusers"}, "weighting belongs to convention='sysdpo'"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\], got 1.5"),
        ({"winner_safeguard": -0.1}, r"winner_safeguard must be in \[0, 1\], got -0.1"),
        ({"cache_bytes": 0}, "counts of at least 1"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        from_vectors(**options)


# Weights


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [5.0, 60.0])
def test_min_snr_weights_are_those_of_the_scripts(kind, gamma):
    component = from_vectors(kind, weighting="min_snr", snr_gamma=gamma, num_noise_draws=16)
    plain = from_vectors(kind)
    draws = component.observe(images(3))
    noise = component.noise(draws, seed(3))
    score = component.score(vectors(3), draws, noise)
    snr = compute_snr(scheduler_of(kind), noise.timesteps)
    weight = torch.stack([snr, gamma * torch.ones_like(snr)], dim=-1).min(dim=-1)[0]
    weight = weight / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[kind]
    assert weight.max() > 1.5 * weight.min()
    weighted = []
    for place in range(16):
        alone = type(noise)(noise.timesteps[:, place], noise.eps[:, place])
        weighted.append(-T * weight[:, place] * plain.errors(vectors(3), draws, alone))
    torch.testing.assert_close(score, torch.stack(weighted).mean(0), rtol=1e-4, atol=1e-3)


def test_min_snr_is_finite_where_the_signal_is_gone():
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(num_train_timesteps=T, prediction_type=kind, rescale_betas_zero_snr=True)
        component = Diffusion(text_unet(), scheduler=scheduler, weighting="min_snr")
        draws = component.observe(images(1))
        noise = component.noise(draws, seed(0))
        last = type(noise)(torch.tensor([T - 1]), noise.eps)
        assert component.forward_process.snr(last.timesteps) < 1e-6
        plain = Diffusion(text_unet(), scheduler=scheduler).score(vectors(1), draws, last)
        found = component.score(vectors(1), draws, last)
        assert torch.isfinite(found).all()
        if kind == "epsilon":
            assert torch.equal(found, plain)


def test_min_snr_of_flow_matching_is_refused_before_training():
    component = from_vectors("flow", weighting="min_snr")
    with pytest.raises(PlanError, match="weighting='min_snr' is not defined for flow matching"):
        component.prepare_training()


def test_options_of_training_are_saved(tmp_path):
    options = dict(
        weighting="min_snr", snr_gamma=3.0, timestep_sampling="mode", mode_scale=0.5, caption_dropout=0.2,
        winner_safeguard=0.9, cache=False, cache_bytes=1000,
    )  # fmt: skip
    saved = from_text(**options).save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path, json.loads(json.dumps(saved)))
    assert {name: getattr(again, name) for name in options} == options
    draws = again.observe(images(2))
    noise = again.noise(draws, seed(0))
    texts = ["dark", "light"]
    assert torch.equal(again.score(texts, draws, noise), from_text(**options).score(texts, draws, noise))


# Dropped captions

prompt = Input("prompt", str)


def painter(component):
    @node(component)
    def image(prompt):
        return prompt

    return System(prompt >> image)


def rows(count):
    texts = ["a dark square", "light", "a circle", "dark"]
    pixels = [image.numpy() for image in images(2 * count)]
    return [{"prompt": texts[row % 4], "chosen": pixels[row], "rejected": pixels[row + count]} for row in range(count)]


def step_of(component, count=4):
    plan = painter(component).compile()
    return SystemModel(plan, ObjectiveOptions(beta=0.001)), encode_pairs(plan, rows(count), "direct")


@pytest.mark.parametrize("whole", [False, True])
def test_dropped_captions_are_scored_as_the_empty_text(whole, tmp_path):
    if whole:
        PIPELINES["sd15"]().save_pretrained(tmp_path)
        component = Diffusion(tmp_path, num_inference_steps=2, caption_dropout=0.5, pipeline_kwargs=CALL.get("sd15"))
        draws = component.sample(["dark"] * 8, generator=seed(0))
    else:
        component = from_text(caption_dropout=0.5)
        draws = component.observe(images(8))
    texts = ["a dark square"] * 8
    component.module.eval()
    evaluated = component.noise(draws, seed(3))
    component.module.train()
    noise = component.noise(draws, seed(3))
    component.module.eval()
    assert evaluated.dropped is None
    assert 1 < noise.dropped.sum() < 7
    assert torch.equal(noise.timesteps, evaluated.timesteps)
    assert torch.equal(noise.eps, evaluated.eps)
    with torch.no_grad():
        score = component.score(texts, draws, noise)
        own, empty = component.score(texts, draws, evaluated), component.score([""] * 8, draws, evaluated)
    assert (own - empty).abs().min() > 1e-3
    torch.testing.assert_close(score, torch.where(noise.dropped, empty, own), rtol=1e-5, atol=1e-4)
    part = noise.select([5, 2])
    assert torch.equal(part.dropped, noise.dropped[[5, 2]])
    assert torch.equal(noise.join([part, noise]).dropped, torch.cat([part.dropped, noise.dropped]))


def test_both_sides_of_a_pair_and_the_reference_share_the_dropped_captions():
    model, pairs = step_of(from_text(caption_dropout=0.5))
    model.train()
    for generator in (seed(1), [seed(place) for place in range(4)]):
        (term,) = model.compare(pairs, generator, None).terms
        winners, losers = term.noise.dropped.chunk(2)
        assert torch.equal(winners, losers)
    output = model(pairs, seed(1))
    assert output.metrics["rewards/margins"].abs().max() == 0
    model.eval()
    assert model.compare(pairs, seed(1), None).terms[0].noise.dropped is None


def test_only_texts_are_dropped():
    component = from_vectors(caption_dropout=0.5)
    draws = component.observe(images(2))
    component.module.train()
    noise = component.noise(draws, seed(0))
    with pytest.raises(DataError, match=r"expected text \(str\) that caption_dropout=0.5 may drop"):
        component.score(vectors(2), draws, noise)


# The layers of a LoRA

_ATTENTION = ["to_k", "to_out.0", "to_q", "to_v"]
_JOINT = sorted(f"attn.{n}" for n in [*_ATTENTION, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"])
_FEED = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd15", _ATTENTION),
        ("sdxl", _ATTENTION),
        ("sd3", _JOINT),
        ("flux-dev", sorted(_JOINT + _FEED)),
        ("sana", ["to_k", "to_q", "to_v"]),
        ("lumina2", ["to_k", "to_q", "to_v"]),
        ("qwen-image", _ATTENTION),
        ("z-image", _ATTENTION),
        ("hidream", ["to_k", "to_out", "to_q", "to_v"]),
        ("pixart-sigma", _ATTENTION),
    ],
)
def test_a_lora_without_targets_gets_those_of_the_familys_script(name, expected, caplog):
    pipe = PIPELINES[name]()
    caplog.set_level(logging.INFO, logger="sysdag")
    config = LoraConfig(r=2)
    component = Diffusion(pipe, peft_config=config)
    denoiser = component.pipeline.denoiser
    (made,) = denoiser.peft_config.values()
    assert sorted(made.target_modules) == expected
    assert config.target_modules is None
    adapted = {path for path, module in denoiser.named_modules() if hasattr(module, "lora_A")}
    ends = tuple(f".{end}" for end in expected)
    plain = {path for path, m in PIPELINES[name]().components[_name(pipe)].named_modules() if path.endswith(ends)}
    assert adapted == plain
    assert "names no target_modules" in caplog.text
    assert str(expected[0]) in caplog.text


def _name(pipe):
    return "unet" if "unet" in pipe.components else "transformer"


def test_a_flux_2_lora_adapts_the_single_blocks_by_their_paths():
    denoiser = Diffusion(PIPELINES["flux2-klein"](), peft_config=LoraConfig(r=2)).pipeline.denoiser
    adapted = {path for path, module in denoiser.named_modules() if hasattr(module, "lora_A")}
    assert "single_transformer_blocks.0.attn.to_out" in adapted
    assert "single_transformer_blocks.0.attn.to_qkv_mlp_proj" in adapted
    assert "transformer_blocks.0.attn.to_out.0" in adapted


def test_targets_that_are_named_stay_and_a_model_without_any_is_refused():
    component = from_vectors(peft_config=LoraConfig(r=2, target_modules=["conv1"]))
    assert set(next(iter(component.pipeline.denoiser.peft_config.values())).target_modules) == {"conv1"}
    bare = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    with pytest.raises(PlanError, match="UNet2DModel: the LoraConfig has no target_modules.*target_modules="):
        _ = Diffusion(bare, scheduler=scheduler_of("epsilon"), peft_config=LoraConfig(r=2)).module


# Guidance that a model reads


def test_a_distilled_model_is_scored_at_the_guidance_that_is_set():
    pipe = PIPELINES["flux-dev"]()
    call = CALL.get("flux-dev", {})
    own = {"num_inference_steps": 2, "convention": "diffusers", "pipeline_kwargs": call}
    sampled = Diffusion(pipe, **own).sample(["a dark square"], generator=seed(3))
    process = ForwardProcess.of(pipe.scheduler)
    found = []
    for options, guidance in (
        ({}, None), ({"guidance_scale": 1.0}, 1.0), ({"score_guidance_scale": 1.0}, 1.0),
        ({"guidance_scale": 5.0, "score_guidance_scale": 1.0}, 1.0), ({"guidance_scale": 5.0}, 5.0),
    ):  # fmt: skip
        component = Diffusion(pipe, **own, **options)
        noise = component.noise(sampled, seed(4))
        with torch.no_grad():
            score = component.score(["a dark square"], sampled, noise)[0]
        clean, eps, t = torch.from_numpy(sampled[0].record["latents"]), noise.eps[0], noise.timesteps[0]
        given = handed_to_scheduler(
            pipe, "a dark square", process.alphas[t] * clean + process.sigmas[t] * eps, process.model_times[t],
            num_inference_steps=2, **call, **({} if guidance is None else {"guidance_scale": guidance}),
        )  # fmt: skip
        torch.testing.assert_close(score, -(eps - clean - given).square().mean(), rtol=2e-4, atol=1e-6)
        found.append(score)
    assert len({round(float(score), 5) for score in found}) == 3
    # Sampling is still at its own.
    image = Diffusion(pipe, **own, score_guidance_scale=1.0).sample(["a dark square"], generator=seed(3))
    assert (image[0].record["latents"] == sampled[0].record["latents"]).all()


@pytest.mark.parametrize("guidance", [0.5, 1.0, 3.0])
def test_guidance_of_scores_is_refused_where_the_model_reads_none(guidance):
    component = Diffusion(
        PIPELINES["sd15"](), num_inference_steps=2, pipeline_kwargs=CALL.get("sd15"), score_guidance_scale=guidance
    )
    with pytest.raises(PlanError, match="StableDiffusionPipeline reads no guidance as an argument"):
        component.sample(["dark"], generator=seed(0))
    with pytest.raises(PlanError, match="condition= makes the arguments"):
        from_text(score_guidance_scale=guidance).observe(images(1))


# What is kept


def test_embeddings_are_kept_unless_told_not_to():
    pipe, texts = PIPELINES["sd15"](), ["a dark square", "light"]
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    options = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get("sd15", {})}
    scores, counts, kept = [], [], []
    for given in ({}, {"cache": False}, {"cache_bytes": 1}):
        component = Diffusion(pipe, **options, **given)
        draws = component.sample(texts, generator=seed(0))
        noise = component.noise(draws, seed(0))
        component.score(texts, draws, noise)
        calls.clear()
        scores.append(component.score(texts, draws, noise).detach())
        counts.append(len(calls))
        kept.append(len(component._calls._kept))
    assert counts == [0, 2, 2]
    assert kept[1:] == [0, 1]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_embeddings_of_models_that_are_passed_as_objects_are_kept_too():
    texts = ["a dark square", "light", "light"]
    scores = []
    for given, counts in (({}, [2, 0]), ({"cache": False}, [3, 3]), ({"cache_bytes": 1}, [2, 2])):
        component = from_text(**given)
        encoder, seen = component.pipeline.parts["text_encoder"], []
        encoder.register_forward_hook(lambda _, ids, out, seen=seen: seen.append(len(out[0])))
        draws = component.observe(images(3))
        noise = component.noise(draws, seed(0))
        scores += [component.score(texts, draws, noise).detach() for _ in range(2)]
        assert seen == counts or seen == [count for count in counts if count]
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_kept_belongs_to_the_encoders_weights(whole, tmp_path):
    if whole:
        pipe = PIPELINES["sd15"]()
        component = Diffusion(pipe, num_inference_steps=2, pipeline_kwargs=CALL.get("sd15", {}))
        draws = component.sample(["dark"], generator=seed(0))
    else:
        component = from_text()
        draws = component.observe(images(1))
    noise = component.noise(draws, seed(0))
    first = component.score(["dark"], draws, noise).detach()
    component.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in component.pipeline.parts["text_encoder"].parameters():
            parameter.mul_(2)
    assert not torch.allclose(component.score(["dark"], draws, noise), first)
    component.load_weights(tmp_path)
    torch.testing.assert_close(component.score(["dark"], draws, noise).detach(), first)


def test_what_is_kept_is_another_at_another_length_and_stays_within_its_bytes():
    component = from_text()
    draws = component.observe(images(2))
    noise = component.noise(draws, seed(0))
    long = component.score(["dark", "light"], draws, noise)
    component.max_text_length = 4
    assert not torch.allclose(component.score(["dark", "light"], draws, noise), long)
    row = component._texts._bytes // 4
    small = from_text(cache_bytes=2 * row + row // 2)
    for text in ("dark", "light", "square", "circle"):
        small.score([text], draws[:1], noise.select([0]))
    assert 1 <= len(small._texts) <= 3
    assert small._texts._bytes <= small.cache_bytes


def test_a_text_encoder_that_trains_is_asked_every_time():
    component = from_text(train_text_encoder=True)
    draws = component.observe(images(1))
    noise = component.noise(draws, seed(0))
    before = component.score(["dark"], draws, noise)
    with torch.no_grad():
        for parameter in component.pipeline.parts["text_encoder"].parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(component.score(["dark"], draws, noise), before)
    assert len(component._texts) == 0
