"""draft -> refine: one language model drafts an answer, another improves it with the question in view.

Wanted are answers in plain words. Only the question and two answers of a pair are looked at; drafts are latent, so the
system is aligned with SysDPO-Sampling.

    python examples/systems/draft_refine.py --output aligned             # sample, judge, train, save
    python examples/systems/draft_refine.py --output tried --offline     # the same on tiny stand-ins
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from sysdag import DiverseBeamSearch, Input, System, node
from sysdag.components import CausalLM

DRAFTER = os.environ.get("DRAFTER", "Qwen/Qwen2.5-0.5B-Instruct")
REFINER = os.environ.get("REFINER", "Qwen/Qwen2.5-1.5B-Instruct")
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

question = Input("question", str)


@node(CausalLM(DRAFTER, peft_config=LORA, max_new_tokens=96))
def draft(question):
    return [{"role": "user", "content": f"Draft a short answer.\n{question}"}]


@node(CausalLM(REFINER, peft_config=LORA, max_new_tokens=96))
def answer(question, draft):
    return [{"role": "user", "content": f"Question: {question}\nDraft: {draft}\nA better answer, in plain words:"}]


system = System(question >> draft, (question & draft) >> answer)


def score(run: Mapping[str, Any]) -> float:
    """Plain words are short ones: minus the mean length of the answer's words, and no answer is worst."""
    words = run["answer"].split()
    return -sum(map(len, words)) / len(words) if words else -100.0


INPUTS = {
    "question": [
        "Why is the sky blue?",
        "How does a vaccine work?",
        "What is inflation?",
        "Why do we dream?",
        "How do planes fly?",
        "What does a judge do?",
        "Why is the sea salty?",
        "How does a battery store energy?",
    ]
}
TRAINING = {"objective": "sampling", "beta": 0.1, "learning_rate": 5e-5}
CANDIDATES = DiverseBeamSearch(num_candidates=4, diversity_penalty=20.0, ngram_size=1)  # the paper's

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [DRAFTER, REFINER])
