"""What the pictures of the first experiment show: levels of a graded attribute, how they are drawn and read off again.

Captions are single words in two dialects, and which word the diffusion model draws clearly differs from level to level,
so writer and painter have to agree (see `examples.tasks.ordered_digits.Illustrator`).
"""

from __future__ import annotations

import colorsys
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor

from examples.tasks import ordered_digits
from examples.tasks.ordered_digits import Digits, Judge


class World(ABC):
    """Words for levels, and pictures of them.

    Attributes:
        words: for each word the kind of attribute and the level it means, by kind, level and dialect.
        channels: of the UNet that learns to draw them, by resolution.
        autoencoder: channels of the autoencoder whose latents the UNet works on; empty where it works on pixels.
    """

    words: dict[str, tuple[str, int]]
    channels: tuple[int, ...] = (24, 48)
    autoencoder: tuple[int, ...] = ()

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def draw(self, kind: str, level: int, rng: random.Random) -> Tensor:
        """A picture (C, H, W) in [-1, 1] for training."""

    @abstractmethod
    def seen(self, kinds: Sequence[str], images: Sequence[Any], annotator: bool) -> numpy.ndarray:
        """The level of each image's attribute, as the annotator sees it or as it is measured: (n,), also fractions."""

    @cached_property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.words.values()))

    @cached_property
    def levels(self) -> int:
        return 1 + max(level for _, level in self.words.values())

    @cached_property
    def synonyms(self) -> dict[tuple[str, int], list[str]]:
        found: dict[tuple[str, int], list[str]] = {}
        for word, meaning in self.words.items():
            found.setdefault(meaning, []).append(word)
        return found

    @cached_property
    def muddle(self) -> dict[str, tuple[float, int]]:
        """For each word the probability that a training picture under it shows its level, and what it shows otherwise.

        Most levels have one clear word; a few have none.
        """
        rng = random.Random(f"muddle-{self.seed}")
        found = {}
        for kind in self.kinds:
            unclear = set(rng.sample(range(self.levels), 3))
            for level in range(self.levels):
                clarity = [0.6, 0.6] if level in unclear else rng.sample([1.0, 0.5], 2)
                for word, share in zip(self.synonyms[kind, level], clarity, strict=True):
                    others = [other for other in range(self.levels) if abs(other - level) > 2]
                    found[word] = (share, rng.choice(others))
        return found

    def illustration(self, word: str, rng: random.Random) -> Tensor:
        """One training picture under a word."""
        kind, level = self.words[word]
        share, otherwise = self.muddle[word]
        return self.draw(kind, level if rng.random() < share else otherwise, rng)

    def kind_of(self, prompt: str) -> str:
        return next(kind for kind in self.kinds if kind in prompt.split())


class DigitWorld(World):
    """scikit-learn's hand-written digits, 8x8. The annotator and the measuring judge are fitted on different ones."""

    words = {word: ("digits", digit) for word, digit in ordered_digits.DIGIT_OF.items()}  # noqa: RUF012

    @cached_property
    def _digits(self) -> Digits:
        return Digits.load(self.seed)

    @cached_property
    def _judges(self) -> dict[bool, Judge]:
        return {True: Judge(*self._digits.judged), False: Judge(*self._digits.audited)}

    def draw(self, kind: str, level: int, rng: random.Random) -> Tensor:
        return torch.from_numpy(self._digits.draw(level, rng))[None]

    def seen(self, kinds: Sequence[str], images: Sequence[Any], annotator: bool) -> numpy.ndarray:
        return numpy.array(self._judges[annotator].read([images])[0], dtype=float)


class ShapeWorld(World):
    """Discs on black, 32x32 in colour, whose size, brightness or hue is graded; the other two are arbitrary.

    What is measured are the attributes themselves, from the pixels; the annotator sees them with an error of half a
    level.
    """

    words = {  # noqa: RUF012
        f"{dialect}{level}": (kind, level)
        for kind, dialects in {
            "size": ("big", "wide"),
            "brightness": ("bright", "light"),
            "hue": ("hue", "tint"),
        }.items()
        for level in range(9)
        for dialect in dialects
    }
    autoencoder = (8, 16, 32)
    _RADIUS, _VALUE, _HUE = (3.0, 13.0), (0.3, 1.0), (0.0, 0.75)

    def draw(self, kind: str, level: int, rng: random.Random) -> Tensor:
        share = {name: rng.random() for name in self.kinds} | {kind: level / (self.levels - 1)}
        radius, value, hue = (
            low + share[name] * (high - low)
            for name, (low, high) in zip(self.kinds, (self._RADIUS, self._VALUE, self._HUE), strict=True)
        )
        rows, columns = numpy.mgrid[:32, :32]
        centre = [15.5 + rng.uniform(-2, 2) for _ in range(2)]
        distance = numpy.hypot(rows - centre[0], columns - centre[1])
        cover = numpy.clip(radius + 0.5 - distance, 0, 1)
        colour = numpy.array(colorsys.hsv_to_rgb(hue, 0.9, value))
        return torch.from_numpy((colour[:, None, None] * cover * 2 - 1).astype(numpy.float32))

    def seen(self, kinds: Sequence[str], images: Sequence[Any], annotator: bool) -> numpy.ndarray:
        found = numpy.array([self._measured(*pair) for pair in zip(kinds, images, strict=True)])
        if not annotator:
            return found
        return found + numpy.random.default_rng([self.seed, len(found)]).normal(0, 0.5, len(found))

    def _measured(self, kind: str, image: Any) -> float:
        pixels = numpy.asarray(image, dtype=float).reshape(32, 32, 3) / 255
        bright = pixels.max(-1)
        inside = bright > 0.15
        if inside.sum() < 4:
            return -1.0
        if kind == "size":
            value, (low, high) = float(numpy.sqrt(inside.sum() / numpy.pi)), self._RADIUS
        elif kind == "brightness":
            value, (low, high) = float(numpy.median(bright[inside])), self._VALUE
        else:
            colour = numpy.median(pixels[inside], axis=0)
            value, (low, high) = colorsys.rgb_to_hsv(*colour)[0], self._HUE
            value = value - 1 if value > 0.875 else value  # a little below red
        return (value - low) / (high - low) * (self.levels - 1)


WORLDS = {"digits": DigitWorld, "shapes": ShapeWorld}
