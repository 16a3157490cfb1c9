"""think -> answer: one model reasons and answers; the answer is judged, and the reasoning is summed over.

A reasoning model writes `<think> ... </think>` and then its answer, as one completion. `split` makes two variables of
it. Only the question and two answers of a pair are looked at, so the system is aligned with SysDPO-Sampling: what is
compared is the probability of an answer after whatever reasoning.

    python examples/systems/think_answer.py --output aligned             # sample, judge, train, save
    python examples/systems/think_answer.py --output tried --offline     # the same on a tiny stand-in
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from sysdag import Input, MonteCarlo, System, split
from sysdag.components import CausalLM

SOLVER = os.environ.get("SOLVER", "Qwen/Qwen3-0.6B")

question = Input("question", str)


@split(
    CausalLM(SOLVER, peft_config=LoraConfig(r=16, target_modules="all-linear"), max_length=448),
    reasoning="</think>",
    answer=None,
    max_new_tokens={"reasoning": 192, "answer": 64},
)
def solve(question):
    return [{"role": "user", "content": f"Answer in one short sentence. {question}"}]


system = System(question >> solve)


def score(run: Mapping[str, Any]) -> float:
    """Short answers are wanted: minus their length, and no answer is worst."""
    return -len(run["answer"]) if run["answer"].strip() else -1000.0


INPUTS = {
    "question": [
        "Which is heavier, a litre of oil or a litre of water?",
        "A train leaves at 14:50 and arrives at 16:05. How long does it take?",
        "Which weekday is it 100 days after a Monday?",
        "How many sides do three triangles and two squares have?",
        "Is 91 a prime number?",
        "Two pens cost 1.10, and one costs 1 more than the other. What does the cheaper one cost?",
    ]
}
TRAINING = {"objective": "sampling", "beta": 0.1, "learning_rate": 5e-5}
CANDIDATES = MonteCarlo(num_candidates=4)

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [SOLVER])
