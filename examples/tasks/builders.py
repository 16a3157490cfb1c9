"""The four base models of the demo, each a function that fills a folder."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from examples import digits_in_order, draft_and_refine
from examples.tasks import ordered_digits, sorted_letters
from examples.tasks.base_models import letter_tokenizer, train_diffusion_model, train_language_model, word_tokenizer
from examples.tasks.ordered_digits import Digits, Illustrator


def captioner(folder: Path, *, seed: int, steps: int) -> None:
    """The language model of `examples.digits_in_order`."""
    prompts = ordered_digits.prompts()
    words = [*ordered_digits.prompt_vocabulary(), ":", ordered_digits.SEPARATOR, *ordered_digits.DIGIT_OF]

    def demonstrate(rng: random.Random) -> tuple[str, str]:
        prompt = rng.choice(prompts)
        return digits_in_order.text(prompt), ordered_digits.demonstration(prompt, rng)

    train_language_model(folder, word_tokenizer(words, max_length=64), demonstrate, seed=seed, steps=steps)


def illustrator(folder: Path, *, seed: int, steps: int) -> None:
    """The diffusion model of `examples.digits_in_order`."""
    digits, muddled = Digits.load(seed), Illustrator.make(seed)

    def illustrate(word: str, rng: random.Random) -> torch.Tensor:
        return torch.from_numpy(digits.draw(muddled.depict(word, rng), rng))[None]

    words = list(ordered_digits.DIGIT_OF)
    train_diffusion_model(folder, words, illustrate, channels=(24, 48), seed=seed, steps=steps)


def drafter(folder: Path, *, seed: int, steps: int) -> None:
    """The first model of `examples.draft_and_refine`."""

    def demonstrate(rng: random.Random) -> tuple[str, str]:
        question = sorted_letters.random_question(rng)
        return draft_and_refine.draft(question), sorted_letters.demonstrated_draft(question, rng)

    train_language_model(folder, _letters(), demonstrate, seed=seed, steps=steps)


def refiner(folder: Path, *, seed: int, steps: int) -> None:
    """The second model of `examples.draft_and_refine`."""

    def demonstrate(rng: random.Random) -> tuple[str, str]:
        question = sorted_letters.random_question(rng)
        draft = sorted_letters.demonstrated_draft(question, rng)
        return draft_and_refine.answer(question, draft), sorted_letters.demonstrated_answer(question, draft, rng)

    train_language_model(folder, _letters(), demonstrate, seed=seed + 1, steps=steps)


def _letters():
    return letter_tokenizer(sorted_letters.LETTERS + ",:", max_length=64)
