"""Instructions with constraints that a program checks: preferences among the system's own runs, by constraints met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from bench.study.real.constraints import Demand, demands, words
from bench.study.real.setting import QUICK, UNTRAINED, Setting, Size, aligned, outcome
from bench.study.training import Curve, favourites, ranked_pairs, runs, shared
from sysdag import System, Trace

VERSION = 1
SIZES = {
    "cpu": Size(),
    "gpu": Size(runs=6, measured_runs=2, batch=16, steps=200, every=25, draft=96, answer=192),
    "quick": QUICK,
}
ROUNDS = 3
SHARES = ("constraints met", "wholly right", "draft constraints met")
METRICS = (*SHARES, "words")


class Constrained(Setting):
    """See the module."""

    @cached_property
    def demands(self) -> dict[str, list[Demand]]:
        return demands(self.size.training, self.size.choosing, self.size.heldout)

    def inputs(self, demands: Sequence[Demand]) -> dict[str, list[str]]:
        """What a system is given."""
        return {"question": [demand.text for demand in demands]}

    def asked(self, part: str) -> dict[str, list[str]]:
        return self.inputs(self.demands[part])

    def met(self, trace: Trace, name: str = "") -> numpy.ndarray:
        """Of each run's constraints, the share that a node's text meets, by default the output's."""
        by_text = {demand.text: demand for part in self.demands.values() for demand in part}
        return numpy.array(
            [
                by_text[asked].share(text)
                for asked, text in zip(trace[self.key], trace[name or self.output], strict=True)
            ]
        )

    def base_runs(self, outline: str | System | None = None) -> Trace:
        """Runs of the untrained system on the training instructions, those of an instruction one after the other."""

        def build(file: Path) -> None:
            runs(self.system(outline), self.asked("training"), self.size.runs, self.seed).to_jsonl(file)

        size = self.size
        made = outline or self.outline
        kind = made if isinstance(made, str) else "-".join(node.name for node in made.nodes)
        kind = kind.replace(" -> ", "-").replace(" ", "-")
        about = f"{self.sources.label}-{size.training}-{size.runs}-{size.draft}-{size.answer}"
        return Trace.from_jsonl(shared(self.cache, f"constrained-{VERSION}-{kind}-{self.seed}-{about}.jsonl", build))

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        return self.preferred(self.base_runs())

    def preferred(self, trace: Trace) -> list[dict[str, Any]]:
        """Of each instruction its run that meets most constraints against the one that meets fewest, where they differ.

        Raises:
            ValueError: if all runs of every instruction meet equally many.
        """
        output = self.output
        latents = [name for name in trace.cells if name != output]
        found = []
        for pair in ranked_pairs(trace, self.met(trace), self.size.runs, 1):
            sides = dict(zip(("chosen", "rejected"), pair, strict=True))
            row = {name: column[pair[0]] for name, column in trace.inputs.items()}
            row |= {side: trace.cells[output][at] for side, at in sides.items()}
            if latents:
                row |= {f"{side}_intermediates": {name: trace.cells[name][at] for name in latents}
                        for side, at in sides.items()}  # fmt: skip
            found.append(row)
        if not found:
            raise ValueError(
                f"seed {self.seed}: no two runs of an instruction differ in the constraints that they meet."
            )
        return found

    def validate(self, system: System) -> float:
        return float(self.met(runs(system, self.asked("choosing"), 1, 17)).mean())

    def measured(self, system: System, best_of: int = 1) -> dict[str, list[float]]:
        """With `best_of`, of the run that the checker itself likes best."""
        times = self.size.measured_runs
        trace = runs(system, self.asked("heldout"), times * best_of, 23 + self.seed)
        trace = favourites(trace, self.met(trace), best_of)
        met = self.met(trace)
        lengths = numpy.array([len(words(text)) for text in trace[self.output]], dtype=float)
        found = {"constraints met": met, "wholly right": (met == 1).astype(float), "words": lengths}
        if "draft" in trace.cells:
            found["draft constraints met"] = self.met(trace, "draft")
        return {name: values.reshape(-1, times).mean(1).tolist() for name, values in found.items()}

    def base_drafts(self, part: str) -> Mapping[str, str]:
        assert part == "training"
        trace = self.base_runs()
        return dict(zip(trace[self.key], trace["draft"], strict=True))

    def in_rounds(self, rate: float) -> tuple[System, list[Curve]]:
        """Direct in rounds, each on new runs of the system as it is for its own part of the instructions, and with that
        system as its reference; as many steps and runs as one training."""
        system, curves = self.system(), []
        for number in range(ROUNDS):
            asked = self.inputs(self.demands["training"][number::ROUNDS])
            rows = self.preferred(runs(system, asked, self.size.runs, self.seed + 1000 * number))
            curves.append(self.train(system, self.nodes, rate=rate, candidates=None, share=1 / ROUNDS, rows=rows))
        return system, curves

    def one_node(self, rate: float) -> tuple[System, list[Curve]]:
        """Plain DPO of the model alone, on its own runs."""
        system = self.system("one node")
        rows = self.preferred(self.base_runs("one node"))
        return system, [self.train(system, ["answer"], rate=rate, candidates=None, rows=rows)]


def align(cache: Path, *, method: str, seed: int, size: str, model: str, rate: float = 1.0) -> dict[str, Any]:
    """One method on one seed.

    Args:
        method: one of the table's.
        size: one of `SIZES`.
        model: what the tables call the model; where it is, the cache's sources say.
        rate: factor on the learning rate.
    """
    return align_in(Constrained(cache, seed, SIZES[size]), method, rate)


def align_in(setting: Constrained, method: str, rate: float) -> dict[str, Any]:
    """One method in a setting."""
    if method in UNTRAINED:
        return outcome(setting, setting.system(), [], UNTRAINED[method])
    others = {"prompting": "careful", "one node, before": "one node"}
    if method in others:
        return outcome(setting, setting.system(others[method]), [])
    ways = {"one node": setting.one_node, "direct, three rounds": setting.in_rounds}
    system, curves = ways[method](rate) if method in ways else aligned(setting, method, rate)
    return outcome(setting, system, curves)
