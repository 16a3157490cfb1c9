"""One optimisation step of a system against a straightforward implementation: time and peak memory.

    python -m bench step [--threads 2] [--repeats 5] [--csv]

Qwen2-shaped models with random weights: on a CPU of 4 layers, in fp32, prompts of 256 tokens, completions of 64; on a
GPU of Qwen2.5-0.5B's size, in bf16, prompts of 512, completions of 128. `two LLMs` is SysDPO-Sampling of draft ->
answer with the skip edge over k given drafts; `chain` is n models in a row and k paths; `one LLM` is DPO of a single
model. `straightforward` is the same step in TRL's style: all runs padded and concatenated, logits materialised, every
graph held until the backward; `trl` is `DPOTrainer`'s own step. The gate compares loss and gradients with them on the
small models, in fp64, to 1e-4 of the largest gradient. Times are of scoring and gradients without the optimizer's
update, interleaved. `peak_mib` is what one step needs beyond weights, gradients and optimizer state: on a CPU (Linux)
the high-water mark of resident memory, in a process of its own; on a GPU that of torch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench import measure
from bench.step_systems import Case, Step

BASELINE = "straightforward"
PEERS = ("trl", "one pass")
NAMES = {"sysdag": "two_pass", "one pass": "one_pass"}


def cases(device: str) -> list[Case]:
    if device == "cuda":
        each = [(lora, k) for lora in (True, False) for k in (2, 8)]
        two = [Case("two LLMs", candidates=k, lora=lora, size="0.5B") for lora, k in each]
        chain = Case("chain", candidates=2, lora=True, nodes=6, size="0.5B")
        return [*two, chain, *(Case("one LLM", 1, lora, nodes=1, pairs=2, size="0.5B") for lora in (True, False))]
    llms = [Case("two LLMs", candidates=k, lora=lora) for lora in (True, False) for k in (2, 4, 8)]
    chains = [Case("chain", candidates=2, lora=False, nodes=nodes) for nodes in (2, 6)]
    return [*llms, *chains, *(Case("one LLM", candidates=1, lora=lora, nodes=1, pairs=2) for lora in (True, False))]


def names(case: Case, peers: Sequence[str] | None) -> list[str]:
    """What is measured for a case."""
    every = dict.fromkeys(["sysdag", BASELINE, *(p for p in PEERS if p != "trl" or case.nodes == 1)])
    return list(measure.wanted(every, peers, baseline=BASELINE))


def check(step: Step, name: str) -> None:
    """The gate: loss and gradients of sysdag's step against another way to them, in fp64.

    In fp32 a product rounds otherwise in another shape, and a chain of models adds that up.
    """
    step.cast(torch.float64)
    seen = []
    for each in ("sysdag", name):
        step.clear()
        seen.append((step.run(each), step.gradients(each)))
    measure.gate_step(step.case, name, *seen)
    step.cast(torch.float32)


def peak_of(step: Step, name: str, device: str) -> float:
    """MiB of one step beyond what is there after a first one."""
    step.run(name)
    step.clear()
    with measure.PeakMemory(device) as memory:
        step.run(name)
    return memory.mib


def peak(case: Case, name: str, threads: int) -> None:
    """Prints it of a CPU's step; for a process of its own."""
    torch.set_num_threads(threads)
    print(peak_of(Step(case, with_trl=name == "trl"), name, "cpu"))


def peak_mib(case: Case, name: str) -> float:
    arguments = f"{case!r}, {name!r}, {torch.get_num_threads()}"
    code = f"from bench.step import *; peak({arguments})"
    return measure.peak_in_a_process(code)


def measured(case: Case, peers: Sequence[str] | None, options: Any) -> list[dict[str, Any]]:
    """The table's rows for one case."""
    wanted, on_gpu = names(case, peers), options.device == "cuda"
    step = Step(case._replace(size="small"), options.device, with_trl="trl" in wanted)
    for name in wanted[1:]:
        check(step, name)
    if on_gpu:
        step = Step(case, options.device, with_trl="trl" in wanted)
        step.cast(torch.bfloat16)
    times = measure.interleave(
        {name: lambda name=name: step.run(name) for name in wanted}, options.repeats, before=step.clear, warmup=1
    )
    columns = {"system": case.system, "nodes": case.nodes, "k": case.candidates, "trained": case.trained}
    columns |= {"size": case.size, "dtype": "bfloat16" if on_gpu else "float32"}
    shown = measure.rows(times, baseline=BASELINE, **columns)
    for row in shown:
        row["peak_mib"] = peak_of(step, row["name"], "cuda") if on_gpu else peak_mib(case, row["name"])
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "step", arguments, peers=PEERS, threads=2, repeats=5)
    rows = [row for case in cases(options.device) for row in measured(case, options.peers, options)]
    measure.report("step", rows, options.csv, [f"trl {measure.version('trl')}"])
