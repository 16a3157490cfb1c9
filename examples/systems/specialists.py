"""question -> route -> one of two specialists: a mixture that runs the branch it takes, and no other.

A frozen encoder turns the question into features, and a `Categorical` picks a specialist. Both are LoRA adapters on one
loaded base model; the one that computes writes down its steps before it answers. The route is latent: p(answer) is the
sum over both branches, so the router learns from answers alone which specialist a question is for.

    python examples/systems/specialists.py --output aligned
    python examples/systems/specialists.py --output tried --offline
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

import torch
from peft import LoraConfig

from sysdag import DiverseBeamSearch, Input, System, node, switch
from sysdag.components import Categorical, CausalLM

ENCODER = os.environ.get("ENCODER", "sentence-transformers/all-MiniLM-L6-v2")
WRITER = os.environ.get("WRITER", "Qwen/Qwen2.5-0.5B-Instruct")
WIDTH = 384  # of the encoder's vectors


def specialist(max_new_tokens: int) -> CausalLM:
    """An adapter of its own on the base that all specialists share."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return CausalLM(WRITER, peft_config=lora, max_new_tokens=max_new_tokens)


@functools.cache
def encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(ENCODER), AutoModel.from_pretrained(ENCODER).eval()


question = Input("question", str)


@node
@torch.no_grad()
def features(question) -> list[float]:
    """The mean over the question's tokens, of length 1."""
    tokenizer, model = encoder()
    vector = model(**tokenizer(question, truncation=True, return_tensors="pt")).last_hidden_state[0].mean(0)
    return torch.nn.functional.normalize(vector.float(), dim=-1).tolist()


@node(Categorical(["compute", "tell"], WIDTH))
def route(features):
    return features


@node(specialist(max_new_tokens=48))
def steps(question):
    return [{"role": "user", "content": f"Write down the steps that solve this, without solving it: {question}"}]


@node(specialist(max_new_tokens=24))
def compute(question, steps):
    return [{"role": "user", "content": f"{question}\nSteps: {steps}\nThe answer in one sentence:"}]


@node(specialist(max_new_tokens=24))
def tell(question):
    return [{"role": "user", "content": f"Answer in one sentence: {question}"}]


answer = switch(route, {"compute": steps >> compute, "tell": tell}, name="answer")
system = System(question >> features >> route, question >> [steps, compute, tell], answer)

ANSWERS = {
    "What is two plus two?": "Two plus two is four.",
    "What is three times five?": "Three times five is fifteen.",
    "How many legs have three dogs?": "Three dogs have twelve legs.",
    "Who wrote Hamlet?": "William Shakespeare wrote Hamlet.",
    "What is the capital of Peru?": "The capital of Peru is Lima.",
    "What do bees make?": "Bees make honey.",
}


def score(run: Mapping[str, Any]) -> float:
    """How much of the wanted answer's text the answer has, from 0 to 1."""
    return SequenceMatcher(None, run["answer"].lower(), ANSWERS[run["question"]].lower()).ratio()


INPUTS = {"question": list(ANSWERS)}
TRAINING = {
    "objective": "sampling",
    "beta": 0.1,
    "learning_rate": 5e-5,
    "nodes": {"route": {"learning_rate": 1e-2}},
}
CANDIDATES = DiverseBeamSearch(num_candidates=4)

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [ENCODER, WRITER])
