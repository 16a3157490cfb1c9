"""Tiny pipelines of diffusers with random weights, by name; `python tests/tiny_pipelines.py [name ...]` tries each.

Every pipeline has the classes of the real one (tokenizers, text encoders, autoencoder, scheduler), in tiny.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from typing import Any

import diffusers
import numpy as np
import tiny_pipelines_dit  # noqa: F401 - registers
import tiny_pipelines_older  # noqa: F401 - registers
import tiny_pipelines_packed  # noqa: F401 - registers
import tiny_pipelines_stages  # noqa: F401 - registers
import tiny_pipelines_text  # noqa: F401 - registers
import tiny_pipelines_unet  # noqa: F401 - registers
import tiny_pipelines_video  # noqa: F401 - registers
import tiny_pipelines_video_text  # noqa: F401 - registers
import torch
import transformers
from tiny_parts import CALL, PIPELINES, UNBUILT

__all__ = ["CALL", "PIPELINES", "UNBUILT"]


def images_of(pipe: Any, prompt: Any, seeds: list[int], **options: Any) -> np.ndarray:
    """What the pipeline makes of a prompt (or several) and as many seeds, after two steps."""
    each = [torch.Generator().manual_seed(number) for number in seeds]
    generator = each if len(each) > 1 else each[0]
    made = pipe(prompt=prompt, **({"num_inference_steps": 2, "output_type": "np", "generator": generator} | options))
    for name in ("images", "image", "frames", "rgb"):
        if hasattr(made, name):
            return np.stack([np.asarray(each) for each in getattr(made, name)]).astype("float64")
    raise TypeError(f"{type(made).__name__} holds no images")


def report(name: str) -> str:
    """One line: class, seconds, whether a reload gives the same images, what prompt and noise change, two prompts."""
    call = CALL.get(name, {})
    start = time.perf_counter()
    pipe = PIPELINES[name]()
    built = time.perf_counter() - start
    images_of(pipe, "a dark square", [0], **call)
    start = time.perf_counter()
    one = images_of(pipe, "a dark square", [0], **call)
    taken = time.perf_counter() - start
    again = images_of(PIPELINES[name](), "a dark square", [0], **call)
    other = images_of(pipe, "light circle on the cube", [0], **call)
    noise = images_of(pipe, "a dark square", [1], **call)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        opened = diffusers.DiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    apart = np.abs(images_of(opened, "a dark square", [0], **call) - one).max()
    try:
        two = images_of(pipe, ["a dark square", "two red words and an old friend of mine"], [0, 1], **call)
        both = f"two prompts: first {np.abs(two[0] - one[0]).max():.0e} from alone"
    except Exception as error:  # noqa: BLE001 - reported
        both = f"two prompts: {type(error).__name__}: {str(error)[:80]}"
    facts = [
        f"{name}: {type(pipe).__name__}, {'x'.join(map(str, one.shape))}, build {built:.2f} s, call {taken:.2f} s",
        "reload the same"
        if apart < 1e-5 and type(opened) is type(pipe)
        else f"RELOAD {apart:.1e} {type(opened).__name__}",
        f"prompt {np.abs(other - one).mean():.4f}, noise {np.abs(noise - one).mean():.4f}",
        both,
    ]
    facts += ["NOT FINITE"] if not np.isfinite(one).all() else []
    facts += ["NOT DETERMINISTIC"] if np.abs(again - one).max() else []
    return "; ".join(facts)


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    for name in names or PIPELINES:
        try:
            print(report(name), flush=True)
        except Exception as error:  # noqa: BLE001 - reported
            print(f"{name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    if not names:
        for name, reason in UNBUILT.items():
            print(f"{name}: not built: {reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
