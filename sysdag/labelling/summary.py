"""How far the labelling is, who labelled what, and how well annotators agree."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sysdag.evaluation.statistics import wilson_interval
from sysdag.labelling.agreement import cohen_kappa, krippendorff_alpha, squared
from sysdag.labelling.records import CHOICES, Collect, Label
from sysdag.labelling.store import LabelStore

_HEADS = {"tie": "ties"}


@dataclass(frozen=True)
class Annotator:
    """What one annotator did.

    Attributes:
        name: of the annotator.
        choices: how many labels there are of each choice.
        skipped, undone: how many were skipped, and taken back.
    """

    name: str
    choices: Mapping[str, int]
    skipped: int
    undone: int

    @property
    def labels(self) -> int:
        """Labels that say something: all but what was skipped."""
        return sum(self.choices.values())


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on the pairs (or single runs) that two or more of them labelled.

    Attributes:
        measure: `Cohen's kappa` for two annotators, `Krippendorff's alpha` for more; for scores always that, with
            differences squared.
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
        collect: what is asked for; where it is no pairs, `pairs` and the like count single runs.
    """

    pairs: int
    labelled: int
    overlap: int
    annotators: tuple[Annotator, ...]
    agreement: Agreement | None
    collect: Collect = "pairs"

    @property
    def units(self) -> str:
        """What is labelled, in words."""
        return "pairs" if self.collect == "pairs" else "runs"

    @property
    def left_share(self) -> tuple[float, float, float] | None:
        """Share of preferences for the left side with its 95 % Wilson interval; sides are drawn, so far from one half
        means that places were labelled rather than outputs. None without preferences."""
        left, right = (sum(one.choices.get(side, 0) for one in self.annotators) for side in ("left", "right"))
        count = left + right
        return (left / count, *wilson_interval(left, count)) if count else None

    def to_dict(self) -> dict[str, Any]:
        """The same, JSON-ready."""
        return {
            **asdict(self),
            "annotators": [{**asdict(annotator), "labels": annotator.labels} for annotator in self.annotators],
            "left_share": self.left_share,
            "units": self.units,
            "choices": CHOICES[self.collect],
        }

    def __str__(self) -> str:
        lines = [f"{self.labelled} of {self.pairs} {self.units} labelled"]
        choices = CHOICES[self.collect]
        if self.annotators:
            width = max(9, *(len(annotator.name) for annotator in self.annotators))
            names = "".join(f"  {_HEADS.get(choice, choice):>6}" for choice in choices)
            lines.append(f"{'annotator':{width}}  labels{names}  skipped  undone")
        for one in self.annotators:
            counts = "".join(f"  {one.choices[choice]:6}" for choice in choices)
            lines.append(f"{one.name:{width}}  {one.labels:6}{counts}  {one.skipped:7}  {one.undone:6}")
        if self.left_share is not None:
            lines.append("left side preferred: {:.0%} (95 % interval {:.0%} to {:.0%})".format(*self.left_share))
        if self.agreement is not None:
            found = self.agreement
            value = "undefined, all labels are alike" if found.value is None else f"{found.value:.3f}"
            lines.append(
                f"{found.measure}: {value}; agreed on {found.same} of {found.pairs} {self.units} with several labels"
            )
        return "\n".join(lines)


def summarize(store: LabelStore) -> Summary:
    """The state of a database."""
    pairs, labels, undone, collect = store.pairs(), store.labels(), store.undone(), store.settings.collect
    given: dict[str, Counter] = {name: Counter() for name in store.annotators()}
    votes: dict[int, dict[str, Label]] = defaultdict(dict)
    for label in labels:
        given[label.annotator][label.choice] += 1
        if label.choice != "skip":
            votes[label.pair][label.annotator] = label
    several = [(pairs[pair], of_pair) for pair, of_pair in votes.items() if len(of_pair) >= 2]
    return Summary(
        pairs=len(pairs),
        labelled=len(votes),
        overlap=min(store.settings.overlap, len(pairs)),
        annotators=tuple(
            Annotator(name, {choice: count[choice] for choice in CHOICES[collect]}, count["skip"], undone.get(name, 0))
            for name, count in given.items()
        ),
        agreement=_agreement([_categories(pair, of_pair, collect) for pair, of_pair in several], collect),
        collect=collect,
    )


def _categories(pair: tuple[int, int], given: Mapping[str, Label], collect: Collect) -> dict[str, Hashable]:
    """Labels as categories that are the same in all pairs; scores as numbers."""
    if collect == "scores":
        return {annotator: int(label.choice) for annotator, label in given.items()}
    if collect == "thumbs":
        return {annotator: label.choice for annotator, label in given.items()}
    names = {pair[0]: "first", pair[1]: "second", None: "tie"}
    return {annotator: names[label.preferred] for annotator, label in given.items()}


def _agreement(units: list[dict[str, Hashable]], collect: Collect) -> Agreement | None:
    if not units:
        return None
    names = sorted({name for unit in units for name in unit})
    same = sum(len(set(unit.values())) == 1 for unit in units)
    if collect == "scores":
        return Agreement("Krippendorff's alpha", krippendorff_alpha(units, squared), len(units), same)
    if len(names) == 2:
        value = cohen_kappa(*([unit[name] for unit in units] for name in names))
        return Agreement("Cohen's kappa", value, len(units), same)
    return Agreement("Krippendorff's alpha", krippendorff_alpha(units), len(units), same)
