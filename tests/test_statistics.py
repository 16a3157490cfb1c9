"""Win rates, intervals and exact tests against scipy, values written by hand, and simulated coverage."""

import numpy
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sysdag.errors import DataError
from sysdag.evaluation import statistics
from sysdag.evaluation.statistics import cluster_bootstrap, exact_test, sign_test, wilson_interval, win_rate


@given(st.integers(1, 300), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilsons_interval_is_scipys(trials, share, confidence):
    successes = round(share * trials)
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence=confidence) == pytest.approx(tuple(expected), abs=1e-9)


def test_ties_count_half():
    found = win_rate([1, 1, 0, 0, -1])
    assert found.estimate == 0.6
    assert (found.low, found.high) == wilson_interval(3, 5)
    assert win_rate([0, 0, 0, 0]).estimate == 0.5


def test_one_comparison_a_prompt_gives_wilsons_interval_whatever_the_prompts_are_called():
    outcomes = [1, -1, 1, 1, 0]
    assert win_rate(outcomes, ["d", "a", "e", "c", "b"]) == win_rate(outcomes)


def test_comparisons_that_share_a_prompt_are_resampled_together():
    outcomes = numpy.repeat([1, -1, 1, -1, 1, 1], 10)  # all that is known are six prompts
    clustered = win_rate(outcomes, numpy.repeat(range(6), 10))
    independent = win_rate(outcomes)
    assert clustered.estimate == independent.estimate == pytest.approx(2 / 3)
    assert clustered.high - clustered.low > 2.5 * (independent.high - independent.low)


def test_prompts_that_came_out_alike_are_not_certain():
    found = win_rate([1] * 12, [0] * 4 + [1] * 4 + [2] * 4)
    assert (found.estimate, found.low, found.high) == (1.0, *wilson_interval(3, 3))
    assert found.low == pytest.approx(0.4385, abs=1e-4)
    alone = win_rate([1, -1, 1, 1], [7, 7, 7, 7])
    assert (alone.low, alone.high) == wilson_interval(0.75, 1)


def test_a_bootstrap_is_reproducible_and_seeded():
    values, clusters = [0.0, 1.0, 3.0, 4.0, 9.0, 2.0], [0, 0, 1, 2, 3, 4]
    assert cluster_bootstrap(values, clusters, seed=3) == cluster_bootstrap(values, clusters, seed=3)
    assert cluster_bootstrap(values, clusters, seed=3) != cluster_bootstrap(values, clusters, seed=4)


def test_the_bootstrap_is_scipys_percentile_interval(monkeypatch):
    values = numpy.random.default_rng(0).exponential(size=60)
    expected = scipy.stats.bootstrap(
        (values,), numpy.mean, method="percentile", n_resamples=50_000, random_state=numpy.random.default_rng(1)
    ).confidence_interval
    spread = expected.high - expected.low
    for most in (2**22, 1000):  # in one block, and in many of which the last is smaller
        monkeypatch.setattr(statistics, "_MOST_DRAWN", most)
        found = cluster_bootstrap(values, resamples=49_999)
        assert found.estimate == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02 * spread)


def test_clusters_of_unequal_size_count_by_their_values():
    """Two prompts with 1 and 3 runs: the means of the four resamples are 0, 0.75, 0.75, 1."""
    found = cluster_bootstrap([0, 1, 1, 1], ["a", "b", "b", "b"], confidence=0.4, resamples=4000)
    assert found.estimate == 0.75
    assert (found.low, found.high) == (0.75, 0.75)
    wide = cluster_bootstrap([0, 1, 1, 1], ["a", "b", "b", "b"], confidence=0.9)
    assert (wide.low, wide.high) == (0, 1)


def test_a_single_prompt_has_an_estimate_and_no_bounds():
    found = cluster_bootstrap([1.0, 2.0], ["a", "a"])
    assert found.estimate == 1.5
    assert numpy.isnan([found.low, found.high]).all()


def test_pairs_stay_together():
    generator = numpy.random.default_rng(2)
    prompt = generator.normal(scale=10, size=40)  # what both systems share
    first, second = prompt + 1 + generator.normal(scale=0.1, size=40), prompt + generator.normal(scale=0.1, size=40)
    found = cluster_bootstrap(first - second)
    assert found.estimate == pytest.approx(1, abs=0.1)
    assert found.high - found.low < 0.12


@pytest.mark.parametrize(("runs", "spread"), [(1, 0.0), (4, 0.35)])
def test_coverage_of_win_rates(runs, spread):
    """Prompts differ in how hard they are; the interval has to cover the mean over all prompts."""
    generator = numpy.random.default_rng(5)
    prompts, covered, trials = 60, 0, 400
    clusters = numpy.repeat(range(prompts), runs)
    for trial in range(trials):
        chance = numpy.clip(0.6 + spread * generator.choice([-1, 1], size=prompts), 0, 1).repeat(runs)
        outcomes = numpy.where(generator.random(prompts * runs) < chance, 1, -1)
        found = win_rate(outcomes, clusters, resamples=400, seed=trial)
        covered += found.low <= 0.6 <= found.high
    assert 0.915 < covered / trials < 0.98


def test_coverage_of_a_mean_difference():
    generator = numpy.random.default_rng(6)
    covered, trials, clusters = 0, 400, numpy.repeat(range(40), 3)
    for trial in range(trials):
        difference = 0.5 + generator.normal(size=40).repeat(3) + generator.normal(size=120)
        found = cluster_bootstrap(difference, clusters, resamples=400, seed=trial)
        covered += found.low <= 0.5 <= found.high
    assert 0.9 < covered / trials < 0.98


def test_the_sign_test_of_successes_is_mcnemars_exact_test():
    """Ten prompts only the first gets right and two only the second: 2 P(X <= 2) for X ~ B(12, 1/2) is 158 / 4096."""
    first = numpy.array([1] * 10 + [0] * 2 + [1] * 7 + [0] * 5)
    second = numpy.array([0] * 10 + [1] * 2 + [1] * 7 + [0] * 5)
    found = sign_test(first - second)
    assert (found.first, found.second) == (10, 2)
    assert found.p_value == pytest.approx(158 / 4096)
    assert sign_test(second - first).p_value == found.p_value
    assert sign_test([0, 0]).p_value == 1


def test_the_sign_test_counts_each_prompt_once():
    """Three prompts: two wins of three; one of each; three losses."""
    found = sign_test([1, 1, -1, 1, -1, -1, -1, -1], [0, 0, 0, 1, 1, 2, 2, 2])
    assert (found.first, found.second, found.p_value) == (1, 1, 1.0)


def test_differences_that_cancel_but_for_rounding_are_even():
    found = sign_test([0.3, -0.1, -0.2, -0.3, 0.1, 0.2, 0.1], [0, 0, 0, 1, 1, 1, 2])
    assert (found.first, found.second) == (1, 0)


def test_exact_tests_hold_their_level():
    generator = numpy.random.default_rng(7)
    below = [exact_test(k, 40 - k).p_value < 0.05 for k in generator.binomial(40, 0.5, size=2000)]
    assert 0.02 < numpy.mean(below) <= 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate([]), "one value or more"),
        (lambda: win_rate([1, 2]), r"An outcome is 1, 0 or -1, got \[2\]"),
        (lambda: win_rate([1, -1], [0]), "There are 2 values, and clusters of shape"),
        (lambda: win_rate([1, -1], confidence=95), "confidence must be between 0 and 1, got 95"),
        (lambda: wilson_interval(3, 2), "got 3 of 2"),
        (lambda: wilson_interval(0, 0), "got 0 of 0"),
        (lambda: cluster_bootstrap([1.0, float("nan")]), "finite values, got nan"),
        (lambda: cluster_bootstrap([[1.0]]), r"shape \(1, 1\)"),
        (lambda: sign_test([]), "one value or more"),
        (lambda: exact_test(-1, 2), "cannot be negative"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(DataError, match=message):
        call()
