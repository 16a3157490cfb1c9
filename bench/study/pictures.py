"""LLM -> three captions -> diffusion -> three images: are they in the order that was asked, and evenly spaced?

Preferences come from the world's annotator; figures come from its measuring judge, which no training sees.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from bench.study import illustrated
from bench.study.illustrated import CAREFUL, PAINTER, SIZES, WRITER, Setting, Size
from bench.study.training import Curve, ranked_pairs, runs, train
from sysdag import System, Trace

VERSION = illustrated.VERSION
NODES = ("text", "image")
METHODS = (
    "before", "prompting", "best of 4", "only the LLM", "only the diffusion model", "separate", "stage by stage",
    "joint", "joint, LoRA",
)  # fmt: skip
UNTRAINED = {"before": ("", 1), "prompting": (CAREFUL, 1), "best of 4": ("", 4)}
PARTS = {"only the LLM": ["text"], "only the diffusion model": ["image"], "joint": NODES, "joint, LoRA": NODES}


def align(
    cache: Path,
    *,
    world: str,
    method: str,
    seed: int,
    size: str,
    rate: float = 1.0,
    times_pairs: int = 1,
    times_steps: int = 1,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One method on one seed: held-out figures by prompt at the step that validation chose.

    Args:
        world: one of `bench.study.worlds.WORLDS`.
        method: one of `METHODS`.
        rate: factor on the learning rates; chosen by validation, with equal effort for every method.
        times_pairs: factor on the pairs of an optimizer step.
        times_steps: factor on the optimizer steps, and on those between two validations.
        factors: on the learning rates of single nodes.
    """
    usual = SIZES[world, size]
    longer = {"steps": usual.steps * times_steps, "every": usual.every * times_steps}
    setting = Setting(cache, world, seed, replace(usual, batch=usual.batch * times_pairs, **longer))
    if method in UNTRAINED:
        style, best_of = UNTRAINED[method]
        return {"heldout": setting.measured(setting.system(style), best_of), "curves": []}
    lora = method == "joint, LoRA"
    system = setting.system(lora=lora)

    def direct(trained: Sequence[str], share: float = 1.0) -> Curve:
        return train(
            system, setting.pairs,
            options=options(setting.size, trained, rate * (4.0 if lora else 1.0), share, factors=factors),
            validate=setting.validate, seed=seed, every=setting.size.every,
        )  # fmt: skip

    if method == "stage by stage":
        curves = [direct(["text"], 0.5), direct(["image"], 0.5)]
    elif method == "separate":
        curves = separate(setting, system, rate)
    else:
        curves = [direct(PARTS[method])]
    return {"heldout": setting.measured(system), "curves": [curve.summary() for curve in curves]}


def options(
    size: Size,
    trained: Sequence[str],
    rate: float,
    share: float = 1.0,
    nodes: Sequence[str] = NODES,
    factors: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Of `SysDPOConfig`: what trains, how fast, and for which share of the size's steps."""
    own = factors or {}
    rates = {name: usual * rate * own.get(name, 1.0) for name, usual in {"text": 5e-4, "image": 2.5e-4}.items()}
    betas = {"image": {"beta": 20.0}}
    return {
        "objective": "direct", "beta": 0.3, "max_steps": max(1, round(size.steps * share)),
        "per_device_train_batch_size": size.batch,
        "nodes": {
            name: {"learning_rate": rates[name], "trainable": name in trained} | betas.get(name, {}) for name in nodes
        },
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
        chosen = options(setting.size, part.outputs, rate, nodes=part.outputs)
        curves.append(train(part, rows, options=chosen, validate=validate, seed=seed, every=setting.size.every))
    return curves
