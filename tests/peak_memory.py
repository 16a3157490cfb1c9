"""Memory that steps take beyond weights and gradients, measured: `python peak_memory.py` prints a JSON object of bytes.

Each system has a process of its own, forked from one that has imported everything: that takes longer than most steps.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusion_memory
import torch
import torch._dynamo  # which torch imports at the first step, in every process that is forked before it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import step, step_systems

# Freed memory goes back to the system at once, so that what is resident is what is in use. No GPU is seen: torch would
# keep its random state too, and a forked process cannot ask for that.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def of_llms(case: step_systems.Case, names: list[str]) -> dict[str, float]:
    """As the benchmark measures it, which starts a process for each; one such is enough here."""
    if case.lora and names == ["sysdag"]:
        return {shown(case, "sysdag"): step.peak_mib(case, "sysdag") * 2**20}
    made = step_systems.Step(case)
    return {shown(case, name): step.peak_of(made, name, "cpu") * 2**20 for name in names}


def of_diffusion(case: str) -> dict[str, float]:
    return {f"diffusion, {case}": diffusion_memory.measured(case)}


def shown(case: step_systems.Case, name: str) -> str:
    return f"{name}, {'LoRA' if case.lora else 'full'}"


LORA, FULL = (step_systems.Case("two LLMs", candidates=4, lora=lora) for lora in (True, False))
LLMS = {shown(case, name): (case, name) for case in (LORA, FULL) for name in ("sysdag", "one pass")}
PROCESSES: list[Callable[[], dict[str, float]]] = [
    partial(of_llms, LORA, ["sysdag"]), partial(of_llms, LORA, ["one pass"]),
    partial(of_llms, FULL, ["sysdag", "one pass"]), *(partial(of_diffusion, case) for case in diffusion_memory.CASES),
]  # fmt: skip


def in_a_fork(measured: Callable[[], dict[str, float]]) -> dict[str, float] | str:
    """What it returns, or the text of the error that it ended in."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = json.dumps(measured())
        except BaseException:  # noqa: BLE001 - the parent's to tell
            found = json.dumps(traceback.format_exc())
        os.write(writing, found.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return json.loads(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    peaks: dict[str, float] = {}
    for process in PROCESSES:
        found = in_a_fork(process)
        if isinstance(found, str):
            raise SystemExit(found)
        peaks |= found
    print(json.dumps(peaks))
