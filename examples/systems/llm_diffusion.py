"""idea -> caption -> image: a language model writes the prompt of a diffusion model.

Wanted are dark pictures of nights and bright ones of noons. Captions and images of both runs are observed, so the
system is aligned with SysDPO-Direct; the diffusion model's bound on the likelihood stands in the same sigmoid as the
language model's exact one.

    python examples/systems/llm_diffusion.py --output aligned
    python examples/systems/llm_diffusion.py --output tried --offline
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy
from peft import LoraConfig

from sysdag import Input, System, node
from sysdag.components import CausalLM, Diffusion

WRITER = os.environ.get("WRITER", "Qwen/Qwen2.5-0.5B-Instruct")
PAINTER = os.environ.get("PAINTER", "stable-diffusion-v1-5/stable-diffusion-v1-5")

idea = Input("idea", str)


@node(
    CausalLM(
        WRITER,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_new_tokens=60,
    )
)
def caption(idea):
    return [{"role": "user", "content": f"Describe a photograph of {idea} in one sentence."}]


@node(
    Diffusion(
        PAINTER,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
        convention="diffusion-dpo",
        guidance_scale=7.5,
        num_inference_steps=25,
    )
)
def image(caption):
    return caption


system = System(idea >> caption >> image)


def score(run: Mapping[str, Any]) -> float:
    """Mean brightness in [0, 1], turned round where the idea is of a night."""
    brightness = float(numpy.asarray(run["image"], dtype=float).mean()) / 255
    return 1 - brightness if "night" in run["idea"] else brightness


INPUTS = {
    "idea": [
        f"{what} {when}"
        for what in ("a lighthouse", "a market square", "a mountain hut", "a harbour")
        for when in ("at night", "at noon")
    ]
}
# A diffusion model's score is a mean over pixels, a language model's a sum over tokens: each has a beta of its own.
TRAINING = {
    "objective": "direct",
    "beta": 0.1,
    "nodes": {"image": {"beta": 2000.0, "learning_rate": 1e-5}, "caption": {"learning_rate": 5e-5}},
}
CANDIDATES = None

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [WRITER, PAINTER])
