"""What a noisy series says: its noise, how far its end is from its beginning, and where it was best."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from sysdag.reporting.history import Series

PART = 0.2
"""The beginning and the end of a series are this part of it each, and at least `LEAST` points."""
LEAST = 3


def noise(series: Series) -> float:
    """The standard deviation around a smooth course, from second differences, which a straight trend leaves at 0.

    Of these the median counts, so single outliers do not. 0 for fewer than three points.
    """
    if len(series) < 3:
        return 0.0
    second = numpy.abs(numpy.diff(numpy.asarray(series.values, dtype=float), n=2))
    return 1.4826 * float(numpy.median(second)) / math.sqrt(6)


@dataclass(frozen=True)
class Change:
    """The means of a series' beginning and end.

    Attributes:
        first, last: the means.
        error: standard error of their difference.
        begin, end: the first and the last step.
        start_of_last: the first step of the end.
    """

    first: float
    last: float
    error: float
    begin: int
    end: int
    start_of_last: int

    @property
    def difference(self) -> float:
        """The end's mean minus the beginning's."""
        return self.last - self.first


def change(series: Series) -> Change | None:
    """How a series of finite values changed; None for fewer than twice `LEAST` points."""
    if len(series) < 2 * LEAST:
        return None
    count = max(LEAST, min(len(series) // 2, math.ceil(PART * len(series))))
    first, last = series.values[:count], series.values[-count:]
    error = noise(series) * math.sqrt(2 / count)
    return Change(
        float(numpy.mean(first)),
        float(numpy.mean(last)),
        error,
        series.steps[0],
        series.steps[-1],
        series.steps[-count],
    )


@dataclass(frozen=True)
class Peak:
    """The best of a series and what became of it.

    Attributes:
        step, value: the best.
        since: the mean of the last values behind it.
        count: how many of them that is, at most `LEAST`.
        last_step: the last step.
        gained: the best minus the first value, without its sign.
    """

    step: int
    value: float
    since: float
    count: int
    last_step: int
    gained: float

    @property
    def lost(self) -> float:
        """How much worse it is since, without its sign."""
        return abs(self.since - self.value)


def peak(series: Series, *, higher_is_better: bool) -> Peak | None:
    """Where a series of finite values was best; None unless there are four values, two of them behind the best."""
    if len(series) < LEAST + 1:
        return None
    best = (max if higher_is_better else min)(series.values)
    at = series.values.index(best)
    behind = series.values[at + 1 :][-LEAST:]
    if len(behind) < 2:
        return None
    since = float(numpy.mean(behind))
    return Peak(series.steps[at], best, since, len(behind), series.steps[-1], abs(best - series.values[0]))


def running_mean(values: numpy.ndarray, window: int) -> numpy.ndarray:
    """The mean over a centred window, smaller at the borders; nan values have no part in it."""
    good = numpy.isfinite(values)
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.where(good, values, 0.0))])
    counts = numpy.concatenate([[0], numpy.cumsum(good)])
    at = numpy.arange(len(values))
    low, high = numpy.maximum(at - window // 2, 0), numpy.minimum(at + window // 2 + 1, len(values))
    number = counts[high] - counts[low]
    return numpy.where(number > 0, (sums[high] - sums[low]) / numpy.maximum(number, 1), numpy.nan)
