"""Running a system over many inputs, in batches, so that the result depends on nothing but what is asked for.

Each draw has a seed of its own, made of the run's seed, the node's name, the input's row and the run's number. So a
batch can be run alone, before or after others, here or elsewhere, and its traces are the same: a run that was cut off
goes on where it was (`sysdag.execution.trace_file`), and engines differ in speed only. Components that take these
seeds (`Component.takes_row_seeds`), as sysdag's own do, draw the same in batches of any size and on any device, to
their models' rounding; others get one generator for a batch, whose size is then part of what is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sysdag.errors import PlanError, RunError, SysdagError
from sysdag.execution.execute import Sampler, component_sampler, draw
from sysdag.execution.rows import failed_row, row_names
from sysdag.graph.plan import Plan
from sysdag.traces.trace import Trace

if TYPE_CHECKING:
    from sysdag.components.component import Component


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Why a row of inputs is not run.

    Attributes:
        why: what is wrong with it.
        from_run: its first run that is left out; earlier ones were made before it failed.
    """

    why: str
    from_run: int = 0


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What is to be run: every input `runs` times, the runs of one input one after the other.

    Attributes:
        inputs: for each input of the system, one value a row.
        runs: how often each row is run.
        seed: of all randomness that components draw from their generators; an `Opaque` component's is its own.
        batch_size: runs that go through the system together.
        skipped: rows that are not run, by number. They keep their place: the other runs stay in the batches that they
            are in without them.
        columns: what else is known of each row, which stays beside its runs.

    Raises:
        PlanError: for an option out of range, or inputs without a row.
    """

    inputs: Mapping[str, Sequence[Any]]
    runs: int = 1
    seed: int = 0
    batch_size: int = 16
    skipped: Mapping[int, Skipped] = field(default_factory=dict)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.runs < 1 or self.batch_size < 1:
            raise PlanError(f"runs and batch_size must be 1 or more, got {self.runs} and {self.batch_size}.")
        if not next(iter(self.inputs.values()), ()):
            raise PlanError("There is no input to run the system on.")

    @property
    def total(self) -> int:
        """Number of runs in all, those of skipped rows among them."""
        return self.runs * len(next(iter(self.inputs.values())))

    @property
    def batches(self) -> int:
        """Number of batches; the last one may be smaller."""
        return -(-self.total // self.batch_size)

    @property
    def made(self) -> int:
        """Number of runs that are made."""
        return self.total - sum(self.runs - skipped.from_run for skipped in self.skipped.values())

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """Row and run of every run of a batch."""
        first = number * self.batch_size
        pairs = [divmod(place, self.runs) for place in range(first, min(first + self.batch_size, self.total))]
        return [(row, run) for row, run in pairs if row not in self.skipped or run < self.skipped[row].from_run]

    def batch(self, number: int) -> Trace:
        """The inputs of a batch, with the columns `prompt` (the input's row) and `run`, and those given."""
        pairs = self.pairs(number)
        inputs = {name: [column[prompt] for prompt, _ in pairs] for name, column in self.inputs.items()}
        numbers = {"prompt": [prompt for prompt, _ in pairs], "run": [run for _, run in pairs]}
        beside = {name: [column[prompt] for prompt, _ in pairs] for name, column in self.columns.items()}
        return Trace(inputs, {}, {**beside, **numbers})


class Engine(Protocol):
    """Runs batches of a plan."""

    def traces(self, plan: Plan, runs: Runs, first: int) -> Iterator[Trace]:
        """The batches from `first` on, in order.

        Raises:
            RunError: what `run` raises, after the batches before have been yielded.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LocalEngine:
    """One batch and one node after the other, in this process.

    Attributes:
        device: where the models are put before the first batch; `auto` is a GPU where torch finds one. None leaves
            them where they are.
    """

    device: str | None = None

    def traces(self, plan: Plan, runs: Runs, first: int) -> Iterator[Trace]:
        check_device(self.device)
        for names in plan.components:
            load(names[0], plan.system[names[0]].component, self.device)
        for number in range(first, runs.batches):
            trace = runs.batch(number)
            for name in plan.order if len(trace) else ():
                trace = with_node(plan, trace, name, component_sampler(plan, name), runs.seed)
            yield trace


def with_node(plan: Plan, trace: Trace, name: str, sampler: Sampler, seed: int) -> Trace:
    """The trace of a batch with one more node's values.

    Raises:
        RunError: see `run`.
    """
    try:
        return trace.updated({name: draw(plan, trace, name, sampler, seed)})
    except Exception as error:  # a node's function is the user's, a component's model anybody's
        failed = failed_row(error)
        prompt = trace.columns["prompt"][failed] if failed is not None and "prompt" in trace.columns else None
        is_told = isinstance(error, SysdagError) and any(known in str(error) for known in (name, *_routers(plan, name)))
        if isinstance(error, SysdagError) and is_told:
            error.input_row = prompt
            raise
        rows = row_names(trace)
        notes = list(getattr(error, "__notes__", ()))
        if not any(repr(name) in note for note in notes):
            notes.append(f"In node {name!r}, rows {rows[0]} to {rows[-1]}.")
        raised = RunError(f"{type(error).__name__}: {error}. {' '.join(notes)}")
        raised.input_row = prompt
        raise raised from error


def _routers(plan: Plan, name: str) -> list[str]:
    """What decides whether the node runs, and may be at fault."""
    return [made.router for made, _ in plan.switches_over(name)]


def check_device(device: str | None) -> None:
    """Refuses a device that is not here, before any weights load.

    Raises:
        RunError: naming it and what torch says.
    """
    import torch

    if device is None or device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of several types, by kind of device
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise RunError(
            f"Device {device!r} cannot be used here ({reason}). Give 'auto', 'cpu', or a GPU that `sysdag env` lists."
        ) from error


def load(name: str, component: Component, device: str | None) -> None:
    """Loads a component's weights and puts them on a device; `auto` is a GPU where torch finds one.

    Weights that were loaded to devices of their own (`device_map`) or quantised stay where they are, and None leaves
    any there. Those that no draw needs are not loaded.

    Raises:
        RunError: naming the node, whatever the model's library raises.
    """
    import torch

    from sysdag.components import adapter

    if component.draws_without_weights:
        return
    try:
        module = component.module
        if device == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            device = None if found is None else found.type
        if module is None or device is None or adapter.is_quantized(module):
            return
        if not any(getattr(part, "hf_device_map", None) for part in module.modules()):
            module.to(device)
    except Exception as error:
        raise RunError(
            f"Node {name!r}: the model of {component!r} cannot be loaded ({type(error).__name__}: {error})."
        ) from error
