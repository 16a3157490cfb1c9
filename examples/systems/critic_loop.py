"""draft -> (critic -> rewrite) x 2: a feedback loop, unrolled into visits that share their weights.

One language model plays every part: it drafts, criticises and rewrites. Wanted are summaries of about a dozen words.
Drafts and criticisms are latent; each visit is one factor of the likelihood under the same weights.

    python examples/systems/critic_loop.py --output aligned
    python examples/systems/critic_loop.py --output tried --offline
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from sysdag import Input, MonteCarlo, System, loop, node
from sysdag.components import CausalLM

WRITER = os.environ.get("WRITER", "Qwen/Qwen2.5-0.5B-Instruct")
ROUNDS = 2

writer = CausalLM(
    WRITER,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    max_new_tokens=64,
)
topic = Input("topic", str)


@node(writer)
def draft(topic):
    return [{"role": "user", "content": f"Sum up in a dozen words: {topic}"}]


@node(writer)
def critic(topic, draft):
    return [{"role": "user", "content": f"What is wrong with this summary of {topic}?\n{draft}"}]


@node(writer)
def rewrite(draft, critic):
    return [{"role": "user", "content": f"Summary: {draft}\nCriticism: {critic}\nA better summary in a dozen words:"}]


system = System(
    topic >> draft,
    loop((topic & draft) >> critic, (draft & critic) >> rewrite, carry={"draft": rewrite}, times=ROUNDS),
)


def score(run: Mapping[str, Any]) -> float:
    """Minus the distance from twelve words."""
    return -abs(len(run[f"rewrite[{ROUNDS - 1}]"].split()) - 12)


INPUTS = {
    "topic": ["the water cycle", "chess", "the French Revolution", "photosynthesis", "the tides", "double-entry books"]
}
TRAINING = {"objective": "sampling", "beta": 0.1, "learning_rate": 5e-5}
CANDIDATES = MonteCarlo(num_candidates=4)

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [WRITER])
