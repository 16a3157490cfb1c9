"""`make demo-real`: aligns draft -> refine of a pretrained model, and shows answers before and after.

    python -m bench.study.real.demo --model FOLDER [--seed N] [--output demo-output/real]

Instructions with constraints that a program checks; preferences are among the system's own runs. Under 15 minutes on
two cores.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.study.cells import quieten
from bench.study.real.constrained import SIZES, Constrained
from bench.study.real.setting import Size
from bench.study.real.sources import HOW_TO_GET, Sources
from bench.study.training import runs
from sysdag import System, Trace
from sysdag.evaluation import cluster_bootstrap

SIZE = replace(SIZES["cpu"], training=100, choosing=30, heldout=60)
SHOWN = 5


def main(arguments: Sequence[str] | None = None, size: Size = SIZE) -> dict[str, Any]:
    """Runs the demo and writes `metrics.json`, the answers and the system; returns the metrics."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study.real.demo", description=__doc__, epilog=HOW_TO_GET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("demo-output/real"))
    options = parser.parse_args(arguments)
    started, threads = time.perf_counter(), torch.get_num_threads()
    quieten()
    torch.set_num_threads(threads)
    sources = Sources(model=options.model, device=options.device)
    sources.check(needs_pairs=False)
    cache = options.output.resolve() / "cache"
    sources.keep(cache)
    setting = Constrained(cache, options.seed, size)
    system = setting.system()
    before = _heldout(setting, system)
    print(f"before: {setting.met(before).mean():.1%} of the constraints met on {len(before)} held-out instructions")
    pairs = setting.pairs
    print(f"{len(pairs)} pairs from {size.training * size.runs} runs; {size.steps} steps of SysDPO-Direct", flush=True)
    curve = setting.train(system, setting.nodes, rate=1.0, candidates=None)
    after = _heldout(setting, system)
    change = cluster_bootstrap(setting.met(after) - setting.met(before))
    metrics = {
        "model": sources.label, "seed": options.seed, "heldout_instructions": len(before), "pairs": len(pairs),
        "before": float(setting.met(before).mean()), "after": float(setting.met(after).mean()),
        "difference": change.estimate, "interval_95": [change.low, change.high],
        "best_step": curve.steps[curve.best], "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    print("\n".join(_beside(before, after, SHOWN)))
    print(
        f"\nconstraints met: {metrics['before']:.1%} -> {metrics['after']:.1%}, {100 * change.estimate:+.1f} points "
        f"(95 % interval {100 * change.low:+.1f} to {100 * change.high:+.1f}), after {metrics['seconds']:.0f} s"
    )
    system.save_pretrained(options.output / "system")
    for name, trace in (("before", before), ("after", after)):
        trace.to_jsonl(options.output / f"{name}.jsonl")
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _heldout(setting: Constrained, system: System) -> Trace:
    return runs(system, setting.asked("heldout"), 1, 23)


def _beside(before: Trace, after: Trace, count: int, width: int = 56) -> list[str]:
    """The first answers, those of before and after in two columns."""
    lines = []
    for asked, *answers in list(zip(before["question"], before["answer"], after["answer"], strict=True))[:count]:
        columns = [textwrap.wrap(text, width) or ["(nothing)"] for text in answers]
        height = max(map(len, columns))
        left, right = (column + [""] * (height - len(column)) for column in columns)
        lines += ["", *textwrap.wrap(asked, 2 * width + 3)]
        lines += [f"  {a:{width}} | {b}" for a, b in zip(left, right, strict=True)]
    return lines


if __name__ == "__main__":
    main()
