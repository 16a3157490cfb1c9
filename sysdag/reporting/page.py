"""What a report says, as plain data: the template writes it, the command prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sysdag.reporting import settings
from sysdag.reporting.charts import Chart
from sysdag.reporting.curves import charts_of, charts_of_several
from sysdag.reporting.diagnoses import diagnose
from sysdag.reporting.diagnosis import Diagnosis, Facts
from sysdag.reporting.history import EMPTY, best_evaluation
from sysdag.reporting.judgements import Judgement, judgements
from sysdag.reporting.layout import Layout, lay_out
from sysdag.reporting.read import Run
from sysdag.reporting.series import Overview
from sysdag.reporting.shares import Shares, last_shares
from sysdag.reporting.values import Prompt, side_by_side

METRICS = (
    ("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins"),
    ("reward on chosen", "rewards/chosen"), ("reward on rejected", "rewards/rejected"),
    ("log-probability of chosen", "logps/chosen"), ("log-probability of rejected", "logps/rejected"),
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """One row of the table of numbers: of training the last value, of the evaluation the first, the best step's, the
    last."""

    label: str
    training: float | None
    first: float | None
    best: float | None
    last: float | None

    def values(self) -> dict[str, float | None]:
        """The numbers by name."""
        return {"training": self.training, "first": self.first, "best": self.best, "last": self.last}


@dataclass(frozen=True)
class Findings:
    """What was found out of one run.

    Attributes:
        run: what was read.
        label: how it is called; unique among the runs of a report.
        order: its scored nodes, parents first.
        best: metric and step of the best evaluation, or None.
        shares: of the margin, by node, or None.
        diagnoses: what the numbers say.
        metrics: the table of numbers.
        judgements: the content of `eval.json`.
    """

    run: Run
    label: str
    order: tuple[str, ...]
    best: tuple[str, int] | None
    shares: Shares | None
    diagnoses: tuple[Diagnosis, ...]
    metrics: tuple[Metric, ...]
    judgements: tuple[Judgement, ...]

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """The columns of the table of numbers, head and attribute: those in which a number stands."""
        best = "best step" if self.best is None else f"best step ({self.best[1]})"
        heads = {"training": "training, last", "first": "evaluation, first", "best": best, "last": "evaluation, last"}
        return tuple(
            (head, name)
            for name, head in heads.items()
            if any(getattr(metric, name) is not None for metric in self.metrics)
        )

    @property
    def duration(self) -> str:
        """How long it ran, as `h:mm:ss`; "" where that is not known."""
        try:
            started, finished = (datetime.fromisoformat(self.run.facts[key]) for key in ("started", "finished"))
            return str(timedelta(seconds=round((finished - started).total_seconds())))
        except (KeyError, TypeError, ValueError):
            return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "folder": str(self.run.folder),
            "status": self.run.facts.get("status"),
            "last_step": self.run.history.last_step,
            "best_evaluation": None if self.best is None else {"metric": self.best[0], "step": self.best[1]},
            "metrics": {metric.label: metric.values() for metric in self.metrics},
            "shares": None if self.shares is None else self.shares.to_dict(),
            "diagnoses": [diagnosis.to_dict() for diagnosis in self.diagnoses],
            "notes": list(self.run.notes),
        }  # fmt: skip


def findings(run: Run, label: str | None = None) -> Findings:
    """Everything that one run says."""
    history = run.history
    known = tuple(run.topology.component_of) if run.topology else ()
    order = tuple(name for name in known if name in history.nodes) + tuple(n for n in history.nodes if n not in known)
    best = best_evaluation(history, run.config)
    rows = []
    for name, metric in METRICS:
        train, evaluated = history.train.get(metric, EMPTY).finite, history.evaluation.get(metric, EMPTY).finite
        if len(train) or len(evaluated):
            rows.append(
                Metric(
                    name,
                    train.values[-1] if len(train) else None,
                    evaluated.values[0] if len(evaluated) else None,
                    evaluated.at(best[1]) if best else None,
                    evaluated.values[-1] if len(evaluated) else None,
                )
            )
    return Findings(
        run, label or run.name, order, best, last_shares(history, order), tuple(diagnose(history, Facts.of(run))),
        tuple(rows), tuple(judgements(run.evaluation)),
    )  # fmt: skip


@dataclass(frozen=True)
class Page:
    """A report of one run, or of several of which the first is told in full.

    Attributes:
        runs: what was found; the first is the main one.
        charts: of the first alone, or of all over each other.
        layout: the first's graph, or None.
        prompts: its traces, side by side, and how many more there are.
        changed, left: its settings, those that were set apart.
        differing: the settings in which the runs differ.
        overview: the table over trainings that belong together, or None.
    """

    runs: tuple[Findings, ...]
    charts: tuple[Chart, ...]
    layout: Layout | None
    prompts: tuple[Prompt, ...]
    more_prompts: int
    changed: tuple[settings.Setting, ...]
    left: tuple[settings.Setting, ...]
    differing: tuple[tuple[str, list[str]], ...]
    overview: Overview | None = None

    @property
    def main(self) -> Findings:
        """The run that is told in full."""
        return self.runs[0]


def page(
    runs: Sequence[Run], *, defaults: Mapping[str, Any], most_prompts: int, overview: Overview | None = None
) -> Page:
    """The report of one run, or of several.

    Args:
        defaults: the configuration's, see `sysdag.reporting.settings.default_config`.
        most_prompts: of the traces, how many prompts are shown.
        overview: over trainings that belong together.
    """
    labels = _labels(runs)
    found = tuple(findings(run, label) for run, label in zip(runs, labels, strict=True))
    main = found[0]
    if len(runs) > 1:
        order = tuple(dict.fromkeys(name for each in found for name in each.order))
        charts = charts_of_several({each.label: each.run for each in found}, order)
    else:
        charts = charts_of(main.run, main.order)
    prompts = side_by_side(main.run.traces, most_prompts)
    length = max((len(trace) for trace in main.run.traces.values()), default=0)
    changed, left = settings.split_by_default(main.run.config, defaults)
    return Page(
        runs=found,
        charts=tuple(charts),
        layout=lay_out(main.run.topology) if main.run.topology else None,
        prompts=tuple(prompts),
        more_prompts=length - len(prompts),
        changed=tuple(changed),
        left=tuple(left),
        differing=tuple(settings.differences({each.label: each.run.config for each in found}) if len(runs) > 1 else ()),
        overview=overview,
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of folders; where two are the same, the paths as they were given."""
    names = [run.name for run in runs]
    labels = [str(run.folder) if names.count(run.name) > 1 else run.name for run in runs]
    return [f"{label} ({at})" if labels.count(label) > 1 else label for at, label in enumerate(labels, start=1)]
