"""Each pipeline of diffusers is its own oracle: what it hands to its scheduler, its images, its folder."""

import inspect

import pytest
import torch
from families_page import check_page
from pipeline_checks import FAMILIES, PROMPTS, checks_of, model_of, own_score
from tiny_diffusion import drift
from tiny_pipelines import CALL, PIPELINES, UNBUILT

from sysdag.components import Diffusion

CASES = [(name, check) for name in FAMILIES if name in PIPELINES for check in checks_of(name)]


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}-{check.__name__[6:]}" for name, check in CASES])
def test_a_pipeline_does_what_it_does_by_itself(name, check, models, tmp_path_factory):
    if name not in models:
        models.clear()
        models[name] = model_of(name, tmp_path_factory.mktemp(name))
    assert check(models[name]) > 0


@pytest.mark.parametrize("name", ["sdxl", "flux-dev", "z-image"])
def test_text_encoders_that_train_get_the_gradients_of_the_pipelines_own_error(name, tmp_path):
    model = model_of(name, tmp_path)
    options = {"num_inference_steps": 2, "pipeline_kwargs": CALL.get(name, {}), "convention": "diffusers"}
    model.component = Diffusion(tmp_path, train_text_encoder=True, **options)
    noise = model.component.noise(model.draws[:1], torch.Generator().manual_seed(4))
    for _ in range(2):  # nothing of a prompt is kept
        model.component.module.zero_grad()
        model.component.score(PROMPTS[:1], model.draws[:1], noise).sum().backward()
    own_score(model, noise, 0, PROMPTS[0], call=inspect.unwrap(type(model.pipe).__call__)).backward()
    encoders = [key for key in model.pipe.components if key.startswith("text_encoder")]
    assert len(encoders) == (1 if name == "z-image" else 2)
    for encoder in encoders:
        ours = dict(model.component.pipeline.parts[encoder].named_parameters())
        own = {key: p.grad for key, p in model.pipe.components[encoder].named_parameters() if p.grad is not None}
        assert own.keys() == {key for key, parameter in ours.items() if parameter.grad is not None}
        assert len(own) > 3
        largest = max(gradient.abs().max() for gradient in own.values())
        for key, gradient in own.items():
            torch.testing.assert_close(ours[key].grad, gradient, rtol=1e-3, atol=1e-4 * largest.item())
    assert not any(p.requires_grad for p in model.component.module["vae"].parameters())
    # The reference stays what it was: its text encoders are its own.
    reference = model.component.reference()
    with torch.no_grad():
        before = reference.score(PROMPTS[:1], model.draws[:1], noise)
        drift(model.component.module)
        torch.testing.assert_close(reference.score(PROMPTS[:1], model.draws[:1], noise), before)
        assert model.component.score(PROMPTS[:1], model.draws[:1], noise) != before


def test_every_family_that_is_brought_is_built():
    assert not set(FAMILIES) & set(UNBUILT)


@pytest.mark.release("all pipelines of diffusers that can be built tiny: three minutes")
def test_the_page_of_pipelines_is_what_is_found():
    check_page("Pipelines of diffusers")
