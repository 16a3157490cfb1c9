"""Systems at the top level of a module, as a saved system needs them."""

from pathlib import Path

import torch
from tiny import char_tokenizer, llama

from sysdag import Input, System, node
from sysdag.components import CausalLM

question = Input("question")


@node(CausalLM("unset", "unset"), name="draft")
def draft_prompt(question):
    return f"q: {question} d:"


@node(CausalLM("unset", "unset"), name="answer")
def answer_prompt(question, draft):
    return f"q: {question} d: {draft} a:"


def two_llms(peft_config=None, base_folder: Path | None = None) -> System:
    """draft -> answer with the skip edge, each on a tiny Llama; the answer's optionally with an adapter."""
    source = llama(1)
    if base_folder is not None:
        source.save_pretrained(base_folder)
        source = base_folder
    outline = System(question >> draft_prompt, (question & draft_prompt) >> answer_prompt)
    return outline.with_components(
        {
            "draft": CausalLM(llama(0), char_tokenizer(), max_new_tokens=4),
            "answer": CausalLM(source, char_tokenizer(), max_new_tokens=4, peft_config=peft_config),
        }
    )


def single_run(row, side, column="output"):
    """One side of a pair as an unpaired row."""
    return {"question": row["question"], column: row[side], "label": side == "chosen",
            "intermediates": row[f"{side}_intermediates"]}  # fmt: skip


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.trained_parameters()])


def rows(count: int) -> list[dict]:
    """Preferences for drafts of vowels and answers of digits."""
    return [
        {
            "question": f"{chr(97 + i % 26)}{i % 7}",
            "chosen": f"{i % 10}",
            "rejected": f"b{i % 3}",
            "chosen_intermediates": {"draft": "aeiou"[i % 5]},
            "rejected_intermediates": {"draft": "xyz"[i % 3]},
        }
        for i in range(count)
    ]
