"""Scoring candidates that share their prompt, forward and backward, with a real language model on the CPU.

    python -m bench tries --model FOLDER [--prompts N ...] [--former COMMIT] [--unpacked N] [--csv]

FOLDER holds a causal language model, such as SmolLM2-135M-Instruct, in fp32. Of k = 8 candidates of 64 tokens after one
prompt, all of random tokens, the log-probabilities are computed with the gradients of their weighted sum. Each way runs
in a process of its own, in turns:

- sysdag: one packed row, whose attention is computed in pieces;
- former: one packed row with a dense mask, by the package as it was at --former, taken from git;
- unpacked: one row after another, each a forward and a backward. They are equally long, so the time of the first
  `--unpacked N` stands for that of all.

The scores, and of each parameter the gradient's norm and its product with a random vector, are compared first: to 1e-5
of the largest score and of the norm, with those of unpacked; of the gradient with former's where N is not all. Seconds
are by the clock, `cpu_seconds` by the processor time of the process; peak memory is what is needed beyond the weights,
gradients included, measured in processes of their own that give freed memory back at once.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if __package__:
    from bench import measure
    from bench.decode import former_tree
    from bench.json_process import JsonProcess

FORMER = "12d175b"  # the last build with a dense mask for every packed row
WAYS = ("sysdag", "former", "unpacked")
CANDIDATES, COMPLETION = 8, 64
TRAINED = ("full", "LoRA")
Answer = dict[str, Any]


def sequences(prompt: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """A prompt of so many random tokens, with each candidate."""
    numbers = torch.Generator().manual_seed(prompt)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary // 2, (count,), generator=numbers).tolist()

    first = tokens(prompt)
    return [(first, tokens(COMPLETION)) for _ in range(CANDIDATES)]


def digests(model: Any) -> dict[str, tuple[float, float]]:
    """Of each parameter's gradient the norm, and the product with a random vector; the gradients are dropped."""
    found = {}
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            numbers = torch.Generator().manual_seed(len(found))
            direction = torch.randn(gradient.shape, generator=numbers)
            found[name] = float(gradient.norm()), float((gradient * direction).sum())
            parameter.grad = None
    return found


def work(folder: str, trained: str) -> None:
    """Answers each line of a request with a line of figures, until the input ends."""
    import transformers

    transformers.logging.set_verbosity_error()
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path[0] = str(ROOT)  # of this file's own helpers; sysdag comes from PYTHONPATH, which stands behind
    sys.path.insert(0, os.environ["SYSDAG_ROOT"])
    from bench.measure import PeakMemory
    from sysdag.components.language.prefix_scorer import PrefixScorer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if trained == "LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    weights = torch.linspace(-1, 2, CANDIDATES)
    for line in sys.stdin:
        asked = json.loads(line)
        wanted = sequences(asked["prompt"], model.config.vocab_size)
        alone = asked["alone"]  # how many are scored one after another; 0 for all in one row
        groups = [[number] for number in range(alone)] if alone else [list(range(CANDIDATES))]
        scorer = PrefixScorer(model, pack_prefixes=not alone)
        scorer.groups(wanted, 1)  # its probe is not measured
        scores: list[float] = []
        with PeakMemory("cpu") as memory:
            start, cpu_start = time.perf_counter(), time.process_time()
            for group in groups:
                found = scorer([wanted[number] for number in group], 0)
                (found @ weights[group]).backward()
                scores += found.tolist()
            part = sum(map(len, groups)) / CANDIDATES
            taken = {
                "seconds": (time.perf_counter() - start) / part, "cpu_seconds": (time.process_time() - cpu_start) / part
            }  # fmt: skip
        answer = {"scores": scores, "gradients": digests(model), **taken, "peak_mib": memory.mib}
        print(json.dumps(answer), file=answers, flush=True)


# Freed memory goes back to the system at once, so that what is resident is what is in use; that takes time.
LEAN = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def process_of(root: Path, folder: str, trained: str, threads: int, environment: Mapping[str, str]) -> JsonProcess:
    """One that holds a model and scores with it, by the package below `root`."""
    own = {"SYSDAG_ROOT": str(root), "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads), **environment}
    return JsonProcess([sys.executable, str(Path(__file__)), folder, trained], os.environ | own)


def score_error(found: Answer, wanted: Answer) -> float:
    """The largest difference of the scores that both have, over the largest score."""
    pairs = zip(found["scores"], wanted["scores"], strict=False)
    return max(abs(own - other) for own, other in pairs) / max(map(abs, wanted["scores"]))


def gradient_error(found: Answer, wanted: Answer) -> float:
    """The largest difference of a gradient's digest, over its norm."""
    every = math.sqrt(sum(norm**2 for norm, _ in wanted["gradients"].values()))
    return max(
        max(abs(own - other) for own, other in zip(found["gradients"][name], value, strict=True))
        / max(value[0], 1e-5 * every)
        for name, value in wanted["gradients"].items()
    )


def compare(
    prompt: int, trained: str, workers: Mapping[str, JsonProcess], peaks: Mapping[str, float], repeats: int,
    model: str, alone: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each way, whose first call is not timed."""
    answers: dict[str, list[Answer]] = {way: [] for way in workers}
    for way, worker in workers.items():
        worker.run(prompt=16, alone=1 if way == "unpacked" else 0)
    for _ in range(repeats):
        for way, worker in workers.items():
            answers[way].append(worker.run(prompt=prompt, alone=alone if way == "unpacked" else 0))
    unpacked, former = answers["unpacked"][0], answers["former"][0]
    rows = []
    for way, each in answers.items():
        differs = {"score_error": score_error(each[0], unpacked)}
        if len(unpacked["scores"]) == CANDIDATES:
            differs["gradient_error"] = gradient_error(each[0], unpacked)
        else:
            differs["gradient_error"] = 0.0 if way == "unpacked" else gradient_error(each[0], former)
        if max(differs.values()) > 1e-5:
            raise SystemExit(f"{way}, prompt {prompt}: {differs}; no speed is reported for a wrong result.")
        row = {"model": model, "trained": trained, "prompt": prompt, "name": way}
        row |= {what: statistics.median(answer[what] for answer in each) for what in ("seconds", "cpu_seconds")}
        rows.append(row | {"peak_mib": peaks[way], **differs})
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        for other in ("former", "unpacked"):
            for what in ("seconds", "cpu_seconds", "peak_mib"):
                row[f"{what}_of_{other}"] = row[what] / by_name[other][what]
        row["repeats"] = repeats
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    own: dict[str, dict[str, Any]] = {
        "--model": {"metavar": "FOLDER", "required": True, "help": "a causal language model"},
        "--prompts": {"metavar": "N", "type": int, "nargs": "+", "default": [256, 2048], "help": "tokens of prompts"},
        "--former": {"metavar": "COMMIT", "default": FORMER},
        "--trained": {"nargs": "+", "choices": TRAINED, "default": ["full"]},
        "--unpacked": {"metavar": "N", "type": int, "choices": range(1, CANDIDATES + 1), "default": CANDIDATES},
    }
    options = measure.options(__doc__, "tries", arguments, devices=["cpu"], threads=1, repeats=1, own=own)
    name = Path(options.model).resolve().name
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        trees = {"former": former_tree(options.former, Path(temporary))}
        for trained in options.trained:

            def started(environment: Mapping[str, str], trained: str = trained) -> dict[str, JsonProcess]:
                threads = options.threads or 1
                return {
                    way: process_of(trees.get(way, ROOT), options.model, trained, threads, environment) for way in WAYS
                }

            peaks: dict[int, dict[str, float]] = {prompt: {} for prompt in options.prompts}
            for way, worker in started(LEAN).items():
                for prompt in options.prompts:
                    peaks[prompt][way] = worker.run(prompt=prompt, alone=1 if way == "unpacked" else 0)["peak_mib"]
                worker.stop()
            workers = started({})
            for prompt in options.prompts:
                rows += compare(prompt, trained, workers, peaks[prompt], options.repeats, name, options.unpacked)
            for worker in workers.values():
                worker.stop()
    measure.report("tries", rows, options.csv)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
