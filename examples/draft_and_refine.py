"""One language model drafts, another refines: the system of the paper's second experiment.

Aligned with SysDPO-Sampling: only the question and the two answers of a pair are known, the drafts are latent. The
refiner reads the question too, so there is a skip edge.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig

from sysdag import Input, System, node
from sysdag.components import CausalLM


def drafter(folder: str | Path = "drafter") -> CausalLM:
    return CausalLM(folder, max_new_tokens=8)


def refiner(folder: str | Path = "refiner") -> CausalLM:
    """Trains through a LoRA adapter."""
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return CausalLM(folder, max_new_tokens=8, peft_config=adapter)


question = Input("question")


@node(drafter())
def draft(question):
    """The drafter's prompt."""
    return f"{question}:"


@node(refiner())
def answer(question, draft):
    """The refiner's prompt."""
    return f"{question},{draft}:"


system = System(question >> draft, (question & draft) >> answer)


def build(drafter_folder: Path, refiner_folder: Path) -> System:
    """The system on the models in these folders."""
    return system.with_components({"draft": drafter(drafter_folder), "answer": refiner(refiner_folder)})
