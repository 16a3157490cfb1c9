"""What the study's systems of pictures have in common: base models, prompts, runs, preferences, scores.

The captioner has seen two styles of prompt, a plain one and a careful one (`please`) whose demonstrations keep the
order more often.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from peft import LoraConfig
from torch import Tensor

from bench.study import task
from bench.study.training import favourites, ranked_pairs, runs, shared
from bench.study.worlds import WORLDS, World
from examples import digits_in_order
from examples.tasks.base_models import train_autoencoder, train_diffusion_model, train_language_model, word_tokenizer
from examples.tasks.ordered_digits import (
    ADJECTIVES,
    ASCENDING,
    ASKED,
    DESCENDING,
    PLACES,
    SEPARATOR,
    VERBS,
    in_order,
    is_ascending,
    preference_score,
)
from sysdag import Input, System, Trace, node
from sysdag.components import CausalLM, Diffusion

VERSION = 2
CAREFUL = "please"


@dataclass(frozen=True, kw_only=True)
class Size(task.Size):
    """How much of everything; `base_steps` are the captioner's, `batch` the pairs of an optimizer step."""

    diffusion_steps: int
    denoising_steps: int
    eye_steps: int = 400
    batch: int = 16
    heldout_runs: int = 2


QUICK = Size(
    base_steps=60, diffusion_steps=30, training=12, validation=4, heldout=6, steps=2, every=1, runs=4,
    denoising_steps=2, eye_steps=20,
)  # fmt: skip
SIZES = {
    ("digits", "full"): Size(
        base_steps=1000, diffusion_steps=600, validation=80, steps=96, every=16, denoising_steps=8
    ),
    ("shapes", "full"): Size(
        base_steps=1000, diffusion_steps=800, validation=80, steps=96, every=16, denoising_steps=8
    ),
    ("digits", "quick"): QUICK,
    ("shapes", "quick"): QUICK,
}
caption = Input("caption")


@node(CausalLM("unset"), name="text")
def careful_text(prompt):
    return f"{CAREFUL} {prompt} :"


@node(Diffusion("unset"), name="image")
def one_image(caption):
    return caption


prompt = Input("prompt")
OUTLINE = digits_in_order.system
CAREFUL_OUTLINE = System(
    prompt >> careful_text >> digits_in_order.captions, digits_in_order.captions.each() >> digits_in_order.image
)
WRITER = System(prompt >> digits_in_order.text)
PAINTER = System(caption >> one_image)


def prompts(world: World) -> list[str]:
    parts = itertools.product(VERBS, ADJECTIVES, world.kinds, ASCENDING + DESCENDING, PLACES)
    return [f"{verb} three {adjective} {kind} {order} {place}" for verb, adjective, kind, order, place in parts]


def demonstration(world: World, asked: str, careful: bool, rng: random.Random) -> str:
    """Three captions of different levels in a dialect picked at random: in the asked order, or with probability 0.35
    (0.2 with care) in any."""
    levels = sorted(rng.sample(range(world.levels), ASKED), reverse=not is_ascending(asked))
    if rng.random() < (0.2 if careful else 0.35):
        rng.shuffle(levels)
    kind = world.kind_of(asked)
    return f" {SEPARATOR} ".join(rng.choice(world.synonyms[kind, level]) for level in levels)


def train_captioner(folder: Path, world: World, seed: int, steps: int) -> None:
    asked = prompts(world)
    words = [*sorted({word for one in asked for word in one.split()}), CAREFUL, ":", SEPARATOR, *world.words]

    def demonstrate(rng: random.Random) -> tuple[str, str]:
        one, careful = rng.choice(asked), rng.random() < 0.5
        written = f"{CAREFUL} {one} :" if careful else f"{one} :"
        return written, demonstration(world, one, careful, rng)

    train_language_model(folder, word_tokenizer(words, max_length=64), demonstrate, seed=seed, steps=steps)


def train_eye(folder: Path, world: World, seed: int, steps: int) -> None:
    """The autoencoder of a world that is painted in latents."""
    words = list(world.words)

    def draw(rng: random.Random) -> Tensor:
        return world.illustration(rng.choice(words), rng)

    train_autoencoder(folder, draw, channels=world.autoencoder, seed=seed, steps=steps)


@dataclass(frozen=True)
class Setting:
    """One seed's models, prompts and preferences in one world."""

    cache: Path
    world_name: str
    seed: int
    size: Size

    @cached_property
    def world(self) -> World:
        return WORLDS[self.world_name](self.seed)

    @cached_property
    def prompts(self) -> dict[str, list[str]]:
        """Disjoint prompts to train on, to choose by, and to measure on."""
        drawn = random.Random(f"prompts-{self.seed}").sample(prompts(self.world), self.size.prompts)
        return self.size.divided(drawn)

    def _folder(self, name: str, build: Callable[[Path, World, int, int], None], steps: int) -> Path:
        return shared(
            self.cache,
            f"{self.world_name}-{VERSION}-{name}-{self.seed}-{steps}",
            lambda folder: build(folder, self.world, self.seed, steps),
        )

    def _train_painter(self, folder: Path, world: World, seed: int, steps: int) -> None:
        eye = self._folder("eye", train_eye, self.size.eye_steps) if world.autoencoder else None
        train_diffusion_model(
            folder, list(world.words), world.illustration, channels=world.channels, seed=seed, steps=steps,
            batch_size=64, autoencoder=eye,
        )  # fmt: skip

    def system(self, style: str = "", lora: bool = False) -> System:
        """On base models of its own."""
        adapters: dict[str, Any] = {}
        if lora:
            adapters = {
                "text": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
                "image": LoraConfig(
                    r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
                ),
            }  # fmt: skip
        writer = CausalLM(
            self._folder("captioner", train_captioner, self.size.base_steps), max_new_tokens=8,
            peft_config=adapters.get("text"),
        )  # fmt: skip
        painter = Diffusion(
            self._folder("painter", self._train_painter, self.size.diffusion_steps), convention="diffusion-dpo",
            num_inference_steps=self.size.denoising_steps, train_text_encoder=not lora,
            peft_config=adapters.get("image"),
        )  # fmt: skip
        outline = CAREFUL_OUTLINE if style else OUTLINE
        return outline.with_components({"text": writer, "image": painter})

    def levels(self, trace: Trace, annotator: bool) -> list[list[float]]:
        """What each run's pictures show."""
        kinds = [
            self.world.kind_of(one) for one, images in zip(trace["prompt"], trace["image"], strict=True) for _ in images
        ]
        flat = [image for images in trace["image"] for image in images]
        seen = iter(self.world.seen(kinds, flat, annotator) if flat else ())
        return [[float(next(seen)) for _ in images] for images in trace["image"]]

    def scores(self, trace: Trace, annotator: bool) -> dict[str, numpy.ndarray]:
        ascending = [is_ascending(one) for one in trace["prompt"]]
        seen = list(zip(self.levels(trace, annotator), ascending, strict=True))
        return {
            "order consistency": numpy.array([float(in_order(*run)) for run in seen]),
            "preference score": numpy.array([preference_score(*run, self.world.levels - 1) for run in seen]),
        }

    def meant(self, texts: Sequence[str], asked: Sequence[str]) -> numpy.ndarray:
        """Preference score of captions alone, by what their words mean."""
        found = []
        for text, one in zip(texts, asked, strict=True):
            meanings = [self.world.words.get(word.strip(), ("", 0)) for word in text.split(SEPARATOR)]
            levels = [level for kind, level in meanings if kind == self.world.kind_of(one)]
            found.append(preference_score(levels, is_ascending(one), self.world.levels - 1))
        return numpy.array(found)

    @cached_property
    def base_runs(self) -> Trace:
        """Runs of the base system that preferences are made of."""

        def build(file: Path) -> None:
            runs(self.system(), {"prompt": self.prompts["training"]}, self.size.runs, self.seed).to_jsonl(file)

        size = self.size
        steps = f"{size.base_steps}-{size.diffusion_steps}-{size.denoising_steps}"
        name = f"{self.world_name}-{VERSION}-runs-{self.seed}-{steps}-{size.training}-{size.runs}.jsonl"
        return Trace.from_jsonl(shared(self.cache, name, build))

    def rows(
        self, columns: Callable[[Trace, int, str], Mapping[str, Any]], scores: numpy.ndarray
    ) -> list[dict[str, Any]]:
        """Dataset rows of the base runs, ranked by `scores`; `columns` gives those of one side."""
        found = ranked_pairs(self.base_runs, scores, self.size.runs, self.size.pairs)
        return [
            {
                "prompt": self.base_runs["prompt"][chosen],
                **columns(self.base_runs, chosen, "chosen"),
                **columns(self.base_runs, rejected, "rejected"),
            }
            for chosen, rejected in found
        ]

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """Preferences about whole runs, everything observed."""

        def columns(trace: Trace, row: int, side: str) -> dict[str, Any]:
            return {side: trace.cells["image"][row], f"{side}_intermediates": {"text": trace.cells["text"][row]}}

        return self.rows(columns, self.scores(self.base_runs, annotator=True)["preference score"])

    def validate(self, system: System) -> float:
        trace = runs(system, {"prompt": self.prompts["validation"]}, 1, 17)
        return float(self.scores(trace, annotator=True)["preference score"].mean())

    def measured(self, system: System, best_of: int = 1) -> dict[str, Any]:
        """A few runs of every held-out prompt, each the annotator's favourite of `best_of`; figures by prompt."""
        times = self.size.heldout_runs
        trace = runs(system, {"prompt": self.prompts["heldout"]}, times * best_of, 23)
        if best_of > 1:
            trace = favourites(trace, self.scores(trace, annotator=True)["preference score"], best_of)
        found = self.scores(trace, annotator=False)
        found["captions in order"] = (self.meant(trace["text"], trace["prompt"]) > 0).astype(float)
        found["three images"] = numpy.array([float(len(images) == ASKED) for images in trace["image"]])
        return {name: values.reshape(-1, times).mean(1).tolist() for name, values in found.items()}
