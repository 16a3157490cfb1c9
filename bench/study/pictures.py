"""LLM -> three captions -> diffusion -> three images: are they in the order that was asked, and evenly spaced?

The captioner has seen two styles of prompt, a plain one and a careful one (`please`) whose demonstrations keep the
order more often. Preferences come from the world's annotator; figures come from its measuring judge, which no training
sees.
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
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from bench.study.training import Curve, ranked_pairs, runs, shared, train
from bench.study.worlds import WORLDS, World
from examples import digits_in_order
from examples.tasks.base_models import fit, train_language_model, word_tokenizer
from examples.tasks.ordered_digits import (
    ADJECTIVES,
    ASCENDING,
    ASKED,
    DESCENDING,
    PLACES,
    SEPARATOR,
    VERBS,
    is_ascending,
)
from sysdag import Input, System, Trace, node
from sysdag.components import CausalLM, Diffusion

VERSION = 1
NODES = ("text", "image")
CAREFUL = "please"
METHODS = (
    "before", "prompting", "best of 4", "only the LLM", "only the diffusion model", "separate", "stage by stage",
    "joint", "joint, LoRA",
)  # fmt: skip
UNTRAINED = {"before": ("", 1), "prompting": (CAREFUL, 1), "best of 4": ("", 4)}
PARTS = {"only the LLM": ["text"], "only the diffusion model": ["image"], "joint": NODES, "joint, LoRA": NODES}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything: base training, prompts, optimizer steps, runs of a training prompt, pairs of them."""

    caption_steps: int = 1000
    diffusion_steps: int = 600
    training: int = 240
    validation: int = 80
    heldout: int = 200
    steps: int = 120
    every: int = 12
    runs: int = 6
    pairs: int = 2
    denoising_steps: int = 10


SIZES = {
    "full": Size(),
    "quick": Size(
        caption_steps=60, diffusion_steps=30, training=12, validation=4, heldout=6, steps=2, every=1, runs=4,
        denoising_steps=2,
    ),
}  # fmt: skip
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


def train_painter(folder: Path, world: World, seed: int, steps: int, batch_size: int = 96) -> None:
    """A small UNet with its text encoder, from the world's captioned pictures."""
    torch.manual_seed(seed)
    rng = random.Random(f"painter-{seed}")
    words = list(world.words)
    tokenizer = word_tokenizer(words, max_length=4, end_captions=True)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=32,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    ).train()  # fmt: skip
    channels, side, _ = world.shape
    blocks = 1 if side == 8 else 3  # the deepest works on 4x4
    unet = UNet2DConditionModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(24, 48) if side == 8 else (16, 32, 48, 48),
        down_block_types=("DownBlock2D",) * blocks + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * blocks,
        cross_attention_dim=32, attention_head_dim=2,
    ).train()  # fmt: skip
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing",
        prediction_type="v_prediction",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        captions = [rng.choice(words) for _ in range(batch_size)]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        clean = torch.stack([world.illustration(word, rng) for word in captions])
        noise, times = torch.randn_like(clean), torch.randint(1000, (batch_size,))
        predicted = unet(scheduler.add_noise(clean, noise, times), times, encoder(ids).last_hidden_state).sample
        return nn.functional.mse_loss(predicted, scheduler.get_velocity(clean, noise, times))

    fit([*unet.parameters(), *encoder.parameters()], loss, steps, learning_rate=2e-3)
    for part, module in {"unet": unet.eval(), "text_encoder": encoder.eval()}.items():
        module.save_pretrained(folder / part)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")


def in_order(levels: Sequence[float], ascending: bool) -> float:
    """1 for exactly three pictures, each at least half a level beyond the one before."""
    steps = numpy.diff(levels) * (1 if ascending else -1)
    return float(len(levels) == ASKED and (steps > 0.5).all())


def preference_score(levels: Sequence[float], ascending: bool, span: int) -> float:
    """From -1 to 1: in order, 1 less the unevenness of the two gaps; out of order at most -0.5; else -1."""
    if len(levels) != ASKED:
        return -1.0
    first, second = numpy.diff(levels) * (1 if ascending else -1)
    if first > 0.5 and second > 0.5:
        return 1.0 - abs(first - second) / span
    return -0.5 if first > 0.5 or second > 0.5 else -1.0


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
        size = self.size
        drawn = random.Random(f"prompts-{self.seed}").sample(
            prompts(self.world), size.training + size.validation + size.heldout
        )
        ends = itertools.accumulate((size.training, size.validation, size.heldout))
        return {
            part: drawn[end - count : end]
            for part, end, count in zip(
                ("training", "validation", "heldout"), ends, (size.training, size.validation, size.heldout), strict=True
            )
        }

    def _folder(self, name: str, build: Callable[..., None], steps: int) -> Path:
        return shared(
            self.cache,
            f"{self.world_name}-{VERSION}-{name}-{self.seed}-{steps}",
            lambda folder: build(folder, self.world, self.seed, steps),
        )

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
            self._folder("captioner", train_captioner, self.size.caption_steps), max_new_tokens=8,
            peft_config=adapters.get("text"),
        )  # fmt: skip
        painter = Diffusion(
            self._folder("painter", train_painter, self.size.diffusion_steps), convention="diffusion-dpo",
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
            "order consistency": numpy.array([in_order(*run) for run in seen]),
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
        name = f"{self.world_name}-{VERSION}-runs-{self.seed}-{size.diffusion_steps}-{size.training}-{size.runs}.jsonl"
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
        """Two runs of every held-out prompt, each the annotator's favourite of `best_of`; figures by prompt."""
        trace = runs(system, {"prompt": self.prompts["heldout"]}, 2 * best_of, 23)
        if best_of > 1:
            liked = self.scores(trace, annotator=True)["preference score"].reshape(-1, best_of)
            trace = trace.select((liked.argmax(1) + best_of * numpy.arange(len(liked))).tolist())
        found = self.scores(trace, annotator=False)
        found["captions in order"] = (self.meant(trace["text"], trace["prompt"]) > 0).astype(float)
        found["three images"] = numpy.array([float(len(images) == ASKED) for images in trace["image"]])
        return {name: values.reshape(-1, 2).mean(1).tolist() for name, values in found.items()}


def align(cache: Path, *, world: str, method: str, seed: int, size: str, rate: float = 1.0) -> dict[str, Any]:
    """One method on one seed: held-out figures by prompt at the step that validation chose.

    Args:
        world: one of `bench.study.worlds.WORLDS`.
        method: one of `METHODS`.
        rate: factor on the learning rates; chosen by validation, with equal effort for every method.
    """
    setting = Setting(cache, world, seed, SIZES[size])
    if method in UNTRAINED:
        style, best_of = UNTRAINED[method]
        return {"heldout": setting.measured(setting.system(style), best_of), "curves": []}
    lora = method == "joint, LoRA"
    system = setting.system(lora=lora)

    def direct(trained: Sequence[str], share: float = 1.0) -> Curve:
        steps = max(1, round(setting.size.steps * share))
        return train(
            system, setting.pairs, options=options(trained, rate * (4.0 if lora else 1.0), steps),
            validate=setting.validate, seed=seed, every=setting.size.every,
        )  # fmt: skip

    if method == "stage by stage":
        curves = [direct(["text"], 0.5), direct(["image"], 0.5)]
    elif method == "separate":
        curves = separate(setting, system, rate)
    else:
        curves = [direct(PARTS[method])]
    return {"heldout": setting.measured(system), "curves": [curve.summary() for curve in curves]}


def options(trained: Sequence[str], rate: float, steps: int, nodes: Sequence[str] = NODES) -> dict[str, Any]:
    """Of `SysDPOConfig`: what trains, and how fast."""
    own = {"text": {"learning_rate": 5e-4 * rate}, "image": {"beta": 20.0, "learning_rate": 2.5e-4 * rate}}
    return {
        "objective": "direct", "beta": 0.3, "max_steps": steps,
        "nodes": {name: own[name] | {"trainable": name in trained} for name in nodes},
    }  # fmt: skip


def separate(setting: Setting, system: System, rate: float) -> list[Curve]:
    """Each model by its own DPO on preferences about its own outputs: the captioner's by what its words mean, the
    diffusion model's by whether an image shows what its caption means. Neither sees the other's training."""
    trace, world, seed = setting.base_runs, setting.world, setting.seed
    asked = setting.prompts["validation"]

    def of_text(trace: Trace, row: int, side: str) -> dict[str, Any]:
        return {side: trace.cells["text"][row]}

    texts = setting.rows(of_text, setting.meant(trace["text"], trace["prompt"]))
    writer = WRITER.with_components({"text": system["text"].component})

    def written(one: System) -> float:
        found = runs(one, {"prompt": asked}, 1, 17)
        return float(setting.meant(found["text"], found["prompt"]).mean())

    painter = PAINTER.with_components({"image": system["image"].component})
    words = list(world.words)

    def errors(found: Trace, annotator: bool) -> numpy.ndarray:
        kinds, meant = zip(*(world.words[word] for word in found["caption"]), strict=True)
        return numpy.abs(world.seen(kinds, found["image"], annotator) - numpy.array(meant))

    def painted(one: System) -> float:
        return -float(errors(runs(one, {"caption": words}, 4, 17), True).mean())

    drawn = runs(
        painter, {"caption": random.Random(seed).choices(words, k=setting.size.training)}, setting.size.runs, seed
    )
    found = ranked_pairs(drawn, -errors(drawn, True), setting.size.runs, setting.size.pairs)
    images = [
        {"caption": drawn["caption"][a], "chosen": drawn.cells["image"][a], "rejected": drawn.cells["image"][b]}
        for a, b in found
    ]
    curves = []
    for part, rows, validate in ((writer, texts, written), (painter, images, painted)):
        chosen = options(part.outputs, rate, setting.size.steps, part.outputs)
        curves.append(train(part, rows, options=chosen, validate=validate, seed=seed, every=setting.size.every))
    return curves
