"""From a system to an aligned one: sample it, judge the runs, train on the pairs, save it, load it again."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import stand_ins
from torch import Tensor

from sysdag import SysDPOConfig, SysDPOTrainer, System, Trace
from sysdag.evaluation import choose_pairs, function_judge, judge_runs
from sysdag.traces import output_names, preference_row


@dataclass(frozen=True)
class Outcome:
    """What `run` made.

    Attributes:
        trace: the runs that were judged.
        pairs: the preference rows made of them.
        trainer: after training.
        moved: for each component, the largest change of one of its weights.
        folder: the aligned system's.
    """

    trace: Trace
    pairs: list[dict[str, Any]]
    trainer: SysDPOTrainer
    moved: dict[str, float]
    folder: Path


def preferences(example: ModuleType, trace: Trace) -> list[dict[str, Any]]:
    """The best and the worst run of each input, where their scores differ: what `sysdag judge` writes."""
    outputs = output_names(trace, example.system.outputs)
    judged = judge_runs(trace, function_judge(example.score), outputs)
    return [preference_row(trace, *pair, outputs) for pair in choose_pairs(trace, judged, outputs).pairs]


def run(example: ModuleType, output: Path, *, runs: int, steps: int, seed: int = 0) -> Outcome:
    """The whole path.

    Args:
        example: a module of this folder: its `system`, `INPUTS`, `score`, `TRAINING` and `CANDIDATES`.
        output: a folder.
        runs: of each input, to be judged.
        steps: of training.
    """
    plan = example.system.compile()
    repeated = {name: [value for value in column for _ in range(runs)] for name, column in example.INPUTS.items()}
    trace = plan.sample(repeated, seed=seed)
    pairs = preferences(example, trace)
    args = SysDPOConfig(
        output_dir=str(output / "training"), max_steps=steps, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to=[], seed=seed, **example.TRAINING,
    )  # fmt: skip
    trainer = SysDPOTrainer(model=example.system, args=args, candidates=example.CANDIDATES, train_dataset=pairs)
    before = {key: [weight.detach().clone() for weight in found] for key, found in _trained(trainer).items()}
    trainer.train()
    moved = {
        key: max(float((new.detach() - old).abs().max()) for new, old in zip(found, before[key], strict=True))
        for key, found in _trained(trainer).items()
    }
    trainer.save_model(str(output / "aligned"))
    return Outcome(trace, pairs, trainer, moved, output / "aligned")


def _trained(trainer: SysDPOTrainer) -> dict[str, list[Tensor]]:
    components = {n.base_name: n.component for n in trainer.system.nodes if n.is_random}
    return {key: [p for p in c.own_parameters().values() if p.requires_grad] for key, c in components.items()}


def main(
    file: str, models: Sequence[str], prepare: str | None = None, arguments: Sequence[str] | None = None
) -> Outcome:
    """Runs an example from the command line.

    Args:
        file: the example's. It is imported under its own name, since a saved system cannot name functions of
            `__main__`.
        models: names of what it loads; with `--offline` stand-ins of these names are made in the output folder, and
            the example runs there.
        prepare: a function of the example that is called once before sampling.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=f"Samples, judges and aligns {Path(file).name}.")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--offline", action="store_true", help="tiny stand-ins with random weights for all models")
    parser.add_argument("--runs", type=int, default=4, help="of each input, to be judged")
    parser.add_argument("--steps", type=int, help="of training; by default 30, with --offline 3")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    output = given.output.resolve()
    if given.offline:
        os.chdir(output)
        stand_ins.write(list(models), output)
    example = importlib.import_module(Path(file).stem)
    if prepare is not None:
        getattr(example, prepare)()
    outcome = run(example, output, runs=given.runs, steps=given.steps or (3 if given.offline else 30))
    losses = [line["loss"] for line in outcome.trainer.state.log_history if "loss" in line]
    print(f"{len(outcome.trace)} runs, {len(outcome.pairs)} pairs; loss {losses[0]:.4f}, then {losses[-1]:.4f}")
    print("largest change of a weight: " + ", ".join(f"{name} {size:.2g}" for name, size in outcome.moved.items()))
    print(f"{outcome.folder} holds")
    print(System.from_pretrained(outcome.folder).compile())
    return outcome
