import math

import pytest
import torch
from tiny import char_tokenizer, llama

from sysdag import DiverseBeamSearch, Input, MonteCarlo, PlanError, System, node
from sysdag.components import CausalLM, Opaque, Tabular
from sysdag.objectives.candidates import distinct_ngrams

X = Input("x")
FIRST = Tabular({"a": {"p": 0.6, "q": 0.3, "r": 0.1}, "b": {"p": 0.05, "q": 0.05, "r": 0.9}})
SECOND = Tabular({k: {"s": 0.8, "t": 0.2} if k != "q" else {"s": 0.4, "t": 0.6} for k in "pqr"})
LAST = Tabular({k: {"yes": 0.5, "no": 0.5} for k in "st"})


@node(FIRST)
def first(x):
    return x


@node
def doubled(first):
    return first * 2


@node(SECOND)
def second(doubled):
    return doubled[0]


@node(LAST)
def last(second):
    return second


CHAIN = System(X >> first >> doubled >> second >> last).compile()


def paths(candidates):
    found = {}
    for row, prompt in enumerate(candidates.prompt):
        found.setdefault(prompt, []).append((candidates.trace["first"][row], candidates.trace["second"][row]))
    return found


def test_beam_search_gives_the_most_probable_values_of_one_latent():
    plan = System(
        X >> first, first >> node(Tabular({k: {"s": 1.0} for k in "pqr"}), name="out")(lambda first: first)
    ).compile()
    drawn = DiverseBeamSearch(num_candidates=2).draw(plan, {"x": ["a", "b"]})
    assert drawn.prompt == (0, 0, 1, 1)
    assert drawn.trace["first"] == ["p", "q", "r", "p"]
    assert drawn.trace["x"] == ["a", "a", "b", "b"]


def test_several_latents_give_distinct_joint_paths():
    drawn = DiverseBeamSearch(num_candidates=3).draw(CHAIN, {"x": ["a"]})
    assert paths(drawn) == {0: [("p", "s"), ("q", "t"), ("r", "s")]}
    drawn = DiverseBeamSearch(num_candidates=5).draw(CHAIN, {"x": ["a"]})
    assert paths(drawn) == {0: [("p", "s"), ("p", "t"), ("q", "t"), ("q", "s"), ("r", "s")]}
    assert "last" not in drawn.trace.cells


def test_no_more_candidates_are_given_than_exist():
    for strategy in (DiverseBeamSearch(num_candidates=50), MonteCarlo(num_candidates=500)):
        drawn = strategy.draw(CHAIN, {"x": ["a", "b"]}, torch.Generator().manual_seed(0))
        assert {p: len(found) for p, found in paths(drawn).items()} == {0: 6, 1: 6}
        assert all(len(set(found)) == len(found) for found in paths(drawn).values())


def test_monte_carlo_draws_joint_paths_from_the_system():
    counts = dict.fromkeys("pqr", 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        drawn = MonteCarlo(num_candidates=2).draw(CHAIN, {"x": ["a"]}, generator)
        counts[drawn.trace["first"][0]] += 1
    chi_square = sum((counts[v] - 400 * p) ** 2 / (400 * p) for v, p in (("p", 0.6), ("q", 0.3), ("r", 0.1)))
    assert chi_square < 13.8  # the 0.999 quantile at 2 degrees of freedom
    again = [MonteCarlo(num_candidates=4).draw(CHAIN, {"x": ["a"]}, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert paths(again[0]) == paths(again[1])


def test_a_tool_before_the_latents_is_called_once_a_prompt():
    calls = []

    @node(Opaque(lambda x: calls.append(x) or x))
    def zz_facts(x):
        return x

    @node(FIRST)
    def guess(zz_facts):
        return zz_facts

    @node(LAST)
    def out(guess, zz_facts):
        return "s"

    plan = System(X >> zz_facts >> guess, (guess & zz_facts) >> out).compile()
    for strategy in (DiverseBeamSearch(num_candidates=3), MonteCarlo(num_candidates=3)):
        calls.clear()
        drawn = strategy.draw(plan, {"x": ["a", "b"]}, torch.Generator().manual_seed(0))
        assert calls == ["a", "b"]
        assert drawn.trace["zz_facts"] == [{0: "a", 1: "b"}[p] for p in drawn.prompt]


def test_a_latent_plate_cannot_be_searched():
    @node
    def items(x) -> list:
        return ["a", "b"]

    @node(FIRST)
    def parts(items):
        return items

    @node(LAST)
    def out(parts):
        return "s"

    plan = System(X >> items, items.each() >> parts, parts >> out).compile()
    with pytest.raises(PlanError, match="'parts' is a plate.*Use MonteCarlo"):
        DiverseBeamSearch().draw(plan, {"x": ["a"]})
    drawn = MonteCarlo(num_candidates=3).draw(plan, {"x": ["a"]}, torch.Generator().manual_seed(0))
    assert all(len(values) == 2 for values in drawn.trace["parts"])


def test_a_language_models_candidates_carry_the_ids_that_were_found():
    lm = CausalLM(llama(), char_tokenizer(), max_new_tokens=5)

    @node(lm)
    def draft(x):
        return x

    @node(CausalLM(llama(1), char_tokenizer()))
    def answer(draft):
        return f"d: {draft}"

    plan = System(X >> draft >> answer).compile()
    for strategy in (DiverseBeamSearch(num_candidates=4), MonteCarlo(num_candidates=4)):
        drawn = strategy.draw(plan, {"x": ["ab", "c"]}, torch.Generator().manual_seed(0))
        for prompt in range(2):
            keys = [lm.key(c) for c, p in zip(drawn.trace.cells["draft"], drawn.prompt, strict=True) if p == prompt]
            assert (2 if isinstance(strategy, DiverseBeamSearch) else 1) <= len(keys) <= 4
            assert len(set(keys)) == len(keys)
        log_probs = plan.system["draft"].component.log_prob(drawn.trace["x"], drawn.trace.cells["draft"])
        assert (log_probs < 0).all()


def test_distinct_ngrams():
    assert distinct_ngrams(["a b c", "a b d"], 2) == pytest.approx(3 / 4)
    assert distinct_ngrams(["abab"], 2) == pytest.approx(2 / 3)
    assert distinct_ngrams(["a", ""], 2) == 0.0
    assert math.isclose(distinct_ngrams(["a b", "a b"], 1), 0.5)
