"""From runs to unpaired rows: one output and whether it is desirable, as in TRL's format for KTO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sysdag.traces.pairs import carried_columns, check_input_names, values_of_run
from sysdag.traces.trace import Trace

_OWN = ("output", "completion", "label", "intermediates")


def unpaired_row(trace: Trace, run: int, label: bool, outputs: Sequence[str]) -> dict[str, Any]:
    """A row for training that says of one run of a trace whether it is desirable.

    Args:
        run: the row of the trace.
        outputs: names of the system's outputs; all other nodes are intermediates.

    Returns:
        The inputs by name, `output` (of several outputs a dict by node), `label` and `intermediates`, a dict by node.
        Values are the trace's draws (a list of them for a plate), so token ids travel. Beside them the run's columns
        (see `sysdag.traces.pairs.carried_columns`).

    Raises:
        DataError: for an input of one of these names.
    """
    check_input_names(trace, _OWN)
    inputs = {name: column[run] for name, column in trace.inputs.items()}
    output, intermediates = values_of_run(trace, run, outputs)
    own = {"output": output, "label": bool(label), "intermediates": intermediates}
    return {**inputs, **own, **carried_columns(trace, [run])}
