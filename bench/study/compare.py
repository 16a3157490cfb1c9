"""Comparing methods: equal tuning for each, several seeds, means with intervals, tests that pair seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy import stats

from bench.study.cells import Cell

RATES = (1 / 3, 1.0, 3.0)
TUNING_SEED = 100  # its models and preferences are in no table
BEST_STEP = "best step"
SHARE = " share"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    Attributes:
        name: the row's.
        options: of the task's cell function, without seed, size and rate.
        tuned_as: options whose tuned learning rate this variant takes, where it is not tuned by itself (an ablation of
            another method); None where it is.
        trains: False for what has no learning rate.
        staged: True where each part of the training goes on from the one before, so that the last one's score is the
            system's; otherwise the parts stand side by side, and their scores are added.
    """

    name: str
    options: Mapping[str, Any]
    tuned_as: Mapping[str, Any] | None = None
    trains: bool = True
    staged: bool = False

    @property
    def tuning(self) -> Mapping[str, Any]:
        return self.options if self.tuned_as is None else self.tuned_as


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants of one task, measured on the same seeds.

    Attributes:
        name: of the table.
        function: the task's cell function.
        variants: the rows; those that train are tuned over `RATES` on `TUNING_SEED` by the validation score.
        metrics: names in the cells' `heldout`, in the table's order; "NODE share" is that node's part of the margin.
        reference: the row that others are tested against.
        seeds: how many.
        device: "cuda" for what is too large for a CPU.
    """

    name: str
    function: str
    variants: Sequence[Variant]
    metrics: Sequence[str]
    reference: str
    seeds: int
    device: str = "cpu"

    def tuning_cells(self, size: str) -> dict[tuple[str, float], Cell]:
        """By row and learning rate's factor; none for a quick look, which takes every rate as it is."""
        if size != "full":
            return {}
        return {
            (variant.name, rate): self._cell(variant.tuning, TUNING_SEED, size, rate)
            for variant in self.variants
            if variant.trains
            for rate in RATES
        }

    def cells(self, size: str, rates: Mapping[str, float]) -> dict[tuple[str, int], Cell]:
        """By row and seed."""
        return {
            (variant.name, seed): self._cell(variant.options, seed, size, rates.get(variant.name))
            for variant in self.variants
            for seed in range(self.seeds if size == "full" else 2)
        }

    def _cell(self, options: Mapping[str, Any], seed: int, size: str, rate: float | None) -> Cell:
        trained = {} if rate is None else {"rate": rate}
        chosen = {**options, **trained, "seed": seed, "size": size}
        return Cell(function=self.function, options=chosen, device=self.device)


def best_rates(variants: Sequence[Variant], tuned: Mapping[tuple[str, float], Mapping[str, Any]]) -> dict[str, float]:
    """For each row the factor with the best validation score."""
    scores: dict[str, dict[float, float]] = {}
    staged = {variant.name for variant in variants if variant.staged}
    for (name, rate), result in tuned.items():
        parts = result["curves"][-1:] if name in staged else result["curves"]
        scores.setdefault(name, {})[rate] = sum(max(curve["validation"]) for curve in parts)
    return {name: max(by_rate, key=by_rate.__getitem__) for name, by_rate in scores.items()}


def rows(
    comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each variant and metric: mean over seeds, 95 % t interval over seeds, and the difference to the
    reference with the interval and p value of a paired t test over seeds. `BEST_STEP` is one more metric of those that
    train: the step that validation chose, summed over the parts of a training."""
    seeds = sorted({seed for _, seed in results})

    def by_seed(name: str, metric: str) -> numpy.ndarray | None:
        of_seed = [results[name, seed] for seed in seeds]
        if metric.endswith(SHARE):
            return numpy.array([share(one["curves"][-1], metric.removesuffix(SHARE)) for one in of_seed])
        if metric != BEST_STEP:
            return numpy.array([numpy.mean(one["heldout"][metric]) for one in of_seed])
        if not of_seed[0]["curves"]:
            return None
        return numpy.array([sum(curve["best_step"] for curve in one["curves"]) for one in of_seed], dtype=float)

    found = []
    for variant in comparison.variants:
        curves = [results[variant.name, seed]["curves"] for seed in seeds]
        for metric in (*comparison.metrics, BEST_STEP):
            ours, theirs = by_seed(variant.name, metric), by_seed(comparison.reference, metric)
            if ours is None:
                continue
            low, high = interval(ours)
            row = {
                "method": variant.name, "metric": metric, "seeds": len(seeds),
                "prompts": len(results[variant.name, seeds[0]]["heldout"][comparison.metrics[0]]),
                "mean": ours.mean(), "low": low, "high": high,
                **{f"seed {seed}": value for seed, value in zip(seeds, ours, strict=True)},
            }  # fmt: skip
            if variant.name != comparison.reference and theirs is not None:
                row |= paired(ours, theirs)
            row |= {"rate": rates.get(variant.name, "")}
            if curves[0]:
                row |= {"cpu_seconds": numpy.mean([sum(curve["cpu_seconds"] for curve in one) for one in curves])}
                row |= _candidate_means(curves)
            found.append(row)
    return found


def _candidate_means(curves: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Effective sample size, distinct-2 and responsibility gap, over all logs of all seeds."""
    logs = [log for one in curves for curve in one for log in curve["logs"]]
    names = ("effective_sample_size", "distinct_2", "responsibility_gap", "coverage")
    return {
        name: float(numpy.mean([log[f"candidates/{name}"] for log in logs]))
        for name in names
        if logs and all(f"candidates/{name}" in log for log in logs)
    }


def share(curve: Mapping[str, Any], node: str) -> float:
    """A node's part of the margin, over the whole training."""
    parts = {
        name.split("/")[1]: numpy.mean([log[name] for log in curve["logs"]])
        for name in curve["logs"][0]
        if name.startswith("nodes/") and name.endswith("/margins")
    }
    return float(parts[node] / sum(parts.values()))


def paired(ours: numpy.ndarray, theirs: numpy.ndarray) -> dict[str, float]:
    """Mean difference over seeds, its 95 % t interval, and the p value of a paired t test."""
    difference = ours - theirs
    low, high = interval(difference)
    p = float(stats.ttest_rel(ours, theirs).pvalue) if difference.any() else 1.0
    return {"difference": float(difference.mean()), "difference_low": low, "difference_high": high, "p": p}


def interval(values: numpy.ndarray) -> tuple[float, float]:
    """95 % t interval of the mean."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def curves(comparison: Comparison, results: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant, part of its training, seed and step: the validation score, and the trainer's metrics
    as means over the steps since the row before."""
    found = []
    for (name, seed), result in results.items():
        for part, curve in enumerate(result["curves"]):
            logs = {log["step"]: log for log in curve["logs"]}
            found += [
                {"method": name, "part": part, "seed": seed, "step": step, "validation": value, **logs.get(step, {})}
                for step, value in zip(curve["steps"], curve["validation"], strict=True)
            ]
    return found
