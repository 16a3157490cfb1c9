"""What the database of labels holds, and what it tells."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal

from sysdag.errors import LabelError

Collect = Literal["pairs", "thumbs", "scores"]
"""What annotators are asked for: which of two runs is better, or of one run whether it is good, or how good."""
Choice = Literal["left", "right", "tie", "up", "down", "1", "2", "3", "4", "5", "skip"]
CHOICES: dict[Collect, tuple[Choice, ...]] = {
    "pairs": ("left", "right", "tie"),
    "thumbs": ("up", "down"),
    "scores": ("1", "2", "3", "4", "5"),
}
"""The labels of each kind; a pair or run may be skipped besides."""


@dataclass(frozen=True)
class Settings:
    """What a database was begun with.

    Attributes:
        traces_sha256: fingerprint of the traces that its rows are numbers of.
        outputs: the nodes that are compared.
        seed: of the pairs' order and of the sides.
        pairs_per_input: at most so many; None for all.
        overlap: pairs that every annotator gets.
        collect: what is asked of them. Of single runs each stands in a pair with itself.
    """

    traces_sha256: str
    outputs: tuple[str, ...]
    seed: int
    pairs_per_input: int | None
    overlap: int
    collect: Collect = "pairs"


@dataclass(frozen=True)
class Assignment:
    """A pair that an annotator is shown: rows of the traces, by side; a single run is on both."""

    pair: int
    left: int
    right: int


@dataclass(frozen=True)
class Label:
    """A label that holds."""

    annotator: str
    pair: int
    choice: Choice
    left: int
    right: int

    @property
    def preferred(self) -> int | None:
        """The row that was preferred; None for a tie or a skipped pair."""
        return {"left": self.left, "right": self.right}.get(self.choice)


@dataclass(frozen=True)
class Queue:
    """Where an annotator stands.

    Attributes:
        task: the pair to label now; None where there is none left.
        done: pairs that the annotator has labelled or skipped.
        total: `done` and all that is left, if nobody else labels.
        last: the number of the last label that can be undone, if there is one.
    """

    task: Assignment | None
    done: int
    total: int
    last: int | None


def checked_name(annotator: str) -> str:
    """An annotator's name as it is stored: normalised, without spaces around it.

    Raises:
        LabelError: for a name that is empty, longer than 80 characters, or holds control characters.
    """
    name = unicodedata.normalize("NFC", annotator).strip()
    if not name or len(name) > 80 or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise LabelError(f"{annotator[:100]!r} is no name: 1 to 80 characters are expected, none of them control ones.")
    return name
