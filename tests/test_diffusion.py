"""`Diffusion` against formulas written by hand and diffusers' own pipelines."""

import copy
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from peft import LoraConfig
from PIL import Image
from tiny_diffusion import (
    LORA,
    Diffusion,
    T,
    autoencoder,
    clip,
    dit,
    drift,
    from_text,
    from_vectors,
    images,
    latents_of,
    plain_unet,
    pooled,
    scheduler_of,
    sd3,
    seed,
    snr_plus_one,
    start_noise,
    text_unet,
    vectors,
)
from torch import nn

from sysdag.components.diffusion.forward_process import DiffusionNoise
from sysdag.errors import DataError, PlanError
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace

# The score


def hand_written_mse(model, scheduler, kind, clean, states, times, eps):
    """The model's mean squared error an image, in the words of diffusers' training scripts."""
    if kind == "flow":
        # diffusers keeps times from noise to data; ours count from data to noise.
        steps = len(scheduler.timesteps) - 1 - times
        noisy = scheduler.scale_noise(clean, scheduler.timesteps[steps], eps)
        target, model_times = eps - clean, scheduler.timesteps[steps]
    else:
        noisy, model_times = scheduler.add_noise(clean, eps, times), times
        target = {"epsilon": eps, "sample": clean, "v_prediction": scheduler.get_velocity(clean, eps, times)}[kind]
    prediction = model(noisy, model_times, encoder_hidden_states=states).sample
    return nn.functional.mse_loss(prediction, target, reduction="none").mean(dim=[1, 2, 3])


@pytest.mark.parametrize(("convention", "factor"), [("diffusion-dpo", 0.5), ("diffusers", 1.0)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_loss_is_the_published_diffusion_dpo_loss(kind, convention, factor):
    beta, count = 40.0, 3
    component = from_vectors(kind, convention=convention)
    reference = component.reference()
    drift(component.module)
    winners, losers = images(count), images(count, number=20)
    captions = [vector[None] for vector in vectors(count)]
    noise = component.noise(component.observe(winners), seed(3))

    def margin(frozen_or_not, draws):
        return frozen_or_not.score(captions, component.observe(draws), noise)

    ours = -nn.functional.logsigmoid(
        beta * (margin(component, winners) - margin(reference, winners))
        - beta * (margin(component, losers) - margin(reference, losers))
    ).mean()
    gradients = torch.autograd.grad(ours, list(component.module["denoiser"].parameters()))

    model, frozen, scheduler = component.module["denoiser"], text_unet(), scheduler_of(kind)
    states = torch.stack(captions)
    w, lo = torch.stack(winners), torch.stack(losers)
    arguments = (states, noise.timesteps, noise.eps)
    mse_w, mse_l = (hand_written_mse(model, scheduler, kind, x, *arguments) for x in (w, lo))
    with torch.no_grad():
        ref_w, ref_l = (hand_written_mse(frozen, scheduler, kind, x, *arguments) for x in (w, lo))
    inside = -factor * beta * ((mse_w - mse_l) - (ref_w - ref_l))
    by_hand = -nn.functional.logsigmoid(inside).mean()
    expected = torch.autograd.grad(by_hand, list(model.parameters()))

    assert inside.abs().max() > 0.1  # far from the loss ln 2 that agreement would not prove anything about
    torch.testing.assert_close(ours, by_hand, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_sysdpo_score_is_minus_T_omega_times_the_sum_of_squares(kind):
    component = from_vectors(kind, weighting=snr_plus_one)
    draws, captions = component.observe(images(4)), vectors(4)
    noise = component.noise(draws, seed(3))
    scheduler = scheduler_of(kind)
    score = component.score(captions, draws, noise)
    for place in range(4):
        t = noise.timesteps[place].item()
        if kind == "flow":
            sigma = scheduler.sigmas.flip(0)[t].item()
            alpha, time = 1 - sigma, sigma * T
        else:
            kept = scheduler.alphas_cumprod[t].item()
            alpha, sigma, time = kept**0.5, (1 - kept) ** 0.5, t
        x, eps = torch.as_tensor(draws[place].record["latents"]), noise.eps[place]
        target = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x, "flow": eps - x}[kind]
        prediction = component.module["denoiser"](
            (alpha * x + sigma * eps)[None], torch.tensor([time]), encoder_hidden_states=captions[place][None, None]
        ).sample[0]
        error = ((target - prediction) ** 2).sum()
        expected = -T * ((alpha / sigma) ** 2 + 1) * error
        torch.testing.assert_close(score[place], expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(component.errors(captions, draws, noise)[place], error, rtol=1e-4, atol=1e-4)


def test_conventions_differ_by_the_factors_that_the_docstring_states():
    draws, captions = from_vectors().observe(images(2)), vectors(2)
    noise = from_vectors().noise(draws, seed(0))
    score = {
        c: from_vectors(convention=c).score(captions, draws, noise) for c in ("sysdpo", "diffusion-dpo", "diffusers")
    }
    torch.testing.assert_close(score["sysdpo"], 2 * T * 64 * score["diffusion-dpo"])
    torch.testing.assert_close(score["diffusers"], 2 * score["diffusion-dpo"])
    assert (score["sysdpo"] < -1).all()


def test_zero_weighting_removes_a_time_from_the_score():
    component = from_vectors(weighting=only_noisy)
    draws, captions = component.observe(images(2)), vectors(2)
    eps = torch.randn(2, 1, 8, 8, generator=seed(0))
    score = component.score(captions, draws, DiffusionNoise(torch.tensor([0, T - 1]), eps))
    assert score[0] == 0
    assert score[1] < 0


def only_noisy(snr):
    return (snr < 100).float()


def test_learned_variance_channels_are_left_out():
    model = dit()
    component = Diffusion(model, scheduler=scheduler_of("epsilon"))
    draws = component.observe([x.numpy() for x in images(2, (2, 4, 4))])
    noise = component.noise(draws, seed(0))
    x_t = DDPMScheduler(num_train_timesteps=T).add_noise(latents_of(draws), noise.eps, noise.timesteps)
    output = model(x_t, noise.timesteps, class_labels=torch.tensor([1, 4])).sample
    assert output.shape[1] == 4
    by_hand = ((noise.eps - output[:, :2]) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(component.errors([1, 4], draws, noise), by_hand, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weighting", [None, snr_plus_one])
def test_several_noise_draws_are_averaged_inside_the_score(weighting):
    many, one = from_vectors(num_noise_draws=3, weighting=weighting), from_vectors(weighting=weighting)
    draws, captions = many.observe(images(2)), vectors(2)
    noise = many.noise(draws, seed(4))
    assert noise.timesteps.shape == (2, 3)
    assert noise.eps.shape == (2, 3, 1, 8, 8)
    separate = [
        one.score(captions, draws, DiffusionNoise(noise.timesteps[:, place], noise.eps[:, place])) for place in range(3)
    ]
    assert (separate[0] - separate[1]).abs().min() > 1
    torch.testing.assert_close(many.score(captions, draws, noise), sum(separate) / 3)
    swapped = many.score(captions[::-1], draws[::-1], noise.select([1, 0]))
    torch.testing.assert_close(swapped.flip(0), many.score(captions, draws, noise))


# Noise


def test_same_noise_gives_the_same_score_whatever_the_batch():
    component = from_text()
    texts = ["a dark square", "light circle", "", "a light square circle"]
    draws = component.observe(images(4))
    noise = component.noise(draws, seed(0))
    score = component.score(texts, draws, noise)
    assert torch.equal(score, component.score(texts, draws, noise))
    order = [2, 0, 3, 1, 1]
    permuted = component.score([texts[k] for k in order], [draws[k] for k in order], noise.select(order))
    torch.testing.assert_close(permuted, score[order], rtol=1e-5, atol=1e-3)
    for place in range(4):
        alone = component.score([texts[place]], [draws[place]], noise.select([place]))
        torch.testing.assert_close(alone[0], score[place], rtol=1e-5, atol=1e-3)
    other = component.score(texts, draws, component.noise(draws, seed(1)))
    assert (other - score).abs().min() > 1


def test_noise_is_uniform_in_time_normal_and_reproducible():
    component = from_vectors(sample_shape=(1, 2, 2))
    draws = [Draw(None, {"latents": numpy.zeros((1, 2, 2), numpy.float32)})] * 4000
    noise = component.noise(draws, seed(0))
    counts = noise.timesteps.bincount(minlength=T)
    assert len(counts) == T
    assert counts.min() > 40
    assert counts.max() < 130
    assert abs(noise.eps.mean()) < 0.05
    assert abs(noise.eps.std() - 1) < 0.05
    again, prefix = component.noise(draws, seed(0)), component.noise(draws[:3], seed(0))
    assert torch.equal(noise.eps, again.eps)
    assert torch.equal(noise.timesteps[:3], prefix.timesteps)
    assert torch.equal(noise.eps[:3], prefix.eps)
    assert len(component.noise([])) == 0


def test_score_needs_noise_of_as_many_draws():
    component = from_vectors()
    draws, captions = component.observe(images(2)), vectors(2)
    with pytest.raises(PlanError, match=r"2 inputs and 2 draws at the noise .* got NoneType"):
        component.score(captions, draws)
    with pytest.raises(PlanError, match="got that of 1 draws"):
        component.score(captions, draws, component.noise(draws[:1]))
    assert component.score([], [], component.noise([])).shape == (0,)


def test_draws_without_latents_or_of_another_shape_are_named():
    component = from_vectors()
    good = component.observe(images(1))[0]
    noise = component.noise([good] * 2)
    with pytest.raises(DataError, match=r"holds latents.*observe") as caught:
        component.score(vectors(2), [good, Draw("text")], noise)
    assert caught.value.element == 1
    small = Draw(None, {"latents": numpy.zeros((1, 4, 4), numpy.float32)})
    with pytest.raises(DataError, match=r"latents of shape \(1, 8, 8\), got \(1, 4, 4\)") as caught:
        component.score(vectors(2), [good, small], noise)
    assert caught.value.element == 1


# The reference


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("trains_text", [False, True])
def test_reference_agrees_at_first_and_stays_put_while_the_policy_trains(adapter, trains_text):
    component = from_text(peft_config=LoraConfig(**LORA) if adapter else None, train_text_encoder=trains_text)
    component.module.train()
    reference = component.reference()
    texts, draws = ["a dark square", "light"], component.observe(images(2))
    noise = component.noise(draws, seed(0))

    def scores():
        return component.score(texts, draws, noise), reference.score(texts, draws, noise)

    policy, frozen = scores()
    assert torch.equal(policy, frozen)
    assert policy.requires_grad
    assert not frozen.requires_grad
    before = reference.sample(texts, generator=seed(0))

    trained = [name for name, parameter in component.module.named_parameters() if parameter.requires_grad]
    assert any(name.startswith("text_encoder.") for name in trained) == trains_text
    assert all("lora_" in name for name in trained if name.startswith("denoiser.")) == adapter
    optimizer = torch.optim.SGD([p for p in component.module.parameters() if p.requires_grad], lr=1e-8, maximize=True)
    for _ in range(2):
        optimizer.zero_grad()
        (component.score(texts, draws, noise) - reference.score(texts, draws, noise)).sum().backward()
        reached = {name.partition(".")[0] for name, p in component.module.named_parameters() if p.grad is not None}
        assert reached == ({"denoiser", "text_encoder"} if trains_text else {"denoiser"})
        optimizer.step()

    moved, still = scores()
    assert torch.equal(still, frozen)
    assert 0.1 < (moved - policy).sum() < 1000  # it was ascended
    assert torch.equal(latents_of(reference.sample(texts, generator=seed(0))), latents_of(before))
    assert not torch.equal(latents_of(component.sample(texts, generator=seed(0))), latents_of(before))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_has_no_dropout_while_the_policy_trains(adapter):
    config = LoraConfig(r=2, target_modules=["conv1"]) if adapter else None
    component = Diffusion(plain_unet(dropout=0.5), scheduler=scheduler_of("epsilon"), peft_config=config)
    draws = component.observe(images(2))
    noise = component.noise(draws, seed(0))
    expected = component.score([None] * 2, draws, noise).detach()
    reference = component.reference()
    component.module.train()
    # A copy lies elsewhere in memory, and some processors' convolutions round by where their weights lie.
    torch.testing.assert_close(reference.score([None] * 2, draws, noise), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(component.score([None] * 2, draws, noise), expected, rtol=1e-3)
    assert all(module.training for module in component.module["denoiser"].modules())


def test_a_new_adapters_reference_shares_the_weights_and_a_full_models_does_not():
    light = from_vectors(peft_config=LoraConfig(**LORA))
    full = from_vectors()
    for component, shared in ((light, True), (full, False)):
        own = {p.data_ptr() for p in component.module.parameters()}
        held = {p.data_ptr() for p in component.reference().module.parameters()}
        assert (own == held) == shared
        assert own & held or not shared
    assert component.reference().reference() is not component.reference()
    frozen = full.reference()
    assert frozen.reference() is frozen
    assert not any(parameter.requires_grad for parameter in frozen.module.parameters())


def test_frozen_parts_are_shared_with_the_reference():
    component = from_text(vae=autoencoder())
    reference = component.reference()
    assert reference.module["text_encoder"] is component.module["text_encoder"]
    assert reference.module["vae"] is component.module["vae"]
    assert reference.module["denoiser"] is not component.module["denoiser"]


def test_reference_of_a_trained_adapter_scores_as_it_does_now():
    component = from_vectors(peft_config=LoraConfig(**LORA))
    draws, captions = component.observe(images(2)), vectors(2)
    noise = component.noise(draws, seed(0))
    at_first = component.score(captions, draws, noise)
    drift(component.module)
    now = component.score(captions, draws, noise)
    reference = component.reference()
    assert (now - at_first).abs().min() > 1
    assert torch.equal(reference.score(captions, draws, noise), now)
    drift(component.module, number=10)
    assert torch.equal(reference.score(captions, draws, noise), now)


def test_a_module_saved_by_peft_config_is_off_in_the_reference_too():
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"])
    component = from_vectors(peft_config=config)
    reference = component.reference()
    draws, captions = component.observe(images(1)), vectors(1)
    noise = component.noise(draws, seed(0))
    before = reference.score(captions, draws, noise)
    assert torch.equal(component.score(captions, draws, noise), before)
    conv_out = [p for n, p in component.module.named_parameters() if p.requires_grad and "conv_out" in n]
    assert conv_out
    with torch.no_grad():
        conv_out[0].add_(0.1)
    assert torch.equal(reference.score(captions, draws, noise), before)
    assert not torch.equal(component.score(captions, draws, noise), before)
    assert (component.reference().score(captions, draws, noise) == component.score(captions, draws, noise)).all()


def test_two_components_put_an_adapter_each_on_one_base():
    base = text_unet()
    others = {"r": 2, "target_modules": ["to_q", "to_k"], "modules_to_save": ["conv_out"]}
    first, second = (
        Diffusion(base, scheduler=scheduler_of("epsilon"), peft_config=LoraConfig(**config))
        for config in (LORA, others)
    )
    draws, captions = first.observe(images(2)), vectors(2)
    noise = first.noise(draws, seed(0))
    bare = Diffusion(text_unet(), scheduler=scheduler_of("epsilon")).score(captions, draws, noise).detach()
    torch.testing.assert_close(first.score(captions, draws, noise), bare)
    torch.testing.assert_close(second.score(captions, draws, noise), bare)
    references = first.reference(), second.reference()

    score = first.score(captions, draws, noise).sum()
    score.backward()
    touched = {name for name, p in base.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched
    assert all(".sysdag." in name for name in touched)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad * 1e-3)
    assert (first.score(captions, draws, noise) - bare).abs().min() > 1e-2
    torch.testing.assert_close(second.score(captions, draws, noise), bare)
    for reference in references:
        torch.testing.assert_close(reference.score(captions, draws, noise), bare)
    second.score(captions, draws, noise).sum().backward()
    trainable = {name for name, p in base.named_parameters() if p.requires_grad}
    assert any(".sysdag." in name for name in trainable)
    assert any(".sysdag_1." in name for name in trainable)


def test_an_adapter_config_that_the_reference_could_not_undo_is_refused():
    with pytest.raises(PlanError, match="bias='lora_only'"):
        from_vectors(peft_config=LoraConfig(**LORA, bias="lora_only")).module
    model = text_unet()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(PlanError, match=r"adapters \['style'\] of its own.*fuse_lora"):
        Diffusion(model, scheduler=scheduler_of("epsilon"), peft_config=LoraConfig(**LORA)).module


def test_train_mode_leaves_frozen_parts_and_class_labels_alone():
    component = from_text(text_encoder=clip(attention_dropout=0.5), vae=autoencoder())
    component.module.train()
    assert component.module["denoiser"].training
    assert not component.module["text_encoder"].training
    assert not component.module["vae"].training
    assert not any(p.requires_grad for part in ("text_encoder", "vae") for p in component.module[part].parameters())
    draws = component.observe([Image.new("RGB", (16, 16), "red")] * 2)
    noise = component.noise(draws, seed(0))
    assert torch.equal(component.score(["a", "dark"], draws, noise), component.score(["a", "dark"], draws, noise))

    labels = Diffusion(dit(), scheduler=scheduler_of("epsilon"))
    labels.module.train()
    draws = [Draw(None, {"latents": x.numpy()}) for x in images(20, (2, 4, 4))]
    noise = labels.noise(draws, seed(0))
    first, second = (labels.score([3] * 20, draws, noise) for _ in range(2))
    assert torch.equal(first, second)  # a label dropped at random (one in ten) would change its score


# Sampling


def test_sampling_repeats_with_its_seed_and_does_not_depend_on_the_batch():
    texts = ["a dark square", "light circle", "a light square"]
    for scheduler in (
        DDPMScheduler(num_train_timesteps=T),
        EulerAncestralDiscreteScheduler(num_train_timesteps=T),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=T),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, stochastic_sampling=True),
    ):
        component = from_text(scheduler=scheduler, guidance_scale=2.0)
        draws = component.sample(texts, generator=seed(0))
        again = component.sample(texts, generator=seed(0))
        assert torch.equal(latents_of(draws), latents_of(again))
        assert [d.value.tobytes() for d in draws] == [d.value.tobytes() for d in again]
        assert (latents_of(draws) - latents_of(component.sample(texts, generator=seed(1)))).abs().max() > 0.1
        component.batch_size = 1
        torch.testing.assert_close(latents_of(component.sample(texts, generator=seed(0))), latents_of(draws))
        component.batch_size = 64
        alone = component.sample(texts[:1], generator=seed(0))
        torch.testing.assert_close(latents_of(alone), latents_of(draws[:1]))


def test_each_sample_has_its_own_condition():
    component = from_text()
    mixed = latents_of(component.sample(["a dark square", "light circle"], generator=seed(0)))
    same = latents_of(component.sample(["a dark square", "a dark square"], generator=seed(0)))
    other = latents_of(component.sample(["circle", "light circle"], generator=seed(0)))
    torch.testing.assert_close(mixed[0], same[0])
    torch.testing.assert_close(mixed[1], other[1])
    assert (mixed[1] - same[1]).abs().max() > 1e-2
    assert (mixed[0] - other[0]).abs().max() > 1e-2


def test_sampling_without_a_generator_follows_torchs_global_one():
    component = from_vectors()
    torch.manual_seed(3)
    first = latents_of(component.sample(vectors(2)))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(latents_of(component.sample(vectors(2))), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(latents_of(component.sample(vectors(2))), first)


def test_sampling_restores_modes_tracks_no_gradient_and_leaves_the_scheduler_alone():
    component = from_vectors()
    denoiser = component.module["denoiser"]
    denoiser.train()
    denoiser.mid_block.eval()
    component.pipeline.parts["scheduler"].set_timesteps(7)
    draws = component.sample(vectors(1), generator=seed(0))
    assert denoiser.training
    assert denoiser.down_blocks[0].training
    assert not denoiser.mid_block.training
    assert len(component.pipeline.parts["scheduler"].timesteps) == 7
    assert draws[0].log_prob is None
    assert draws[0].record["latents"].dtype == numpy.float32
    assert draws[0].record["latents"].shape == (1, 8, 8)
    assert draws[0].value.mode == "L"
    levels = (draws[0].record["latents"][0] / 2 + 0.5).clip(0, 1) * 255
    assert numpy.array_equal(numpy.asarray(draws[0].value), levels.round().astype(numpy.uint8))
    assert component.sample([]) == []


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(num_train_timesteps=T, clip_sample=False, steps_offset=1),
        EulerDiscreteScheduler(num_train_timesteps=T, timestep_spacing="trailing"),
        EulerAncestralDiscreteScheduler(num_train_timesteps=T, prediction_type="v_prediction"),
        diffusers.DPMSolverMultistepScheduler(num_train_timesteps=T, steps_offset=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_text_to_image_equals_the_stable_diffusion_pipeline(scheduler, guidance):
    texts = ["a dark square", "light circle"]
    component = from_text(scheduler=scheduler, vae=autoencoder(shift_factor=None), guidance_scale=guidance)
    draws = component.sample(texts, generator=seed(0))
    parts = component.pipeline.parts
    pipe = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    start, generators = start_noise(2, (1, 8, 8))
    options = dict(latents=start, num_inference_steps=4, guidance_scale=guidance, generator=generators)
    states = copy.deepcopy([generator.get_state() for generator in generators])
    latents = pipe(texts, output_type="latent", **options).images
    torch.testing.assert_close(latents_of(draws), latents, rtol=1e-4, atol=1e-4)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    for draw, image in zip(draws, pipe(texts, **options).images, strict=True):
        assert draw.value.mode == "RGB"
        difference = numpy.asarray(draw.value).astype(int) - numpy.asarray(image).astype(int)
        assert abs(difference).max() <= 1
    if guidance != 1:
        unguided = latents_of(from_text(scheduler=scheduler).sample(texts, generator=seed(0)))
        assert (unguided - latents).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_labels_to_image_equals_the_dit_pipeline(guidance):
    vae = autoencoder(latents=2, shift_factor=None)
    component = Diffusion(
        dit(num_embeds_ada_norm=1000), scheduler=DDIMScheduler(num_train_timesteps=T), vae=vae, num_inference_steps=4,
        guidance_scale=guidance,
    )  # fmt: skip
    labels = [7, 900]
    draws = component.sample(labels, generator=seed(0))
    pipe = diffusers.DiTPipeline(component.module["denoiser"], vae, component.pipeline.parts["scheduler"])
    pipe.set_progress_bar_config(disable=True)
    seeds = torch.randint(2**62, (2,), generator=seed(0)).tolist()
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    expected = pipe(labels, guidance_scale=guidance, num_inference_steps=4, generator=generators).images
    for draw, image in zip(draws, expected, strict=True):
        difference = numpy.asarray(draw.value).astype(int) - numpy.asarray(image).astype(int)
        assert abs(difference).max() <= 1


def test_unconditional_equals_the_ddpm_pipeline():
    component = Diffusion(plain_unet(), scheduler=DDPMScheduler(num_train_timesteps=T), num_inference_steps=5)
    draws = component.sample([None, None], generator=seed(0))
    pipe = diffusers.DDPMPipeline(component.module["denoiser"], component.pipeline.parts["scheduler"])
    pipe.set_progress_bar_config(disable=True)
    seeds = torch.randint(2**62, (2,), generator=seed(0)).tolist()
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    expected = pipe(batch_size=2, num_inference_steps=5, generator=generators, output_type="np").images[..., 0]
    torch.testing.assert_close(
        (latents_of(draws)[:, 0] / 2 + 0.5).clamp(0, 1), torch.as_tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_learned_variance_reaches_a_scheduler_that_uses_it():
    scheduler = DDPMScheduler(num_train_timesteps=T, variance_type="learned_range")
    model = dit()
    component = Diffusion(model, scheduler=scheduler, num_inference_steps=3, guidance_scale=2.0)
    drawn = latents_of(component.sample([1, 2], generator=seed(0)))
    samples, generators = start_noise(2, (2, 4, 4))
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            times = t.expand(2)
            mean, variance = model(samples, times, class_labels=torch.tensor([1, 2])).sample.chunk(2, dim=1)
            empty = model(samples, times, class_labels=torch.tensor([5, 5])).sample[:, :2]
            both = torch.cat([empty + 2.0 * (mean - empty), variance], dim=1)
            samples = scheduler.step(both, t, samples, generator=generators).prev_sample
    torch.testing.assert_close(drawn, samples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_flow_matching_transformer_with_a_hook_equals_a_loop_by_hand(dynamic):
    model = sd3()
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=2.0, use_dynamic_shifting=dynamic)
    component = Diffusion(model, scheduler=scheduler, condition=pooled, num_inference_steps=4, guidance_scale=2.0)
    drawn = latents_of(component.sample([0.5, 2.0], generator=seed(0)))
    samples, _ = start_noise(2, (2, 4, 4))
    # SD3's pipeline: mu is linear in the number of tokens, here (4 / 2)^2, between (256, 0.5) and (4096, 1.15)
    scheduler.set_timesteps(4, **({"mu": 0.5 + (4 - 256) * (1.15 - 0.5) / (4096 - 256)} if dynamic else {}))
    with torch.no_grad():
        for t in scheduler.timesteps:
            wanted, empty = (
                model(samples, timestep=t.expand(2), **pooled(inputs)).sample for inputs in ([0.5, 2.0], [None, None])
            )
            samples = scheduler.step(empty + 2.0 * (wanted - empty), t, samples).prev_sample
    torch.testing.assert_close(drawn, samples, rtol=1e-4, atol=1e-4)
    draws = component.sample([0.5, 2.0], generator=seed(0))
    assert isinstance(draws[0].value, numpy.ndarray)  # two channels are no image
    noise = component.noise(draws, seed(1))
    sigma = scheduler_sigmas(2.0, dynamic)[noise.timesteps][:, None, None, None]
    clean = latents_of(draws)
    velocity = model((1 - sigma) * clean + sigma * noise.eps, timestep=sigma.flatten() * T, **pooled([0.5, 2.0])).sample
    by_hand = -T * (noise.eps - clean - velocity).square().flatten(1).sum(1)
    torch.testing.assert_close(component.score([0.5, 2.0], draws, noise), by_hand, rtol=1e-4, atol=1e-2)


def scheduler_sigmas(shift, dynamic):
    linear = torch.arange(1, T + 1) / T
    return linear if dynamic else shift * linear / (1 + (shift - 1) * linear)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_prediction_of_a_multistep_solver_is_scored_as_flow_matching(shift):
    solver = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=T, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=shift)
    one, other = (Diffusion(text_unet(), scheduler=scheduler) for scheduler in (solver, euler))
    draws, captions = one.observe(images(2)), vectors(2)
    noise = one.noise(draws, seed(0))
    torch.testing.assert_close(one.score(captions, draws, noise), other.score(captions, draws, noise))


def test_the_inference_steps_of_a_scheduler_do_not_change_scores():
    for kind in ("epsilon", "flow"):
        used = scheduler_of(kind)
        used.set_timesteps(5)
        fresh, stale = from_vectors(kind), Diffusion(text_unet(), scheduler=used)
        draws, captions = fresh.observe(images(2)), vectors(2)
        noise = fresh.noise(draws, seed(0))
        assert torch.equal(fresh.score(captions, draws, noise), stale.score(captions, draws, noise))


def test_schedulers_that_cannot_score_are_refused():
    unknown = diffusers.EDMEulerScheduler()
    with pytest.raises(PlanError, match=r"EDMEulerScheduler cannot score.*DDPMScheduler"):
        Diffusion(text_unet(), scheduler=unknown).noise([Draw(None)])
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(PlanError, match="invert_sigmas"):
        Diffusion(text_unet(), scheduler=inverted).noise([Draw(None)])
    odd = DDPMScheduler(prediction_type="noise")
    with pytest.raises(PlanError, match=r"prediction_type='noise'.*epsilon"):
        Diffusion(text_unet(), scheduler=odd).noise([Draw(None)])


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "ddpo"}, r"one of \['sysdpo', 'diffusion-dpo', 'diffusers'\], got 'ddpo'"),
        ({"convention": "diffusers", "weighting": snr_plus_one}, "weighting belongs to convention='sysdpo'"),
        ({"num_noise_draws": 0}, "'num_noise_draws': 0"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"sample_shape": (8, 8)}, r"sample_shape must be \(C, H, W\), got \(8, 8\)"),
        ({"scheduler": None}, "pass its scheduler too"),
        ({"tokenizer": "x"}, "text_encoder and tokenizer go together"),
        ({"train_text_encoder": True}, "needs a text_encoder"),
        ({"dtype": torch.float16}, "the model is an object"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        Diffusion(_MODEL, **({"scheduler": scheduler_of("epsilon")} | options))


_MODEL = plain_unet()


def test_a_text_encoder_to_train_must_be_in_the_folder(tmp_path):
    Diffusion(_MODEL, scheduler=scheduler_of("epsilon")).save_pretrained(tmp_path)
    with pytest.raises(
        PlanError, match=r"train_text_encoder=True needs a text encoder; the parts are \['scheduler', 'unet'"
    ):
        Diffusion(tmp_path, train_text_encoder=True).module


def test_a_model_without_a_size_needs_sample_shape():
    model = UNet2DModel.from_config({**plain_unet().config, "sample_size": None})
    with pytest.raises(PlanError, match="has no sample_size; pass sample_shape"):
        Diffusion(model, scheduler=scheduler_of("epsilon")).sample([None])
    component = Diffusion(model, scheduler=scheduler_of("epsilon"), sample_shape=(1, 8, 4), num_inference_steps=2)
    assert component.sample([None])[0].value.size == (4, 8)


def test_repr_and_kind():
    component = from_text(peft_config=LoraConfig(**LORA), guidance_scale=7.5)
    assert repr(component) == (
        "Diffusion(UNet2DConditionModel, scheduler=DDIMScheduler, text_encoder=CLIPTextModel, adapter, steps=4, "
        "guidance=7.5, scale=sysdpo)"
    )
    assert repr(component.reference()).endswith("scale=sysdpo, frozen)")
    assert component.likelihood == "bound"
    assert component.lengths([Draw(None)] * 2) == [1, 1]
    with pytest.raises(PlanError, match="no exact likelihood"):
        component.log_prob(["a"], [Draw(None)])


def test_importing_and_constructing_load_neither_diffusers_nor_transformers():
    code = (
        "import sys; from sysdag.components import Diffusion; print(Diffusion('some/hub-id', num_inference_steps=3));"
        "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "Diffusion('some/hub-id', steps=3, scale=sysdpo)"


@pytest.mark.gpu
def test_on_a_gpu_samples_and_scores_are_the_cpus():
    component = from_text(vae=autoencoder(), guidance_scale=2.0)
    texts = ["a dark square", "light circle"]
    draws = component.sample(texts, generator=seed(0))
    noise = component.noise(draws, seed(1))
    score = component.score(texts, draws, noise).detach()
    component.module.to("cuda")
    assert component.device.type == "cuda"
    torch.testing.assert_close(
        latents_of(component.sample(texts, generator=seed(0))), latents_of(draws), rtol=1e-2, atol=1e-2
    )
    torch.testing.assert_close(component.score(texts, draws, noise).cpu(), score, rtol=1e-3, atol=1)


def test_a_trace_on_disk_scores_the_same(tmp_path):
    component = from_text()
    texts = ["dark", "light circle"]
    draws = component.sample(texts, generator=seed(0))
    Trace({"caption": texts}, {"image": draws}).to_jsonl(tmp_path / "trace.jsonl")
    read = Trace.from_jsonl(tmp_path / "trace.jsonl")
    noise = component.noise(draws, seed(0))
    assert torch.equal(component.score(texts, read.cells["image"], noise), component.score(texts, draws, noise))
    assert read["image"][0].tobytes() == draws[0].value.tobytes()
