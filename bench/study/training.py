"""Training under the study's rules: validation prompts choose the step, held-out prompts are seen once, at the end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from filelock import FileLock
from transformers import PrinterCallback, TrainerCallback

from examples.experiment import repeat
from sysdag import SysDPOConfig, SysDPOTrainer, System, Trace
from sysdag.objectives import CandidateStrategy

Scores = Callable[[Trace], numpy.ndarray]
LOGGED = (
    "loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "candidates/effective_sample_size", "candidates/responsibility_gap", "candidates/coverage", "candidates/distinct_2",
)  # fmt: skip


@dataclass(kw_only=True)
class Curve:
    """What a training did.

    Attributes:
        steps, validation: the validation score before the first step and after every few.
        logs: means of the trainer's metrics over the same stretches, without the first.
        cpu_seconds: of training alone, with one thread; unlike a clock's they do not depend on what else runs.
    """

    steps: list[int]
    validation: list[float]
    logs: list[dict[str, float]]
    cpu_seconds: float

    @property
    def best(self) -> int:
        """Place of the best validation score, the earliest of equals."""
        return int(numpy.argmax(self.validation))

    def summary(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "validation": self.validation, "logs": self.logs, "cpu_seconds": self.cpu_seconds,
            "best_step": self.steps[self.best],
        }  # fmt: skip


class _Validation(TrainerCallback):
    """Scores the system every few steps, training time apart, and keeps the weights of the best score."""

    def __init__(self, system: System, score: Callable[[], float], every: int) -> None:
        self.system, self.score, self.every = system, score, every
        self.steps: list[int] = []
        self.values: list[float] = []
        self.logs: list[dict[str, float]] = []
        self.kept: list[torch.Tensor] = []
        self.cpu_seconds = 0.0
        self.resumed = 0.0

    def parameters(self) -> list[torch.Tensor]:
        components = {id(n.component): n.component for n in self.system.nodes if n.is_random}.values()
        return [parameter for component in components for parameter in component.own_parameters().values()]

    def note(self, step: int) -> None:
        value = self.score()
        if not self.values or value > max(self.values):
            self.kept = [parameter.detach().clone() for parameter in self.parameters()]
        self.steps.append(step)
        self.values.append(value)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.note(0)
        self.resumed = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.cpu_seconds += time.process_time() - self.resumed
            self.note(state.global_step)
            self.resumed = time.process_time()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            kept = [name for name in logs if name in LOGGED or (name.startswith("nodes/") and "/rewards/" in name)]
            self.logs.append({"step": state.global_step} | {name: logs[name] for name in kept})

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, kept in zip(self.parameters(), self.kept, strict=True):
                parameter.copy_(kept)


def train(
    system: System,
    pairs: Sequence[Mapping[str, Any]],
    *,
    options: Mapping[str, Any],
    validate: Callable[[System], float],
    seed: int,
    every: int,
    candidates: CandidateStrategy | None = None,
    keep_best: bool = True,
    device: str = "cpu",
) -> Curve:
    """Aligns a system in place; it ends with the weights of its best validation score, or the last ones.

    Args:
        pairs: dataset rows.
        options: of `SysDPOConfig`, without folder and seed.
        validate: the score of the system as it is.
        every: optimizer steps between two validations.
        keep_best: False leaves the last weights.
        device: to train on; the system stays there.
    """
    callback = _Validation(system, lambda: validate(system), every)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SysDPOTrainer(
            model=system,
            args=SysDPOConfig(
                **{
                    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "logging_steps": every,
                    "per_device_train_batch_size": 32,
                } | dict(options),
                output_dir=folder, seed=seed, use_cpu=device == "cpu", report_to="none", save_strategy="no",
                disable_tqdm=True,
            ),
            candidates=candidates,
            train_dataset=list(pairs),
            callbacks=[callback],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if keep_best:
        callback.restore()
    return Curve(steps=callback.steps, validation=callback.values, logs=callback.logs, cpu_seconds=callback.cpu_seconds)


def runs(system: System, inputs: Mapping[str, Sequence[Any]], times: int, seed: int) -> Trace:
    """`times` runs of every prompt, those of a prompt one after the other."""
    return system.compile().sample(repeat(inputs, times), seed=seed)


def favourites(trace: Trace, scores: numpy.ndarray, of: int) -> Trace:
    """Of every `of` runs, which stand one after the other, the one with the best score."""
    by_group = scores.reshape(-1, of)
    return trace.select((by_group.argmax(1) + of * numpy.arange(len(by_group))).tolist())


def shared(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """A file or folder that several cells need, built once by whichever of them comes first."""
    place = cache / "shared" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(place) + ".lock"):
        if not place.exists():
            unfinished = place.with_name(place.name + ".unfinished")
            build(unfinished)
            unfinished.rename(place)
    return place


def ranked_pairs(
    trace: Trace, scores: numpy.ndarray, runs_per_prompt: int, pairs_per_prompt: int
) -> list[tuple[int, int]]:
    """(better, worse) rows: of each prompt its best run against its worst, the second best against the second worst,
    ..., as long as their scores differ.

    Args:
        scores: one a row; the runs of a prompt stand one after the other.
    """
    found = []
    for first in range(0, len(trace), runs_per_prompt):
        order = first + numpy.argsort(-scores[first : first + runs_per_prompt], kind="stable")
        for place in range(min(pairs_per_prompt, runs_per_prompt // 2)):
            better, worse = int(order[place]), int(order[-1 - place])
            if scores[better] > scores[worse]:
                found.append((better, worse))
    return found
