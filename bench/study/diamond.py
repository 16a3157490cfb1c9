"""A diamond of five models: a plan is drawn up, two workers sort a half each, a third merges them, a fourth polishes.

`split` decides how the six letters of a question are divided (in the middle, or by alternating); `left` and `right`
sort what they are given, better after the second; `merge` puts the halves together; `polish` reads the question and the
merged text and mends it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy

from bench.study import task
from examples.tasks.sorted_letters import LETTERS, solve, swap_neighbours
from sysdag import Input, MonteCarlo, System, Trace, node
from sysdag.components import Categorical, CausalLM

VERSION = 2
LENGTH = 6
SPLITS = {"middle": 0.4, "alternate": 0.8}  # how often the workers are right
MODELS = ("left", "right", "merge", "polish")
NODES = ("split", *MODELS)
METHODS = ("before", "only polish", "joint", "direct")
question = Input("question")


@node(Categorical(tuple(SPLITS), 1))
def split(question):
    return [1.0]


@node(CausalLM("unset"))
def left(question, split):
    return f"{split[0].upper()}{halves(question, split)[0]}:"


@node(CausalLM("unset"))
def right(question, split):
    return f"{split[0].upper()}{halves(question, split)[1]}:"


@node(CausalLM("unset"))
def merge(left, right):
    return f"{left},{right}:"


@node(CausalLM("unset"))
def polish(question, merge):
    return f"{question},{merge}:"


OUTLINE = System(
    question >> split, (question & split) >> [left, right], (left & right) >> merge, (question & merge) >> polish
)


def halves(question: str, split: str) -> tuple[str, str]:
    middle = len(question) // 2
    return (question[:middle], question[middle:]) if split == "middle" else (question[::2], question[1::2])


def spoiled(text: str, rng: random.Random, good: float) -> str:
    """The text as it stands with this probability, otherwise with two neighbours exchanged."""
    return text if rng.random() < good or len(text) < 2 else swap_neighbours(text, rng)


def demonstration(name: str, rng: random.Random) -> tuple[str, str]:
    """What the base models learn from: workers right as `SPLITS` says, a merger in 7 of 10 cases, a polisher that mends
    in 3."""
    asked = "".join(rng.sample(LETTERS, LENGTH))
    how = rng.choice(tuple(SPLITS))
    parts = [solve(half) for half in halves(asked, how)]
    written = [spoiled(part, rng, SPLITS[how]) for part in parts]
    if name in ("left", "right"):
        worker, place = (left, 0) if name == "left" else (right, 1)
        return worker.function(asked, how), written[place]
    if name == "merge":
        return f"{written[0]},{written[1]}:", spoiled(solve(asked), rng, 0.7)
    merged = spoiled(solve(asked), rng, 0.5)
    return f"{asked},{merged}:", solve(asked) if rng.random() < 0.3 else merged


@dataclass(frozen=True)
class Diamond(task.Task):
    """See the module."""

    @property
    def name(self) -> str:
        return f"diamond-{VERSION}"

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        rng, found = random.Random(f"diamond-{self.seed}"), dict[str, str]()
        while len(found) < self.size.prompts:
            asked = "".join(rng.sample(LETTERS, LENGTH))
            found.setdefault(solve(asked), asked)
        return self.size.divided(found.values())

    def system(self) -> System:
        models = self.models(self.name, LETTERS + "MA,:", {name: partial(demonstration, name) for name in MODELS})
        return OUTLINE.with_components({"split": Categorical(tuple(SPLITS), 1), **models})

    def qualities(self, trace: Trace) -> numpy.ndarray:
        asked = zip(trace["question"], trace["polish"], strict=True)
        return numpy.array([task.matching(solve(one), text) for one, text in asked])

    def figures(self, trace: Trace) -> dict[str, numpy.ndarray]:
        return super().figures(trace) | {
            "right choice": numpy.array([float(how == "alternate") for how in trace["split"]])
        }


def align(cache: Path, *, method: str, seed: int, size: str, rate: float = 1.0) -> dict[str, Any]:
    """One method on one seed; see `letters.align`."""
    setting = Diamond(cache, seed, task.SIZES[size])
    system = setting.system()
    if method == "before":
        return setting.outcome(system, [])
    trained: Sequence[str] = ["polish"] if method == "only polish" else NODES
    curve = setting.train(
        system, trained, rate=rate, objective="direct" if method == "direct" else "sampling",
        candidates=MonteCarlo(num_candidates=4),
    )  # fmt: skip
    return setting.outcome(system, [curve])
