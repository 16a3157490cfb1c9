"""The demo: `python -m examples.demo [--seed N] [--output demo-output] [--quick]`.

Trains tiny base models, aligns both systems of the README, and reports what changed on held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
import transformers

from examples.experiment import Experiment, align, measure, paired_bootstrap, preference_pairs
from examples.experiments import QUICK, Size, order_digits, sort_letters
from examples.pictures import plot_training
from sysdag import System
from sysdag.graph import draw


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs both experiments and writes `metrics.json`; returns its content."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--cache", type=Path, default=Path(".demo-cache"), help="where base models are kept")
    parser.add_argument("--quick", action="store_true", help="everything tiny: shows that it runs, improves nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the models are so small that a second thread waits more than it works
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    started = time.perf_counter()
    size = QUICK if options.quick else Size()
    metrics: dict[str, Any] = {"seed": options.seed, "quick": options.quick, "experiments": {}}
    for make in (order_digits, sort_letters):
        print(f"\n{make.__doc__}\n  base models: trained here, or taken from {options.cache}", flush=True)
        began = time.perf_counter()
        experiment = make(size, options.seed, options.cache)
        print(f"  base models ready after {time.perf_counter() - began:.0f} s", flush=True)
        metrics["experiments"][experiment.name] = run(experiment, options.output / experiment.name, options.seed)
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\n{summary(metrics)}\nWritten to {options.output}/ after {metrics['seconds']:.0f} s.")
    return metrics


def run(experiment: Experiment, folder: Path, seed: int) -> dict[str, Any]:
    """Measures, aligns and measures again; writes the pictures and the saved system to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = experiment.system.compile()
    print(plan)
    draw(plan, folder / "plan.png")

    torch.manual_seed(seed)
    before, trace_before = measure(experiment, seed=seed)
    print(f"  before: {experiment.metric} {before.mean():.1%} on {len(before)} held-out prompts", flush=True)
    pairs = preference_pairs(experiment, seed=seed + 1)
    print(f"  {len(pairs)} preference pairs from {experiment.runs} runs of the system on training prompts", flush=True)
    trainer = align(experiment, pairs, str(folder / "trainer"), seed)
    after, trace_after = measure(experiment, seed=seed)
    low, high = paired_bootstrap(before, after, seed)
    change = f"{100 * (after.mean() - before.mean()):+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    print(f"  after:  {experiment.metric} {after.mean():.1%}, {change}", flush=True)

    trainer.save_model(str(folder / "system"))
    plot_training(trainer.state.log_history, folder / "training.png", experiment.title)
    experiment.show(trace_before, trace_after, folder)
    same = reloads(experiment, folder / "system", seed)
    print(f"  saved to {folder / 'system'}, loaded again, same runs from the same seed: {'yes' if same else 'NO'}")
    return {
        "metric": experiment.metric,
        "heldout_prompts": len(before),
        "pairs": len(pairs),
        "before": float(before.mean()),
        "after": float(after.mean()),
        "difference": float(after.mean() - before.mean()),
        "interval_95": [low, high],
        "reload_agrees": same,
        **{
            name: {"before": float(score(trace_before).mean()), "after": float(score(trace_after).mean())}
            for name, score in experiment.also.items()
        },
    }


def reloads(experiment: Experiment, folder: Path, seed: int, rows: int = 8) -> bool:
    """Whether the system that `System.from_pretrained` reads samples as the one in memory does."""
    inputs = {name: list(column[:rows]) for name, column in experiment.heldout.items()}
    traces = [made.compile().sample(inputs, seed=seed) for made in (experiment.system, System.from_pretrained(folder))]
    return all(same(*(trace[name] for trace in traces)) for name in experiment.system.compile().order)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a node (text, image, or a list of them) are equal."""
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(numpy.array_equal(numpy.asarray(ours), numpy.asarray(theirs)))


def summary(metrics: dict[str, Any]) -> str:
    """A table for people."""
    lines = [f"{'system':18s} {'metric':18s} {'before':>7s} {'after':>7s}   change (95 % interval), points"]
    for name, found in metrics["experiments"].items():
        low, high = found["interval_95"]
        lines.append(
            f"{name:18s} {found['metric']:18s} {found['before']:7.1%} {found['after']:7.1%}   "
            f"{100 * found['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
