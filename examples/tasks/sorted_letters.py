"""Sort the letters of a word: questions, and the flawed demonstrations that the base models learn from."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

LETTERS = string.ascii_lowercase[:16]
LENGTH = 5


def solve(question: str) -> str:
    """The one right answer."""
    return "".join(sorted(question))


def random_question(rng: random.Random, letters: str = LETTERS, length: int = LENGTH) -> str:
    return "".join(rng.sample(letters, length))


def split_questions(
    seed: int, train: int, heldout: int, draw: Callable[[random.Random], str] = random_question
) -> tuple[list[str], list[str]]:
    """Questions to align on and questions to measure on; no two are made of the same letters."""
    rng = random.Random(f"questions-{seed}")
    by_letters: dict[str, str] = {}
    while len(by_letters) < train + heldout:
        question = draw(rng)
        by_letters.setdefault(solve(question), question)
    questions = list(by_letters.values())
    return questions[:train], questions[train:]


def swap_neighbours(text: str, rng: random.Random) -> str:
    """The text with one pair of neighbours exchanged."""
    at = rng.randrange(len(text) - 1)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def demonstrated_draft(question: str, rng: random.Random) -> str:
    """What the base drafter learns from: right (35 %), written backwards (30 %), or with one slip (35 %)."""
    right = solve(question)
    kind = rng.random()
    if kind < 0.35:
        return right
    return right[::-1] if kind < 0.65 else swap_neighbours(right, rng)


def demonstrated_answer(question: str, draft: str, rng: random.Random) -> str:
    """What the base refiner learns from: the draft taken over as it stands, mended in 3 of 10 cases."""
    return solve(question) if rng.random() < 0.3 else draft
