"""Figures of the study, drawn from its CSVs as vector graphics: estimates with intervals, learning curves, sweeps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from bench.study.compare import interval
from bench.study.written import Table

WIDTH = 7.0  # inches: a page's text width


def draw(path: Path, paint: Callable[..., None], columns: int = 1, height: float = 3.0, **grid: Any):
    """Opens a figure of panels, has them painted, and writes it; equal figures give equal files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "sysdag", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure, panels = pyplot.subplots(1, columns, figsize=(WIDTH, height), squeeze=False, **grid)
        paint(panels.ravel())
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def estimates(path: Path, table: Table, metrics: Sequence[str]) -> None:
    """Mean and 95 % interval of every method, one panel a metric, with the seeds as dots."""

    def paint(panels) -> None:
        for panel, metric in zip(panels, metrics, strict=True):
            for place, method in enumerate(table.methods):
                row, seeds = table[method, metric], table.seeds(method, metric)
                panel.plot(seeds, [place] * len(seeds), ".", color="0.7", zorder=1)
                panel.plot([row["low"], row["high"]], [place, place], "-", color="C0")
                panel.plot(row["mean"], place, "o", color="C0")
            panel.set_xlabel(metric)
            panel.grid(axis="x", alpha=0.3)
        panels[0].set_yticks(range(len(table.methods)), table.methods)
        panels[0].invert_yaxis()

    draw(path, paint, len(metrics), 0.8 + 0.19 * len(table.methods), sharey=True)


def learning(
    path: Path, curves: Sequence[Mapping[str, str]], panels: Mapping[str, Mapping[str, Mapping[str, str]]]
) -> None:
    """Validation score by optimizer step, mean over seeds with its 95 % interval, and a mark where the mean is best.

    Args:
        curves: rows of a `-curves.csv`.
        panels: by title and line, what the line's rows have in common; several trainings one after the other are one
            line.
    """

    def paint(axes) -> None:
        for panel, (title, drawn) in zip(axes, panels.items(), strict=True):
            for colour, (label, common) in enumerate(drawn.items()):
                steps, values = by_step([row for row in curves if common.items() <= row.items()])
                means, bounds = values.mean(0), numpy.array([interval(column) for column in values.T])
                panel.plot(steps, means, color=f"C{colour}", label=label)
                panel.fill_between(steps, bounds[:, 0], bounds[:, 1], color=f"C{colour}", alpha=0.15, linewidth=0)
                panel.plot(steps[means.argmax()], means.max(), "v", color=f"C{colour}")
            panel.set_title(title)
            panel.set_xlabel("optimizer step")
            panel.grid(alpha=0.3)
            panel.legend(frameon=False)
        axes[0].set_ylabel("validation score")

    draw(path, paint, len(panels))


def by_step(rows: Sequence[Mapping[str, str]]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Steps, and scores (seeds, steps); a training's second part goes on where the first ended."""
    steps: dict[int, list[float]] = {}
    ends: dict[tuple[str, int], int] = {}
    for row in rows:
        part, seed, step = int(row["part"]), row["seed"], int(row["step"])
        before = ends.get((seed, part - 1), 0)
        if before and step == 0:
            continue
        at = step + before
        ends[seed, part] = max(at, ends.get((seed, part), 0))
        steps.setdefault(at, []).append(float(row["validation"]))
    return numpy.array(list(steps)), numpy.array(list(steps.values())).T


def sweep(path: Path, table: Table, metrics: Sequence[str]) -> None:
    """Metrics against the percentage that ends each method's name ("joint, DPO, 25% misled"), one line a method,
    each a little beside the one before."""
    found: dict[str, dict[int, str]] = {}
    for method in table.methods:
        name, value, what = re.fullmatch(r"(.+), (\d+)% (\w+)", method).groups()
        found.setdefault(name, {})[int(value)] = method

    def paint(panels) -> None:
        for panel, metric in zip(panels, metrics, strict=True):
            for place, (name, points) in enumerate(found.items()):
                beside = [value + 0.6 * (place - (len(found) - 1) / 2) for value in points]
                with_bars(panel, beside, [table[method, metric] for method in points.values()], name)
            panel.set_xlabel(f"% {what}")
            panel.set_ylabel(metric)
        panels[0].legend(frameon=False)

    draw(path, paint, len(metrics))


def against(path: Path, points: Mapping[str, tuple[float, float]], labels: tuple[str, str]) -> None:
    """A point a method; methods that differ in k alone are joined, and their points say it."""
    found: dict[str, list[str]] = {}
    for method in points:
        found.setdefault(re.sub(r", k = \d+", "", method), []).append(method)

    def paint(panels) -> None:
        (panel,) = panels
        for place, (name, methods) in enumerate(found.items()):
            x, y = zip(*(points[method] for method in methods), strict=True)
            panel.plot(x, y, color=f"C{place}", label=name, marker="os^vD*P"[place % 7], linewidth=0.7)
            for method in methods:
                if k := re.search(r"k = (\d+)", method):
                    panel.annotate(k[1], points[method], (3, -8), textcoords="offset points", fontsize=6)
        panel.set_xlabel(labels[0])
        panel.set_ylabel(labels[1])
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    draw(path, paint)


def rounds(path: Path, tables: Mapping[int, Table], metric: str) -> None:
    """A metric against the number of rounds of a loop, one line a method."""

    def paint(panels) -> None:
        (panel,) = panels
        for method in next(iter(tables.values())).methods:
            with_bars(panel, list(tables), [table[method, metric] for table in tables.values()], method)
        panel.set_xticks(list(tables))
        panel.set_xlabel("rounds")
        panel.set_ylabel(metric)
        panel.legend(frameon=False)

    draw(path, paint)


def with_bars(panel: Any, at: Sequence[float], rows: Sequence[Mapping[str, Any]], label: str) -> None:
    """A line of means with their intervals."""
    means = numpy.array([row["mean"] for row in rows])
    bars = [means - [row["low"] for row in rows], [row["high"] for row in rows] - means]
    panel.errorbar(at, means, bars, marker="o", capsize=2, label=label)
    panel.grid(alpha=0.3)
