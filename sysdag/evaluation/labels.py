"""Which of judged runs are desirable and which are not, for unpaired training; one run of an input is enough."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sysdag.evaluation.ranking import Judged
from sysdag.evaluation.statistics import reaches
from sysdag.files.encoding import encode_value
from sysdag.traces.trace import Trace


@dataclass(frozen=True)
class Labelled:
    """Runs that are desirable or not.

    Attributes:
        runs: rows of the trace.
        labels: of each, whether it is desirable.
        left_out: how many runs have no label, by reason.
        contradicted: how many of `runs` have the inputs and outputs of one with the other label.
    """

    runs: Sequence[int]
    labels: Sequence[bool]
    left_out: Mapping[str, int]
    contradicted: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.runs)} unpaired rows: {sum(self.labels)} true, {len(self.labels) - sum(self.labels)} false."
        ]
        lines += [f"  {count} left out: {reason}" for reason, count in self.left_out.items()]
        if self.contradicted:
            lines.append(
                f"  {self.contradicted} rows say true and false of equal outputs to equal inputs; they are kept."
            )
        return "\n".join(lines)


def label_runs(
    trace: Trace, judged: Judged, outputs: Sequence[str], *, threshold: float, margin: float = 0.0
) -> Labelled:
    """Runs whose score is at least (where lower is better: at most) a threshold are desirable.

    Args:
        outputs: the nodes by which contradictions are found.
        threshold: of scores; 0.5 for thumbs.
        margin: runs that miss the threshold by less have no label.
    """
    sign = -1 if judged.lower_is_better else 1
    runs: list[int] = []
    labels: list[bool] = []
    left_out: Counter[str] = Counter()
    for run, score in enumerate(judged.scores):
        if score is None:
            left_out[f"no {judged.noun}"] += 1
            continue
        missing = sign * (threshold - score)
        if missing > 0 and not reaches(missing, margin):
            left_out[f"misses {threshold:g} by less than the margin {margin:g}"] += 1
            continue
        runs.append(run)
        labels.append(missing <= 0)
    return Labelled(runs, labels, dict(left_out), _contradicted(trace, runs, labels, outputs))


def _contradicted(trace: Trace, runs: Sequence[int], labels: Sequence[bool], outputs: Sequence[str]) -> int:
    said = defaultdict(list)
    names = [*trace.inputs, *outputs]
    columns = [trace[name] for name in names]
    for run, label in zip(runs, labels, strict=True):
        content = [encode_value(column[run], name) for name, column in zip(names, columns, strict=True)]
        said[json.dumps(content, sort_keys=True)].append(label)
    return sum(len(given) for given in said.values() if len(set(given)) == 2)
