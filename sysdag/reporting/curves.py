"""Which charts a report has: of one training, or of several over each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sysdag.reporting.charts import COLOURS, Chart, Line, draw, points_of_a_curve
from sysdag.reporting.history import EMPTY, History, Series, best_evaluation
from sysdag.reporting.read import Run

WHOLE = "all together"


@dataclass(frozen=True)
class Sheet:
    """A chart of some metrics.

    Attributes:
        title, about: as in `Chart`.
        metrics: (label, metric) of each line.
        bounds, is_log: as in `sysdag.reporting.charts.draw`.
    """

    title: str
    about: str
    metrics: Sequence[tuple[str, str]]
    bounds: tuple[float, float] | None = None
    is_log: bool = False


def sheets(history: History, order: Sequence[str]) -> list[Sheet]:
    """The charts of a training, for its nodes in that order; without series of their own they come to nothing."""
    nodes = [name for name in order if name in history.nodes] + [name for name in history.nodes if name not in order]

    def by_node(kind: str) -> list[tuple[str, str]]:
        return [(name, f"nodes/{name}/rewards/{kind}") for name in nodes]

    keys = sorted(history.components, key=lambda key: (nodes.index(key) if key in nodes else len(nodes), key))
    gradients = [(key, f"nodes/{key}/grad_norm") for key in keys]
    return [
        Sheet("Loss", "The preference loss, a mean over pairs or single runs.", [("loss", "loss")]),
        Sheet(
            "Margin",
            "Implicit reward of winners (or desirable runs) minus that of losers (or undesirable ones).",
            [("margin", "rewards/margins")],
        ),
        Sheet(
            "Accuracy",
            "Share of pairs with a positive margin; of single runs on the side of the zero that their label says.",
            [("accuracy", "rewards/accuracies")],
            (0, 1),
        ),
        Sheet(
            "KL",
            "Of policy and reference in nats, as the loss kto estimates it by mismatched runs.",
            [("KL", "kl")],
        ),
        Sheet("Shift", "The mean reward so far, around which the loss bco classifies.", [("shift", "delta")]),
        Sheet(
            "Rewards",
            "Beta times the log-ratio of policy to reference, of the whole system.",
            [("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")],
        ),
        Sheet(
            "Log-probabilities",
            "Of winners and losers under the policy, in nats; nodes with an exact likelihood.",
            [("chosen", "logps/chosen"), ("rejected", "logps/rejected")],
        ),
        Sheet("Margin by node", "Who earns the preference.", by_node("margins")),
        Sheet("Reward on winners by node", "Implicit reward of each node on chosen outputs.", by_node("chosen")),
        Sheet("Reward on losers by node", "Implicit reward of each node on rejected outputs.", by_node("rejected")),
        Sheet(
            "Effective sample size",
            "Candidates that share the gradient; near 1 a single one has it all.",
            [("effective sample size", "candidates/effective_sample_size")],
        ),
        Sheet(
            "Responsibility gap",
            "Mean difference of responsibilities between winner and loser; at 0 latents do not learn.",
            [("gap", "candidates/responsibility_gap")],
        ),
        Sheet(
            "Coverage",
            "Probability of the latents that the candidates hold.",
            [("coverage", "candidates/coverage")],
            (0, 1),
        ),
        Sheet(
            "Distinct-2",
            "Share of distinct word pairs among candidates.",
            [("distinct-2", "candidates/distinct_2")],
            (0, 1),
        ),
        Sheet(
            "Gradient norm",
            "Before clipping, of the whole and of each component.",
            [*(gradients if len(gradients) > 1 else []), (WHOLE, "grad_norm")],
            is_log=True,
        ),
        Sheet("Learning rate", "Of the optimizer's first group.", [("learning rate", "learning_rate")]),
    ]


def charts_of(run: Run, order: Sequence[str]) -> list[Chart]:
    """The charts of one training: training and evaluation together, the best evaluation marked."""

    component_of = run.topology.component_of if run.topology else {}
    colours = {component_of.get(name) or name: at for at, name in reversed(list(enumerate(order)))}
    colours |= {name: at for at, name in enumerate(order)} | {WHOLE: COLOURS - 1}

    def lines(sheet: Sheet) -> list[Line]:
        single = len(sheet.metrics) == 1
        found = []
        for number, (label, metric) in enumerate(sheet.metrics):
            for split, series in _splits(run.history, metric):
                name = (split.replace("eval", "evaluation", 1) or "training") if single else label
                colour = _split_colour(run.history, split) if single else colours.get(label, number)
                found.append(Line(name, colour, series, bool(split)))
        return found

    best = best_evaluation(run.history, run.config)
    marks = [(best[1], f"best {best[0].split('/')[-1]}")] if best else []
    return _drawn(sheets(run.history, order), lines, marks, [run.history])


def charts_of_several(runs: Mapping[str, Run], order: Sequence[str]) -> list[Chart]:
    """The charts of several trainings over each other, one colour for each; by node and side one chart for each."""
    histories = [run.history for run in runs.values()]
    wanted: dict[str, Sheet] = {}
    for history in histories:
        for sheet in sheets(history, order):
            for label, metric in sheet.metrics:
                title = (
                    sheet.title
                    if len(sheet.metrics) == 1 and "by node" not in sheet.title
                    else f"{sheet.title}: {label}"
                )
                wanted.setdefault(metric, Sheet(title, sheet.about, [(label, metric)], sheet.bounds, sheet.is_log))

    def lines(sheet: Sheet) -> list[Line]:
        ((_, metric),) = sheet.metrics
        found = []
        for colour, (name, run) in enumerate(runs.items()):
            found.append(Line(name, colour, run.history.train.get(metric, EMPTY)))
            found.append(Line(name, colour, run.history.evaluation.get(metric, EMPTY), True))
        return found

    return _drawn(list(wanted.values()), lines, [], histories)


def _splits(history: History, metric: str) -> list[tuple[str, Series]]:
    own = [("", history.train.get(metric, EMPTY))]
    return own + [(name, metrics.get(metric, EMPTY)) for name, metrics in history.evaluations.items()]


def _split_colour(history: History, split: str) -> int:
    return 1 + list(history.evaluations).index(split) if split else 0


def _drawn(
    wanted: Sequence[Sheet], lines: Callable[[Sheet], list[Line]], marks: Sequence[tuple[int, str]],
    histories: Sequence[History],
) -> list[Chart]:  # fmt: skip
    drawn = [(sheet, lines(sheet)) for sheet in wanted]
    points = points_of_a_curve(sum(len(line.series) > 0 for _, found in drawn for line in found))
    span = (0, max(history.last_step for history in histories))
    charts = [
        draw(
            sheet.title, sheet.about, found, points=points, span=span, marks=marks, bounds=sheet.bounds,
            is_log=sheet.is_log,
        )
        for sheet, found in drawn
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]
