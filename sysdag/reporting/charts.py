"""Line charts: from series to the coordinates that the template `chart.svg.j2` writes. No markup is made here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy

from sysdag.reporting.formats import number
from sysdag.reporting.history import Series
from sysdag.reporting.thinning import thin
from sysdag.reporting.trends import running_mean

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
POINTS = 20_000
"""Of all curves of a report together, so that it stays small however many nodes and steps there are."""
MOST_OF_A_CURVE, LEAST_OF_A_CURVE = 400, 60
SMOOTHED_FROM = 60
"""Points from which on a curve of training is drawn pale, with its running mean over it."""
WINDOW = 0.05
"""The running mean is over this part of the points."""
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A series to be drawn.

    Attributes:
        label: what the legend calls it; lines of one label have one colour and one entry.
        colour: index of its colour; from `COLOURS` on they repeat, dashed.
        series: what is drawn.
        is_evaluation: drawn with a dot at each point.
    """

    label: str
    colour: int
    series: Series
    is_evaluation: bool = False


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A line in the chart's coordinates.

    Attributes:
        path: SVG path data, with a gap where a value is not finite.
        mean: the same of the running mean, or "".
        dots: centres of dots.
        steps, values: the points that were kept, for reading them off: the first step and then differences; numbers.
    """

    label: str
    colour: int
    dashed: bool
    is_evaluation: bool
    path: str
    mean: str
    dots: tuple[tuple[float, float], ...]
    steps: str
    values: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be written.

    Attributes:
        title, about: what it shows, and how to read it.
        curves: its lines.
        legend: (label, colour, dashed) of each entry.
        x_ticks, y_ticks: positions and texts.
        marks: (x, label) of vertical lines.
        first_step, last_step, low, high: what the axes span.
        is_log: whether the values' axis is logarithmic.
    """

    title: str
    about: str
    curves: tuple[Curve, ...]
    legend: tuple[tuple[str, int, bool], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[tuple[float, str], ...]
    first_step: int
    last_step: int
    low: float
    high: float
    is_log: bool


def points_of_a_curve(curves: int) -> int:
    """How many points each of that many curves may have."""
    return max(LEAST_OF_A_CURVE, min(MOST_OF_A_CURVE, POINTS // max(curves, 1)))


def draw(
    title: str,
    about: str,
    lines: Iterable[Line],
    *,
    points: int,
    span: tuple[int, int],
    marks: Sequence[tuple[int, str]] = (),
    bounds: tuple[float, float] | None = None,
    is_log: bool = False,
) -> Chart | None:
    """A chart of the lines that have a finite value; None where there are none.

    Args:
        points: how many of each line are kept, about.
        span: first and last step of the axis, the same for all charts of a report.
        marks: steps to be marked, and with what.
        bounds: of the values' axis, where they are known, such as 0 and 1.
        is_log: a logarithmic axis, if all values allow it.
    """
    lines = [line for line in lines if len(line.series.finite)]
    if not lines:
        return None
    values = numpy.concatenate([line.series.finite.values for line in lines])
    is_log = is_log and bool((values > 0).all())
    low, high, ticks = _axis(float(values.min()), float(values.max()), bounds, is_log)
    first, last = span[0], max(span[1], span[0] + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if is_log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    legend = tuple(dict.fromkeys((line.label, line.colour % COLOURS, line.colour >= COLOURS) for line in lines))
    steps = [step for step in _nice(first, last, 5) if step == int(step)]
    return Chart(
        title=title,
        about=about,
        curves=tuple(_curve(line, points, x, y) for line in lines),
        legend=legend,
        x_ticks=tuple(Tick(round(x(step), 1), f"{int(step):,}") for step in steps),
        y_ticks=tuple(Tick(round(y(value), 1), number(value)) for value in ticks),
        marks=tuple((round(x(step), 1), label) for step, label in marks if first <= step <= last),
        first_step=first,
        last_step=last,
        low=low,
        high=high,
        is_log=is_log,
    )


def _curve(line: Line, points: int, x, y) -> Curve:  # type: ignore[no-untyped-def]
    series = line.series
    kept = thin(series.values, points)
    steps = [series.steps[at] for at in kept]
    values = [series.values[at] for at in kept]
    mean = ""
    if not line.is_evaluation and len(series) >= SMOOTHED_FROM:
        smooth = running_mean(numpy.asarray(series.values), max(3, int(len(series) * WINDOW)))
        some = thin(smooth.tolist(), max(LEAST_OF_A_CURVE, points // 3))
        mean = _path([series.steps[at] for at in some], [float(smooth[at]) for at in some], x, y)
    places = [(round(x(s), 1), round(y(v), 1)) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    return Curve(
        label=line.label,
        colour=line.colour % COLOURS,
        dashed=line.colour >= COLOURS,
        is_evaluation=line.is_evaluation,
        path=_path(steps, values, x, y),
        mean=mean,
        dots=tuple(places) if (line.is_evaluation and len(places) <= 60) or len(places) == 1 else (),
        steps=" ".join(str(step) for step in [steps[0], *(b - a for a, b in itertools.pairwise(steps))]),
        values=" ".join(f"{value:.4g}" for value in values),
    )


def _path(steps: Sequence[int], values: Sequence[float], x, y) -> str:  # type: ignore[no-untyped-def]
    parts, is_drawing = [], False
    for step, value in zip(steps, values, strict=True):
        if math.isfinite(value):
            parts.append(f"{'L' if is_drawing else 'M'}{x(step):.1f} {y(value):.1f}")
        is_drawing = math.isfinite(value)
    return "".join(parts)


def _axis(
    low: float, high: float, bounds: tuple[float, float] | None, is_log: bool
) -> tuple[float, float, list[float]]:
    """The axis' ends and its ticks."""
    if is_log and high / low >= 10:
        powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        return powers[0], powers[-1], powers[:: max(1, math.ceil(len(powers) / 5))]
    if bounds is not None:
        low, high = min(low, bounds[0]), max(high, bounds[1])
    elif high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    else:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    if is_log and low <= 0:
        low = high / 10
    return low, high, [tick for tick in _nice(low, high, 5) if low <= tick <= high]


def _nice(low: float, high: float, count: int) -> list[float]:
    """About that many round numbers between two others."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(at * unit, 12) for at in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
