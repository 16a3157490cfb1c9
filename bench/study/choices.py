"""Systems with a discrete choice, trained jointly with the language models that it feeds.

`router`: a question asks for its letters in order or in reverse; a router picks one of two specialists, each of which
was taught one of the tasks well and the other badly. The specialists share a model and are told apart by a tag.
`retriever`: a question is a key; a retriever picks one of eight notes, of which one is the answer; a reader answers
from the question and the note.
"""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy

from bench.study import task
from examples.tasks.sorted_letters import LETTERS, random_question, solve, swap_neighbours
from sysdag import Exhaustive, Input, System, Trace, node
from sysdag.components import Categorical, CausalLM

VERSION = 2
METHODS = ("before", "only the choice", "only the LLM", "joint", "direct")
SPECIALISTS = ("up", "down")
NOTES, KNOWN = 8, 3  # how many notes there are, how many letters of the right one a key has
question = Input("question")


@node(Categorical(SPECIALISTS, 2))
def route(question):
    """Whether the question asks for the reverse order, and a constant: what a router's encoder would see."""
    return [1.0, float(question.startswith("-"))]


@node(CausalLM("unset"), name="answer")
def specialist(question, route):
    return f"{route[0]}{question}:"


@node(Categorical(("unset", "either"), len(LETTERS)))
def retrieve(question):
    """Which letters the question has."""
    return [float(letter in question) for letter in LETTERS]


@node(CausalLM("unset"), name="answer")
def reader(question, retrieve):
    return f"{question},{retrieve}:"


ROUTED = System(question >> route, (question & route) >> specialist)
RETRIEVED = System(question >> retrieve, (question & retrieve) >> reader)


@dataclass(frozen=True)
class Choice(task.Task):
    """What both systems share.

    Attributes:
        choosing: the node that chooses.
    """

    choosing: ClassVar[str]
    outline: ClassVar[System]

    @abstractmethod
    def component(self) -> Categorical:
        """What chooses, at first evenly."""

    @abstractmethod
    def demonstration(self, rng: random.Random) -> tuple[str, str]:
        """What the language model learns from."""

    @abstractmethod
    def right(self, asked: str) -> str:
        """The right answer."""

    @abstractmethod
    def best(self, asked: str) -> str:
        """The choice that helps most."""

    @property
    def name(self) -> str:
        return f"{self.choosing}-{VERSION}"

    def system(self) -> System:
        models = self.models(self.name, LETTERS + "-,:", {"answer": self.demonstration})
        return self.outline.with_components({self.choosing: self.component(), **models})

    def qualities(self, trace: Trace) -> numpy.ndarray:
        asked = zip(trace["question"], trace["answer"], strict=True)
        return numpy.array([task.matching(self.right(one), text) for one, text in asked])

    def figures(self, trace: Trace) -> dict[str, numpy.ndarray]:
        picked = zip(trace["question"], trace[self.choosing], strict=True)
        return super().figures(trace) | {
            "right choice": numpy.array([float(value == self.best(asked)) for asked, value in picked])
        }


class Router(Choice):
    """Half of the questions ask for the reverse order."""

    choosing, outline = "route", ROUTED

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        marks = random.Random(f"marks-{self.seed}")
        return {part: [marks.choice(("", "-")) + one for one in asked] for part, asked in super().prompts.items()}

    def component(self) -> Categorical:
        return Categorical(SPECIALISTS, 2)

    def right(self, asked: str) -> str:
        return solve(asked[1:])[::-1] if asked.startswith("-") else solve(asked)

    def best(self, asked: str) -> str:
        return "down" if asked.startswith("-") else "up"

    def demonstration(self, rng: random.Random) -> tuple[str, str]:
        """Right in 7 of 10 cases where the specialist is the one for the question, in 2 of 10 otherwise."""
        asked, chosen = rng.choice(("", "-")) + random_question(rng), rng.choice(SPECIALISTS)
        right = self.right(asked)
        good = rng.random() < (0.7 if chosen == self.best(asked) else 0.2)
        return specialist.function(asked, chosen), right if good else swap_neighbours(right, rng)


class Retriever(Choice):
    """A key is three letters of a note and one letter that the note has not, in any order; no two keys are made of the
    same letters, and no other note has three of them. Every seed has notes of its own."""

    choosing, outline = "retrieve", RETRIEVED

    @cached_property
    def notes(self) -> list[str]:
        """Any two have at most `KNOWN` - 1 letters in common."""
        rng, found = random.Random(f"notes-{self.seed}"), list[str]()
        while len(found) < NOTES:
            note = "".join(rng.sample(LETTERS, 5))
            if all(len(set(note) & set(other)) < KNOWN for other in found):
                found.append(note)
        return found

    def holding(self, key: Collection[str]) -> list[str]:
        """The notes that the key may be meant for."""
        return [note for note in self.notes if len(set(note) & set(key)) >= KNOWN]

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        keys = sorted({
            "".join(sorted((*known, other)))
            for note in self.notes
            for known in itertools.combinations(note, KNOWN)
            for other in set(LETTERS) - set(note)
        })  # fmt: skip
        rng = random.Random(f"keys-{self.seed}")
        asked = ["".join(rng.sample(key, len(key))) for key in keys if len(self.holding(key)) == 1]
        rng.shuffle(asked)
        if len(asked) < self.size.prompts:
            raise ValueError(f"seed {self.seed}: the notes give only {len(asked)} keys, {self.size.prompts} are needed")
        return self.size.divided(asked, ("heldout", "validation", "training"))

    def component(self) -> Categorical:
        return Categorical(tuple(self.notes), len(LETTERS))

    def right(self, asked: str) -> str:
        (note,) = self.holding(asked)
        return note

    best = right

    def demonstration(self, rng: random.Random) -> tuple[str, str]:
        """The note in 6 of 10 cases, whatever was asked; otherwise with two letters exchanged."""
        note = "".join(rng.sample(LETTERS, 5)) if rng.random() < 0.5 else rng.choice(self.notes)
        asked = "".join(rng.sample(LETTERS, KNOWN + 1))
        return reader.function(asked, note), note if rng.random() < 0.6 else swap_neighbours(note, rng)


SYSTEMS = {"router": Router, "retriever": Retriever}


def align(
    cache: Path,
    *,
    system: str,
    method: str,
    seed: int,
    size: str,
    rate: float = 1.0,
    factors: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One method on one seed; see `letters.align`. The latent choice is summed over all its values."""
    setting = SYSTEMS[system](cache, seed, task.SIZES[size])
    made = setting.system()
    if method == "before":
        return setting.outcome(made, [])
    trained: Sequence[str] = {"only the choice": [setting.choosing], "only the LLM": ["answer"]}.get(
        method, [setting.choosing, "answer"]
    )
    curve = setting.train(
        made, trained, rate=rate, objective="direct" if method == "direct" else "sampling", candidates=Exhaustive(),
        factors=factors, **(options or {}),
    )  # fmt: skip
    return setting.outcome(made, [curve])
