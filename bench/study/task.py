"""What the study's systems of language models have in common: prompts, runs, an annotator who errs, preference rows."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy

from bench.study.training import Curve, favourites, ranked_pairs, runs, shared, train
from examples.tasks.base_models import letter_tokenizer, train_language_model
from examples.tasks.sorted_letters import random_question, split_questions
from sysdag import System, Trace
from sysdag.components import Categorical, CausalLM
from sysdag.objectives import CandidateStrategy


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything: prompts, optimizer steps, runs of a training prompt, pairs made of them."""

    base_steps: int = 500
    training: int = 240
    validation: int = 100
    heldout: int = 200
    steps: int = 96
    every: int = 8
    runs: int = 6
    pairs: int = 2

    @property
    def prompts(self) -> int:
        """Of all parts together."""
        return self.training + self.validation + self.heldout

    def divided(
        self, prompts: Iterable[str], order: Sequence[str] = ("training", "validation", "heldout")
    ) -> dict[str, list[str]]:
        """The prompts by part, taken in this order: to train on, to choose by, to measure on."""
        rest = iter(prompts)
        return {part: list(itertools.islice(rest, getattr(self, part))) for part in order}


SIZES = {"full": Size(), "quick": Size(base_steps=60, training=16, validation=6, heldout=8, steps=2, every=1, runs=4)}


@dataclass(frozen=True)
class Task(ABC):
    """One seed's models, prompts and preferences.

    Attributes:
        cache: where base models and their runs are kept.
        seed: of models, prompts and preferences.
        size: how much of everything.
    """

    cache: Path
    seed: int
    size: Size
    device: ClassVar[str] = "cpu"
    longest: ClassVar[int] = 8  # tokens of a completion
    model_options: ClassVar[Mapping[str, Any]] = {}  # of `train_language_model`

    @property
    @abstractmethod
    def name(self) -> str:
        """Of what is kept in the cache; says everything that base models and runs depend on but seed and size."""

    @abstractmethod
    def system(self) -> System:
        """On base models of its own."""

    @abstractmethod
    def qualities(self, trace: Trace) -> numpy.ndarray:
        """The exact rule, in [0, 1]: one number a run."""

    def models(
        self, prefix: str, letters: str, demonstrations: Mapping[str, Callable[[random.Random], tuple[str, str]]]
    ) -> dict[str, CausalLM]:
        """Base models of single letters by name, each trained once from fresh (prompt, completion) demonstrations.

        Args:
            prefix: of their folders; says everything that they depend on but name, seed and size.
        """
        tokenizer, steps = letter_tokenizer(letters, max_length=64), self.size.base_steps

        def built(name: str, seed: int) -> Path:
            def build(folder: Path) -> None:
                train_language_model(
                    folder, tokenizer, demonstrations[name], seed=seed, steps=steps, device=self.device,
                    **self.model_options,
                )  # fmt: skip

            return shared(self.cache, f"{prefix}-{name}-{self.seed}-{steps}", build)

        found = {
            name: CausalLM(built(name, self.seed + place), max_new_tokens=self.longest)
            for place, name in enumerate(demonstrations)
        }
        if self.device != "cpu":  # there each is loaded when it is first used
            for component in found.values():
                component.module.to(self.device)
        return found

    def question(self, rng: random.Random) -> str:
        return random_question(rng)

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Disjoint prompts to train on, to choose by, and to measure on."""
        size = self.size
        training, rest = split_questions(self.seed, size.training, size.validation + size.heldout, self.question)
        return size.divided([*training, *rest])

    def annotated(self, trace: Trace, error: float = 0.15) -> numpy.ndarray:
        """What the annotator thinks of each run: its quality, and an error with this standard deviation."""
        drawn = numpy.random.default_rng([self.seed, len(trace)]).normal(0, error, len(trace))
        return self.qualities(trace) + drawn

    def base_runs(self, part: str) -> Trace:
        """Runs of the base system that preferences are made of, those of a prompt one after the other."""
        size, prompts = self.size, self.prompts[part]

        def build(file: Path) -> None:
            runs(self.system(), {"question": prompts}, size.runs, self.seed).to_jsonl(file)

        name = f"{self.name}-runs-{part}-{self.seed}-{size.base_steps}-{len(prompts)}-{size.runs}.jsonl"
        return Trace.from_jsonl(shared(self.cache, name, build))

    def training_runs(self) -> Trace:
        return self.base_runs("training")

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Dataset rows, with the intermediates of both runs as they were sampled."""
        trace = self.training_runs()
        plan = self.system().compile()
        observed = [name for name in plan.random_nodes if name not in plan.system.outputs]
        (output,) = plan.system.outputs
        return [
            {"question": trace["question"][pair[0]]}
            | {side: trace.cells[output][row] for side, row in zip(("chosen", "rejected"), pair, strict=True)}
            | {
                f"{side}_intermediates": {name: trace.cells[name][row] for name in observed}
                for side, row in zip(("chosen", "rejected"), pair, strict=True)
            }
            for pair in ranked_pairs(trace, self.annotated(trace), self.size.runs, self.size.pairs)
        ]

    def validate(self, system: System) -> float:
        """Mean quality on the validation prompts, two runs each."""
        return float(self.qualities(runs(system, {"question": self.prompts["validation"]}, 2, 17)).mean())

    def measured(self, system: System, best_of: int = 1) -> dict[str, list[float]]:
        """Figures of two runs of every held-out prompt, each the annotator's favourite of `best_of`, by prompt."""
        trace = runs(system, {"question": self.prompts["heldout"]}, 2 * best_of, 23)
        trace = favourites(trace, self.annotated(trace), best_of)
        return {name: values.reshape(-1, 2).mean(1).tolist() for name, values in self.figures(trace).items()}

    def figures(self, trace: Trace) -> dict[str, numpy.ndarray]:
        """What is measured of each run."""
        return {"exact": (self.qualities(trace) == 1).astype(float), "quality": self.qualities(trace)}

    def train(
        self,
        system: System,
        trained: Sequence[str],
        *,
        rate: float,
        objective: str,
        candidates: CandidateStrategy | None = None,
        share: float = 1.0,
        deployed: System | None = None,
        factors: Mapping[str, float] | None = None,
        **options: Any,
    ) -> Curve:
        """Aligns the named nodes (base names, for the visits of a loop) from `pairs`; the others stay as they are.

        Args:
            rate: factor on the learning rates, see `nodes`.
            share: of the size's steps.
            factors: on top of `rate`, by node.
            deployed: what is validated, where it is not the system that trains but shares its components.
            options: more of `SysDPOConfig`.
        """
        chosen = {
            "objective": objective, "beta": 0.5, "max_steps": max(1, round(self.size.steps * share)),
            "nodes": nodes(system, trained, rate, factors),
        } | options  # fmt: skip
        return train(
            system, self.pairs, options=chosen, candidates=candidates if objective == "sampling" else None,
            validate=lambda trained: self.validate(deployed or trained), seed=self.seed, every=self.size.every,
            device=self.device,
        )  # fmt: skip

    def outcome(self, system: System, trained: Sequence[Curve]) -> dict[str, Any]:
        """What a cell keeps."""
        return {"heldout": self.measured(system), "curves": [curve.summary() for curve in trained]}


def matching(right: str, text: str) -> float:
    """The share of letters that stand where they belong; 0 for a text of another length."""
    return sum(a == b for a, b in zip(right, text, strict=True)) / len(right) if len(text) == len(right) else 0.0


def nodes(
    system: System, trained: Sequence[str], rate: float, factors: Mapping[str, float] | None = None
) -> dict[str, Mapping[str, Any]]:
    """Options by node: what trains, and how fast. A choice, whose weights start from nothing, takes larger steps."""
    own = factors or {}
    found = {node.base_name: node for node in system.nodes if node.is_random}
    usual = {name: 0.05 if isinstance(node.component, Categorical) else 5e-4 for name, node in found.items()}
    return {
        name: {"learning_rate": usual[name] * rate * own.get(name, 1.0), "trainable": name in trained} for name in found
    }
