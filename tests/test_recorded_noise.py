"""The noise that a picture was sampled from: what the pipeline makes of it again, and scores at it."""

import pytest
import torch
from diffusers import DDIMScheduler
from pipeline_checks import pixels
from test_diffusion_checkpoints import OUTLINE, base_of, noise_image, opened
from tiny_diffusion import drift, from_vectors, seed, vectors
from tiny_pipelines import CALL

from sysdag.components import Diffusion
from sysdag.components.diffusion.forward_process import ForwardProcess
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.errors import DataError, PlanError
from sysdag.objectives.options import ObjectiveOptions

PROMPTS = ["a dark square", "a light circle on a dark square"]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux-dev", "wan"])
def test_the_pipeline_makes_the_same_picture_of_the_recorded_noise(name, tmp_path):
    folder = base_of(name, tmp_path / "base")
    component = Diffusion(folder, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}), record_noise=True)
    pipe = opened(folder)
    for draw, prompt in zip(component.sample(PROMPTS, generator=seed(0)), PROMPTS, strict=True):
        noise = torch.from_numpy(draw.record["noise"])
        assert noise.shape == draw.record["latents"].shape
        own = pipe(prompt=prompt, latents=noise[None], num_inference_steps=2, output_type="pil", **CALL.get(name, {}))
        assert abs(pixels(own[0][0]) - pixels(draw.value)).max() <= 2
    plain = Diffusion(folder, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}))
    assert "noise" not in plain.sample(PROMPTS, generator=seed(0))[0].record


def test_separate_parts_record_what_their_first_step_began_with():
    component = from_vectors("flow", record_noise=True)
    draws = component.sample(vectors(2), generator=seed(0))
    seeds = torch.randint(2**62, (2,), generator=seed(0)).tolist()
    for draw, number in zip(draws, seeds, strict=True):
        expected = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(torch.from_numpy(draw.record["noise"]), expected)


@pytest.mark.parametrize("times_each", [1, 2])
def test_scores_at_the_recorded_noise_are_those_on_the_line_to_it(times_each):
    component = from_vectors(
        "flow", record_noise=True, score_noise="recorded", convention="diffusers", num_noise_draws=times_each
    )
    inputs = vectors(2)
    draws = component.sample(inputs, generator=seed(0))
    noise = component.noise(draws, seed(1))
    process = ForwardProcess.of(component.pipeline.parts["scheduler"])
    with torch.no_grad():
        found = component.score(inputs, draws, noise)
    for row, draw in enumerate(draws):
        image, eps = (torch.from_numpy(draw.record[name]) for name in ("latents", "noise"))
        errors = []
        for t in noise.timesteps.reshape(2, -1)[row]:
            sigma = process.sigmas[t]
            with torch.no_grad():
                given = component.pipeline.denoiser(
                    ((1 - sigma) * image + sigma * eps)[None], process.model_times[t],
                    encoder_hidden_states=inputs[row].reshape(1, 1, -1),
                ).sample[0]  # fmt: skip
            errors.append((eps - image - given).square().mean())
        assert len(errors) == times_each
        torch.testing.assert_close(found[row], -sum(errors) / times_each, rtol=1e-4, atol=1e-6)


def test_a_winner_and_a_loser_have_each_their_own_noise_at_common_times(tmp_path):
    component = Diffusion(
        base_of("sd3", tmp_path / "base"), num_inference_steps=2, record_noise=True, score_noise="recorded",
        pipeline_kwargs=CALL["sd3"],
    )  # fmt: skip
    winners, losers = (component.sample(PROMPTS, generator=seed(number)) for number in (0, 1))
    rows = [
        {"prompt": prompt, "chosen": winner, "rejected": loser}
        for prompt, winner, loser in zip(PROMPTS, winners, losers, strict=True)
    ]
    plan = OUTLINE.with_components({"picture": component}).compile()
    model = SystemModel(plan, ObjectiveOptions())
    drift(component.pipeline.denoiser)
    (term,) = model.compare(encode_pairs(plan, rows, "direct"), seed(2), None).terms
    assert torch.equal(term.noise.timesteps[:2], term.noise.timesteps[2:])
    for eps, draw in zip(term.noise.eps, [*winners, *losers], strict=True):
        assert torch.equal(eps, torch.from_numpy(draw.record["noise"]))
    with pytest.raises(DataError, match="holds noise, got the record .*sampled with record_noise=True"):
        component.noise(component.observe([noise_image(0)]))
    with pytest.raises(DataError, match="Row 0, chosen, node 'picture': expected a draw that holds noise"):
        encode_pairs(plan, [{**rows[0], "chosen": component.observe([noise_image(0)])[0]}], "direct")


def test_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(PlanError, match="pass record_noise=True too"):
        from_vectors("flow", score_noise="recorded")
    with pytest.raises(PlanError, match="score_noise must be 'drawn' or 'recorded', got 'prior'"):
        from_vectors("flow", score_noise="prior")
    curved = Diffusion(
        from_vectors().pipeline.denoiser, scheduler=DDIMScheduler(), record_noise=True, score_noise="recorded"
    )
    with pytest.raises(PlanError, match="DDIMScheduler predicts epsilon"):
        curved.noise(curved.sample(vectors(1), generator=seed(0)))


def test_the_options_are_saved(tmp_path):
    component = from_vectors("flow", record_noise=True, score_noise="recorded")
    again = Diffusion.from_pretrained(tmp_path, component.save_pretrained(tmp_path))
    assert (again.record_noise, again.score_noise) == (True, "recorded")
