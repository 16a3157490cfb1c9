"""Trainings that belong together, as `sysdag rounds` and `sysdag train --sweep` leave them, read for one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sysdag.errors import DataError
from sysdag.files.series_files import ROUNDS_FILE, SWEEP_FILE, read_series
from sysdag.reporting.formats import DASH, number
from sysdag.reporting.read import Run, read_run

_MEASURES = (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"))


@dataclass(frozen=True)
class Overview:
    """One table over all trainings.

    Attributes:
        title: of the table.
        header: of its columns.
        rows: of texts.
        note: what has to be said of it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = ["  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)) for row in self._all()]
        return "\n".join([f"{self.title}:", *(line.rstrip() for line in lines), self.note]).rstrip()

    def _all(self) -> list[Sequence[str]]:
        return [self.header, *self.rows]


def read_series_runs(folder: str | Path) -> list[Run]:
    """The trainings of a folder: the rounds that were trained, those of a sweep, or the folder's own.

    Raises:
        DataError: if there is none, or a record is damaged; see `sysdag.reporting.read.read_run`.
    """
    folder = Path(folder)
    record = read_series(folder / ROUNDS_FILE)
    if record is not None:
        names = [each["folder"] for each in record["rounds"] if "train" in each]
        if not names:
            raise DataError(f"{folder}: no round has been trained yet, so there is nothing to report.")
        return [read_run(folder / name) for name in names]
    record = read_series(folder / SWEEP_FILE)
    if record is None:
        return [read_run(folder)]
    return [read_run(folder / run["folder"]) for run in record["runs"] if run["done"]]


def overview_of(folder: str | Path, runs: Sequence[Run]) -> Overview | None:
    """The table over a folder's trainings; None for one that holds a single training.

    Args:
        runs: what `read_series_runs` returned.
    """
    record = read_series(Path(folder) / ROUNDS_FILE)
    if record is not None:
        return _of_rounds(record)
    record = read_series(Path(folder) / SWEEP_FILE)
    return None if record is None else _of_sweep(record, runs)


def _of_rounds(record: Mapping[str, Any]) -> Overview:
    best = record.get("best")
    rows = []
    for each in record["rounds"]:
        if "eval" not in each:
            continue
        given, trained, judged = each["eval"], each.get("train", {}), each.get("judge", {})
        interval = given.get("interval")
        rows.append(
            [
                "before" if not each["round"] else str(each["round"]),
                *(_text(part.get(name)) for part, name in (
                    (each.get("sample", {}), "runs"), (judged, "score"), (trained, "fresh"), (trained, "earlier"),
                    (trained, "steps"),
                )),
                number(given["score"]),
                DASH if not interval else f"{number(interval[0])} to {number(interval[1])}",
                "best" if each["round"] == best else "",
            ]
        )  # fmt: skip
    score = record["score"]
    lower = ", where lower is better" if score["lower_is_better"] else ""
    stopped = f" Ended: {record['stopped']}." if record.get("stopped") else ""
    header = ("round", "runs", "their score", "fresh pairs", "earlier", "steps", "held-out", "interval", "best")
    return Overview("Rounds", header, rows, f"Held-out: {score['name']}{lower}.{stopped}")


def _of_sweep(record: Mapping[str, Any], runs: Sequence[Run]) -> Overview:
    keys = list(record["swept"])
    done = [run for run in record["runs"] if run["done"]]
    measured = {run["folder"]: _measures(read) for run, read in zip(done, runs, strict=True)}
    rows = [[*(_value(run["options"].get(key)) for key in keys), *map(number, measured[run["folder"]])] for run in done]
    others = [key for key in keys if key != "seed"]
    if "seed" in keys and others:
        groups: dict[tuple[str, ...], list[list[float | None]]] = {}
        for run in done:
            group = tuple(_value(run["options"].get(key)) for key in others)
            groups.setdefault(group, []).append(measured[run["folder"]])
        for group, found in groups.items():
            of_group = dict(zip(others, group, strict=True))
            means = [number(_mean(column)) for column in zip(*found, strict=True)]
            rows.append([of_group.get(key, f"mean of {len(found)}") for key in keys] + means)
    has_eval = any(read.history.evaluation for read in runs)
    note = "Of the last evaluation." if has_eval else "Of the last log of training; --eval-dataset measures on others."
    return Overview("Sweep", [*keys, *(label for label, _ in _MEASURES)], rows, note)


def _measures(run: Run) -> list[float | None]:
    """The last evaluation's, or without one the last log's of training."""
    found: list[float | None] = []
    for _, name in _MEASURES:
        series = run.history.evaluation.get(name) or run.history.train.get(name)
        finite = None if series is None else series.finite
        found.append(finite.values[-1] if finite is not None and len(finite) else None)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _value(value: Any) -> str:
    return str(value)


def _text(value: Any) -> str:
    return DASH if value is None else number(value) if isinstance(value, float) else str(value)
