"""idea -> caption -> image -> critique: a vision-language model looks at what a diffusion model drew.

A language model writes the prompt of a diffusion model, and a vision-language model says what it sees. Wanted are
pictures in which it finds the idea again. All three are trained together from preferences about the critique alone
(SysDPO-Direct); the image reaches the critic as the pixels that were drawn.

    python examples/systems/picture_critic.py --output aligned
    python examples/systems/picture_critic.py --output tried --offline
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from sysdag import Input, System, node
from sysdag.components import CausalLM, Diffusion, ImageTextToText

WRITER = os.environ.get("WRITER", "Qwen/Qwen2.5-0.5B-Instruct")
PAINTER = os.environ.get("PAINTER", "stable-diffusion-v1-5/stable-diffusion-v1-5")
CRITIC = os.environ.get("CRITIC", "llava-hf/llava-interleave-qwen-0.5b-hf")

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


@node(
    ImageTextToText(
        CRITIC,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o)_proj"),
        max_new_tokens=60,
    )
)
def critique(image):
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Say in a few words what this shows."}]
    return [{"role": "user", "content": parts}]


system = System(idea >> caption >> image >> critique)


def score(run: Mapping[str, Any]) -> float:
    """How much of the idea the critique finds in the picture: the share of letters that match, in [0, 1]."""
    return difflib.SequenceMatcher(None, run["idea"], run["critique"].lower()).ratio()


INPUTS = {
    "idea": [
        f"{what} {when}"
        for what in ("a lighthouse", "a market square", "a mountain hut", "a harbour")
        for when in ("at night", "at noon")
    ]
}
# The scale of a diffusion model's score is another than that of language models': it has a beta of its own.
TRAINING = {
    "objective": "direct",
    "beta": 0.1,
    "nodes": {
        "image": {"beta": 2000.0, "learning_rate": 1e-5},
        "caption": {"learning_rate": 5e-5},
        "critique": {"learning_rate": 5e-5},
    },
}
CANDIDATES = None

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [WRITER, PAINTER, CRITIC])
