"""Training in rounds against one training of as many steps, on the demo's draft -> refine as it stands.

The system, its options and its prompts are those of `python -m examples.demo`. Preferences are by the exact rule, as
there. Every method takes the same number of optimizer steps; what is measured is the system after the last of them, so
that no choice is made on the held-out prompts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.experiment import Experiment, measure
from examples.experiments import QUICK, Size, sort_letters
from examples.tasks.sorted_letters import solve
from sysdag import SysDPOConfig, Trace
from sysdag.training import Rounds

VERSION = 1
ROUNDS = 3
STEPS = {"full": 48, "quick": 2}  # of a round; 48 are the demo's two epochs
SIZES = {"full": Size(), "quick": QUICK}
EVAL_RUNS = 2
METHODS: dict[str, dict[str, Any]] = {
    "one training": {"rounds": 1},
    "one training, three times the runs": {"rounds": 1, "times": ROUNDS},
    "three rounds": {"rounds": ROUNDS},
    "three rounds, fixed reference": {"rounds": ROUNDS, "reference": "fixed"},
}


def is_solved(run: Mapping[str, Any]) -> bool:
    """The exact rule."""
    return run["answer"] == solve(run["question"])


def align(cache: Path, *, method: str, seed: int, size: str) -> dict[str, Any]:
    """Held-out exact match after the last step of a method, and after each of its rounds.

    Args:
        method: one of `METHODS`, or "before".
    """
    experiment = sort_letters(SIZES[size], seed, cache / "demo")
    if method == "before":
        solved, _ = measure(experiment, seed, EVAL_RUNS)
        return {"heldout": {"exact": solved.tolist()}, "curves": []}
    options = dict(METHODS[method])
    times, steps = options.pop("times", 1), STEPS[size] * ROUNDS // options["rounds"]
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(
            system=experiment.system,
            inputs=_rows(experiment.training),
            heldout=_rows(experiment.heldout),
            judge=is_solved,
            args=_arguments(experiment, steps, folder, seed),
            candidates=experiment.candidates,
            seed=seed,
            runs=experiment.runs_per_prompt * times,
            pairs_per_prompt=experiment.pairs_per_prompt * times,
            batch_size=256,
            eval_runs=EVAL_RUNS,
            device="cpu",
            **options,
        )
        began = time.process_time()
        result = rounds.run(say=lambda _: None)
        seconds = time.process_time() - began
        last = len(result.scores) - 1
        solved = _solved(Trace.load(Path(folder) / f"round-{last}" / "heldout.jsonl"))
    places = [number * steps for number in range(last + 1)]
    curve = {
        "steps": places, "validation": list(result.scores), "logs": [], "cpu_seconds": seconds,
        "best_step": places[result.best],
    }  # fmt: skip
    return {"heldout": {"exact": solved}, "curves": [curve]}


def _rows(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(inputs, values, strict=True)) for values in zip(*inputs.values(), strict=True)]


def _arguments(experiment: Experiment, steps: int, folder: str, seed: int) -> SysDPOConfig:
    kept = {key: value for key, value in experiment.options.items() if key not in ("num_train_epochs", "eval_steps")}
    return SysDPOConfig(
        **kept, max_steps=steps, output_dir=folder, seed=seed, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip


def _solved(trace: Trace) -> list[float]:
    """Of each prompt, the share of its runs."""
    found: dict[str, list[float]] = {}
    for question, answer in zip(trace["question"], trace["answer"], strict=True):
        found.setdefault(question, []).append(float(answer == solve(question)))
    return [sum(each) / len(each) for each in found.values()]
