"""Pictures of different sizes in one batch: each is scored as it is alone, and as the pipeline does at its size."""

import math
from dataclasses import replace

import pytest
import torch
from pipeline_checks import handed_to_scheduler, target_of
from test_diffusion_checkpoints import OUTLINE, base_of, noise_image
from test_trainer import config, weights
from test_two_pass import gradients_of
from tiny_diffusion import drift, seed

from sysdag import SysDPOTrainer
from sysdag.components import Diffusion
from sysdag.components.diffusion.forward_process import DiffusionNoise, ForwardProcess
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import ObjectiveOptions

PROMPTS = ["a dark square", "a light circle", "a light circle on a dark square", "a dark square"]
SIZES = [((16, 16), (24, 16)), ((24, 16), (16, 16)), ((16, 24), (24, 16)), ((24, 16), (24, 16))]  # width, height


def rows():
    return [
        {"prompt": prompt, "chosen": noise_image(2 * row, *chosen), "rejected": noise_image(2 * row + 1, *rejected)}
        for row, (prompt, (chosen, rejected)) in enumerate(zip(PROMPTS, SIZES, strict=True))
    ]


def component_of(name, folder):
    return Diffusion(base_of(name, folder), num_inference_steps=2, convention="diffusion-dpo", guidance_scale=1.0)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_each_is_scored_as_alone_and_as_the_pipeline_at_its_size(name, tmp_path):
    component = component_of(name, tmp_path / "base")
    draws = component.observe([row[side] for row in rows() for side in ("chosen", "rejected")])
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    noise = component.noise(draws, seed(3))
    with torch.no_grad():
        together = component.score(prompts, draws, noise)
        alone = [component.score([prompts[i]], [draws[i]], noise.select([i])) for i in range(len(draws))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)
    pipe = component.pipeline.whole
    process = ForwardProcess.of(pipe.scheduler)
    sizes = [size for pair in SIZES for size in pair]
    for row, (width, height) in enumerate(sizes):
        clean, eps, t = torch.from_numpy(draws[row].record["latents"]), noise.eps[row], noise.timesteps[row]
        assert clean.shape[1:] == (height // 2, width // 2)
        alpha, sigma = process.alphas[t], process.sigmas[t]
        given = handed_to_scheduler(
            pipe, prompts[row], alpha * clean + sigma * eps, process.model_times[t], num_inference_steps=2,
            guidance_scale=1.0, height=height, width=width,
        )  # fmt: skip
        error = (target_of(process, clean, eps, alpha, sigma) - given).square().mean()
        torch.testing.assert_close(together[row], -0.5 * error, rtol=2e-4, atol=1e-6)


def test_a_batch_of_pairs_has_the_mean_loss_and_gradient_of_each_alone(tmp_path):
    plan = OUTLINE.with_components({"picture": component_of("sd15", tmp_path / "base")}).compile()
    model = SystemModel(plan, ObjectiveOptions(beta=50.0))
    drift(model.components["picture"].pipeline.denoiser, size=0.02)
    pairs = encode_pairs(plan, rows(), "direct")

    def loss_and_gradients(chosen):
        output, gradients = gradients_of(model, [pairs[i] for i in chosen], [seed(i) for i in chosen])
        return output.loss.item(), {name: gradient for name, gradient in gradients.items() if gradient is not None}

    loss, gradients = loss_and_gradients(range(4))
    each = [loss_and_gradients([i]) for i in range(4)]
    assert abs(loss - math.log(2)) > 1e-3
    assert loss == pytest.approx(sum(one for one, _ in each) / 4, rel=1e-4)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        mean = sum(own[name] for _, own in each) / 4
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-4 * largest.item())


def test_a_winner_and_a_loser_share_their_times_and_what_noise_they_can(tmp_path):
    plan = OUTLINE.with_components({"picture": component_of("sd15", tmp_path / "base")}).compile()
    model = SystemModel(plan, ObjectiveOptions())
    (term,) = model.compare(encode_pairs(plan, rows(), "direct"), seed(0), None).terms
    times, eps = term.noise.timesteps, term.noise.eps
    assert torch.equal(times[:4], times[4:])
    for pair, (winner, loser) in enumerate(SIZES):
        assert eps[pair].shape[1:] == (winner[1] // 2, winner[0] // 2)
        assert eps[pair + 4].shape[1:] == (loser[1] // 2, loser[0] // 2)
        assert torch.equal(eps[pair], eps[pair + 4]) == (winner == loser)


def test_fitted_noise_of_several_times_keeps_what_fits():
    noise = DiffusionNoise.draw([(1, 4, 6), (1, 4, 4)], 2, 50, seed(0))
    assert noise.fitted([(1, 4, 6), (1, 4, 4)], seed(1)) is noise
    fitted = noise.fitted([(1, 6, 4), (1, 4, 4)], seed(1))
    assert torch.equal(fitted.timesteps, noise.timesteps)
    assert torch.equal(fitted.eps[1], noise.eps[1])
    dropped = torch.tensor([True, False])
    hidden = replace(noise, dropped=dropped)
    own = [torch.zeros(1, 4, 6), torch.zeros(1, 4, 4)]
    for changed in (hidden.fitted([(1, 6, 4), (1, 4, 4)]), hidden.replaced(own)):
        assert torch.equal(changed.dropped, dropped)
    assert torch.equal(fitted.eps[0], torch.randn(2, 1, 6, 4, generator=seed(1)))


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
def test_rows_of_several_sizes_train_in_one_batch(engine, tmp_path):
    system = OUTLINE.with_components({"picture": component_of("sd15", tmp_path / "base")})
    options = {"objective": "direct", "beta": 2000.0, "max_steps": 3, "engine": engine, "micro_batch_tokens": 400}
    trainer = SysDPOTrainer(system, config(tmp_path / "out", **options), train_dataset=rows())
    start = weights(system)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert all(math.isfinite(loss) for loss in losses)
    assert not all(tensor.equal(start[key]) for key, tensor in weights(system).items())
