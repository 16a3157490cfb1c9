"""draft -> refine: two language models sort letters, the refiner reads the question too (a skip edge).

The base models have seen two styles of prompt, a plain one and a careful one (`!`) whose demonstrations are better:
that is what prompting can use. Preferences come from an annotator who sees how many letters of an answer stand where
they belong, and errs; what is measured is the exact rule, which no training sees.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from bench.study import task
from bench.study.training import Curve, runs, train
from examples.tasks.sorted_letters import LENGTH, LETTERS, random_question, solve, swap_neighbours
from sysdag import DiverseBeamSearch, ImportanceSampling, Input, MonteCarlo, System, Trace, node
from sysdag.components import CausalLM
from sysdag.execution import sample

VERSION = 2


class Scale(NamedTuple):
    """Of words and models.

    Attributes:
        letters, length: words are `length` different ones of these.
        base_steps: of a full study's base models; None for the size's.
        rate: factor on the usual learning rates.
        model_options: of `train_language_model`.
        device: where base models are trained and systems aligned.
    """

    letters: str = LETTERS
    length: int = LENGTH
    base_steps: int | None = None
    rate: float = 1.0
    model_options: Mapping[str, Any] = {}
    device: str = "cpu"


LARGE = {"width": 512, "layers": 8, "learning_rate": 6e-4}
SCALES = {
    "small": Scale(),
    "large": Scale(string.ascii_lowercase, 8, base_steps=1500, rate=0.2, model_options=LARGE, device="cuda"),
}
NODES = ("draft", "answer")
STRATEGIES = {"dbs": partial(DiverseBeamSearch, ngram_size=1), "mc": MonteCarlo, "is": ImportanceSampling}
CANDIDATES = {"num_candidates": 4, "diversity_penalty": 3.0}
question, careful_question, base_draft = Input("question"), Input("question"), Input("draft")


@node(CausalLM("unset"))
def draft(question):
    return f"{question}:"


@node(CausalLM("unset"))
def answer(question, draft):
    return f"{question},{draft}:"


@node(CausalLM("unset"), name="draft")
def careful_draft(question):
    return f"!{question}:"


@node(CausalLM("unset"), name="answer")
def careful_answer(question, draft):
    return f"!{question},{draft}:"


OUTLINE = System(question >> draft, (question & draft) >> answer)
CAREFUL = System(careful_question >> careful_draft, (careful_question & careful_draft) >> careful_answer)
REFINER = System((question & base_draft) >> answer)
DRAFTER = System(question >> draft)
UNTRAINED = {"before": (OUTLINE, 1), "prompting": (CAREFUL, 1), "best of 4": (OUTLINE, 4)}
PARTS = {"only draft": ["draft"], "only answer": ["answer"], "joint": NODES, "direct": NODES}
METHODS = (*UNTRAINED, "separate", "only draft", "only answer", "stage by stage", "joint", "direct")


def demonstrated_draft(question: str, careful: bool, rng: random.Random, damaged: bool = False) -> str:
    """Right in 35 % of cases (50 % with care, 10 % if damaged), backwards in 30 % (15 %, 55 %), with one slip else."""
    right, kind = solve(question), rng.random()
    if kind < (0.1 if damaged else 0.5 if careful else 0.35):
        return right
    return right[::-1] if kind < 0.65 else swap_neighbours(right, rng)


def demonstrated_answer(question: str, draft: str, careful: bool, rng: random.Random, damaged: bool = False) -> str:
    """The draft as it stands, mended in 3 of 10 cases (4 with care); if damaged, turned round in 6 of 10."""
    if damaged:
        return draft[::-1] if rng.random() < 0.6 else draft
    return solve(question) if rng.random() < (0.4 if careful else 0.3) else draft


def demonstration(name: str, damaged: str, scale: str, rng: random.Random) -> tuple[str, str]:
    """What the base model of a node learns from, the drafts in a refiner's demonstrations as the drafter's are."""
    asked, careful = random_question(rng, *SCALES[scale][:2]), rng.random() < 0.5
    written = demonstrated_draft(asked, careful, rng, damaged == "draft" == name)
    prompt = ("!" if careful else "") + asked
    if name == "draft":
        return f"{prompt}:", written
    return f"{prompt},{written}:", demonstrated_answer(asked, written, careful, rng, damaged == name)


def qualities(trace: Trace, name: str) -> numpy.ndarray:
    return numpy.array(
        [task.matching(solve(asked), text) for asked, text in zip(trace["question"], trace[name], strict=True)]
    )


def wins(ours: numpy.ndarray, theirs: numpy.ndarray) -> numpy.ndarray:
    """1 where ours is better, 0.5 where they are equal."""
    return (ours > theirs) + 0.5 * (ours == theirs)


@dataclass(frozen=True)
class Letters(task.Task):
    """See the module.

    Attributes:
        damaged: the node whose base model learned from bad demonstrations, or "".
        misled: the share of training prompts whose runs start from a draft that is written backwards.
        flipped: the share of pairs whose preference is turned round.
        scale: one of `SCALES`.
    """

    damaged: str = ""
    misled: float = 0.0
    flipped: float = 0.0
    scale: str = "small"

    @property
    def scaled(self) -> Scale:
        return SCALES[self.scale]

    @property
    def device(self) -> str:
        return self.scaled.device

    @property
    def longest(self) -> int:
        return max(8, self.scaled.length + 2)

    @property
    def model_options(self) -> Mapping[str, Any]:
        return self.scaled.model_options

    @property
    def prefix(self) -> str:
        return f"letters-{VERSION}" + f"-{self.scale}" * (self.scale != "small")

    @property
    def name(self) -> str:
        return self.prefix + self.damaged

    def question(self, rng: random.Random) -> str:
        return random_question(rng, self.scaled.letters, self.scaled.length)

    def system(self, outline: System = OUTLINE) -> System:
        folders = {name: name + "-damaged" * (name == self.damaged) for name in NODES}
        demonstrations = {folders[name]: partial(demonstration, name, self.damaged, self.scale) for name in NODES}
        models = self.models(self.prefix, self.scaled.letters + "!,:", demonstrations)
        return outline.with_components({name: models[folders[name]] for name in NODES})

    def qualities(self, trace: Trace) -> numpy.ndarray:
        return qualities(trace, "answer")

    def training_runs(self) -> Trace:
        """Those of the base system, but for prompts whose drafts mislead."""
        trace, prompts = self.base_runs("training"), self.prompts["training"]
        misled = set(random.Random(f"misled-{self.seed}").sample(prompts, round(self.misled * len(prompts))))
        if not misled:
            return trace
        system = self.system()
        rows = [row for row, asked in enumerate(trace["question"]) if asked in misled]
        backwards = system["draft"].component.observe([solve(trace["question"][row])[::-1] for row in rows])
        given = trace.select(rows).only([]).updated({"draft": backwards})
        again = sample(system.compile(), given.inputs, seed=self.seed, given=given)
        cells = {name: list(column) for name, column in trace.cells.items()}
        for place, row in enumerate(rows):
            for name in NODES:
                cells[name][row] = again.cells[name][place]
        return trace.updated(cells)

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        rows = super().pairs
        for place in random.Random(f"flipped-{self.seed}").sample(range(len(rows)), round(self.flipped * len(rows))):
            row = rows[place]
            for chosen, rejected in (("chosen", "rejected"), ("chosen_intermediates", "rejected_intermediates")):
                row[chosen], row[rejected] = row[rejected], row[chosen]
        return rows

    @cached_property
    def chosen(self) -> numpy.ndarray:
        """Quality of the run that the annotator likes best, for each held-out prompt."""
        trace = self.base_runs("heldout")
        best = self.annotated(trace).reshape(-1, self.size.runs).argmax(1)
        return self.qualities(trace).reshape(-1, self.size.runs)[numpy.arange(len(best)), best]

    @cached_property
    def prompted(self) -> numpy.ndarray:
        """Quality of two runs of each held-out prompt in the careful style."""
        asked = {"question": self.prompts["heldout"]}
        return self.qualities(runs(self.system(CAREFUL), asked, 2, 29))

    def figures(self, trace: Trace) -> dict[str, numpy.ndarray]:
        found = self.qualities(trace)
        return super().figures(trace) | {
            "win against chosen": wins(found, self.chosen.repeat(2)),
            "win against prompted": wins(found, self.prompted),
            "draft exact": (qualities(trace, "draft") == 1).astype(float),
        }


def align(
    cache: Path,
    *,
    method: str,
    seed: int,
    size: str,
    rate: float = 1.0,
    strategy: str = "dbs",
    candidates: Mapping[str, Any] = CANDIDATES,
    options: Mapping[str, Any] | None = None,
    factors: Mapping[str, float] | None = None,
    damaged: str = "",
    misled: float = 0.0,
    flipped: float = 0.0,
    scale: str = "small",
) -> dict[str, Any]:
    """One method on one seed: held-out figures by prompt at the step that validation chose, and the way there.

    Args:
        method: one of `METHODS`.
        rate: factor on the learning rates; chosen by validation, with equal effort for every method.
        strategy, candidates: of Sampling.
        options: more of `SysDPOConfig`.
        factors: on the learning rates of single nodes.
        damaged, misled, flipped, scale: see `Letters`.
    """
    rate, steps = rate * SCALES[scale].rate, SCALES[scale].base_steps
    amounts = replace(task.SIZES[size], base_steps=steps) if steps and size == "full" else task.SIZES[size]
    setting = Letters(cache, seed, amounts, damaged, misled, flipped, scale)
    if method in UNTRAINED:
        outline, best_of = UNTRAINED[method]
        return {"heldout": setting.measured(setting.system(outline), best_of), "curves": []}
    system = setting.system()
    if method == "separate":
        return setting.outcome(system, separate(setting, system, rate))
    stages = [(["draft"], 0.5), (["answer"], 0.5)] if method == "stage by stage" else [(PARTS[method], 1.0)]
    objective = "direct" if method == "direct" else "sampling"
    drawn = STRATEGIES[strategy](**candidates)
    curves = [
        setting.train(
            system, trained, rate=rate, objective=objective, candidates=drawn, share=share, factors=factors,
            **(options or {}),
        )
        for trained, share in stages
    ]  # fmt: skip
    return setting.outcome(system, curves)


def separate(setting: Letters, system: System, rate: float) -> list[Curve]:
    """Each model by its own DPO on the same preferences: the drafter as if its drafts were answers, the refiner on
    drafts that the base drafter wrote. Neither sees the other's training."""
    drafts = setting.training_runs()
    written: dict[str, str] = dict(zip(drafts["question"], drafts["draft"], strict=True))
    plain = [{name: row[name] for name in ("question", "chosen", "rejected")} for row in setting.pairs]
    with_draft = [row | {"draft": written[row["question"]]} for row in plain]
    # Both models have one tokenizer, so an answer's token ids are a draft's, too.
    asked = setting.prompts["validation"]
    drafter = DRAFTER.with_components({"draft": system["draft"].component})
    refiner = REFINER.with_components({"answer": system["answer"].component})
    given = {"question": asked, "draft": runs(setting.system(), {"question": asked}, 1, 31)["draft"]}
    curves = []
    for part, rows, inputs in ((drafter, plain, {"question": asked}), (refiner, with_draft, given)):
        (name,) = part.outputs

        def validate(one: System, inputs=inputs, name=name) -> float:
            return float(qualities(runs(one, inputs, 2, 17), name).mean())

        chosen = {
            "objective": "direct", "beta": 0.5, "max_steps": setting.size.steps, "nodes": task.nodes(part, [name], rate)
        }  # fmt: skip
        curves.append(
            train(
                part, rows, options=chosen, validate=validate, seed=setting.seed, every=setting.size.every,
                device=setting.device,
            )
        )  # fmt: skip
    return curves
