"""The systems of the real study: one pretrained model under all nodes, an adapter of its own for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from sysdag import Input, System, loop, node
from sysdag.components import CausalLM

RANK, ALPHA = 8, 16
question, note, given_draft = Input("question", str), Input("note", str), Input("draft", str)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "You follow instructions."}, {"role": "user", "content": text}]


@node(CausalLM("unset"))
def draft(question):
    return said(f"Write a short draft of an answer.\n{question}")


@node(CausalLM("unset"))
def answer(question, draft):
    return said(f"{question}\n\nA draft of an answer: {draft}\n\nWrite the final answer.")


@node(CausalLM("unset"), name="draft")
def careful_draft(question):
    return said(
        f"Think of what is asked for, and of all that it demands. Write a short draft of an answer.\n{question}"
    )


@node(CausalLM("unset"), name="answer")
def careful_answer(question, draft):
    return said(
        f"{question}\n\nA draft of an answer, which may be wrong: {draft}\n\nCheck the draft against the instruction, "
        "mend what it lacks, and write only the final answer, clear and correct."
    )


@node(CausalLM("unset"), name="answer")
def only_answer(question):
    return said(question)


@node(CausalLM("unset"), name="draft")
def summary(note):
    return said(f"Sum up in one sentence, with place, day and numbers:\n{note}")


@node(CausalLM("unset"), name="answer")
def told(question, draft):
    return said(f"The news: {draft}\n\n{question}")


@node(CausalLM("unset"))
def critic(question, draft):
    return said(f"Instruction: {question}\nAnswer: {draft}\nSay in one sentence what the answer lacks.")


@node(CausalLM("unset"))
def rewrite(question, draft, critic):
    return said(f"{question}\n\nA draft of an answer: {draft}\nWhat it lacks: {critic}\n\nWrite the final answer.")


OUTLINES = {
    "draft -> refine": System(question >> draft, (question & draft) >> answer),
    "careful": System(question >> careful_draft, (question & careful_draft) >> careful_answer),
    "one node": System(question >> only_answer),
    "drafter": System(question >> draft),
    "refiner": System((question & given_draft) >> answer),
    "summarise -> rewrite": System(note >> summary, (question & summary) >> told),
    "summariser": System(note >> summary),
    "writer": System((question & given_draft) >> told),
}


def critic_loop(rounds: int) -> System:
    """Generator, then so often a critic and a generator that reads it; one critic and one rewriter for all rounds."""
    feedback = loop(critic >> rewrite, carry={"draft": rewrite}, times=rounds)
    return System(question >> draft, (question & draft) >> critic, (question & draft) >> rewrite, feedback)


def load(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(name)


pretrained = cache(load)  # for all systems of a process


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted(
    outline: System,
    name: str,
    device: str,
    lengths: Mapping[str, int],
    seed: int,
    loads: Callable[[str, str], tuple[Any, Any]] = pretrained,
) -> System:
    """The outline on one loaded model, with an adapter for each base name.

    Args:
        lengths: most new tokens, by base name.
        seed: of the adapters' start.
        loads: gives model and tokenizer.
    """
    model, tokenizer = loads(name, device)
    components: dict[str, CausalLM] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for each in outline.nodes:
            if each.is_random and each.base_name not in components:
                made = CausalLM(model, tokenizer, peft_config=lora(), max_new_tokens=lengths[each.base_name])
                components[each.base_name] = made
    return outline.with_components({n.name: components[n.base_name] for n in outline.nodes if n.is_random})
