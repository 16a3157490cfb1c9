"""What every component inherits."""

import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_diffusion import from_vectors, images, vectors

from sysdag import Component, Draw, PlanError
from sysdag.components import BiEncoder, CausalLM, Choice, ImageTextToText, Opaque, Seq2Seq, Tabular


class Weighing(Tabular):
    """A draw's value is what it weighs."""

    def token_counts(self, draws):
        return [draw.value for draw in draws]


@given(st.lists(st.integers(1, 9), max_size=20), st.none() | st.integers(1, 12))
def test_micro_batches_are_runs_that_fill_the_budget(weights, max_tokens):
    component = Weighing({"a": {"x": 1.0}})
    draws = [Draw(weight) for weight in weights]
    found = component.micro_batches([None] * len(draws), draws, max_tokens)
    assert sum(found, []) == list(range(len(draws)))
    filled = [sum(weights[i] for i in group) for group in found]
    if max_tokens is None:
        assert len(found) <= 1
        return
    for group, total in zip(found, filled, strict=True):
        assert total <= max_tokens or len(group) == 1
    for total, group in zip(filled, found[1:], strict=False):
        assert total + weights[group[0]] > max_tokens, "the next would have fitted"


def test_an_element_weighs_1_by_default_and_a_budget_holds_something():
    component = Tabular({"a": {"x": 1.0}})
    assert component.micro_batches(["a"] * 5, [Draw("x")] * 5, 2) == [[0, 1], [2, 3], [4]]
    with pytest.raises(PlanError, match=r"max_tokens >= 1, or None for one group of all, got 0"):
        component.micro_batches(["a"], [Draw("x")], 0)


@pytest.mark.parametrize(("noise_draws", "expected"), [(1, [[0, 1, 2], [3, 4]]), (3, [[0], [1], [2], [3], [4]])])
def test_a_diffusion_draw_weighs_its_positions_at_each_noise(noise_draws, expected):
    """8 * 8 latents; groups are scored at their part of the noise as the whole is."""
    component = from_vectors(num_noise_draws=noise_draws)
    inputs, draws = vectors(5), component.observe(images(5))
    found = component.micro_batches(inputs, draws, 3 * 64 + 63)
    assert found == expected
    noise = component.noise(draws)
    whole = component.score(inputs, draws, noise)
    for group in found:
        part = component.score([inputs[i] for i in group], [draws[i] for i in group], noise.select(group))
        torch.testing.assert_close(part, whole[group])


class Lists(Tabular):
    """Draws lists, and has weights; says nothing of log-probabilities, references, keys and loading."""

    def __init__(self):
        super().__init__({"a": {"x": 1.0}})
        self._module = torch.nn.Linear(1, 1)

    @property
    def module(self):
        return self._module

    log_prob = Component.log_prob
    reference = Component.reference
    key = Component.key
    load_weights = Component.load_weights


def test_a_component_of_ones_own_is_told_which_method_it_lacks():
    with pytest.raises(PlanError, match=r"override `reference\(self\)` in Lists .*'trainable': False"):
        Lists().reference()
    with pytest.raises(PlanError, match=r"drew \['x'\], which has no hash .* override `key\(self, draw\)` in Lists"):
        Lists().key(Draw(["x"]))
    with pytest.raises(PlanError, match=r"override `log_prob\(self, inputs, draws\)` in Lists"):
        Lists().log_prob(["a"], [Draw("x")])
    with pytest.raises(PlanError, match=r"override `load_weights\(self, folder\)` in Lists"):
        Lists().load_weights(Path())
    with pytest.raises(PlanError, match=r"has no exact likelihood \(its kind is 'none'\)"):
        Opaque(str).log_prob(["a"], [Draw("x")])
    with pytest.raises(PlanError, match="has no weights to load"):
        Opaque(str).load_weights(Path())
    assert Lists().key(Draw(("x",))) == ("x",)
    assert Component.key(Lists(), Draw("x")) == "x"


@pytest.mark.parametrize("kind", [Seq2Seq, ImageTextToText, Choice])
def test_every_option_of_causal_lm_is_taken_or_refused_with_what_serves_instead(kind):
    taken = inspect.signature(kind).parameters
    for name in inspect.signature(CausalLM).parameters.keys() - taken.keys():
        with pytest.raises(PlanError, match=f"{kind.__name__} takes no {name}: .*"):
            kind("somewhere", **{name: "x"})


def test_an_option_that_nobody_knows_is_refused_with_the_nearest_one():
    with pytest.raises(PlanError, match=r"CausalLM takes no max_newtokens\. Did you mean max_new_tokens\?"):
        CausalLM("somewhere", max_newtokens=3)
    with pytest.raises(PlanError, match=r"BiEncoder takes no grammar\. It takes model, tokenizer"):
        BiEncoder("somewhere", grammar="x")

    class Mine(CausalLM):
        def __init__(self, model, *, depth=1, **options):
            super().__init__(model, **options)

    with pytest.raises(PlanError, match="Mine takes no processor: its prompts are texts"):
        Mine("somewhere", depth=2, processor="x")
    assert Mine("somewhere", max_new_tokens=3).max_new_tokens == 3
    assert "model" in inspect.signature(Seq2Seq).parameters
