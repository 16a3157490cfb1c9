"""Which runs are compared: pairs of runs of the same inputs, in a seeded order."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.errors import DataError
from sysdag.files.encoding import encode_value
from sysdag.traces.cells import ABSENT, Draw, value_of
from sysdag.traces.pairs import runs_by_input
from sysdag.traces.trace import Trace


@dataclass(frozen=True)
class Pairing:
    """The comparisons that a trace offers.

    Attributes:
        pairs: rows of the trace. Which of two stands first is drawn, so that agreement is not corrected for a chance
            that one side has by its place in the file.
        identical: pairs (or single runs) left out because their outputs are the same as others'.
        single: inputs that have one run, which are in no pair of two.
    """

    pairs: tuple[tuple[int, int], ...]
    identical: int
    single: int


def pair_runs(trace: Trace, outputs: Sequence[str], *, seed: int, pairs_per_input: int | None = None) -> Pairing:
    """Pairs of runs with equal inputs and different outputs.

    Every input comes once before any comes twice, so whoever stops early has covered as many inputs as possible.

    Args:
        outputs: the nodes whose values are compared.
        seed: of the order.
        pairs_per_input: at most so many of each input; all of them by default.

    Raises:
        DataError: if the trace offers nothing to compare.
    """
    generator = random.Random(seed)
    looks = {name: [fingerprint_of(value_of(cell)) for cell in trace.cells[name]] for name in outputs}
    found: list[tuple[int, float, tuple[int, int]]] = []
    identical = single = 0
    for rows in runs_by_input(trace):
        single += len(rows) == 1
        candidates = list(itertools.combinations(rows, 2))
        different = [pair for pair in candidates if any(look[pair[0]] != look[pair[1]] for look in looks.values())]
        identical += len(candidates) - len(different)
        generator.shuffle(different)
        for turn, (first, second) in enumerate(different[:pairs_per_input]):
            pair = (first, second) if generator.random() < 0.5 else (second, first)
            found.append((turn, generator.random(), pair))
    if not found:
        raise DataError(
            f"There is nothing to compare: {identical} pairs of runs have the same {' and '.join(outputs)}, and "
            f"{single} inputs have a single run. Sample two or more runs of each input (sysdag sample --runs 2)."
        )
    return Pairing(tuple(pair for _, _, pair in sorted(found)), identical, single)


def single_runs(trace: Trace, outputs: Sequence[str], *, seed: int, runs_per_input: int | None = None) -> Pairing:
    """Single runs, each paired with itself; of runs with equal inputs and outputs the first alone.

    Every input comes once before any comes twice, in a seeded order.

    Args:
        outputs: the nodes whose values are labelled.
        seed: of the order.
        runs_per_input: at most so many of each input; all of them by default.

    Raises:
        DataError: for a trace without runs.
    """
    generator = random.Random(seed)
    looks = list(
        zip(*([fingerprint_of(value_of(cell)) for cell in trace.cells[name]] for name in outputs), strict=True)
    )
    found: list[tuple[int, float, tuple[int, int]]] = []
    identical = single = 0
    for rows in runs_by_input(trace):
        single += len(rows) == 1
        first = {looks[row]: row for row in reversed(rows)}
        identical += len(rows) - len(first)
        different = sorted(first.values())
        generator.shuffle(different)
        found += [(turn, generator.random(), (row, row)) for turn, row in enumerate(different[:runs_per_input])]
    if not found:
        raise DataError("There are no runs to label.")
    return Pairing(tuple(pair for _, _, pair in sorted(found)), identical, single)


def fingerprint(trace: Trace) -> str:
    """SHA-256 of inputs and draws; the same for equal traces, whatever file format they came from."""
    digest = hashlib.sha256()
    for names, columns in (("input", trace.inputs), ("node", trace.cells)):
        for name, column in columns.items():
            digest.update(json.dumps([names, name]).encode())
            for content in column:
                digest.update(fingerprint_of(content).encode())
    return digest.hexdigest()


def fingerprint_of(content: Any) -> str:
    """SHA-256 of a value or cell."""
    plain = json.dumps(encode_value(_plain(content), "a value to label"), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _plain(content: Any) -> Any:
    """Draws as their parts, and images as their pixels: writing PNGs would take most of the command's start."""
    image = sys.modules.get("PIL.Image")
    if image is not None and isinstance(content, image.Image):
        return ["image", content.mode, list(content.size), content.getpalette(), content.tobytes()]
    if isinstance(content, list):
        return [_plain(element) for element in content]
    if isinstance(content, tuple):
        return tuple(_plain(element) for element in content)
    if isinstance(content, Mapping):
        return {key: _plain(element) for key, element in content.items()}
    if content is ABSENT:
        return {"absent": True}
    if isinstance(content, Draw):
        return {"value": _plain(content.value), "record": _plain(content.record), "log_prob": content.log_prob}
    return content
