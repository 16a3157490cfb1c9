"""Labels as a preference dataset: one row for each pair on which most annotators agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdag.errors import LabelError
from sysdag.labelling.records import Label
from sysdag.labelling.store import LabelStore
from sysdag.traces.pairs import preference_row, write_pairs
from sysdag.traces.trace import Trace


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
    votes: dict[int, list[Label]] = defaultdict(list)
    for label in store.labels():
        if label.choice != "skip":
            votes[label.pair].append(label)
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


def majority(votes: Iterable[int | None]) -> tuple[int | None, int]:
    """What more than half of the votes are for, and how many they are; 0 where there is no such thing."""
    counts = Counter(votes)
    for vote, count in counts.most_common(1):
        if 2 * count > counts.total():
            return vote, count
    return None, 0


def write_export(store: LabelStore, trace: Trace, path: str | Path) -> Export:
    """Writes them as `sysdag.traces.pairs.write_pairs` does: JSON lines or Parquet, by the ending.

    Raises:
        LabelError: if there is no preference to write; an older file stays as it was.
    """
    found = export(store, trace)
    if not found.rows:
        raise LabelError(f"{store.path} has no preferences to export yet: {found}.")
    write_pairs(path, found.rows)
    return found
