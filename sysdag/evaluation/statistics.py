"""Statistics of comparisons: win rates, intervals, and exact tests of paired outcomes.

Comparisons that share a prompt are not independent; `clusters` says which do, and intervals then come from resampling
whole prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy.typing import ArrayLike, NDArray

from sysdag.errors import DataError

_MOST_DRAWN = 2**22  # indices that a bootstrap holds at once
_ROUNDING = 1e-9  # part of decimal fractions that sums and differences may miss: 0.3 - 0.2 is below 0.1


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes:
        estimate: of the whole sample.
        low, high: NaN where the sample cannot tell, as with a single prompt.
    """

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """An exact test of paired outcomes.

    Attributes:
        first, second: pairs in which the first alone, and the second alone, succeeded.
        p_value: two-sided, under the hypothesis that each is as likely as the other.
    """

    first: int
    second: int
    p_value: float


def win_rate(
    outcomes: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Share of comparisons won, ties counted half.

    With one comparison a cluster the interval is Wilson's (with ties it is too wide rather than too narrow); with
    several, a bootstrap over clusters. Where all clusters came out alike resampling shows no spread, and the interval
    is Wilson's with one trial a cluster.

    Args:
        outcomes: (n,) 1 for a win, 0 for a tie, -1 for a loss.
        clusters: (n,) the prompt of each comparison; by default each has its own.
        confidence: the interval's coverage.
        resamples, seed: of the bootstrap.

    Raises:
        DataError: for no comparisons, other outcomes, or columns of different lengths.
    """
    outcomes = numpy.asarray(outcomes)
    if not numpy.isin(outcomes, (-1, 0, 1)).all():
        raise DataError(f"An outcome is 1, 0 or -1, got {sorted(set(outcomes.tolist()) - {-1, 0, 1})}.")
    won = (1 + outcomes) / 2
    sums, counts = _by_cluster(won, clusters)
    rate = float(won.mean())
    if counts.max() == 1 or len(set((sums / counts).tolist())) == 1:
        low, high = wilson_interval(rate * len(sums), len(sums), confidence=confidence)
        return Interval(rate, low, high)
    return cluster_bootstrap(won, clusters, confidence=confidence, resamples=resamples, seed=seed)


def wilson_interval(successes: float, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, without continuity correction.

    Args:
        successes: in [0, trials]; need not be whole.
        trials: independent ones, at least 1.

    Raises:
        DataError: for counts out of range.
    """
    from scipy.special import ndtri

    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"A proportion needs 0 <= successes <= trials and a trial, got {successes} of {trials}.")
    z = float(ndtri((1 + _checked(confidence)) / 2))
    rate = successes / trials
    middle = rate + z * z / (2 * trials)
    half = z * (rate * (1 - rate) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def cluster_bootstrap(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of values, with the percentile interval of resampled clusters.

    Of differences of paired scores it is the paired bootstrap: pairs stay together, and so do the pairs of a cluster.

    Args:
        values: (n,) floats.
        clusters: (n,) what each value belongs to; by default each to a cluster of its own.
        confidence, resamples, seed: see `win_rate`.

    Returns:
        The interval; without bounds for a single cluster.

    Raises:
        DataError: for no values, values that are not finite, or columns of different lengths.
    """
    values = numpy.asarray(values, dtype=float)
    sums, counts = _by_cluster(values, clusters)
    tail = (1 - _checked(confidence)) / 2
    if len(sums) == 1:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    generator = numpy.random.default_rng(seed)
    block = max(1, _MOST_DRAWN // len(sums))
    means = numpy.empty(resamples)
    for start in range(0, resamples, block):
        drawn = generator.integers(len(sums), size=(min(block, resamples - start), len(sums)))
        means[start : start + block] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def sign_test(differences: ArrayLike, clusters: ArrayLike | None = None) -> PairedTest:
    """Exact test of whether more prompts are in favour of the first or of the second; even prompts do not count.

    With one difference of successes (1, 0 or -1) a prompt this is McNemar's exact test.

    Args:
        differences: (n,) first minus second, or 1, 0, -1 for a win, tie, loss.
        clusters: (n,) the prompt of each; its differences are added up, so that each prompt counts once.

    Raises:
        DataError: see `cluster_bootstrap`.
    """
    values = numpy.asarray(differences, dtype=float)
    sums, _ = _by_cluster(values, clusters)
    rounding = _ROUNDING * _by_cluster(abs(values), clusters)[0]
    return exact_test(int((sums > rounding).sum()), int((sums < -rounding).sum()))


def exact_test(first: int, second: int) -> PairedTest:
    """Two-sided binomial test of `first` against `second` discordant pairs; p is 1 where there are none."""
    from scipy.stats import binomtest

    if first < 0 or second < 0:
        raise DataError(f"Numbers of pairs cannot be negative, got {first} and {second}.")
    p_value = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    return PairedTest(first, second, p_value)


def reaches(difference: ArrayLike, margin: float) -> NDArray:
    """Whether differences of scores are at least a margin, elementwise; one that misses it by rounding alone is."""
    return numpy.asarray(difference) >= margin * (1 - _ROUNDING)


def _by_cluster(values: NDArray, clusters: ArrayLike | None) -> tuple[NDArray, NDArray]:
    """Sum and number of the values of each cluster."""
    if values.ndim != 1 or not len(values):
        raise DataError(f"Statistics need one value or more in one column, got an array of shape {values.shape}.")
    if not numpy.isfinite(values).all():
        raise DataError(f"Statistics need finite values, got {values[~numpy.isfinite(values)][0]}.")
    if clusters is None:
        return values, numpy.ones(len(values), dtype=int)
    labels = numpy.asarray(clusters)
    if labels.shape != values.shape:
        raise DataError(f"There are {len(values)} values, and clusters of shape {labels.shape}.")
    _, index, counts = numpy.unique(labels, return_inverse=True, return_counts=True)
    return numpy.bincount(index, weights=values), counts


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise DataError(f"confidence must be between 0 and 1, got {confidence}.")
    return confidence
