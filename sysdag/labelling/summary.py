"""How far the labelling is, who labelled what, and how well annotators agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sysdag.evaluation.statistics import wilson_interval
from sysdag.labelling.agreement import cohen_kappa, krippendorff_alpha
from sysdag.labelling.store import LabelStore


@dataclass(frozen=True)
class Annotator:
    """What one annotator did: numbers of labels, by choice, and of labels taken back."""

    name: str
    left: int
    right: int
    ties: int
    skipped: int
    undone: int

    @property
    def labels(self) -> int:
        """Labels that say something: all but skipped pairs."""
        return self.left + self.right + self.ties


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on the pairs that two or more of them labelled.

    Attributes:
        measure: `Cohen's kappa` for two annotators, `Krippendorff's alpha` for more.
        value: None where it is undefined, because all labels are alike.
        pairs: with two labels or more.
        same: of these, those on which all agree.
    """

    measure: str
    value: float | None
    pairs: int
    same: int


@dataclass(frozen=True)
class Summary:
    """The state of a database of labels.

    Attributes:
        pairs: to be labelled.
        labelled: pairs with a label or more.
        overlap: pairs that every annotator gets.
        annotators: in order of first appearance.
        agreement: None as long as no pair has two labels.
    """

    pairs: int
    labelled: int
    overlap: int
    annotators: tuple[Annotator, ...]
    agreement: Agreement | None

    @property
    def left_share(self) -> tuple[float, float, float] | None:
        """Share of preferences for the left side with its 95 % Wilson interval; sides are drawn, so far from one half
        means that places were labelled rather than outputs. None without preferences."""
        left = sum(annotator.left for annotator in self.annotators)
        count = left + sum(annotator.right for annotator in self.annotators)
        return (left / count, *wilson_interval(left, count)) if count else None

    def to_dict(self) -> dict[str, Any]:
        """The same, JSON-ready."""
        return {
            **asdict(self),
            "annotators": [{**asdict(annotator), "labels": annotator.labels} for annotator in self.annotators],
            "left_share": self.left_share,
        }

    def __str__(self) -> str:
        lines = [f"{self.labelled} of {self.pairs} pairs labelled"]
        if self.annotators:
            width = max(9, *(len(annotator.name) for annotator in self.annotators))
            lines.append(f"{'annotator':{width}}  labels    left   right    ties  skipped  undone")
        for one in self.annotators:
            counts = f"{one.labels:6}  {one.left:6}  {one.right:6}  {one.ties:6}  {one.skipped:7}  {one.undone:6}"
            lines.append(f"{one.name:{width}}  {counts}")
        if self.left_share is not None:
            lines.append("left side preferred: {:.0%} (95 % interval {:.0%} to {:.0%})".format(*self.left_share))
        if self.agreement is not None:
            found = self.agreement
            value = "undefined, all labels are alike" if found.value is None else f"{found.value:.3f}"
            lines.append(f"{found.measure}: {value}; agreed on {found.same} of {found.pairs} pairs with several labels")
        return "\n".join(lines)


def summarize(store: LabelStore) -> Summary:
    """The state of a database."""
    pairs, labels, undone = store.pairs(), store.labels(), store.undone()
    choices: dict[str, Counter] = {name: Counter() for name in store.annotators()}
    votes: dict[int, dict[str, int | None]] = defaultdict(dict)
    for label in labels:
        choices[label.annotator][label.choice] += 1
        if label.choice != "skip":
            votes[label.pair][label.annotator] = label.preferred
    return Summary(
        pairs=len(pairs),
        labelled=len(votes),
        overlap=min(store.settings.overlap, len(pairs)),
        annotators=tuple(
            Annotator(name, count["left"], count["right"], count["tie"], count["skip"], undone.get(name, 0))
            for name, count in choices.items()
        ),
        agreement=_agreement([_by_place(pairs[pair], given) for pair, given in votes.items() if len(given) >= 2]),
    )


def _by_place(pair: tuple[int, int], given: Mapping[str, int | None]) -> dict[str, str]:
    """Labels as categories that are the same in all pairs."""
    names = {pair[0]: "first", pair[1]: "second", None: "tie"}
    return {annotator: names[preferred] for annotator, preferred in given.items()}


def _agreement(units: list[dict[str, str]]) -> Agreement | None:
    if not units:
        return None
    names = sorted({name for unit in units for name in unit})
    same = sum(len(set(unit.values())) == 1 for unit in units)
    if len(names) == 2:
        value = cohen_kappa(*([unit[name] for unit in units] for name in names))
        return Agreement("Cohen's kappa", value, len(units), same)
    return Agreement("Krippendorff's alpha", krippendorff_alpha(units), len(units), same)
