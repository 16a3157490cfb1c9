"""From runs to preference rows: runs of equal inputs, what is preferred among them, and files of such rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdag.errors import DataError
from sysdag.files.arrow import load_pyarrow, write_parquet
from sysdag.files.atomic import replacing_file
from sysdag.files.encoding import encode_value
from sysdag.traces.cells import ABSENT, Cell, Draw
from sysdag.traces.row_format import encode_row_value, to_arrow
from sysdag.traces.trace import Trace

_SIDES = ("chosen", "rejected")


def runs_by_input(trace: Trace) -> list[list[int]]:
    """The rows of a trace, grouped by equal inputs, in the order in which each input first appears.

    Raises:
        DataError: for an input that has no lossless JSON form, by which equal ones are found.
    """
    groups: dict[str, list[int]] = {}
    for row in range(len(trace)):
        key = {name: encode_value(column[row], name) for name, column in trace.inputs.items()}
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(row)
    return list(groups.values())


def output_names(trace: Trace, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The nodes whose values are compared.

    Args:
        names: of nodes; by default the trace's last one, which is always an output.

    Raises:
        DataError: for a name that the trace has no cells of, or a trace without any.
    """
    if not trace.cells:
        raise DataError("The trace has no nodes, so there is nothing to compare.")
    if not names:
        return (list(trace.cells)[-1],)
    for name in names:
        if name not in trace.cells:
            raise DataError(f"The trace has no node {name!r}; its nodes are {list(trace.cells)}.")
    return tuple(dict.fromkeys(names))


def preference_row(trace: Trace, chosen: int, rejected: int, outputs: Sequence[str]) -> dict[str, Any]:
    """A row for training (see `sysdag.data.encoding.encode_rows`) that prefers one run of a trace to another.

    Args:
        chosen, rejected: rows of the trace, whose inputs are those of `chosen`.
        outputs: names of the system's outputs; all other nodes are intermediates.

    Returns:
        The inputs by name, `chosen`, `rejected` (of several outputs a dict by node), `chosen_intermediates` and
        `rejected_intermediates`. Values are the trace's draws (a list of them for a plate), so token ids travel.
        Beside them what both runs' columns say alike (see `carried_columns`).

    Raises:
        DataError: for an input of one of these names.
    """
    check_input_names(trace, [f"{side}{kind}" for side in _SIDES for kind in ("", "_intermediates")])
    row = {name: column[chosen] for name, column in trace.inputs.items()}
    for side, number in zip(_SIDES, (chosen, rejected), strict=True):
        row[side], row[f"{side}_intermediates"] = values_of_run(trace, number, outputs)
    return {**row, **carried_columns(trace, [chosen, rejected])}


def values_of_run(trace: Trace, run: int, outputs: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The draws of a run's output (of several outputs a dict by node), and those of all other nodes by name.

    None of a node that did not run.
    """
    given = {name: _given(cells[run]) for name, cells in trace.cells.items()}
    output = given[outputs[0]] if len(outputs) == 1 else {name: given[name] for name in outputs}
    return output, {name: value for name, value in given.items() if name not in outputs}


def check_input_names(trace: Trace, names: Iterable[str]) -> None:
    """Refuses inputs whose names a row needs for something else."""
    if both := sorted(trace.inputs.keys() & set(names)):
        raise DataError(
            f"The input {both[0]!r} has the name of a column that rows of feedback have; rename the system's input."
        )


NOT_CARRIED = frozenset(
    {
        "prompt", "run", "chosen", "rejected", "chosen_intermediates", "rejected_intermediates", "output",
        "completion", "intermediates", "label", "weight", "margin",
    }
)  # fmt: skip
"""Columns of runs that do not go into rows for training, where these names mean something else."""


def carried_columns(trace: Trace, runs: Sequence[int]) -> dict[str, Any]:
    """The columns of a trace that say the same of all these runs, as a reference answer or a user's name does.

    Columns with the name of an input, a node or of `NOT_CARRIED` stay behind, and so does what is None.
    """
    found = {}
    for name, column in trace.columns.items():
        if name in NOT_CARRIED or name in trace.inputs or name in trace.cells or column[runs[0]] is None:
            continue
        first, *others = (encode_row_value(column[run], name) for run in runs)
        if all(type(other) is type(first) and other == first for other in others):
            found[name] = column[runs[0]]
    return found


def _given(cell: Cell) -> Draw | list[Draw] | None:
    if cell is ABSENT:
        return None
    return list(cell) if isinstance(cell, tuple) else cell


def write_pairs(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines or Parquet, by the file's ending, which is replaced as a whole.

    `sysdag.traces.read_rows` gives back what was written, draws with their token ids; a value of None is left out.
    See `sysdag.traces.row_format` for how values stand in the file.

    Raises:
        DataError: naming the row and column of a value that cannot be written without loss; or for another ending.
    """
    path = Path(path)
    given = [{name: value for name, value in row.items() if value is not None} for row in rows]
    if path.suffix.lower() == ".jsonl":
        lines = [_line(number, row) for number, row in enumerate(given)]
        with replacing_file(path) as unfinished, unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
    elif path.suffix.lower() == ".parquet":
        load_pyarrow(path)
        names = dict.fromkeys(name for row in given for name in row)
        arrays = {name: to_arrow([row.get(name) for row in given], name) for name in names}
        with replacing_file(path) as unfinished:
            write_parquet(unfinished, arrays)
    else:
        raise DataError(f"{path}: rows of preferences are written to files that end in .jsonl or .parquet.")


def _line(number: int, row: Mapping[str, Any]) -> str:
    try:
        data = {name: encode_row_value(value, name) for name, value in row.items()}
    except DataError as error:
        raise DataError(f"Row {number}, {error}") from error
    return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"
