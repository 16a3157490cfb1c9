"""One experiment on one system: measure, sample preference pairs from the system itself, align, measure again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from transformers import PrinterCallback, TrainerCallback

from sysdag import SysDPOConfig, SysDPOTrainer, System, Trace
from sysdag.objectives import CandidateStrategy

Scores = Callable[[Trace], numpy.ndarray]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A system with its task.

    Attributes:
        name: of the folder that its results go to.
        title: one line for people.
        metric: the name of what `success` measures.
        system: built on the base models.
        training, heldout: inputs to sample pairs from, and inputs to measure on.
        preference: a graded score for each run; pairs are made of runs that differ in it.
        success: 0 or 1 for each run.
        options: of `SysDPOConfig`, without the output folder and the seed.
        also: further measures of a run, by name, for `metrics.json`.
        show: writes examples of runs before and after to a folder.
        candidates: for the objective `sampling`.
        runs_per_prompt: how many runs of each training prompt are compared with each other.
        pairs_per_prompt: most pairs made of them.
    """

    name: str
    title: str
    metric: str
    system: System
    training: Mapping[str, Sequence[Any]]
    heldout: Mapping[str, Sequence[Any]]
    preference: Scores
    success: Scores
    options: Mapping[str, Any]
    also: Mapping[str, Scores]
    show: Callable[[Trace, Trace, Path], None]
    candidates: CandidateStrategy | None = None
    runs_per_prompt: int = 6
    pairs_per_prompt: int = 3

    @property
    def output(self) -> str:
        return self.system.outputs[0]

    @property
    def runs(self) -> int:
        """Number of runs that pairs are made of."""
        return self.runs_per_prompt * len(next(iter(self.training.values())))


def repeat(inputs: Mapping[str, Sequence[Any]], times: int) -> dict[str, list[Any]]:
    """Every row `times` times, one after the other."""
    return {name: [value for value in column for _ in range(times)] for name, column in inputs.items()}


def measure(experiment: Experiment, seed: int, runs: int = 2) -> tuple[numpy.ndarray, Trace]:
    """Success of each held-out prompt, averaged over `runs` runs, and the trace of all runs."""
    trace = experiment.system.compile().sample(repeat(experiment.heldout, runs), seed=seed)
    return experiment.success(trace).reshape(-1, runs).mean(1), trace


def preference_pairs(experiment: Experiment, seed: int) -> list[dict[str, Any]]:
    """Dataset rows for `SysDPOTrainer`: for each training prompt the best run against the worst, then the second best
    against the second worst, as long as their scores differ."""
    trace = experiment.system.compile().sample(repeat(experiment.training, experiment.runs_per_prompt), seed=seed)
    scores = experiment.preference(trace).reshape(-1, experiment.runs_per_prompt)
    rows = []
    for prompt, of_prompt in enumerate(scores):
        ranked = prompt * experiment.runs_per_prompt + numpy.argsort(-of_prompt, kind="stable")
        for place in range(min(experiment.pairs_per_prompt, len(ranked) // 2)):
            chosen, rejected = int(ranked[place]), int(ranked[-1 - place])
            if scores.flat[chosen] > scores.flat[rejected]:
                rows.append(_row(experiment, trace, chosen, rejected))
    return rows


def _row(experiment: Experiment, trace: Trace, chosen: int, rejected: int) -> dict[str, Any]:
    row = {name: column[chosen] for name, column in trace.inputs.items()}
    if experiment.options["objective"] == "sampling":
        return row | {"chosen": trace[experiment.output][chosen], "rejected": trace[experiment.output][rejected]}
    plan = experiment.system.compile()
    observed = [name for name in plan.observed("direct") if name != experiment.output]
    for side, run in (("chosen", chosen), ("rejected", rejected)):
        row[side] = trace.cells[experiment.output][run]
        row[f"{side}_intermediates"] = {name: trace.cells[name][run] for name in observed}
    return row


def align(experiment: Experiment, pairs: Sequence[dict[str, Any]], folder: str, seed: int) -> SysDPOTrainer:
    """Trains all models of the system jointly; a tenth of the pairs is kept for validation."""
    if len(pairs) < 2:
        raise ValueError(f"{experiment.name}: the runs of a prompt differ too seldom; {len(pairs)} pairs are too few.")
    validation = max(1, len(pairs) // 10)
    trainer = SysDPOTrainer(
        model=experiment.system,
        args=SysDPOConfig(
            **experiment.options, output_dir=folder, seed=seed, use_cpu=True, report_to="none", save_strategy="no",
            eval_strategy="steps", disable_tqdm=True, logging_first_step=True,
        ),
        candidates=experiment.candidates,
        train_dataset=list(pairs[validation:]),
        eval_dataset=list(pairs[:validation]),
        callbacks=[Progress()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


class Progress(TrainerCallback):
    """Prints one line for each log of the trainer."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for side, loss in (("training", "loss"), ("validation", "eval_loss")):
            if loss in logs:
                rewards = loss.removesuffix("loss") + "rewards"
                print(
                    f"    step {state.global_step:4d} of {state.max_steps}  {side:10s}  loss {logs[loss]:.3f}  "
                    f"margin {logs[f'{rewards}/margins']:+.2f}  accuracy {logs[f'{rewards}/accuracies']:.2f}",
                    flush=True,
                )


def paired_bootstrap(
    before: numpy.ndarray, after: numpy.ndarray, seed: int, resamples: int = 10_000
) -> tuple[float, float]:
    """95 % interval of the mean difference, prompts resampled with replacement."""
    difference = after - before
    drawn = numpy.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    low, high = numpy.quantile(difference[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)
