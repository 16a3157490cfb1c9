"""Each pipeline of diffusers is its own oracle: what it hands to its scheduler, its images, its folder."""

import pytest
from families_page import check_page
from pipeline_checks import FAMILIES, checks_of, model_of
from tiny_pipelines import PIPELINES, UNBUILT

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


def test_every_family_that_is_brought_is_built():
    assert not set(FAMILIES) & set(UNBUILT)


@pytest.mark.release("all pipelines of diffusers that can be built tiny: three minutes")
def test_the_page_of_pipelines_is_what_is_found():
    check_page("Pipelines of diffusers")
