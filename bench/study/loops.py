"""A critic loop: a drafter's answer is criticised and rewritten n times; one critic and one rewriter for all rounds.

The critic names the place of the first wrong letter (or says that there is none), the rewriter puts the right letter
there. Trained as it is, with n unrolled rounds, or naively: the arrow back is dropped, so that the preferences about
the n-round system's answers are put to a graph of one round.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from bench.study import task
from bench.study.letters import demonstrated_draft, qualities
from examples.tasks.sorted_letters import LENGTH, LETTERS, random_question, solve
from sysdag import Input, MonteCarlo, System, Trace, loop, node
from sysdag.components import CausalLM

VERSION = 1
NODES = ("draft", "critic", "rewrite")
METHODS = ("before", "naive", "unrolled")
FINE = "="
question = Input("question")


@node(CausalLM("unset"))
def draft(question):
    return f"{question}:"


@node(CausalLM("unset"))
def critic(question, draft):
    return f"{question},{draft}?"


@node(CausalLM("unset"))
def rewrite(question, draft, critic):
    return f"{question},{draft},{critic}:"


def outline(rounds: int) -> System:
    feedback = loop(critic >> rewrite, carry={"draft": rewrite}, times=rounds)
    return System(question >> draft, (question & draft) >> critic, (question & draft) >> rewrite, feedback)


def first_wrong(question: str, text: str) -> str:
    right = solve(question)
    places = [str(place) for place, (a, b) in enumerate(zip(right, text, strict=False)) if a != b]
    return places[0] if places else FINE


def mended(question: str, text: str, place: str) -> str:
    """The text with the right letter at a place, exchanged with the one that stands there."""
    if not place.isdigit() or len(text) != LENGTH:
        return text
    letters, wanted = list(text), solve(question)[int(place)]
    if wanted in letters:
        other = letters.index(wanted)
        letters[int(place)], letters[other] = letters[other], letters[int(place)]
    return "".join(letters)


def demonstration(name: str, rng: random.Random) -> tuple[str, str]:
    """What the base models learn from: a critic that is right in half of the cases, a rewriter that follows it in 7 of
    10, and swaps two letters otherwise."""
    asked = random_question(rng)
    written = demonstrated_draft(asked, False, rng)
    if name == "draft":
        return draft.function(asked), written
    told = first_wrong(asked, written) if rng.random() < 0.5 else rng.choice([FINE, *map(str, range(LENGTH))])
    if name == "critic":
        return critic.function(asked, written), told
    answer = mended(asked, written, told) if rng.random() < 0.7 else mended(asked, written, str(rng.randrange(LENGTH)))
    return rewrite.function(asked, written, told), answer


@dataclass(frozen=True)
class CriticLoop(task.Task):
    """See the module; `rounds` are those of the system that is deployed."""

    rounds: int = 1

    @property
    def name(self) -> str:
        return f"loop-{VERSION}-{self.rounds}"

    def system(self) -> System:
        demonstrations = {name: partial(demonstration, name) for name in NODES}
        models = self.models(f"loop-{VERSION}", LETTERS + "01234=?,:", demonstrations)
        made = outline(self.rounds)
        return made.with_components({n.name: models[n.base_name] for n in made.nodes})

    def qualities(self, trace: Trace) -> numpy.ndarray:
        return qualities(trace, list(trace.cells)[-1])


def align(
    cache: Path, *, method: str, rounds: int, seed: int, size: str, rate: float = 1.0, candidates: int = 4
) -> dict[str, Any]:
    """One method on one seed, deployed with `rounds` rounds; see `letters.align`."""
    setting = CriticLoop(cache, seed, task.SIZES[size], rounds)
    system = setting.system()
    if method == "before":
        return setting.outcome(system, [])
    trained = system
    if method == "naive":
        once = outline(1)
        trained = once.with_components({n.name: system[n.name].component for n in once.nodes})
    curve = setting.train(
        trained, NODES, rate=rate, objective="direct" if method == "unrolled, direct" else "sampling",
        candidates=MonteCarlo(num_candidates=candidates), deployed=system,
    )  # fmt: skip
    return setting.outcome(system, [curve])
