"""The tables of the real study: their rows, and the order in which cells are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.study.cells import Cell
from bench.study.compare import RATES, TUNING_SEED
from bench.study.real import constrained, costs, critic, pairs, reports
from bench.study.real.setting import SAMPLING, TUNED_AS, UNTRAINED, VALIDATION
from bench.study.real.store import Found

SEEDS = 3
PHASES = ("look", "tuning", "seeds")
STAGED = ("stage by stage", "direct, three rounds")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Methods on the same instructions.

    Attributes:
        name: of its CSV.
        function: the cell function.
        methods: the rows, in the page's order.
        untrained: those that have no learning rate.
        tuned_as: by method, the one whose tuned rate it takes, where it is not tuned by itself.
        metrics: in the page's order.
        percentages: those that are shares.
        reference: the row that others are compared with.
        first: methods whose first seed is computed before all else.
        seeds: how many.
        needs_pairs: whether its cells read files of pairs.
        judged: whether its cells ask a judge of likelihoods.
    """

    name: str
    function: str
    methods: Sequence[str]
    untrained: Sequence[str] = ()
    tuned_as: Mapping[str, str] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    percentages: Sequence[str] = ()
    reference: str = ""
    first: Sequence[str] = ()
    seeds: int = SEEDS
    needs_pairs: bool = False
    judged: bool = False

    def cell(self, method: str, seed: int, rate: float | None, about: Mapping[str, Any], device: str = "cpu") -> Cell:
        trained = {} if rate is None or method in self.untrained else {"rate": rate}
        return Cell(function=self.function, options={"method": method, "seed": seed, **trained, **about}, device=device)

    def tuned(self, method: str, about: Mapping[str, Any], found: Mapping[str, Found]) -> float | None:
        """The rate with the best validation on the tuning seed; None while not all of its rates are there."""
        method, scores = self.tuned_as.get(method, method), {}
        for rate in RATES:
            key = self.cell(method, TUNING_SEED, rate, about).key
            if key not in found:
                return None
            parts = found[key].values[VALIDATION]
            scores[rate] = parts[-1] if method in STAGED else sum(parts)
        return max(scores, key=scores.__getitem__)

    def rate(self, method: str, about: Mapping[str, Any], found: Mapping[str, Found]) -> float:
        """The tuned one, or 1 as long as there is none."""
        tuned = self.tuned(method, about, found)
        return 1.0 if tuned is None else tuned

    def planned(self, phase: str, about: Mapping[str, Any], found: Mapping[str, Found], device: str) -> list[Cell]:
        """The cells of a phase, those of `first` before others.

        Args:
            phase: of `PHASES`. "look" is the first seed of every row at the usual rate; "tuning" every rate on the
                tuning seed; "seeds" every seed at the tuned rate, and nothing before the tuning is there.
        """
        order = [*self.first, *(method for method in self.methods if method not in self.first)]
        rows = [method for method in order if method not in self.untrained and method not in self.tuned_as]
        if phase == "look":
            return [self.cell(method, 0, 1.0, about, device) for method in order]
        if self.seeds == 1:
            return []
        if phase == "tuning":
            return [self.cell(method, TUNING_SEED, rate, about, device) for method in rows for rate in RATES]
        if any(self.tuned(method, about, found) is None for method in rows):
            return []
        return [
            self.cell(method, seed, self.rate(method, about, found), about, device)
            for seed in range(self.seeds)
            for method in order
        ]

    def shown(self, about: Mapping[str, Any], found: Mapping[str, Found]) -> dict[str, dict[int, Found]]:
        """By method and seed, the cells that the page tells of: those at the tuned rate; while there is none, or no
        cell at it, those at the usual one."""
        by_method: dict[str, dict[int, Found]] = {}
        for method in self.methods:
            for rate in dict.fromkeys((self.rate(method, about, found), 1.0)):
                keys = {seed: self.cell(method, seed, rate, about).key for seed in range(self.seeds)}
                if there := {seed: found[key] for seed, key in keys.items() if key in found}:
                    by_method[method] = there
                    break
        return by_method


TUNED_OTHERS = {method: row for method, row in TUNED_AS.items() if method != row}
OF_ONE = ("prompting", "one node", "separate", "only draft", "only answer", "stage by stage", *SAMPLING)
TABLES = {
    table.name: table
    for table in (
        Table(
            name="costs", function="real.costs:steps", methods=tuple(costs.SYSTEMS), untrained=tuple(costs.SYSTEMS),
            seeds=1, needs_pairs=True,
        ),
        Table(
            name="constraints", function="real.constrained:align",
            methods=(
                "before", "prompting", "best of 4", "one node, before", *OF_ONE[1:], "direct", "direct, three rounds",
            ),
            untrained=(*UNTRAINED, "prompting", "one node, before"), tuned_as=TUNED_OTHERS, metrics=constrained.METRICS,
            percentages=constrained.SHARES, reference="before", first=("before", "direct", "joint"),
        ),
        Table(
            name="preferences", function="real.pairs:align", methods=OF_ONE, untrained=("prompting",),
            tuned_as=TUNED_OTHERS, metrics=pairs.METRICS,
            percentages=("accuracy", "win by rules", "win by likelihood"), reference="joint",
            first=("one node", "joint"), needs_pairs=True, judged=True,
        ),
        Table(
            name="reports", function="real.reports:align", methods=reports.METHODS, untrained=tuple(UNTRAINED),
            metrics=constrained.METRICS, percentages=constrained.SHARES, reference="before",
            first=("before", "direct", "joint"),
        ),
        Table(
            name="critic-loop", function="real.critic:align", methods=tuple(critic.METHODS),
            untrained=tuple(name for name, (way, _) in critic.METHODS.items() if way == "before"),
            metrics=constrained.METRICS, percentages=constrained.SHARES, reference=critic.named("unrolled", 1),
        ),
    )
}  # fmt: skip
