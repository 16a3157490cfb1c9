"""Real preferences: SysDPO-Sampling of draft -> refine from pairs of answers that others wrote and a judge ranked.

Measured are the system's implicit reward on held-out pairs, and its own answers to held-out instructions against the
untrained system's by two judges that no row trains on. Both are weak: the likelihood of an answer a token under another
language model, and rules of form.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from bench.study.real import models
from bench.study.real.constraints import words
from bench.study.real.reward import ImplicitReward
from bench.study.real.setting import BETA, QUICK, Setting, Size, aligned, outcome
from bench.study.real.sources import read_pairs
from bench.study.training import Curve, runs, shared
from sysdag import System, Trace

VERSION = 1
SIZES = {
    "cpu": Size(training=1000, choosing=24, heldout=50, every=8),
    "gpu": Size(training=10_000, choosing=60, heldout=90, batch=16, steps=200, every=20, draft=96, answer=192),
    "quick": QUICK,
}
OF_ONE, DRAFTS = 2, 4  # pairs of an instruction that are scored, and drafts that this takes
METRICS = ("accuracy", "log-loss", "win by rules", "win by likelihood", "words")


class RealPairs(Setting):
    """See the module."""

    @cached_property
    def rows(self) -> dict[str, list[dict[str, str]]]:
        """The pairs to train on, to choose by and to measure on; no instruction is in two parts. The last two are the
        same for every seed, and have at most `OF_ONE` pairs of an instruction."""
        training, heldout = (read_pairs(path) for path in self.sources.pairs)
        questions = sorted({row["question"] for row in training})
        if both := {row["question"] for row in heldout} & set(questions):
            raise ValueError(f"--pairs: both files have the prompt {sorted(both)[0]!r}.")
        random.Random("choosing").shuffle(questions)
        choosing = set(questions[: min(self.size.choosing, len(questions) // 2)])
        kept = [row for row in training if row["question"] not in choosing]
        random.Random(self.seed).shuffle(kept)
        return {
            "training": kept[: self.size.training],
            "choosing": _few([row for row in training if row["question"] in choosing], self.size.choosing),
            "heldout": _few(heldout, self.size.heldout),
        }

    @property
    def pairs(self) -> list[dict[str, Any]]:
        return self.rows["training"]

    def margins(self, system: System, part: str) -> tuple[numpy.ndarray, list[str]]:
        """Of each pair the difference of implicit rewards, and its instruction."""
        latent = "draft" in {node.base_name for node in system.nodes}
        rows = self.rows[part]
        reward = ImplicitReward(rows, drafts=DRAFTS if latent else 0, beta=BETA)
        kind = "draft-refine" if latent else "one-node"
        folder = shared(
            self.cache, f"pairs-{VERSION}-{kind}-{part}-{self._about}",
            lambda place: reward.prepare(self.system(None if latent else "one node"), place),
        )  # fmt: skip
        return reward.margins(system, folder), [row["question"] for row in rows]

    @property
    def _about(self) -> str:
        size, sources = self.size, self.sources
        return f"{sources.label}-{sources.fingerprint()}-{size.choosing}-{size.heldout}-{size.draft}-{size.answer}"

    def validate(self, system: System) -> float:
        """Minus the log-loss."""
        margins, _ = self.margins(system, "choosing")
        return -float(numpy.logaddexp(0, -margins).mean())

    def measured(self, system: System, best_of: int = 1) -> dict[str, list[float]]:
        margins, asked = self.margins(system, "heldout")
        by_pair = {
            "accuracy": (margins > 0) + 0.5 * (margins == 0),
            "log-loss": numpy.logaddexp(0, -margins),
        }
        found = {name: by_instruction(values, asked) for name, values in by_pair.items()}
        questions = list(dict.fromkeys(asked))
        ours, theirs = runs(system, {"question": questions}, 1, 23 + self.seed), self.base_runs(questions)
        found["words"] = [float(len(words(text))) for text in ours["answer"]]
        found["win by rules"] = wins(form(ours), form(theirs)).tolist()
        if self.sources.judge:
            judged = [fluency(trace, self.sources.judge, self.sources.device) for trace in (ours, theirs)]
            found["win by likelihood"] = wins(*judged).tolist()
        return found

    def base_runs(self, questions: Sequence[str]) -> Trace:
        """Of the untrained system on held-out instructions."""

        def build(file: Path) -> None:
            runs(self.system(), {"question": questions}, 1, 29 + self.seed).to_jsonl(file)

        return Trace.from_jsonl(shared(self.cache, f"pairs-{VERSION}-heldout-{self.seed}-{self._about}.jsonl", build))

    def base_drafts(self, part: str) -> Mapping[str, str]:
        questions = list(dict.fromkeys(row["question"] for row in self.rows[part]))

        def build(file: Path) -> None:
            runs(self.system("drafter"), {"question": questions}, 1, self.seed).to_jsonl(file)

        name = f"pairs-{VERSION}-drafts-{part}-{self.seed}-{self.size.training}-{self._about}.jsonl"
        trace = Trace.from_jsonl(shared(self.cache, name, build))
        return dict(zip(trace["question"], trace["draft"], strict=True))

    def one_node(self, rate: float) -> tuple[System, list[Curve]]:
        """Plain DPO of the model alone."""
        system = self.system("one node")
        return system, [self.train(system, ["answer"], rate=rate, candidates=None)]


def _few(rows: Sequence[dict[str, str]], questions: int) -> list[dict[str, str]]:
    """Of the first so many instructions, `OF_ONE` pairs each."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["question"], []).append(row)
    return [row for of_one in list(found.values())[:questions] for row in of_one[:OF_ONE]]


def by_instruction(values: numpy.ndarray, asked: Sequence[str]) -> list[float]:
    """Means over the pairs of each instruction, in the order of their first."""
    found: dict[str, list[float]] = {}
    for value, question in zip(values, asked, strict=True):
        found.setdefault(question, []).append(float(value))
    return [sum(of_one) / len(of_one) for of_one in found.values()]


def wins(ours: numpy.ndarray, theirs: numpy.ndarray) -> numpy.ndarray:
    """1 where ours is more, 0.5 where they are equal."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def form(trace: Trace) -> numpy.ndarray:
    """How many rules of form each answer keeps: it comes to its end, does not repeat itself, is no copy of the
    instruction, and says anything at all."""
    cells = trace.cells["answer"]
    return numpy.array([
        bool(text.strip()) + bool(cell.record.get("finished")) + (not repeats(text)) + (text.strip() != asked.strip())
        for text, cell, asked in zip(trace["answer"], cells, trace["question"], strict=True)
    ])  # fmt: skip


def repeats(text: str, size: int = 4) -> bool:
    """Whether some words stand there twice in a row of `size`."""
    found = text.lower().split()
    grams = [tuple(found[at : at + size]) for at in range(len(found) - size + 1)]
    return len(set(grams)) < len(grams)


@torch.no_grad()
def fluency(trace: Trace, judge: str, device: str) -> numpy.ndarray:
    """Mean log-likelihood a token of each answer behind its instruction, under a model that no row trains."""
    model, tokenizer = models.pretrained(judge, device)
    found = []
    for asked, answer in zip(trace["question"], trace["answer"], strict=True):
        prompt = tokenizer(f"Question: {asked}\nAnswer:", add_special_tokens=True).input_ids
        continued = tokenizer(" " + answer.strip(), add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *continued]], device=device)
        scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(float(scores.gather(1, ids[0, len(prompt) :, None]).mean()) if continued else -numpy.inf)
    return numpy.array(found)


def align(
    cache: Path, *, method: str, seed: int, size: str, model: str, pairs: str, judge: str = "", rate: float = 1.0
) -> dict[str, Any]:
    """One method on one seed.

    Args:
        method: one of the table's.
        size: one of `SIZES`.
        model, pairs, judge: what tells these rows from those of another model, other data and another judge.
        rate: factor on the learning rate.
    """
    setting = RealPairs(cache, seed, SIZES[size])
    if method == "prompting":
        return outcome(setting, setting.system("careful"), [])
    system, curves = setting.one_node(rate) if method == "one node" else aligned(setting, method, rate)
    return outcome(setting, system, curves)
