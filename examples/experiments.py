"""The demo's two experiments: systems, data, metrics and training options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy

from examples import digits_in_order, draft_and_refine
from examples.experiment import Experiment
from examples.pictures import plot_samples
from examples.tasks import builders, ordered_digits, sorted_letters
from examples.tasks.cache import cached
from examples.tasks.ordered_digits import Digits, Judge
from sysdag import DiverseBeamSearch, Trace


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything.

    Attributes:
        caption_steps, diffusion_steps, letter_steps: of base training.
        training, heldout: number of prompts.
        epochs: of alignment, for each experiment.
        denoising_steps: of the diffusion sampler.
    """

    caption_steps: int = 1000
    diffusion_steps: int = 500
    letter_steps: int = 500
    training: int = 400
    heldout: int = 200
    epochs: tuple[float, float] = (4.0, 2.0)
    denoising_steps: int = 10


QUICK = Size(
    caption_steps=100,
    diffusion_steps=20,
    letter_steps=150,
    training=12,
    heldout=8,
    epochs=(1.0, 1.0),
    denoising_steps=3,
)


def order_digits(size: Size, seed: int, cache: Path) -> Experiment:
    """LLM -> diffusion, aligned with SysDPO-Direct."""
    digits = Digits.load(seed)
    judge, auditor = Judge(*digits.judged), Judge(*digits.audited)
    training, heldout = ordered_digits.split_prompts(seed, size.training, size.heldout)
    system = digits_in_order.build(
        cached(cache, builders.captioner, seed=seed, steps=size.caption_steps),
        cached(cache, builders.illustrator, seed=seed, steps=size.diffusion_steps),
        num_inference_steps=size.denoising_steps,
    )
    return Experiment(
        name="digits_in_order",
        title="a language model captions three digits, a diffusion model draws them (SysDPO-Direct)",
        metric="order consistency",
        system=system,
        training={"prompt": training},
        heldout={"prompt": heldout},
        preference=lambda trace: judged(trace, judge, ordered_digits.preference_score),
        success=lambda trace: judged(trace, judge, ordered_digits.in_order),
        also={
            "preference score": lambda trace: judged(trace, judge, ordered_digits.preference_score),
            "order consistency, second judge": lambda trace: judged(trace, auditor, ordered_digits.in_order),
            "captions in order": captions_in_order,
            "text is three captions": lambda trace: numpy.array([well_formed(found) for found in trace["captions"]]),
            "images that show their caption": lambda trace: drawn_as_said(trace, judge),
        },
        show=lambda before, after, folder: show_images(before, after, judge, folder / "samples.png"),
        options={
            "objective": "direct",
            "beta": 0.3,
            "nodes": {"text": {"learning_rate": 1e-3}, "image": {"beta": 20.0, "learning_rate": 5e-4}},
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 32,
            "num_train_epochs": size.epochs[0],
            "warmup_steps": 8,
            "logging_steps": 10,
            "eval_steps": 20,
        },
    )


def judged(trace: Trace, judge: Judge, score) -> numpy.ndarray:
    """`score(digits, ascending)` of every run, with the digits that the judge reads."""
    ascending = map(ordered_digits.is_ascending, trace["prompt"])
    return numpy.array([float(score(*run)) for run in zip(judge.read(trace["image"]), ascending, strict=True)])


def well_formed(captions: list[str]) -> float:
    """1 for exactly three captions, each one word that names a digit."""
    return float(len(captions) == ordered_digits.ASKED and all(word in ordered_digits.DIGIT_OF for word in captions))


def captions_in_order(trace: Trace) -> numpy.ndarray:
    """1 where the language model's words are in the asked order, whatever is drawn."""
    meant = [[ordered_digits.DIGIT_OF.get(caption, -1) for caption in captions] for captions in trace["captions"]]
    ascending = map(ordered_digits.is_ascending, trace["prompt"])
    return numpy.array([float(ordered_digits.in_order(*run)) for run in zip(meant, ascending, strict=True)])


def drawn_as_said(trace: Trace, judge: Judge) -> numpy.ndarray:
    """The share of a run's images that the judge reads as the digit that their caption means."""
    runs = zip(judge.read(trace["image"]), trace["captions"], strict=True)
    return numpy.array(
        [
            numpy.mean([digit == ordered_digits.DIGIT_OF.get(word) for digit, word in zip(digits, words, strict=True)])
            for digits, words in runs
        ]
    )


def show_images(before: Trace, after: Trace, judge: Judge, path: Path, prompts: int = 8) -> None:
    """The first run of a few held-out prompts, before and after, side by side."""
    rows = [before["prompt"].index(prompt) for prompt in dict.fromkeys(before["prompt"])][:prompts]
    sides = []
    for heading, trace in (("before alignment", before), ("after alignment", after)):
        shown = trace.select(rows)
        digits, satisfied = judge.read(shown["image"]), judged(shown, judge, ordered_digits.in_order) > 0
        sides.append((heading, list(zip(shown["captions"], shown["image"], digits, satisfied, strict=True))))
    plot_samples([before["prompt"][row] for row in rows], sides, path)


def sort_letters(size: Size, seed: int, cache: Path) -> Experiment:
    """Drafter -> refiner, aligned with SysDPO-Sampling."""
    training, heldout = sorted_letters.split_questions(seed, size.training, size.heldout)
    system = draft_and_refine.build(
        cached(cache, builders.drafter, seed=seed, steps=size.letter_steps),
        cached(cache, builders.refiner, seed=seed, steps=size.letter_steps),
    )
    return Experiment(
        name="draft_and_refine",
        title="one language model drafts, another refines (SysDPO-Sampling)",
        metric="exact match",
        system=system,
        training={"question": training},
        heldout={"question": heldout},
        preference=solved,
        success=solved,
        also={"draft is right": draft_is_right, "answer repeats the draft": answer_repeats_draft},
        show=show_texts,
        options={
            "objective": "sampling",
            "beta": 0.5,
            "nodes": {"draft": {"learning_rate": 5e-4}, "answer": {"learning_rate": 1e-3}},
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 32,
            "num_train_epochs": size.epochs[1],
            "logging_steps": 10,
            "eval_steps": 20,
        },
        candidates=DiverseBeamSearch(num_candidates=4, diversity_penalty=3.0, ngram_size=1),
    )


def solved(trace: Trace) -> numpy.ndarray:
    """1 for every right answer."""
    pairs = zip(trace["question"], trace["answer"], strict=True)
    return numpy.array([float(answer == sorted_letters.solve(question)) for question, answer in pairs])


def draft_is_right(trace: Trace) -> numpy.ndarray:
    pairs = zip(trace["question"], trace["draft"], strict=True)
    return numpy.array([float(draft == sorted_letters.solve(question)) for question, draft in pairs])


def answer_repeats_draft(trace: Trace) -> numpy.ndarray:
    return numpy.array([float(a == b) for a, b in zip(trace["draft"], trace["answer"], strict=True)])


def show_texts(before: Trace, after: Trace, folder: Path, questions: int = 20) -> None:
    """The first run of a few held-out questions, before and after, as a table."""
    rows = [before["question"].index(question) for question in dict.fromkeys(before["question"])][:questions]
    lines = ["question  solution  | before: draft, answer        | after: draft, answer"]
    for row in rows:
        question = before["question"][row]
        right = sorted_letters.solve(question)
        sides = []
        for trace in (before, after):
            answer = trace["answer"][row]
            sides.append(f"{trace['draft'][row]:10s} {answer:10s} {'right' if answer == right else 'wrong'}")
        lines.append(f"{question:9s} {right:9s} | {sides[0]:28s} | {sides[1]}")
    (folder / "samples.txt").write_text("\n".join(lines) + "\n")
