"""Candidates that are kept for a number of optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdag.components.random_streams import RowGenerator
from sysdag.files.encoding import decode_value, encode_value
from sysdag.graph.plan import Plan
from sysdag.objectives.candidates import Candidates, CandidateStrategy
from sysdag.traces.trace import Trace


class CandidateCache:
    """Draws candidates, and draws those of a prompt anew once they are `refresh_steps` optimizer steps old.

    Args:
        strategy: how candidates are found.
        refresh_steps: 1 draws afresh after every update.
    """

    def __init__(self, strategy: CandidateStrategy, refresh_steps: int) -> None:
        self.strategy = strategy
        self.refresh_steps = refresh_steps
        self._kept: dict[str, tuple[int, Candidates]] = {}

    def draw(
        self,
        plan: Plan,
        inputs: Mapping[str, Sequence[Any]],
        generator: RowGenerator = None,
        step: int | None = None,
    ) -> Candidates:
        """Candidates for each prompt.

        Args:
            plan, inputs, generator: see `CandidateStrategy.draw`.
            step: number of optimizer steps so far; None draws anew and keeps nothing.
        """
        if self.refresh_steps == 1 or step is None:
            return self.strategy.draw(plan, inputs, generator)
        prompts = len(next(iter(inputs.values())))
        keys = [key_of({name: column[row] for name, column in inputs.items()}) for row in range(prompts)]
        first_row: dict[str, int] = {}
        for row, key in enumerate(keys):
            first_row.setdefault(key, row)
        stale = [key for key in first_row if key not in self._kept or step - self._kept[key][0] >= self.refresh_steps]
        if stale:
            rows = [first_row[key] for key in stale]
            if isinstance(generator, Sequence):
                generator = [generator[row] for row in rows]
            fresh = self.strategy.draw(
                plan, {name: [column[row] for row in rows] for name, column in inputs.items()}, generator
            )
            for number, key in enumerate(stale):
                self._kept[key] = (step, fresh.of_prompt(number))
        return Candidates.join([self._kept[key][1] for key in keys])

    def save(self, file: Path) -> list[dict[str, Any]]:
        """Writes the kept candidates' trace, if there are any; returns what `load` needs besides, ready for JSON."""
        if self._kept:
            Trace.concatenate([kept.trace for _, kept in self._kept.values()]).to_jsonl(file)
        return [
            {
                "prompt": prompt,
                "step": step,
                "count": len(kept.prompt),
                "log_proposal": _encoded(kept.log_proposal),
                "log_weight": _encoded(kept.log_weight),
            }
            for prompt, (step, kept) in self._kept.items()
        ]

    def load(self, file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what `save` wrote and returned, and nothing else."""
        self._kept = {}
        trace = Trace.from_jsonl(file) if entries else None
        start = 0
        for entry in entries:
            assert trace is not None
            rows = range(start, start + entry["count"])
            start += entry["count"]
            columns = [None if entry[name] is None else tuple(decode_value(entry[name])) for name in _COLUMNS]
            self._kept[entry["prompt"]] = (
                entry["step"],
                Candidates(trace.select(rows), (0,) * entry["count"], *columns),
            )


_COLUMNS = ("log_proposal", "log_weight")


def _encoded(column: tuple[float, ...] | None) -> Any:
    return None if column is None else encode_value(list(column), "candidates")


def key_of(inputs: Mapping[str, Any]) -> str:
    """What a prompt's inputs are known by: equal ones have one key."""
    return json.dumps({name: encode_value(value, name) for name, value in inputs.items()}, sort_keys=True)
