"""What an error calls the rows of a trace, and which of them is at fault."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from sysdag.traces.trace import Trace

_FAILED_ROW = "_sysdag_failed_row"


def row_names(trace: Trace) -> Sequence[int | str]:
    """What an error calls each row: its number in the trace, or those of its input and run where the trace has them."""
    if {"prompt", "run"} <= trace.columns.keys():
        pairs = zip(trace.columns["prompt"], trace.columns["run"], strict=True)
        return [f"{prompt}, run {run}" for prompt, run in pairs]
    return range(len(trace))


@contextlib.contextmanager
def at_row(row: int | None) -> Iterator[None]:
    """Context in which whatever is raised is the fault of one row of the trace; see `failed_row`."""
    try:
        yield
    except Exception as error:
        error.__dict__[_FAILED_ROW] = row
        raise


def failed_row(error: BaseException) -> int | None:
    """The row of the trace that alone is at fault for an error; None where it is not known to be one."""
    return getattr(error, _FAILED_ROW, None)
