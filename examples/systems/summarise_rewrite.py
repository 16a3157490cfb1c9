"""summarise -> rewrite: an encoder-decoder sums a report up, a language model says it plainly.

Wanted are answers in plain words. Only the report and two answers of a pair are looked at; summaries are latent, so the
system is aligned with SysDPO-Sampling, and its candidates are beams of the encoder-decoder.

    python examples/systems/summarise_rewrite.py --output aligned             # sample, judge, train, save
    python examples/systems/summarise_rewrite.py --output tried --offline     # the same on tiny stand-ins
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from sysdag import DiverseBeamSearch, Input, System, node
from sysdag.components import CausalLM, Seq2Seq

SUMMARISER = os.environ.get("SUMMARISER", "google/flan-t5-small")
WRITER = os.environ.get("WRITER", "Qwen/Qwen2.5-0.5B-Instruct")

report = Input("report", str)


@node(Seq2Seq(SUMMARISER, peft_config=LoraConfig(r=16, task_type="SEQ_2_SEQ_LM"), max_new_tokens=64))
def summary(report):
    return f"summarize: {report}"


@node(CausalLM(WRITER, peft_config=LoraConfig(r=16, target_modules="all-linear"), max_new_tokens=96))
def answer(summary):
    return [{"role": "user", "content": f"Say this in plain words.\n{summary}"}]


system = System(report >> summary >> answer)


def score(run: Mapping[str, Any]) -> float:
    """Plain words are short ones: minus the mean length of the answer's words, and no answer is worst."""
    words = run["answer"].split()
    return -sum(map(len, words)) / len(words) if words else -100.0


INPUTS = {
    "report": [
        "The council met on Monday and put off the vote on the new bridge until spring.",
        "Heavy rain closed two roads in the valley; both are expected to open on Friday.",
        "The library has bought three hundred books with the money of last year's fair.",
        "A survey counted forty herons at the lake, twice as many as ten years ago.",
        "The bakery on the square closes for a week while its oven is repaired.",
        "Trains to the coast run every half hour again from the first of June.",
    ]
}
TRAINING = {"objective": "sampling", "beta": 0.1, "learning_rate": 5e-5}
CANDIDATES = DiverseBeamSearch(num_candidates=4, diversity_penalty=20.0)

if __name__ == "__main__":
    from whole_path import main

    outcome = main(__file__, [SUMMARISER, WRITER])
