"""Ordered choices without replacement against enumeration, and their formula."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sysdag.components.selection import plackett_luce


def enumerated(logits, k):
    """The probability of every ordered choice, by the product of shares of what is left."""
    weights = [math.exp(logit) for logit in logits]
    found = {}
    for chosen in itertools.permutations(range(len(logits)), k):
        left, probability = math.fsum(weights), 1.0
        for option in chosen:
            probability *= weights[option] / left
            left = math.fsum(w for place, w in enumerate(weights) if place not in chosen[: chosen.index(option) + 1])
        found[chosen] = probability
    return found


logit_lists = st.lists(st.floats(-4, 4), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(logits=logit_lists, data=st.data())
def test_probabilities_are_those_of_the_enumeration_and_sum_to_1(logits, data):
    k = data.draw(st.integers(1, len(logits)))
    wanted = enumerated(logits, k)
    every = plackett_luce.every(len(logits), k)
    assert len(every) == plackett_luce.count(len(logits), k) == len(wanted)
    padded = torch.tensor([*logits, -math.inf, -math.inf], dtype=torch.float64).expand(len(every), -1)
    found = plackett_luce.log_prob(padded, torch.tensor(every)).exp()
    torch.testing.assert_close(found, torch.tensor([wanted[c] for c in every], dtype=torch.float64), rtol=1e-9, atol=0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(logits=logit_lists, data=st.data())
def test_the_best_choices_are_the_most_probable_ones_in_order(logits, data):
    k = data.draw(st.integers(1, len(logits)))
    most = data.draw(st.integers(1, 130))
    wanted = enumerated(logits, k)
    found = plackett_luce.best(logits, k, most)
    assert len(found) == len(set(found)) == min(most, len(wanted))
    ordered = sorted(wanted.values(), reverse=True)[: len(found)]
    assert [wanted[each] for each in found] == pytest.approx(ordered, rel=1e-9)


def test_of_equal_scores_earlier_options_come_first_and_impossible_ones_never():
    assert plackett_luce.best([0.0, 0.0, 0.0], 2, 4) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    assert plackett_luce.best([0.0, -math.inf, 1.0], 2, 9) == [(2, 0), (0, 2)]
    assert plackett_luce.best([0.0, -math.inf], 2, 9) == []
    assert plackett_luce.best([-800.0, 800.0, -801.0], 3, 2) == [(1, 0, 2), (1, 2, 0)]  # nothing underflows


def test_the_gradient_is_that_of_the_formula():
    logits = torch.tensor([[0.3, -1.2, 2.0, 0.7]], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[2, 0, 3]])
    plackett_luce.log_prob(logits, chosen).sum().backward()
    wanted, left = torch.zeros(4, dtype=torch.float64), [0, 1, 2, 3]
    for option in (2, 0, 3):  # d/ds of s_c - log sum exp over what is left: 1 at c, less the shares
        wanted[option] += 1
        wanted[left] -= logits.detach()[0, left].softmax(0)
        left.remove(option)
    torch.testing.assert_close(logits.grad[0], wanted, rtol=1e-12, atol=1e-12)


def test_typicality_sums_the_steps():
    logits = torch.tensor([[0.3, -1.2, 2.0]], dtype=torch.float64)
    first = logits[0].softmax(0)
    second = logits[0, [0, 1]].softmax(0)  # once option 2 is taken
    wanted = math.log(first[2] / (first**2).sum()) + math.log(second[0] / (second**2).sum())
    assert float(plackett_luce.typicality(logits, torch.tensor([[2, 0]]))) == pytest.approx(wanted, rel=1e-12)


def chi_square(counts, probabilities, draws):
    return sum((counts[value] - draws * p) ** 2 / (draws * p) for value, p in probabilities.items())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gumbel_top_k_draws_with_the_enumerated_probabilities(k):
    logits, draws = [0.5, -0.7, 1.1], 20000
    drawn = plackett_luce.gumbel_top_k(torch.tensor([logits]).expand(draws, -1), k, torch.arange(draws))
    counts = Counter(map(tuple, drawn.tolist()))
    assert chi_square(counts, enumerated(logits, k), draws) < {1: 13.8, 2: 20.5, 3: 20.5}[k]  # 0.999 quantiles


def test_a_draw_depends_on_its_seed_and_on_no_padding():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    seeds = torch.arange(50) * 7
    together = plackett_luce.gumbel_top_k(logits, 3, seeds)
    padded = torch.cat([logits, torch.full((50, 300), -torch.inf)], 1)
    assert torch.equal(plackett_luce.gumbel_top_k(padded, 3, seeds), together)
    for row in (0, 17, 49):
        assert torch.equal(plackett_luce.gumbel_top_k(logits[row : row + 1], 3, seeds[row : row + 1])[0], together[row])


def test_truncated_draws_leave_out_the_improbable_at_every_step():
    logits, draws = [2.0, 1.0, 0.0, -1.0], 400
    found = [
        plackett_luce.truncated_top_k(torch.tensor(logits), 2, seed, temperature=0.5, top_p=1.0, top_k=2)
        for seed in range(draws)
    ]
    sharp = [2 * logit for logit in logits]
    wanted = {}
    for first, others in ((0, (1, 2)), (1, (0, 2))):  # the two best of what is left
        p = math.exp(sharp[first]) / (math.exp(sharp[0]) + math.exp(sharp[1]))
        total = sum(math.exp(sharp[other]) for other in others)
        wanted |= {(first, other): p * math.exp(sharp[other]) / total for other in others}
    counts = Counter(tuple(chosen) for chosen, _ in found)
    assert set(counts) <= set(wanted)
    assert chi_square(counts, wanted, draws) < 16.3
    for chosen, log_prob in found[:20]:
        assert log_prob == pytest.approx(math.log(wanted[tuple(chosen)]), abs=1e-5)
