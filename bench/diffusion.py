"""One Diffusion-DPO step, and sampling, of a pipeline against diffusers' own: `python -m bench diffusion`.

    python -m bench diffusion [--threads 2] [--repeats 5] [--csv]

A UNet (as SD 1.5) and a transformer (as PixArt) of 30 to 60 million parameters with random weights, latents of 64 x 64,
one pair, fp32. `script` is the step in the style of diffusers' Diffusion-DPO script: it encodes images and caption,
concatenates winner and loser, and runs policy and reference on both; `script, encoded before` leaves the encoding out.
sysdag encodes each image and caption once in a training, so its step never does. The gate compares loss and gradients,
on latents of 16 x 16 in fp64, to 1e-4 of the largest. `peak_mib` is what one step needs beyond weights, gradients and
what is kept of the data, in a process of its own. Sampling is of 16 prompts in 4 steps at latents of 16 x 16, against
the pipeline's own call on the same prompts; the images are compared first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench import measure
from bench.diffusion_systems import CAPTIONS, Case, Step, pipeline

BASELINE = "script"
PEERS = ("script, encoded before", "one pass")
CASES = [Case(model, lora) for model in ("unet", "transformer") for lora in (True, False)]


def check(case: Case) -> None:
    """The gate: loss and gradients of sysdag's step against the script's, at latents of 16 x 16 in fp64."""
    # At a beta of 2000 the loss would magnify how fp32 rounds a score, which sysdag's are in.
    step, seen = Step(case, side=16, beta=20.0), []
    step.in_double()
    for name in ("sysdag", "one pass", "script, encoded before"):
        step.clear()
        seen.append((step.run(name), step.gradients()))
    *found, wanted = seen
    for own in found:
        measure.gate_step(case, "script", own, wanted)


def peak(case: Case, name: str, threads: int) -> None:
    """Prints the MiB of one step beyond what is there after a first one; for a process of its own."""
    torch.set_num_threads(threads)
    step = Step(case)
    step.run("sysdag")
    step.run(name)
    step.clear()
    with measure.PeakMemory("cpu") as memory:
        step.run(name)
    print(memory.mib)


def peak_mib(case: Case, name: str) -> float:
    code = f"from bench.diffusion import *; peak({case!r}, {name!r}, {torch.get_num_threads()})"
    return measure.peak_in_a_process(code)


def of_step(case: Case, options: Any) -> list[dict[str, Any]]:
    wanted = list(measure.wanted(dict.fromkeys(["sysdag", BASELINE, *PEERS]), options.peers, baseline=BASELINE))
    check(case)
    step = Step(case)
    times = measure.interleave(
        {name: lambda name=name: step.run(name) for name in wanted}, options.repeats, before=step.clear, warmup=1
    )
    millions = sum(p.numel() for p in step.pipe.components[case.model].parameters()) / 1e6
    columns = {"what": "step", "model": case.model, "millions": round(millions, 1), "trained": case.trained}
    shown = _compared(times, BASELINE, columns)
    for row in shown:
        row["peak_mib"] = peak_mib(case, row["name"])
        print({key: row[key] for key in ("model", "trained", "name", "median_ms", "peak_mib")}, flush=True)
    return shown


def of_sampling(model: str, options: Any) -> list[dict[str, Any]]:
    """16 prompts in 4 steps; the same images, which is the gate."""
    pipe = pipeline(model, side=16)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"output_type": "pil"} | ({} if model == "unet" else {"use_resolution_binning": False})
    from sysdag.components import Diffusion

    component = Diffusion(
        pipe, num_inference_steps=4, batch_size=16,
        pipeline_kwargs={name: value for name, value in arguments.items() if name != "output_type"},
    )  # fmt: skip
    prompts = [CAPTIONS[row % len(CAPTIONS)] for row in range(16)]
    seeds = torch.randint(2**62, (16,), generator=torch.Generator().manual_seed(0)).tolist()

    def ours() -> Any:
        return [draw.value for draw in component.sample(prompts, generator=torch.Generator().manual_seed(0))]

    def theirs() -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompt=prompts, generator=generators, num_inference_steps=4, **arguments)[0]

    for own, other in zip(ours(), theirs(), strict=True):
        apart = max(abs(a - b) for a, b in zip(own.tobytes(), other.tobytes(), strict=True))
        if apart > 1:
            raise SystemExit(f"sampling, {model}: images are {apart} of 255 levels apart.")
    times = measure.interleave({"sysdag": ours, "pipeline": theirs}, options.repeats, warmup=0)
    millions = sum(p.numel() for p in pipe.components[model].parameters()) / 1e6
    columns = {"what": "sampling", "model": model, "millions": round(millions, 1), "trained": ""}
    return [row | {"peak_mib": ""} for row in _compared(times, "pipeline", columns)]


def _compared(times: Mapping[str, measure.Times], baseline: str, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows whose ratio to diffusers' own way has one name."""
    found = measure.rows(times, baseline=baseline, **columns)
    for row in found:
        row["times_diffusers"] = row.pop(f"times_{baseline}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "diffusion", arguments, peers=PEERS, devices=("cpu",), threads=2, repeats=5)
    rows = [row for case in CASES for row in of_step(case, options)]
    rows += [row for model in ("unet", "transformer") for row in of_sampling(model, options)]
    measure.report("diffusion", rows, options.csv, [f"diffusers {measure.version('diffusers')}"])
