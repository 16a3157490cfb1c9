"""Labels as data for training: preferences or unpaired rows on which most annotators agree, or scored runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sysdag.errors import LabelError
from sysdag.labelling.records import Label
from sysdag.labelling.store import LabelStore
from sysdag.traces.pairs import preference_row, write_pairs
from sysdag.traces.trace import Trace
from sysdag.traces.unpaired import unpaired_row


@dataclass(frozen=True)
class Export:
    """What became of the labels.

    Attributes:
        rows: preferences, with the token ids of their draws, and `labels` and `agreeing`: how many annotators labelled
            the pair and how many of them preferred what is chosen.
        ties: pairs that most annotators held for equal.
        disagreements: pairs on which no more than half of the annotators agree.
        unlabelled: pairs without a label.
    """

    rows: list[dict[str, Any]]
    ties: int
    disagreements: int
    unlabelled: int

    def __str__(self) -> str:
        return (
            f"{len(self.rows)} preferences; left out: {self.ties} ties, {self.disagreements} disagreements, "
            f"{self.unlabelled} pairs without a label"
        )


def export(store: LabelStore, trace: Trace) -> Export:
    """The preferences that a database holds, pairs in their order; a skipped pair is no label."""
    votes = _votes(store)
    rows = []
    ties = disagreements = unlabelled = 0
    for number, pair in enumerate(store.pairs()):
        given = votes.get(number, [])
        winner, count = majority(label.preferred for label in given)
        if not given:
            unlabelled += 1
        elif not count:
            disagreements += 1
        elif winner is None:
            ties += 1
        else:
            loser = pair[0] if winner == pair[1] else pair[1]
            row = preference_row(trace, winner, loser, store.settings.outputs)
            rows.append({**row, "labels": len(given), "agreeing": count})
    return Export(rows, ties, disagreements, unlabelled)


@dataclass(frozen=True)
class ThumbsExport:
    """What became of thumbs.

    Attributes:
        rows: unpaired rows (see `sysdag.traces.unpaired`), with `labels` and `agreeing` as in `Export`.
        disagreements: runs on which no more than half of the annotators agree.
        unlabelled: runs without a label.
    """

    rows: list[dict[str, Any]]
    disagreements: int
    unlabelled: int

    def __str__(self) -> str:
        good = sum(row["label"] for row in self.rows)
        return (
            f"{len(self.rows)} unpaired rows, {good} true and {len(self.rows) - good} false; left out: "
            f"{self.disagreements} disagreements, {self.unlabelled} runs without a label"
        )


def export_thumbs(store: LabelStore, trace: Trace) -> ThumbsExport:
    """The unpaired rows that a database of thumbs holds, runs in their order."""
    votes = _votes(store)
    rows = []
    disagreements = unlabelled = 0
    for number, (run, _) in enumerate(store.pairs()):
        given = votes.get(number, [])
        label, count = majority(each.choice == "up" for each in given)
        if not given:
            unlabelled += 1
        elif not count:
            disagreements += 1
        else:
            row = unpaired_row(trace, run, bool(label), store.settings.outputs)
            rows.append({**row, "labels": len(given), "agreeing": count})
    return ThumbsExport(rows, disagreements, unlabelled)


@dataclass(frozen=True)
class ScoresExport:
    """What became of scores.

    Attributes:
        trace: the runs that have a score, with their mean over annotators as a column `name`, and `<name>_labels`: how
            many gave one.
        name: of the column: `score`, or `label_score` where the runs have a column of that name.
        unlabelled: runs without a label.
    """

    trace: Trace
    name: str
    unlabelled: int

    def __str__(self) -> str:
        return (
            f"{len(self.trace)} runs with a column {self.name!r}, which sysdag judge takes (--by {self.name}); left "
            f"out: {self.unlabelled} runs without a label"
        )


def export_scores(store: LabelStore, trace: Trace) -> ScoresExport:
    """The scored runs that a database holds, in the order of the trace.

    Raises:
        LabelError: if the runs have columns of the names that scores get.
    """
    votes = _votes(store)
    runs = {store.pairs()[number][0]: [int(label.choice) for label in given] for number, given in votes.items()}
    name = "label_score" if "score" in trace.columns else "score"
    if taken := {name, f"{name}_labels"} & trace.columns.keys():
        raise LabelError(f"The runs have a column {min(taken)!r} already, so scores would overwrite it.")
    rows = sorted(runs)
    columns: dict[str, Any] = {
        name: [sum(runs[r]) / len(runs[r]) for r in rows],
        f"{name}_labels": [len(runs[r]) for r in rows],
    }
    chosen = trace.select(rows)
    scored = replace(chosen, columns={**chosen.columns, **columns})
    return ScoresExport(scored, name, len(store.pairs()) - len(rows))


def _votes(store: LabelStore) -> dict[int, list[Label]]:
    """The labels of each pair; a skipped one is none."""
    votes: dict[int, list[Label]] = defaultdict(list)
    for label in store.labels():
        if label.choice != "skip":
            votes[label.pair].append(label)
    return votes


def majority(votes: Iterable[int | None]) -> tuple[int | None, int]:
    """What more than half of the votes are for, and how many they are; 0 where there is no such thing."""
    counts = Counter(votes)
    for vote, count in counts.most_common(1):
        if 2 * count > counts.total():
            return vote, count
    return None, 0


def write_export(store: LabelStore, trace: Trace, path: str | Path) -> Export | ThumbsExport | ScoresExport:
    """Writes them as JSON lines or Parquet, by the ending: rows for training, or of scores the scored runs.

    Raises:
        LabelError: if there is nothing to write; an older file stays as it was.
    """
    if store.settings.collect == "scores":
        scored = export_scores(store, trace)
        if not len(scored.trace):
            raise LabelError(f"{store.path} has no scores to export yet: {scored}.")
        scored.trace.save(path)
        return scored
    found = export(store, trace) if store.settings.collect == "pairs" else export_thumbs(store, trace)
    if not found.rows:
        what = "preferences" if store.settings.collect == "pairs" else "thumbs"
        raise LabelError(f"{store.path} has no {what} to export yet: {found}.")
    write_pairs(path, found.rows)
    return found
