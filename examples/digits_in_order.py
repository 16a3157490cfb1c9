"""A language model captions three images, a diffusion model draws them: the system of the paper's first experiment.

Aligned with SysDPO-Direct: the captions and the images of both runs of a pair are observed.
"""

from __future__ import annotations

from pathlib import Path

from examples.tasks.ordered_digits import SEPARATOR
from sysdag import Input, System, node
from sysdag.components import CausalLM, Diffusion


def writer(folder: str | Path = "captioner") -> CausalLM:
    return CausalLM(folder, max_new_tokens=8)


def illustrator(folder: str | Path = "illustrator", num_inference_steps: int = 10) -> Diffusion:
    return Diffusion(
        folder, num_inference_steps=num_inference_steps, convention="diffusion-dpo", train_text_encoder=True
    )


prompt = Input("prompt")


@node(writer())
def text(prompt):
    """The language model's prompt."""
    return f"{prompt} :"


@node
def captions(text) -> list:
    """Deterministic: one caption an image."""
    return [caption.strip() for caption in text.split(SEPARATOR)]


@node(illustrator())
def image(captions):
    """The diffusion model's prompt: one caption, it runs once for each."""
    return captions


system = System(prompt >> text >> captions, captions.each() >> image)


def build(language_model: Path, diffusion_model: Path, num_inference_steps: int = 10) -> System:
    """The system on the models in these folders."""
    return system.with_components(
        {"text": writer(language_model), "image": illustrator(diffusion_model, num_inference_steps)}
    )
