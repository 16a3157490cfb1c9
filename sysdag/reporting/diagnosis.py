"""What a diagnosis is, and what it may rest on besides the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sysdag.reporting.history import EMPTY, History, Series
from sysdag.reporting.read import Run
from sysdag.reporting.trends import LEAST

Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True)
class Diagnosis:
    """Something that the numbers of a training say.

    Attributes:
        kind: its name, stable for programs.
        level: `problem` (the result is in doubt), `warning` (look at it), `note` (good to know).
        title: what it is, in a line.
        evidence: the numbers it rests on, and the steps.
        advice: what to try.
        first_step, last_step: the steps that it is about.
    """

    kind: str
    level: Level
    title: str
    evidence: str
    advice: str
    first_step: int
    last_step: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What is known of a training besides its log; each may be missing.

    Attributes:
        component_of: for each random node the key of its component.
        frozen: nodes that the configuration does not train.
        evaluation_pairs: number of preference pairs of the evaluation.
        config: the configuration.
    """

    component_of: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    evaluation_pairs: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> Facts:
        """The facts of a run that was read."""
        component_of = run.topology.component_of if run.topology else {}
        nodes = run.config.get("nodes")
        options = nodes if isinstance(nodes, Mapping) else {}
        frozen = {name for name, own in options.items() if isinstance(own, Mapping) and own.get("trainable") is False}
        data = run.facts.get("data")
        evaluation = data.get("eval") if isinstance(data, Mapping) else None
        pairs = evaluation.get("pairs") if isinstance(evaluation, Mapping) else None
        return cls(
            {name: key for name, key in component_of.items() if key is not None},
            frozenset(frozen),
            pairs if isinstance(pairs, int) and pairs > 0 else None,
            run.config,
        )

    def gradient_norm(self, history: History, node: str) -> Series:
        """The gradient norms of the node's component; empty where none were logged."""
        return history.train.get(f"nodes/{self.component_of.get(node, node)}/grad_norm", EMPTY)

    def trains(self, history: History, node: str) -> bool:
        """Whether a node is trained, as far as can be told: others have gradient norms and it has none where not."""
        if node in self.frozen:
            return False
        return not history.components or len(self.gradient_norm(history, node)) > 0


@dataclass(frozen=True)
class End:
    """The last `LEAST` values of a metric.

    Attributes:
        split: the words for where they come from.
        mean: of the values.
        begin, end: their first and their last step.
    """

    split: str
    mean: float
    begin: int
    end: int


def end_of(history: History, metric: str) -> End | None:
    """The end of a metric, `observed`; None where neither split has enough values."""
    split, series = observed(history, metric, LEAST)
    if not len(series):
        return None
    return End(split, sum(series.values[-LEAST:]) / LEAST, series.steps[-LEAST], series.steps[-1])


def observed(history: History, metric: str, least: int) -> tuple[str, Series]:
    """A metric's finite values where there are enough of them: of the evaluation, or else of training.

    Returns:
        the words for where they come from, and the series, which is empty where neither has as many.
    """
    for split, metrics in (("in evaluation", history.evaluation), ("in training", history.train)):
        series = metrics.get(metric, EMPTY).finite
        if len(series) >= least:
            return split, series
    return "", EMPTY
