"""What the real study's tables of systems have in common: sizes, the methods that they compare, what a cell keeps."""

from __future__ import annotations

import hashlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.study.compare import TUNING_SEED
from bench.study.real import models
from bench.study.real.sources import Sources
from bench.study.training import Curve, shared, train
from sysdag import DiverseBeamSearch, ImportanceSampling, MonteCarlo, System
from sysdag.objectives import CandidateStrategy

BETA, LEARNING_RATE = 0.1, 2e-4
VALIDATION = "validation"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes:
        training, choosing, heldout: instructions to train on, to choose the step and the rate by, to measure on.
        runs: of a training instruction, where pairs are made of runs.
        measured_runs: of a held-out instruction.
        batch: pairs of a step.
        steps: of the optimizer, in all.
        every: steps between two validations.
        draft, answer: most tokens of each.
    """

    training: int = 300
    choosing: int = 100
    heldout: int = 200
    runs: int = 2
    measured_runs: int = 1
    batch: int = 2
    steps: int = 32
    every: int = 16
    draft: int = 20
    answer: int = 40

    @property
    def lengths(self) -> dict[str, int]:
        """Most new tokens of each node, by base name."""
        return dict.fromkeys(("draft", "critic"), self.draft) | dict.fromkeys(("answer", "rewrite"), self.answer)


QUICK = Size(training=24, choosing=2, heldout=3, runs=8, steps=2, every=1, batch=2, draft=4, answer=10)
NODES = ("draft", "answer")
UNTRAINED = {"before": 1, "best of 4": 4}  # of how many runs the best
SAMPLING: dict[str, Any] = {
    "joint": partial(DiverseBeamSearch, num_candidates=4),
    "joint, beams, k = 2": partial(DiverseBeamSearch, num_candidates=2),
    **{f"joint, Monte Carlo, k = {k}": partial(MonteCarlo, num_candidates=k) for k in (2, 4, 8)},
    "joint, importance sampling, k = 4": partial(ImportanceSampling, num_candidates=4),
}
STAGES: dict[str, Sequence[tuple[Sequence[str], float]]] = {
    "only draft": [(["draft"], 1.0)],
    "only answer": [(["answer"], 1.0)],
    "stage by stage": [(["draft"], 0.5), (["answer"], 0.5)],
}
TUNED_AS = dict.fromkeys(SAMPLING, "joint")


class Setting(ABC):
    """One seed of one table.

    Args:
        cache: where models, runs and sources are kept.
        seed: of adapters, pairs, order and draws.
        size: how much of everything.
    """

    nodes: Sequence[str] = NODES
    output: str = "answer"
    outline: str | System = "draft -> refine"
    parts: Mapping[str, str] = {"draft": "drafter", "answer": "refiner"}  # its nodes, each a system by itself
    key: str = "question"  # the input that tells instructions apart

    def __init__(self, cache: Path, seed: int, size: Size) -> None:
        self.cache, self.seed, self.size = cache, seed, size
        self.sources = Sources.kept(cache)

    @property
    @abstractmethod
    def pairs(self) -> list[dict[str, Any]]:
        """Dataset rows of the system draft -> refine."""

    @abstractmethod
    def validate(self, system: System) -> float:
        """By the choosing part; more is better."""

    @abstractmethod
    def measured(self, system: System, best_of: int = 1) -> dict[str, list[float]]:
        """Held-out figures, one number an instruction."""

    @abstractmethod
    def base_drafts(self, part: str) -> Mapping[str, str]:
        """One draft of the untrained drafter for each instruction of a part, by its `key`."""

    def validated(self, system: System) -> float:
        """`validate`; of a system whose adapters change nothing yet, which all methods and seeds have in common, once.

        Every row of it starts from the same number so, whichever cell comes first.
        """
        if not at_its_start(system):
            return self.validate(system)
        nodes = "-".join(node.name for node in system.nodes)
        version = sys.modules[type(self).__module__].VERSION
        content = f"{self.sources} {self.sources.fingerprint()} {self.size} {nodes}"
        name = f"start-{type(self).__name__}-{version}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
        kept = shared(self.cache, name, lambda file: file.write_text(json.dumps(self.validate(system))))
        return float(json.loads(kept.read_text()))

    def system(self, outline: str | System | None = None) -> System:
        """On the pretrained model, with new adapters; by default the setting's own."""
        made = outline or self.outline
        made = models.OUTLINES[made] if isinstance(made, str) else made
        return models.adapted(made, self.sources.model, self.sources.device, self.size.lengths, self.seed)

    def train(
        self,
        system: System,
        trained: Sequence[str],
        *,
        rate: float,
        candidates: CandidateStrategy | None,
        share: float = 1.0,
        rows: Sequence[Mapping[str, Any]] | None = None,
        validate: Any = None,
        **options: Any,
    ) -> Curve:
        """Aligns the named nodes, by base name; Sampling with candidates, else Direct.

        Args:
            rate: factor on the learning rate.
            share: of the size's steps.
            rows: by default `pairs`.
            validate: by default this setting's `validated`.
            options: more of `SysDPOConfig`.
        """
        steps = max(1, round(self.size.steps * share))
        chosen = {
            "objective": "direct" if candidates is None else "sampling", "beta": BETA, "max_steps": steps,
            "per_device_train_batch_size": self.size.batch, "warmup_steps": min(4, steps // 4),
            "nodes": {
                node.base_name: {"learning_rate": LEARNING_RATE * rate, "trainable": node.base_name in trained}
                for node in system.nodes
                if node.is_random
            },
        } | options  # fmt: skip
        return train(
            system, self.pairs if rows is None else rows, options=chosen, candidates=candidates,
            validate=validate or self.validated, seed=self.seed, every=self.size.every, device=self.sources.device,
        )  # fmt: skip


def at_its_start(system: System) -> bool:
    """Whether no adapter of a system changes anything: LoRA begins with a B of zeros."""
    return not any(
        bool(parameter.any())
        for node in system.nodes
        if node.is_random
        for name, parameter in node.component.own_parameters().items()
        if "lora_B" in name
    )


def aligned(setting: Setting, method: str, rate: float) -> tuple[System, list[Curve]]:
    """A new system, aligned by a method that every table has.

    Args:
        method: a key of `SAMPLING` or `STAGES`, or "direct" or "separate".
        rate: factor on the learning rate.
    """
    system = setting.system()
    if method == "separate":
        return system, separate(setting, system, rate)
    if method == "direct":
        return system, [setting.train(system, setting.nodes, rate=rate, candidates=None)]
    stages = STAGES.get(method, [(setting.nodes, 1.0)])
    candidates = SAMPLING.get(method, SAMPLING["joint"])()
    return system, [
        setting.train(system, trained, rate=rate, candidates=candidates, share=share) for trained, share in stages
    ]


def separate(setting: Setting, system: System, rate: float) -> list[Curve]:
    """Each node by a DPO of its own on the same pairs: the drafter as if its drafts were answers, the refiner on drafts
    that the base drafter wrote. Neither sees the other's training; each is chosen by the system with the other as it
    started."""
    drafts = setting.base_drafts("training")
    curves = []
    for node, outline in setting.parts.items():
        part = models.OUTLINES[outline].with_components({node: system[node].component})
        read = [each.name for each in part.inputs]
        rows = [
            {name: row[name] for name in (*read, "chosen", "rejected") if name in row}
            | ({"draft": drafts[row[setting.key]]} if "draft" in read else {})
            for row in setting.pairs
        ]
        validated = setting.system().with_components({node: system[node].component})
        curves.append(
            setting.train(
                part, [node], rate=rate, candidates=None, rows=rows,
                validate=lambda _, validated=validated: setting.validated(validated),
            )
        )  # fmt: skip
    return curves


def outcome(setting: Setting, system: System, curves: Sequence[Curve], best_of: int = 1) -> dict[str, Any]:
    """What a cell keeps; of the tuning seed, which is in no table, only what was validated."""
    parts = [max(curve.validation) for curve in curves]
    values: dict[str, list[float]] = {VALIDATION: parts} if parts else {}
    if setting.seed != TUNING_SEED:
        values |= setting.measured(system, best_of)
    return {"values": values, "curves": [curve.summary() for curve in curves]}
