"""The study's CSVs as tables in memory, and how their figures are written."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from bench.study.compare import BEST_STEP, paired

NOT_MEASURED = "*not measured yet*"
PERCENTAGES = frozenset(
    {
        "exact", "draft exact", "win against chosen", "win against prompted", "order consistency", "captions in order",
        "three images", "right choice", "draft share",
    }
)  # fmt: skip
EXTRAS = {
    "cpu_seconds": ("training, CPU s", ".0f"),
    "rate": ("rate", ".2g"),
    "effective_sample_size": ("ESS", ".2f"),
    "distinct_2": ("distinct-2", ".3f"),
    "responsibility_gap": ("gap", ".3f"),
    "coverage": ("coverage", ".2g"),
}


class Table:
    """One CSV of `bench.study.compare.rows`; numbers are floats, what is empty is left out."""

    def __init__(self, path: Path) -> None:
        self.found: dict[tuple[str, str], dict[str, Any]] = {}
        with path.open() as file:
            for row in csv.DictReader(file):
                kept = {name: number(value) for name, value in row.items() if value != ""}
                self.found[row["method"], row["metric"]] = kept
        self.methods = list(dict.fromkeys(method for method, _ in self.found))
        self.metrics = list(dict.fromkeys(metric for _, metric in self.found))

    def __getitem__(self, key: tuple[str, str]) -> dict[str, Any]:
        """The row of a method and a metric."""
        return self.found[key]

    def seeds(self, method: str, metric: str) -> numpy.ndarray:
        """The mean of each seed."""
        return numpy.array([value for name, value in self[method, metric].items() if name.startswith("seed ")])

    def difference(self, method: str, other: str, metric: str) -> dict[str, float]:
        """See `paired`."""
        return paired(self.seeds(method, metric), self.seeds(other, metric))

    def markdown(self, metrics: Sequence[str], extras: Sequence[str] = (), against: str = "") -> str:
        """Means with half the width of their 95 % intervals; with `against`, the first metric's difference to it.
        Extra columns that no row has are left out."""
        extras = [name for name in extras if any(name in row for row in self.found.values())]
        head = ["", *(f"{metric}, %" if metric in PERCENTAGES else metric for metric in metrics)]
        head += [f"{metrics[0]} against {against}"] if against else []
        head += [EXTRAS[name][0] for name in extras]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for method in self.methods:
            known = [metric if (method, metric) in self.found else "" for metric in metrics]
            cells = [method, *(metric and self.estimate(method, metric) for metric in known)]
            if against:
                cells.append("" if method == against else self.change(method, against, metrics[0]))
            row = self[method, metrics[0]]
            cells += [format(row[name], EXTRAS[name][1]) if name in row else "" for name in extras]
            lines.append(cells)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def estimate(self, method: str, metric: str) -> str:
        """Mean and half the width of its interval."""
        row, scale, digits = self[method, metric], scale_of(metric), digits_of(metric)
        mean, half = row["mean"] * scale, (row["high"] - row["low"]) / 2 * scale
        return f"{signed(mean, digits, plus=False)} ± {half:.{digits}f}"

    def change(self, method: str, other: str, metric: str, interval: bool = False) -> str:
        """The difference in words: "+3.6 (p = 0.012)", or with its interval "+3.6 [0.4, 6.8], p = 0.012"."""
        found, scale, digits = self.difference(method, other, metric), scale_of(metric), digits_of(metric)
        value, p = signed(found["difference"] * scale, digits), p_value(found["p"])
        if not interval:
            return f"{value} ({p})"
        low, high = (signed(found[f"difference_{end}"] * scale, digits, plus=False) for end in ("low", "high"))
        return f"{value} [{low}, {high}], {p}"


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def scale_of(metric: str) -> int:
    return 100 if metric in PERCENTAGES else 1


def digits_of(metric: str) -> int:
    return 0 if metric == BEST_STEP else 1 if metric in PERCENTAGES else 3


def signed(value: float, digits: int, plus: bool = True) -> str:
    return f"{value:{'+' if plus else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
