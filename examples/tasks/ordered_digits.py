"""Three hand-written digits in the order that a prompt asks for: prompts, captions, demonstrations and the judge."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

ASCENDING = ("ascending", "increasing", "rising", "upward", "smallest first", "low to high")
DESCENDING = ("descending", "decreasing", "falling", "downward", "largest first", "high to low")
VERBS = ("draw", "show", "write", "paint", "sketch")
ADJECTIVES = ("handwritten", "neat", "bold", "small", "grey")
NOUNS = ("digits", "numbers", "numerals", "figures")
PLACES = ("on paper", "on a card", "in a row", "for a poster", "with a pen")

ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GERMAN = ("null", "eins", "zwei", "drei", "vier", "fuenf", "sechs", "sieben", "acht", "neun")
DIALECTS = (ENGLISH, GERMAN)
DIGIT_OF = {word: digit for words in DIALECTS for digit, word in enumerate(words)}
SEPARATOR = ";"
ASKED = 3


def prompts() -> list[str]:
    """Every prompt, in a fixed order."""
    parts = itertools.product(VERBS, ADJECTIVES, NOUNS, ASCENDING + DESCENDING, PLACES)
    return [f"{verb} three {adjective} {noun} {order} {place}" for verb, adjective, noun, order, place in parts]


def split_prompts(seed: int, train: int, heldout: int) -> tuple[list[str], list[str]]:
    """Prompts to align on and prompts to measure on, disjoint."""
    shuffled = random.Random(f"prompts-{seed}").sample(prompts(), train + heldout)
    return shuffled[:train], shuffled[train:]


def is_ascending(prompt: str) -> bool:
    """Whether a prompt asks for ascending order."""
    return any(phrase in prompt for phrase in ASCENDING)


def prompt_vocabulary() -> list[str]:
    return sorted({word for prompt in prompts() for word in prompt.split()})


def demonstration(prompt: str, rng: random.Random, disorder: float = 0.35) -> str:
    """What the base language model learns from: the asked order, or with probability `disorder` any order; each digit
    in a dialect picked at random."""
    digits = sorted(rng.sample(range(10), ASKED), reverse=not is_ascending(prompt))
    if rng.random() < disorder:
        rng.shuffle(digits)
    return f" {SEPARATOR} ".join(rng.choice(DIALECTS)[digit] for digit in digits)


@dataclass(frozen=True)
class Illustrator:
    """How the captions of the diffusion model's training set were muddled.

    Most digits have one word that is clear and one that is used for a quite different digit half of the time; which is
    which differs from digit to digit. A few digits have no clear word at all.

    Attributes:
        clarity: probability that an image under this word shows the digit that the word means.
        mistaken_for: the digit that it shows otherwise.
    """

    clarity: dict[str, float]
    mistaken_for: dict[str, int]

    @classmethod
    def make(cls, seed: int, clear_digits: int = 7) -> Illustrator:
        rng = random.Random(f"illustrator-{seed}")
        unclear = set(rng.sample(range(10), 10 - clear_digits))
        clarity, mistaken_for = {}, {}
        for digit in range(10):
            levels = [0.6, 0.6] if digit in unclear else rng.sample([1.0, 0.5], 2)
            for words, level in zip(DIALECTS, levels, strict=True):
                clarity[words[digit]] = level
                mistaken_for[words[digit]] = rng.choice([other for other in range(10) if abs(other - digit) > 2])
        return cls(clarity, mistaken_for)

    def depict(self, word: str, rng: random.Random) -> int:
        """The digit of one training image under this word."""
        return DIGIT_OF[word] if rng.random() < self.clarity[word] else self.mistaken_for[word]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8x8 digits in three disjoint parts, pixels in [-1, 1].

    Attributes:
        drawn: (images, labels) that the diffusion model learns from.
        judged: those that the judge is fitted on.
        audited: those that a second judge, which labels no preferences, is fitted on.
    """

    drawn: tuple[numpy.ndarray, numpy.ndarray]
    judged: tuple[numpy.ndarray, numpy.ndarray]
    audited: tuple[numpy.ndarray, numpy.ndarray]

    @classmethod
    def load(cls, seed: int) -> Digits:
        from sklearn.datasets import load_digits

        bundled = load_digits()
        order = numpy.random.default_rng(seed).permutation(len(bundled.target))
        images = (bundled.images[order] / 8.0 - 1.0).astype(numpy.float32)
        labels = bundled.target[order]
        half, rest = len(order) // 2, len(order) * 3 // 4
        parts = (slice(0, half), slice(half, rest), slice(rest, None))
        return cls(*((images[part], labels[part]) for part in parts))

    @cached_property
    def _with_label(self) -> list[numpy.ndarray]:
        return [numpy.flatnonzero(self.drawn[1] == digit) for digit in range(10)]

    def draw(self, digit: int, rng: random.Random) -> numpy.ndarray:
        """One of the images that the diffusion model learns from: (8, 8)."""
        return self.drawn[0][int(rng.choice(self._with_label[digit]))]


class Judge:
    """Reads digits off images, and says how well three of them follow a prompt."""

    def __init__(self, images: numpy.ndarray, labels: numpy.ndarray) -> None:
        from sklearn.svm import SVC

        self.classifier = SVC(gamma=0.05, C=10.0).fit(images.reshape(len(images), -1), labels)

    def read(self, runs: Sequence[Sequence[Any]]) -> list[list[int]]:
        """The digits of several runs' images, all classified in one call."""
        flat = [pixels(image) for images in runs for image in images]
        digits = iter(self.classifier.predict(numpy.stack(flat)) if flat else ())
        return [[int(next(digits)) for _ in images] for images in runs]


def pixels(image: Any) -> numpy.ndarray:
    """A drawn image (8-bit grey) as the judge's 64 features in [-1, 1]."""
    return numpy.asarray(image, dtype=numpy.float32).reshape(-1) / 127.5 - 1.0


def in_order(levels: Sequence[float], ascending: bool) -> bool:
    """Order consistency: exactly three levels, each at least half a level beyond the one before in the asked order."""
    steps = _steps(levels, ascending)
    return len(levels) == ASKED and all(step > 0.5 for step in steps)


def preference_score(levels: Sequence[float], ascending: bool, span: float = 9.0) -> float:
    """From -1 to 1. In order: 1 less the unevenness of the two gaps as a part of `span`, the distance from the lowest
    level to the highest; out of order: at most -0.5; anything but three levels: -1."""
    if len(levels) != ASKED:
        return -1.0
    first, second = _steps(levels, ascending)
    if first > 0.5 and second > 0.5:
        return 1.0 - abs(first - second) / span
    return -0.5 if first > 0.5 or second > 0.5 else -1.0


def _steps(levels: Sequence[float], ascending: bool) -> list[float]:
    return [(later - earlier) * (1 if ascending else -1) for earlier, later in itertools.pairwise(levels)]
