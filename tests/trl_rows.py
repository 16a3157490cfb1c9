"""What TRL's own preprocessing makes of preference rows, and whether sysdag scores the same tokens as well as it."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from tiny import llama
from tokenizer_families import FAMILIES, Family, rows_of
from trl import DPOTrainer
from trl.data_utils import common_prefix_length

from sysdag.components import CausalLM


def prepared(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, as `DPOTrainer` tokenises them."""
    datasets.disable_progress_bars()
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    made = DPOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, args, "rows")
    return list(made)


def expected(family: Family) -> list[tuple[Any, Any, list[int], int]]:
    """Prompt, completion, the tokens of both by TRL, and where among them the completion begins.

    TRL lets both sides of a row begin where the first of them does; here each begins where its own tokens part from the
    prompt's. What stands behind the token that ends the answer is left out: a model has stopped there. So is what the
    tokenizer puts behind every text, which TRL leaves at the end of prompts.
    """
    tokenizer, found = family.tokenizer, []
    rows = rows_of(family)
    for row, made in zip(rows, prepared(tokenizer, rows), strict=True):
        if family.is_chat:
            alone = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        else:
            alone = tokenizer(row["prompt"])["input_ids"]
            alone = alone[: len(alone) - family.behind]
        for side in ("chosen", "rejected"):
            whole = made["prompt_ids"] + made[f"{side}_ids"]
            start = common_prefix_length(alone, whole)
            end = None if family.end is None else tokenizer.convert_tokens_to_ids(family.end)
            stop = len(whole) if end is None else whole.index(end, start) + 1
            if stop > start:  # an empty answer of a template that ends no turn has nothing to score, and is refused
                found.append((row["prompt"], row[side], whole[:stop], start))
    return found


def language_model(family: Family, **options: Any) -> CausalLM:
    """A tiny model for the family's tokenizer that ends where the family's models do."""
    size = len(family.tokenizer)
    model = llama(vocab_size=size, max_position_embeddings=512, hidden_size=16, intermediate_size=16)
    model.generation_config.eos_token_id = family.end_ids
    return CausalLM(model, family.tokenizer, max_new_tokens=200, **options)


@functools.cache
def compared(name: str) -> tuple[int, list[str]]:
    """How many completions of a family were compared with TRL's tokens, and those that differ; likewise their score."""
    family = next(family for family in FAMILIES if family.name == name)
    lm, cases = language_model(family), expected(family)
    prompts = [prompt for prompt, *_ in cases]
    draws = lm.in_context(prompts, lm.observe([completion for _, completion, *_ in cases]))
    wrong = []
    for (prompt, completion, whole, start), draw in zip(cases, draws, strict=True):
        ids = lm.prompt_ids([prompt])[0]
        ids = ids[: len(ids) - draw.record.get("prompt_overlap", 0)]
        if (ids, list(draw.record["token_ids"])) != (whole[:start], whole[start:]):
            wrong.append(
                f"{prompt!r} {completion!r}: {[*ids, '|', *draw.record['token_ids']]}, not {whole} from {start}"
            )
    scores = lm.log_prob(prompts[:4], draws[:4]).tolist()
    for case, score in zip(cases, scores, strict=False):
        if abs(score - forward(lm.module, *case[2:])) > 1e-4:
            wrong.append(f"{case[1]!r} scores {score}, not {forward(lm.module, *case[2:])}")
    return len(cases), wrong


@torch.no_grad()
def forward(model: Any, ids: list[int], start: int) -> float:
    """The log-probability of the tokens from `start` on, by the model's own logits."""
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(log_probs[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])].sum())
