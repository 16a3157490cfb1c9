"""What the benchmarks share: command line, gate on correctness, interleaved timing, the machine, a table and its CSV.

options = measure.options(__doc__, "token_logprob", arguments, peers=PEERS)
rows = []
for shape in SHAPES:
    measure.gate("token_logprob", ours, eager, truth)            # ends the run where it is wrong: no speed on red
    functions = measure.wanted({"sysdag": f, "eager": g, "torch.compile": h}, options.peers, baseline="eager")
    times = measure.interleave(functions, options.repeats)
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
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Grads = Mapping[str, Tensor]

RESULTS = Path(__file__).resolve().parent / "results"


def options(
    doc: str | None,
    name: str,
    arguments: Sequence[str] | None = None,
    *,
    peers: Sequence[str] = (),
    devices: Sequence[str] = ("cpu", "cuda"),
    threads: int | None = None,
    repeats: int | None = 7,
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> argparse.Namespace:
    """The command line that all benchmarks have; torch's threads are set to what it says.

    Args:
        doc: the benchmark's description.
        name: of the command, and of its CSV.
        arguments: what follows the command; by default this process's arguments.
        peers: names of the rows that `--peers` may select, beside sysdag's and the baseline.
        devices: those it can run on.
        threads: default of `--threads`; all cores where it is None.
        repeats: default of `--repeats`.
        own: options that only this benchmark has: flag to argparse's keywords.

    Returns:
        `peers` is None for all; `csv` is the file to write, or None.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=doc, formatter_class=layout)
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these beside sysdag and the baseline")
    parser.add_argument(
        "--csv", nargs="?", type=Path, const=RESULTS, metavar="FOLDER",
        help=f"write {name}-DEVICE.csv there; without FOLDER into bench/results",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=threads, help=f"torch's; default {threads or 'all cores'}")
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"timed calls of each; default {repeats or 'its own'}"
    )
    parser.add_argument("--peer-python", metavar="PATH", help="Python of an environment with transformers 4.56.2")
    for flag, keywords in (own or {}).items():
        parser.add_argument(flag, **keywords)
    parsed = parser.parse_args(arguments)
    for peer in parsed.peers or ():
        if peer not in peers:
            there = ", ".join(map(repr, peers)) or "none"
            parser.error(f"--peers: {name} has no peer {peer!r}; there are: {there}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    if parsed.csv is not None:
        if parsed.csv.suffix == ".csv":
            parser.error(
                f"--csv takes a folder, got {str(parsed.csv)!r}; the file's name is {name}-{parsed.device}.csv"
            )
        parsed.csv = parsed.csv / f"{name}-{parsed.device}.csv"
    torch.set_num_threads(parsed.threads or os.cpu_count() or 1)
    return parsed


def wanted(functions: Mapping[str, Any], peers: Sequence[str] | None, *, baseline: str) -> dict[str, Any]:
    """Those to time: sysdag's and the baseline always, of the others the named ones, or all if none are named."""
    return {
        name: function
        for name, function in functions.items()
        if peers is None or name in peers or name == baseline or name.startswith("sysdag")
    }


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
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times each function `repeats` times, in turns, so that another load on the machine meets all alike.

    Args:
        functions: by name; each is called without arguments.
        before: called before each timed call, outside its time.
        warmup: calls of each that are not timed.
        clock: gives seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, repeats):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            if before is not None:
                before()
            synchronize()
            start = clock()
            functions[name]()
            synchronize()
            if turn >= 0:
                found[name].append(clock() - start)
    return {name: Times(tuple(seconds)) for name, seconds in found.items()}


class PeakMemory:
    """A context whose `mib` is, afterwards, how far memory rose inside it: on a CPU (Linux) the process's resident
    memory, on a GPU what torch's allocator held."""

    def __init__(self, device: str) -> None:
        self.device, self.mib = device, 0.0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._before = _high_water()
        return self

    def __exit__(self, *_: object) -> None:
        now = torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else _high_water()
        self.mib = now - self._before


def peak_in_a_process(code: str) -> float:
    """What the last line says that Python code prints, MiB as a rule, in a process of its own."""
    # Freed memory goes back to the system at once, so that what is resident is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(ended.stdout.splitlines()[-1])


def gate_step(what: object, peer: str, own: tuple[Tensor, Grads], wanted: tuple[Tensor, Grads]) -> None:
    """Ends the run unless a step's loss and gradients are a peer's, to 1e-4 of the largest gradient.

    Args:
        own, wanted: the loss, and the gradients by name, of sysdag and of the peer.
    """
    (loss, ours), (expected, theirs) = own, wanted
    error = gradient_error(ours, theirs)
    if not (abs(float(loss - expected)) <= 1e-4 and error <= 1e-4):
        raise SystemExit(
            f"{what}: loss {float(loss):.6f}, {peer} {float(expected):.6f}; gradients {error:.2g} of the largest "
            "apart, 1e-4 is allowed; no speed is reported for a wrong result."
        )


def gradient_error(found: Grads, truth: Grads) -> float:
    """The largest difference between gradients of the same names, as a share of the largest true one."""
    largest = max(float(gradient.abs().max()) for gradient in truth.values())
    return max(float((found[name] - truth[name]).abs().max()) for name in truth) / largest


def _high_water() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compile_peer(functions: dict[str, Callable[..., Any]], *arguments: Any) -> list[str]:
    """Replaces the function "torch.compile", where it is wanted, by what that makes of it in a call with the arguments.

    Returns:
        Why it is left out, if it cannot run here.
    """
    if "torch.compile" not in functions:
        return []
    torch._dynamo.reset()  # else it stops to compile after a few shapes
    made = torch.compile(functions["torch.compile"], dynamic=False)
    try:
        made(*arguments)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        del functions["torch.compile"]
        return [f"left out: torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"]
    functions["torch.compile"] = made
    return []


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


def described(row: Mapping[str, str], device: str) -> str:
    """The machine that a CSV's row was measured on, in words."""
    where = row["gpu"] if device == "cuda" else f"{row['cpu']}, {row['threads']} of {row['cores']} cores"
    return f"{where}, torch {row['torch']}"


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
        write([{**row, **here} for row in rows], path)


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A CSV file whose columns are the first row's keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that a benchmark wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
