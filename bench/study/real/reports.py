"""Summarise -> rewrite on longer inputs: a report is summed up, and from the summary alone it is told as is asked for.

The writer sees the summary and what is demanded, not the report, so that facts it must name have to pass through the
summary. Reports are made of sentences about one event; what an answer has to name (place, day, number) is known.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.study.real.constrained import SIZES, Constrained, align_in
from bench.study.real.constraints import Constraint, Demand, at_most, begins, exactly, lowercase, no_commas, words

VERSION = 1
METHODS = ("before", "best of 4", "separate", "only draft", "only answer", "stage by stage", "joint", "direct")
PLACES = (
    "Aldham", "Brixen", "Corwell", "Dunmore", "Elstow", "Farley", "Gorham", "Hexley", "Ilmouth", "Jarrow", "Kelso",
    "Lindale", "Marwick", "Norbury", "Oakham", "Penrith", "Quorndon", "Ripley", "Selby", "Tarbet",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
EVENTS = {
    "bridge": "The council of {place} met on {day} and voted to repair the old bridge for {number} thousand pounds.",
    "library": "On {day} the library of {place} received {number} books from a family that moved away.",
    "herons": "Volunteers counted {number} herons at the lake near {place} on {day}.",
    "storm": "A storm on {day} brought down {number} trees in the woods behind {place}.",
    "market": "The market of {place} opened on {day} with {number} stalls.",
    "trains": "From {day} on {number} trains will stop in {place}.",
    "school": "A school in {place} sent {number} children to plant trees on {day}.",
    "concert": "On {day} {number} people came to a concert in the square of {place}.",
    "bakery": "The oldest bakery of {place} gave away {number} loaves on {day}.",
    "race": "A race around {place} on {day} had {number} runners.",
}
AROUND = (
    "The weather was mild, and many people had come early.", "Nobody had expected so much interest.",
    "A speaker thanked all who had helped in the weeks before.", "Some neighbours complained about the noise.",
    "The local paper sent a photographer, whose pictures are shown in the town hall.",
    "Children were given lemonade and sat on the steps.", "An older man said that he had waited for this for years.",
    "There was some confusion about where cars could be left.", "The mayor could not come, as she had a cold.",
    "A short film about it is to be made.", "Several shops stayed open longer than they usually do.",
    "It was not clear at first who would pay for it.", "A committee will look into what can be done better.",
    "Two musicians played until it was dark.", "Those who came from far away stayed for the night.",
)  # fmt: skip
FORMS = (
    lambda rng: at_most(rng.choice((15, 20, 25))), lambda rng: exactly(rng.choice((1, 2))), lambda rng: no_commas(),
    lambda rng: lowercase(), lambda rng: begins(rng.choice(("Well", "Listen", "News"))),
)  # fmt: skip


@dataclass(frozen=True)
class Report(Demand):
    """A demand about a report, which is its `text`.

    Attributes:
        question: what the writer is asked.
    """

    question: str


def names(kind: str, word: str) -> Constraint:
    """The answer has a fact's word."""
    return Constraint(kind, f"Name the {kind}.", lambda text: word.lower() in words(text))


def reports(training: int, choosing: int, heldout: int) -> dict[str, list[Report]]:
    """The reports by part, always the same ones, all different."""
    rng = random.Random("reports")
    found: dict[str, Report] = {}
    while len(found) < training + choosing + heldout:
        made = _report(rng)
        found[made.text] = made
    every = list(found.values())
    return {
        "training": every[:training],
        "choosing": every[training : training + choosing],
        "heldout": every[training + choosing :],
    }


def _report(rng: random.Random) -> Report:
    topic = rng.choice(list(EVENTS))
    facts = {"place": rng.choice(PLACES), "day": rng.choice(DAYS), "number": str(rng.randint(11, 99))}
    sentences = rng.sample(AROUND, rng.randint(5, 8))
    sentences.insert(rng.randrange(len(sentences)), EVENTS[topic].format(**facts))
    asked = [names(kind, facts[kind]) for kind in rng.sample(list(facts), 2)] + [rng.choice(FORMS)(rng)]
    question = " ".join(["Tell a neighbour the news.", *(constraint.asks for constraint in asked)])
    return Report(topic, " ".join(sentences), asked, question)


class Reports(Constrained):
    """See the module; the node `draft` is the summary."""

    key = "note"
    outline = "summarise -> rewrite"
    parts: Mapping[str, str] = {"draft": "summariser", "answer": "writer"}

    @cached_property
    def demands(self) -> dict[str, list[Any]]:
        return reports(self.size.training, self.size.choosing, self.size.heldout)

    def inputs(self, demands: Sequence[Any]) -> dict[str, list[str]]:
        return {"note": [each.text for each in demands], "question": [each.question for each in demands]}


def align(cache: Path, *, method: str, seed: int, size: str, model: str, rate: float = 1.0) -> dict[str, Any]:
    """One method on one seed; see `bench.study.real.constrained.align`."""
    return align_in(Reports(cache, seed, SIZES[size]), method, rate)
