"""Draws pictures/*.svg: the graphs of the examples.

python docs/pictures.py
"""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

from sysdag.graph import render
from sysdag.saving import load_system

FOLDER = Path(__file__).with_name("pictures")
SYSTEMS = Path(__file__).parents[1] / "examples" / "systems"
NAMES = (
    "draft_refine", "llm_diffusion", "picture_critic", "rag_router", "rag_passages", "critic_loop", "summarise_rewrite",
    "specialists", "think_answer",
)  # fmt: skip

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "sysdag"  # the same file each time
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    for name in NAMES:
        render.draw(load_system(f"{SYSTEMS / name}.py:system").compile(), FOLDER / f"{name}.svg")
