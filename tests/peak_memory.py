"""Memory that steps take beyond weights and gradients, measured: `python peak_memory.py` prints a JSON object of bytes.

Each step has a process of its own, forked from one that has imported everything: that takes longer than most steps.
"""

import contextlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusion_memory
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import step, step_systems

# Freed memory goes back to the system at once, so that what is resident is what is in use. No GPU is seen: torch would
# keep its random state too, and a forked process cannot ask for that.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
LLMS = {
    f"{name}, {'LoRA' if lora else 'full'}": (step_systems.Case("two LLMs", candidates=4, lora=lora), name)
    for lora in (True, False)
    for name in ("sysdag", "one pass")
}


def of_llms(case: step_systems.Case, name: str) -> float:
    """As the benchmark measures it, which starts a process for each; one such is enough here."""
    if case.lora and name == "sysdag":
        return step.peak_mib(case, name) * 2**20
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        step.peak(case, name, 1)
    return float(printed.getvalue()) * 2**20


STEPS: dict[str, Callable[[], float]] = {name: partial(of_llms, *case) for name, case in LLMS.items()} | {
    f"diffusion, {case}": partial(diffusion_memory.measured, case) for case in diffusion_memory.CASES
}


def in_a_fork(measured: Callable[[], float]) -> float | str:
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
    print(json.dumps({name: in_a_fork(measured) for name, measured in STEPS.items()}))
