"""What a GPU has to show, in the minutes there are: `python -m bench gpu`, or `make gpu` on a bare machine.

    python -m bench gpu [--seconds 520] [--parts NAME ...] [--list] [--again]

Parts run one after the other, each in a process of its own: the tests on a GPU, then the benchmarks, those of small
problems first. How a part ended is written at once into a CSV in bench/results, with the device's name and the commit,
and a benchmark's figures into its own; so a run that is cut off keeps what it had. A part is begun while there is time
for it (by the seconds that it is given), is stopped at its own limit, and runs again only where it has not passed on
this device at this commit, or with --again. Ends with 1 where a part failed or was stopped.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import measure

ROOT = Path(__file__).resolve().parents[1]
RECORD = measure.RESULTS / "gpu-runs.csv"
COLUMNS = ("part", "ended", "seconds", "said", "commit", "gpu", "torch", "triton")


class Part(NamedTuple):
    """A command, and the seconds after which it is stopped."""

    command: tuple[str, ...]
    limit: int


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments)


def _bench(*arguments: str) -> tuple[str, ...]:
    return ("-m", "bench", *arguments, "--device", "cuda", "--csv")


PARTS = {
    "tests of what only a GPU has": Part(_pytest("-m", "gpu"), 90),
    "tests of the ops": Part(_pytest("tests/ops"), 150),
    "preference_loss": Part(_bench("preference_loss"), 40),
    "diffusion_error": Part(_bench("diffusion_error"), 40),
    "token_logprob": Part(_bench("token_logprob"), 40),
    "diverse_beam_step": Part(_bench("diverse_beam_step"), 40),
    "step": Part(_bench("step", "--repeats", "5"), 150),
    "linear_logprob": Part(_bench("linear_logprob"), 120),
    "sweep": Part(_bench("sweep"), 120),
}


def commit() -> str:
    """The checkout's; empty where it is none."""
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def passed(record: Path, here: dict[str, str]) -> set[str]:
    """The parts that have passed on this device at this commit."""
    rows = measure.read(record) if record.exists() else []
    return {r["part"] for r in rows if r["ended"] == "passed" and all(r[key] == value for key, value in here.items())}


def run(part: Part) -> tuple[str, str]:
    """How it ended, and the last line that it said; what it prints is shown as it comes."""
    last = ""
    with subprocess.Popen(
        ["timeout", "--kill-after=5", str(part.limit), sys.executable, *part.command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    stopped = process.returncode in (124, 137)
    return "stopped" if stopped else "failed" if process.returncode else "passed", last[:200]


def write(record: Path, row: dict[str, str]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    is_new = not record.exists()
    with record.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main(arguments: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__, formatter_class=layout)
    parser.add_argument("--seconds", type=float, default=520, help="that there are; default 520")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="also what has passed on this device at this commit")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits in seconds")
    options = parser.parse_args(arguments)
    if options.list:
        print(*(f"{name}: {PARTS[name].limit} s" for name in options.parts), sep="\n")
        return
    if not torch.cuda.is_available():
        raise SystemExit("gpu: torch finds no CUDA device here.")
    start, here = time.monotonic(), {"commit": commit(), "gpu": torch.cuda.get_device_name()}
    versions = {name: measure.version(name) for name in ("torch", "triton")}
    done = set() if options.again else passed(RECORD, here)
    ended: dict[str, str] = {}
    for name in options.parts:
        left = options.seconds - (time.monotonic() - start)
        if name in done:
            ended[name] = "passed before"
        elif left < PARTS[name].limit:
            ended[name] = f"not begun: {left:.0f} s are left of the {PARTS[name].limit} s that it may take"
        else:
            print(f"== {name}", flush=True)
            begun = time.monotonic()
            ended[name], said = run(PARTS[name])
            seconds = f"{time.monotonic() - begun:.1f}"
            write(RECORD, {"part": name, "ended": ended[name], "seconds": seconds, "said": said, **here, **versions})
    print(*(f"{name}: {how}" for name, how in ended.items()), sep="\n")
    if {"failed", "stopped"} & set(ended.values()):
        raise SystemExit(1)
