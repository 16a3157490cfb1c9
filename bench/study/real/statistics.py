"""Estimates over seeds and instructions: both are resampled, so that a single seed is seen to be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from sysdag.evaluation.statistics import Interval, cluster_bootstrap

RESAMPLES = 10_000


def mean_of(values: Mapping[int, Sequence[float]]) -> Interval:
    """Mean over seeds and instructions with its 95 % interval.

    Whole instructions are resampled, and with several seeds also seeds: what a seed changes is no error that more
    instructions would average out. With one seed the interval says nothing of other seeds.

    Args:
        values: by seed, one number an instruction, in the same order.
    """
    table = numpy.array([values[seed] for seed in sorted(values)])
    if len(table) == 1:
        return cluster_bootstrap(table[0], resamples=RESAMPLES)
    generator = numpy.random.default_rng(0)
    seeds = generator.integers(len(table), size=(RESAMPLES, len(table)))
    means = numpy.empty(RESAMPLES)
    for at, drawn in enumerate(seeds):
        places = generator.integers(table.shape[1], size=table.shape[1])
        means[at] = table[drawn].mean(0)[places].mean()
    low, high = numpy.quantile(means, [0.025, 0.975])
    return Interval(float(table.mean()), float(low), float(high))


@dataclass(frozen=True)
class Change:
    """A difference of two rows.

    Attributes:
        interval: of it, paired by seed and instruction.
        seeds: those that both rows have.
    """

    interval: Interval
    seeds: Sequence[int]


def difference_of(ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]]) -> Change | None:
    """Ours minus theirs; None where no seed is in both."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    paired = {seed: [a - b for a, b in zip(ours[seed], theirs[seed], strict=True)] for seed in seeds}
    return Change(mean_of(paired), seeds)
