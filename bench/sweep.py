"""linear_logprob over the number of rows N and the vocabulary V, beside eager torch and the bare products.

    python -m bench sweep --csv

Columns are those of `python -m bench linear_logprob`; `python -m bench plots` draws them. About 5 minutes on 2 cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench import measure
from bench.linear_logprob import BASELINE, FUNCTIONS, PEERS, Case, measured

HIDDEN = 512
ROWS, AT_VOCABULARY = (512, 1024, 2048, 4096), 32000
VOCABULARIES, AT_ROWS = (8000, 32000, 128000), 1024
MODES = ("frozen", "trained")


def shapes() -> list[tuple[int, int, int]]:
    """N, H, V of both lines; the point where they meet is measured once."""
    found = [(N, HIDDEN, AT_VOCABULARY) for N in ROWS] + [(AT_ROWS, HIDDEN, V) for V in VOCABULARIES]
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "sweep", arguments, peers=PEERS, threads=2, repeats=3)
    wanted = {name: FUNCTIONS[name] for name in ("sysdag", BASELINE, *(options.peers or ()))}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for mode in MODES:
        for shape in shapes():
            rows += measured(Case(shape, mode, options.device, dtype), wanted, options.repeats, notes)
    measure.report("linear_logprob by N and V", rows, options.csv, notes)
