"""Cells of the real study: each in a process of its own, kept as rows of a CSV that is committed.

A cell that has rows is not computed again, on whatever machine they were made. A row is one metric of one cell, its
values by instruction beside its mean, so that whatever is said of several cells can be paired by instruction.
"""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import PeakMemory, described, machine
from bench.study.cells import Cell, quieten

COLUMNS = (
    "cell", "method", "seed", "rate", "metric", "mean", "count", "values", "seconds", "cpu_seconds", "peak_mib",
    "best_step", "options", "machine",
)  # fmt: skip
CURVES = "-curves"


@dataclass(frozen=True)
class Found:
    """What is kept of a cell.

    Attributes:
        row: what its rows have in common.
        values: by metric, one number an instruction (a repeat, where times are measured).
    """

    row: Mapping[str, str]
    values: Mapping[str, Sequence[float]]


class Store:
    """The rows of one table, in one CSV, and the curves of its trainings in another.

    Args:
        folder: of the CSVs.
        name: the table's.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.curves_path = folder / f"{name}.csv", folder / f"{name}{CURVES}.csv"

    def found(self) -> dict[str, Found]:
        """By the cell's key, in the order in which they were computed."""
        found: dict[str, tuple[dict[str, str], dict[str, list[float]]]] = {}
        for row in _read(self.path):
            _, values = found.setdefault(row["cell"], (row, {}))
            values[row["metric"]] = [float(each) for each in row["values"].split()]
        return {key: Found(row, values) for key, (row, values) in found.items()}

    def curves(self) -> list[dict[str, str]]:
        return _read(self.curves_path)

    def add(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Writes a cell's rows behind those that are there."""
        options, curves = dict(cell.options), result.get("curves", [])
        shared = {
            "cell": cell.key, "method": options.pop("method"), "seed": options.pop("seed"),
            "rate": options.pop("rate", ""), "seconds": result["seconds"], "peak_mib": result["peak_mib"],
            "cpu_seconds": sum(curve["cpu_seconds"] for curve in curves) if curves else "",
            "best_step": sum(curve["best_step"] for curve in curves) if curves else "",
            "options": json.dumps(options, sort_keys=True), "machine": result["machine"],
        }  # fmt: skip
        rows = [
            shared | {
                "metric": name, "mean": math.fsum(values) / len(values), "count": len(values),
                "values": " ".join(f"{value:.5g}" for value in values),
            }
            for name, values in result["values"].items()
        ]  # fmt: skip
        steps = [
            {"cell": cell.key, "method": shared["method"], "seed": shared["seed"], "rate": shared["rate"]}
            | {"part": part, "step": step, "validation": value}
            | {name: v for log in curve["logs"] if log["step"] == step for name, v in log.items() if name != "step"}
            for part, curve in enumerate(curves)
            for step, value in zip(curve["steps"], curve["validation"], strict=True)
        ]
        if steps:
            _write(self.curves_path, [*self.curves(), *steps])
        _write(self.path, [*_read(self.path), *rows], COLUMNS)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Whole or not at all: a study is stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
    unfinished.replace(path)


def computed(cell: Cell, cache: Path) -> dict[str, Any]:
    """A cell's result with its seconds, the peak of the memory beyond what was there before, and the machine; for a
    process of its own. A failure is a result with the key `problem`."""
    quieten()
    started = time.perf_counter()
    try:
        with PeakMemory(cell.device) as memory:
            result = dict(cell(cache))
    except (Exception, SystemExit):  # noqa: BLE001 - told by the parent, with the others' results kept
        return {"problem": traceback.format_exc()}
    return result | {
        "seconds": time.perf_counter() - started, "peak_mib": memory.mib, "machine": described(machine(), cell.device),
    }  # fmt: skip


@dataclass(kw_only=True)
class Share:
    """How much of the study this call computes.

    Attributes:
        cells: at most so many.
        until: no cell starts after this time (`time.monotonic`).
    """

    cells: float = math.inf
    until: float = math.inf

    def take(self) -> bool:
        """Whether one more may start."""
        if self.cells < 1 or time.monotonic() >= self.until:
            return False
        self.cells -= 1
        return True


def run(store: Store, cells: Sequence[Cell], cache: Path, share: Share, workers: int) -> list[str]:
    """Computes those of the cells that have no rows, in their order, and writes each when it is done.

    Args:
        workers: processes side by side, one thread each; 0 computes in this process.

    Returns:
        What went wrong, a text for each cell that failed.
    """
    there = store.found()
    waiting = list({cell.key: cell for cell in cells if cell.key not in there}.values())
    failed: list[str] = []

    def done(cell: Cell, result: Mapping[str, Any]) -> None:
        if "problem" in result:
            failed.append(f"{cell.function} {dict(cell.options)}\n{result['problem']}")
            return
        store.add(cell, result)
        told = {name: value for name, value in cell.options.items() if name in ("method", "seed", "rate")}
        print(f"{store.path.stem} {told}: {result['seconds']:.0f} s", flush=True)

    if workers == 0:
        while waiting and share.take():
            done(cell := waiting.pop(0), computed(cell, cache))
        return failed
    running: dict[Future[dict[str, Any]], Cell] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        while True:
            while waiting and len(running) < workers and share.take():
                cell = waiting.pop(0)
                running[pool.submit(computed, cell, cache)] = cell
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done(running.pop(future), future.result())
