"""Aligns draft -> answer, two language models, on one or many processes.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate/train.py \\
        --drafter org/drafter --refiner org/refiner --data preferences.jsonl --output aligned

The data are JSON lines with `question`, `chosen`, `rejected`; drafts are latent (SysDPO-Sampling).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig

from sysdag import DiverseBeamSearch, Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM

question = Input("question")


@node(CausalLM("unset"), name="draft")
def draft_prompt(question: str) -> str:
    return f"Draft an answer.\n{question}\n"


@node(CausalLM("unset"), name="answer")
def answer_prompt(question: str, draft: str) -> str:
    return f"Question: {question}\nDraft: {draft}\nImproved answer:\n"


def language_model(name: str, max_new_tokens: int) -> CausalLM:
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return CausalLM(name, max_new_tokens=max_new_tokens, peft_config=adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", required=True, help="a model's name on the Hub, or a folder")
    parser.add_argument("--refiner", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", default="aligned")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch", type=int, default=4, help="pairs for each process")
    parser.add_argument("--use-cpu", action="store_true")
    given = parser.parse_args()
    outline = System(question >> draft_prompt, (question & draft_prompt) >> answer_prompt)
    system = outline.with_components(
        {
            "draft": language_model(given.drafter, given.max_new_tokens),
            "answer": language_model(given.refiner, given.max_new_tokens),
        }
    )
    pairs: list[dict[str, Any]] = [json.loads(line) for line in given.data.read_text().splitlines()]
    args = SysDPOConfig(
        output_dir=given.output, objective="sampling", beta=0.1, learning_rate=1e-5, max_steps=given.max_steps,
        per_device_train_batch_size=given.batch, save_strategy="no", report_to=[], use_cpu=given.use_cpu,
    )  # fmt: skip
    candidates = DiverseBeamSearch(num_candidates=4)
    trainer = SysDPOTrainer(model=system, args=args, candidates=candidates, train_dataset=pairs)
    trainer.train()
    trainer.save_model(given.output)


if __name__ == "__main__":
    main()
