"""Rows that surely have no problem, told many at once: what is left is looked at one by one.

`sysdag.data.checks.check_row` says what is wrong with a row, in about a millisecond. Most rows of a large file are
plain texts with nothing wrong, which takes a small part of that to see. A row that passes here has no problem there,
and nothing to note; of one that does not pass nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sysdag.components.component import Takes
from sysdag.data.columns import SIDES, input_column, pair_columns
from sysdag.execution.execute import node_inputs, row_options
from sysdag.files.encoding import is_text
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace

AT_ONCE = 256
"""Rows that are looked at together."""


class Screen:
    """Looks at rows of a system whose random nodes all have components that tell (see `Component.screen`).

    Args:
        plan, objective: of the rows.
    """

    def __init__(self, plan: Plan, objective: Objective) -> None:
        self._plan = plan
        self._needed_of_none = (*row_options(plan), *pair_columns(plan))
        self._latents = [name for name in plan.observed(objective) if name not in plan.system.outputs]
        self._takes = self._told_by_components()
        self._drawn_from = {name: self._random_ancestors(name) for name in plan.order}
        self._columns = lru_cache(maxsize=64)(self._columns_of)

    def _told_by_components(self) -> dict[str, Takes]:
        """What tells of each random node; nothing where one cannot, or values are other than one text a node."""
        plan = self._plan
        texts = all(given.value_type in (None, str) for given in plan.system.inputs)
        found: dict[str, Takes] = {}
        for name in plan.random_nodes:
            component = plan.system[name].component
            takes = None if component is None or plan.is_plate(name) else component.screen()
            if takes is None:
                return {}
            found[name] = takes
        return found if texts and len(plan.system.outputs) == 1 and plan.system.outputs[0] in found else {}

    def _random_ancestors(self, name: str) -> set[str]:
        found: set[str] = set()
        for edge in self._plan.parents(name):
            if any(given.name == edge.parent for given in self._plan.system.inputs):
                continue
            found |= {edge.parent} if self._plan.system[edge.parent].is_random else self._random_ancestors(edge.parent)
        return found

    def passing(self, rows: Sequence[Any]) -> list[bool]:
        """Of each row whether it surely has no problem."""
        passes = [bool(self._takes) and self._is_plain(row) for row in rows]
        plain = [row for row, is_plain in zip(rows, passes, strict=True) if is_plain]
        if not plain:
            return passes
        try:
            told = iter(self._fitting(plain))
        except Exception:  # noqa: BLE001 - a node's function may raise anything; on which row is found one by one
            return [False] * len(rows)
        return [is_plain and next(told) for is_plain in passes]

    def _columns_of(self, keys: tuple[Any, ...]) -> dict[str, str] | None:
        """The columns of the inputs in rows with these keys; None where one is missing."""
        row = dict.fromkeys(keys)
        found = {given.name: input_column(self._plan, row, given.name) for given in self._plan.system.inputs}
        return found if all(column in row for column in [*found.values(), *SIDES]) else None

    def _is_plain(self, row: Any) -> bool:
        """Whether a row has a text for all that it needs, and says nothing else."""
        if not isinstance(row, dict):
            return False
        if getattr(row, "unpaired", "") or getattr(row, "damage", ""):
            return False
        columns = self._columns(tuple(row))
        if columns is None or any(row.get(name) is not None for name in self._needed_of_none):
            return False
        chosen, rejected = row["chosen"], row["rejected"]
        texts = [*(row[column] for column in columns.values()), chosen, rejected]
        if not all(map(_is_plain_text, texts)) or chosen == rejected or not chosen.strip():
            return False
        return all(self._has_latents(row.get(f"{side}_intermediates")) for side in SIDES) if self._latents else True

    def _has_latents(self, given: Any) -> bool:
        return (
            isinstance(given, Mapping)
            and given.keys() == set(self._latents)
            and all(map(_is_plain_text, given.values()))
        )

    def _fitting(self, rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Of each row whether its texts surely have room."""
        plan, output = self._plan, self._plan.system.outputs[0]
        columns = [self._columns(tuple(row)) or {} for row in rows]
        inputs = {
            given.name: [row[of[given.name]] for row, of in zip(rows, columns, strict=True)]
            for given in plan.system.inputs
        }
        shared = Trace(inputs, {})
        prompts: dict[str, list[Any]] = {}
        fits = [True] * len(rows)
        for side in SIDES:
            values = {output: [row[side] for row in rows]}
            values |= {name: [row[f"{side}_intermediates"][name] for row in rows] for name in self._latents}
            trace = Trace(inputs, {name: list(map(Draw, column)) for name, column in values.items()})
            for name in plan.order:
                is_random = plan.system[name].is_random
                behind = self._drawn_from[name]
                if not behind <= values.keys():
                    found: list[Any] = [None] * len(rows)
                elif behind:
                    found = node_inputs(plan, trace, name).values
                else:
                    if name not in prompts:
                        prompts[name] = node_inputs(plan, shared, name).values
                        if not is_random:
                            shared = shared.updated({name: list(map(Draw, prompts[name]))})
                    found = prompts[name]
                if not is_random:
                    if behind <= values.keys():
                        trace = trace.updated({name: list(map(Draw, found))})
                    continue
                takes, texts = self._takes[name], values.get(name, [""] * len(rows))
                fits = [fit and takes(*each) for fit, *each in zip(fits, found, texts, strict=True)]
        return fits


def _is_plain_text(value: Any) -> bool:
    """Whether it is a text, and none that chat messages are written down in."""
    return type(value) is str and value.lstrip()[:1] not in ("[", "{") and (value.isascii() or is_text(value))
