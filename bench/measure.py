"""What the benchmarks of ops share: a gate on correctness, interleaved timing, the machine, a table and its CSV.

options = measure.options(__doc__, "token_logprob")
rows = []
for shape in SHAPES:
    measure.gate("token_logprob", ours, eager, truth)            # ends the run where it is wrong: no speed on red
    times = measure.interleave({"sysdag": f, "eager": g}, options.repeats)
    rows += measure.rows(times, baseline="eager", **shape)
measure.report("token_logprob", rows, options.csv)
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"


def options(doc: str | None, op: str, **defaults: int) -> argparse.Namespace:
    """The command line of an op's benchmark: --threads, --repeats, --device, --csv; the number of threads is set."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=defaults.get("threads", cores), help="default: all cores")
    parser.add_argument("--repeats", type=int, default=defaults.get("repeats", 7))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--csv", type=Path, help=f"where to write the rows, such as bench/results/{op}-cpu.csv")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def gate(what: str, found: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Ends the run unless the error of `found` against the fp64 truth is at most eager torch's, plus one rounding."""
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    allowed = largest_error(eager, truth) + 2 * torch.finfo(eager.dtype).eps * scale
    error = largest_error(found, truth)
    if not error <= allowed:  # also where the error is nan
        raise SystemExit(f"{what}: error {error:.3g}, allowed {allowed:.3g}; no speed is reported for a wrong result.")


def largest_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).abs().max()) if truth.numel() else 0.0


class Times(NamedTuple):
    """Seconds of each repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    before: Callable[[], Any] | None = None,
    warmup: int = 2,
) -> dict[str, Times]:
    """Times each function `repeats` times, in turns, so that another load on the machine meets all alike.

    Args:
        functions: by name; each is called without arguments.
        before: called before each timed call, outside its time.
        warmup: calls of each that are not timed.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, repeats):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            if before is not None:
                before()
            synchronize()
            start = time.perf_counter()
            functions[name]()
            synchronize()
            if turn >= 0:
                found[name].append(time.perf_counter() - start)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any] | None, str]:
    """`torch.compile(function)`, compiled by a call with the arguments; or None and why it cannot run here."""
    try:
        made = torch.compile(function, dynamic=False)
        made(*arguments)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return made, ""


def rows(times: Mapping[str, Times], *, baseline: str, **columns: Any) -> list[dict[str, Any]]:
    """A row of the table for each name: median, spread, and how many times faster than the baseline.

    The ratio is the median over the turns of the baseline's time over the name's in the same turn.
    """
    found = []
    for name, taken in times.items():
        ratios = [base / own for base, own in zip(times[baseline].seconds, taken.seconds, strict=True)]
        shown = {"median": taken.median, "min": min(taken.seconds), "max": max(taken.seconds)}
        row = {**columns, "name": name, **{f"{what}_ms": seconds * 1e3 for what, seconds in shown.items()}}
        found.append(row | {f"times_{baseline}": statistics.median(ratios), "repeats": len(taken.seconds)})
    return found


def machine() -> dict[str, Any]:
    """Processor, GPU, cores, torch's threads, and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = {name: version(name) for name in ("torch", "triton")}
    return {
        "cpu": cpu_name(), "gpu": gpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), **versions,
    }  # fmt: skip


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def report(title: str, rows: Sequence[Mapping[str, Any]], path: Path | None, notes: Sequence[str] = ()) -> None:
    """Prints the rows as a table, under the machine and the notes, and writes them with the machine to a CSV file."""
    here = machine()
    print(f"{title}: {', '.join(f'{name} {value}' for name, value in here.items() if value)}")
    print(*notes, sep="\n", end="\n" if notes else "")
    names = list(rows[0])
    table = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(names))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*names, *here])
            writer.writeheader()
            writer.writerows({**row, **here} for row in rows)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
