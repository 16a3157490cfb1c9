"""The demo's pictures: loss and margins over training, and images before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot

Run = tuple[Sequence[str], Sequence[Any], Sequence[int], bool]
"""Captions, images, the digits that the judge read, and whether it is satisfied."""


def plot_training(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Loss, and the margin of the system with each node's part of it, from `trainer.state.log_history`."""
    figure, (losses, margins) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for prefix, label in (("", "training"), ("eval_", "validation")):
        _line(losses, history, f"{prefix}loss", label)
        _line(margins, history, f"{prefix}rewards/margins", f"system, {label}")
    losses.axhline(numpy.log(2), color="grey", linewidth=0.8, linestyle=":", label="ln 2")
    nodes = sorted({key for row in history for key in row if key.startswith("nodes/") and key.endswith("/margins")})
    for key in nodes:
        _line(margins, history, key, f"node {key.split('/')[1]}, training", linestyle="--")
    for axes, name in ((losses, "loss"), (margins, "margin (chosen - rejected)")):
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(axes: Any, history: Sequence[Mapping[str, float]], key: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in history if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def plot_samples(prompts: Sequence[str], sides: Sequence[tuple[str, Sequence[Run]]], path: Path) -> None:
    """One row a prompt; for each side (before, after) the images of one run under their captions.

    Args:
        prompts: the rows' titles.
        sides: a heading, and one run for each prompt.
    """
    width = max(len(images) for _, runs in sides for _, images, _, _ in runs)
    figure, grid = pyplot.subplots(
        len(prompts), 2 * width + 1, figsize=(1.15 * (2 * width + 1), 1.6 * len(prompts) + 0.6), squeeze=False,
        gridspec_kw={"width_ratios": [1.0] * width + [0.35] + [1.0] * width},
    )  # fmt: skip
    for axes in grid.flat:
        axes.set_axis_off()
    for (heading, runs), offset in zip(sides, (0, width + 1), strict=True):
        for row, (captions, images, digits, satisfied) in enumerate(runs):
            for column, (caption, image, digit) in enumerate(zip(captions, images, digits, strict=True)):
                axes = grid[row, offset + column]
                axes.imshow(numpy.asarray(image), cmap="gray_r", vmin=0, vmax=255)
                axes.set_title(f"{caption}\nread as {digit}", fontsize=7, color="tab:green" if satisfied else "tab:red")
        middle = grid[0, offset + width // 2]
        middle.annotate(heading, (0.5, 1.75), xycoords="axes fraction", ha="center", fontsize=11, fontweight="bold")
    for row, prompt in enumerate(prompts):
        grid[row, 0].annotate(prompt, (0.0, -0.2), xycoords="axes fraction", fontsize=8, style="italic")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
