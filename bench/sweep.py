"""linear_logprob over the number of rows N and the vocabulary V, beside eager torch and the bare products.

    python -m bench sweep --csv

Columns are those of `python -m bench linear_logprob`; `python -m bench plots` draws them. About 5 minutes on 2 cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bench import measure
from bench.linear_logprob import BASELINE, FUNCTIONS, PEERS, Case, measured

MODES = ("frozen", "trained")


class Lines(NamedTuple):
    """One over the rows, one over the vocabularies."""

    hidden: int
    rows: tuple[int, ...]
    at_vocabulary: int
    vocabularies: tuple[int, ...]
    at_rows: int

    def shapes(self) -> list[tuple[int, int, int]]:
        """N, H, V of both lines; the point where they meet is measured once."""
        found = [(N, self.hidden, self.at_vocabulary) for N in self.rows]
        return list(dict.fromkeys(found + [(self.at_rows, self.hidden, V) for V in self.vocabularies]))


LINES = {
    "cpu": Lines(512, (512, 1024, 2048, 4096), 32000, (8000, 32000, 128000), 1024),
    "cuda": Lines(4096, (1024, 2048, 4096, 8192, 16384), 128256, (32000, 64128, 128256, 256512), 4096),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "sweep", arguments, peers=PEERS, threads=2, repeats=3)
    wanted = {name: FUNCTIONS[name] for name in ("sysdag", BASELINE, *(options.peers or ()))}
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for mode in MODES:
        for shape in LINES[options.device].shapes():
            rows += measured(Case(shape, mode, options.device, dtype), wanted, options.repeats, notes)
    measure.report("linear_logprob by N and V", rows, options.csv, notes)
