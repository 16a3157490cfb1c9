"""Memory that steps take beyond weights and gradients, measured: `python peak_memory.py` prints a JSON object of bytes.

Each system has a process of its own, forked from one that has imported everything: that takes longer than most steps.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import choice_memory
import diffusion_memory
import networkx  # noqa: F401 - a plan needs it, so each process would import it
import torch
import vision_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import step, step_systems

# Freed memory goes back to the system at once, so that what is resident is what is in use. No GPU is seen: torch would
# keep its random state too, and a forked process cannot ask for that.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def of_llms(case: step_systems.Case, by_the_benchmark: bool) -> dict[str, float]:
    """Both ways of computing a step, one after the other, or each in a process of its own that the benchmark starts."""
    if by_the_benchmark:
        return {shown(case, name): step.peak_mib(case, name) * 2**20 for name in NAMES}
    made = step_systems.Step(case)
    return {shown(case, name): step.peak_of(made, name, "cpu") * 2**20 for name in NAMES}


def of_choice(case: str) -> dict[str, float]:
    return {f"choice, {case}": choice_memory.measured(case)}


def of_diffusion(case: str) -> dict[str, float]:
    return {f"diffusion, {case}": diffusion_memory.measured(case)}


def of_vision(case: str) -> dict[str, float]:
    return {f"vision, {case}": vision_memory.measured(case)}


def shown(case: step_systems.Case, name: str) -> str:
    return f"{name}, {'LoRA' if case.lora else 'full'}"


NAMES = ("sysdag", "one pass")
SYSTEMS = [step_systems.Case("two LLMs", candidates=2, lora=lora) for lora in (True, False)]
LLMS = {shown(case, name): (case, name) for case in SYSTEMS for name in NAMES}


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
    processes: list[Callable[[], dict[str, float]]] = [
        *(partial(of_llms, case, "--by-the-benchmark" in sys.argv) for case in SYSTEMS),
        *(partial(of_diffusion, case) for case in diffusion_memory.CASES),
        *(partial(of_choice, case) for case in choice_memory.CASES),
        *(partial(of_vision, case) for case in vision_memory.CASES),
    ]
    gc.freeze()  # what was imported is not looked through, and so not copied, by the processes
    peaks: dict[str, float] = {}
    for process in processes:
        found = in_a_fork(process)
        if isinstance(found, str):
            raise SystemExit(found)
        peaks |= found
    print(json.dumps(peaks))
