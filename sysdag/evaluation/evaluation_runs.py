"""The runs that an evaluation compares: of a system on held-out rows, and the responses that the rows hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdag.data.given_runs import given_cells
from sysdag.data.inputs import columns_beside, inputs_of
from sysdag.data.trl_prompts import explicit_prompt
from sysdag.errors import DataError
from sysdag.execution.batches import LocalEngine, Runs, load
from sysdag.execution.running import run
from sysdag.execution.trace_file import TraceFile
from sysdag.files.encoding import encode_value
from sysdag.graph.plan import Plan
from sysdag.traces.trace import Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate on.

    Attributes:
        rows: as they were read, with implicit prompts told apart.
        inputs: for each input one value a row.
        extras: the rows' other columns, as a reference answer, for judges that are functions.
    """

    rows: Sequence[Mapping[str, Any]]
    inputs: Mapping[str, Sequence[Any]]
    extras: Mapping[str, Sequence[Any]]


def held_out(plan: Plan, rows: Sequence[Mapping[str, Any]], *, distinct: bool) -> HeldOut:
    """The inputs of rows, which may be preference rows.

    Args:
        distinct: keeps the first row of those with equal inputs alone.

    Raises:
        DataError: naming the row in which an input is missing or of another type.
    """
    told = [each.row for each in (explicit_prompt(plan, row) for row in rows) if not each.has_no_prompt]
    if len(told) < len(rows):
        logger.warning(
            "%d of %d rows are left out: chosen is rejected, or one is the other's beginning, so where their prompt "
            "ends cannot be told.", len(rows) - len(told), len(rows),
        )  # fmt: skip
    inputs, _ = inputs_of(plan, told)
    names = list(inputs)
    if distinct:
        first: dict[str, int] = {}
        for row, values in enumerate(zip(*inputs.values(), strict=True)):
            key = json.dumps([encode_value(value, name) for name, value in zip(names, values, strict=True)])
            first.setdefault(key, row)
        told = [told[row] for row in first.values()]
        inputs = {name: [column[row] for row in first.values()] for name, column in inputs.items()}
    return HeldOut(told, inputs, columns_beside(plan, told))


def sample_runs(
    plan: Plan,
    given: HeldOut,
    *,
    runs: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    device: str | None = "auto",
    keep: Path | None = None,
) -> Trace:
    """Runs a system on held-out rows, `runs` times each; its models leave the device afterwards.

    Args:
        runs, seed, batch_size: see `sysdag.execution.batches.Runs`.
        device: see `sysdag.execution.batches.LocalEngine`.
        keep: a file that the traces are written to as they are made, and that an evaluation goes on behind.

    Raises:
        RunError: naming the node and the row at which the system failed.
        DataError: if `keep` holds the traces of something else.
    """
    wanted = Runs(inputs=given.inputs, columns=given.extras, runs=runs, seed=seed, batch_size=batch_size)
    file = None
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        file = TraceFile(keep, plan, wanted, existing="resume")
    found: list[Trace] = []
    done = file.batches if file else 0
    if done < wanted.batches:
        for trace in _batches(plan, wanted, done, device):
            if file is None:
                found.append(trace)
            else:
                file.append(trace)
        for names in plan.components:
            load(names[0], plan.system[names[0]].component, "cpu" if device else None)
    return Trace.concatenate(found) if keep is None else Trace.load(keep)


def _batches(plan: Plan, wanted: Runs, first: int, device: str | None) -> Iterator[Trace]:
    from tqdm import tqdm

    traces = run(
        plan, wanted.inputs, columns=wanted.columns, runs=wanted.runs, seed=wanted.seed, batch_size=wanted.batch_size,
        first_batch=first, engine=LocalEngine(device=device),
    )  # fmt: skip
    with tqdm(total=wanted.total, initial=first * wanted.batch_size, unit="run", desc="sampling", disable=None) as bar:
        for trace in traces:
            yield trace
            bar.update(len(trace))


def chosen_runs(plan: Plan, given: HeldOut, *, runs: int = 1) -> Trace:
    """The `chosen` responses of preference rows as runs, each `runs` times, with the intermediates that all rows hold.

    Raises:
        DataError: naming the row that has none.
    """
    outputs = plan.system.outputs
    sides = []
    for number, row in enumerate(given.rows):
        where = _name(row, number)
        side = row.get("chosen")
        if side is None:
            raise DataError(
                f"{where}: 'chosen' is missing; the row has {sorted(map(str, row))}. Evaluate against a system "
                "(--against SYSTEM2), or on preference rows."
            )
        if len(outputs) == 1:
            side = {outputs[0]: side}
        elif not isinstance(side, Mapping) or set(side) != set(outputs):
            raise DataError(f"{where}: chosen must be a dict with one value for each of {list(outputs)}.")
        side = {**(row.get("chosen_intermediates") or {}), **side}
        folder = getattr(row, "folder", None)
        inputs = {name: column[number] for name, column in given.inputs.items()}
        sides.append(given_cells(plan, inputs, side, where, folder))
    cells = {name: [side[name] for side in sides] for name in plan.order if all(name in side for side in sides)}
    trace = Trace(given.inputs, cells, given.extras)
    return trace.select([row for row in range(len(trace)) for _ in range(runs)])


def _name(row: Mapping[str, Any], number: int) -> str:
    place = getattr(row, "place", "")
    return f"Row {number}{f' ({place})' if place else ''}"
