"""A system run over many inputs, batch by batch, by an engine of choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sysdag.errors import PlanError
from sysdag.execution.batches import Engine, LocalEngine, Runs, Skipped
from sysdag.execution.execute import check_inputs
from sysdag.execution.ray_engine import RayEngine
from sysdag.graph.plan import Plan
from sysdag.traces.trace import Trace


def run(
    plan: Plan,
    inputs: Mapping[str, Sequence[Any]],
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    runs: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    skipped: Mapping[int, Skipped] | None = None,
    engine: Engine | Literal["local", "ray"] = "local",
    first_batch: int = 0,
) -> Iterator[Trace]:
    """Runs a system over inputs, batch by batch.

    Args:
        inputs, columns, runs, seed, batch_size, skipped: see `Runs`.
        engine: `local`, `ray`, or one with options: `LocalEngine(...)`, `sysdag.execution.ray_engine.RayEngine(...)`.
        first_batch: skips the batches before it; those from it on are the same all the same.

    Yields:
        The trace of each batch, in order, with the columns `prompt` and `run`, and those that were given.

    Raises:
        PlanError: before anything runs, for inputs that are not the system's, or an option out of range.
        RunError: naming the node, the input's row and the run, whatever a node's function or component raises. (An
            error of sysdag that names node and row already is raised as it is.)
    """
    wanted = Runs(
        inputs=check_inputs(plan, inputs, but=skipped or ()), columns=columns or {}, runs=runs, seed=seed,
        batch_size=batch_size, skipped=skipped or {},
    )  # fmt: skip
    return engine_of(engine).traces(plan, wanted, first_batch)


def engine_of(engine: Engine | str) -> Engine:
    """An engine by its name, with its defaults, or as it is.

    Raises:
        PlanError: for an unknown name.
    """
    if engine == "local":
        return LocalEngine()
    if engine == "ray":
        return RayEngine()
    if isinstance(engine, str):
        raise PlanError(f"engine must be 'local' or 'ray', or an object such as LocalEngine(...), got {engine!r}.")
    return engine
