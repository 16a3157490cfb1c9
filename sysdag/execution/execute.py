"""Running a plan: ancestral sampling of every variable that is not given.

torch is imported where it is needed, so that a process which calls the nodes' functions alone does without.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sysdag.errors import DataError, EndpointError, PlanError, failed_element, shown
from sysdag.execution.branching import skipped_rows, values_taken
from sysdag.execution.origins import Origins
from sysdag.execution.rows import at_row, failed_row, row_names
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT, Cell, Draw, draws_of, value_of
from sysdag.traces.trace import Trace

if TYPE_CHECKING:
    import torch

    from sysdag.components.component import Component
    from sysdag.graph.variables import Edge

Sampler = Callable[[Sequence[Any], Sequence[int]], list[Draw]]
"""Draws for what a node's function returned, one an element, each with a seed."""


@dataclass(frozen=True)
class Elements:
    """The inputs of one node's component for a batch of rows, plates laid out flat.

    Attributes:
        values: what the node's function returned, one an element.
        rows: the row of each element, ascending.
        length: number of rows.
        is_plate: whether a row has a list of elements, and not one.
        skipped: rows without elements as the node does not run there.
    """

    values: list[Any]
    rows: list[int]
    length: int
    is_plate: bool = False
    skipped: frozenset[int] = frozenset()

    @property
    def counts(self) -> list[int]:
        """Number of elements of each row."""
        found = [0] * self.length
        for row in self.rows:
            found[row] += 1
        return found

    def seeds(self, rows: Sequence[int]) -> list[int]:
        """A seed for each element, of its row's seed and its place there."""
        from sysdag.components.random_streams import seed_of

        return [seed_of(seed, place) for seed, count in zip(rows, self.counts, strict=True) for place in range(count)]

    def cells(self, draws: Sequence[Draw]) -> list[Cell]:
        """Draws, one an element, as one cell a row."""
        found: list[Cell] = []
        for row, (start, end) in enumerate(itertools.pairwise(itertools.accumulate(self.counts, initial=0))):
            if row in self.skipped:
                found.append(ABSENT)
            else:
                found.append(tuple(draws[start:end]) if self.is_plate else draws[start])
        return found


def flat_draws(cells: Sequence[Cell]) -> list[Draw]:
    """The draws of a column, one an element."""
    return [draw for cell in cells for draw in draws_of(cell)]


def node_inputs(plan: Plan, trace: Trace, name: str) -> Elements:
    """Calls the node's function on its parents' values, once a row or once an element of a plate.

    A row in which another branch of a switch is taken has no element. A switch has the value of the branch's last node.

    What it returns becomes the component's input as that reads it (see `sysdag.components.input_reader`): values are
    told apart from what the function wrote, and what the rows hold beside the inputs is put to it.

    Raises:
        PlanError: if a parent has no value in the trace, or a plate's parent is no list, naming node and row.
        DataError: for a value or a row's option that the component cannot use, or a router's value that names no
            branch, naming node and row.
    """
    skipped = skipped_rows(plan, trace, name)
    if made := plan.switch(name):
        taken = [
            (row, value_of(cell)) for row, cell in enumerate(values_taken(plan, trace, made)) if row not in skipped
        ]
        return Elements([value for _, value in taken], [row for row, _ in taken], len(trace), skipped=skipped)
    edges = plan.arguments(name)
    columns = {}
    for edge in edges:
        if edge.parent in trace.inputs:
            columns[edge.parameter] = trace.inputs[edge.parent]
        elif edge.parent in trace.cells:
            columns[edge.parameter] = [value_of(cell) for cell in trace.cells[edge.parent]]
        else:
            raise PlanError(f"Node {name!r} reads {edge.parent!r}, of which the trace has no values.")
    plates = [edge for edge in edges if edge.each]
    function = plan.system[name].function
    component = plan.system[name].component
    options = {option: trace.inputs[option] for option in row_options(plan) if option in trace.inputs}
    origins = Origins(plan, trace, name)

    def call(arguments: Mapping[str, Any], row: int, place: int | str, element: int = 0) -> Any:
        value = _call(function, arguments, name, place)
        if component is None:
            return value
        own = {option: column[row] for option, column in options.items() if option in _row_options(component)}
        try:
            value = component.tell_apart(value, function, origins.told(arguments, row, element))
            return component.with_row_options(value, own) if own else value
        except DataError as error:
            raise DataError(f"Node {name!r}, row {place}: {error}") from error

    values: list[Any] = []
    rows: list[int] = []
    for row, place in enumerate(row_names(trace)):
        if row in skipped:
            continue
        arguments = {parameter: column[row] for parameter, column in columns.items()}
        with at_row(row):
            if not plates:
                values.append(call(arguments, row, place))
                rows.append(row)
                continue
            for element in range(_plate_length(plates, arguments, name, place)):
                picked = {edge.parameter: arguments[edge.parameter][element] for edge in plates}
                values.append(call({**arguments, **picked}, row, place, element))
                rows.append(row)
    return Elements(values, rows, len(trace), bool(plates), skipped)


def row_options(plan: Plan) -> list[str]:
    """The columns that rows may hold beside the inputs, which components take up; an input of that name is none."""
    found = dict.fromkeys(option for name in plan.random_nodes for option in _row_options(plan.system[name].component))
    return [option for option in found if option not in {given.name for given in plan.system.inputs}]


def _row_options(component: Any) -> tuple[str, ...]:
    return getattr(component, "row_options", ())


def _plate_length(plates: Sequence[Edge], arguments: Mapping[str, Any], name: str, place: int | str) -> int:
    lengths = {}
    for edge in plates:
        value = arguments[edge.parameter]
        if not isinstance(value, (list, tuple)):
            raise PlanError(
                f"{edge.parent}.each() >> {name}, row {place}: a plate needs a list, but {edge.parent!r} is "
                f"{type(value).__name__} {value!r:.100}."
            )
        lengths[edge.parent] = len(value)
    if len(set(lengths.values())) > 1:
        raise PlanError(f"Node {name!r}, row {place}: its plates have different lengths {lengths}.")
    return next(iter(lengths.values()))


def _call(function: Any, arguments: Mapping[str, Any], name: str, place: int | str) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        error.add_note(f"In the function of node {name!r}, row {place}.")
        raise


def sample(
    plan: Plan,
    inputs: Mapping[str, Sequence[Any]],
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    given: Trace | None = None,
) -> Trace:
    """Draws every variable of a batch of runs, in topological order.

    Args:
        inputs: for each input of the system, one value a row.
        seed: makes the run reproducible; by default torch's global generator does. What is drawn in a row depends on it
            and on the row's number.
        generator: a CPU generator that the seed is drawn from, instead of a seed.
        given: rows whose cells are kept as they are, so that only the missing ones are drawn.

    Raises:
        PlanError: for missing or unknown inputs, or columns of different lengths.
    """
    import torch

    if seed is not None and generator is not None:
        raise PlanError("sample(...) takes a seed or a generator, not both.")
    if seed is None:
        seed = int(torch.randint(2**62, (1,), generator=generator))
    trace = Trace(check_inputs(plan, inputs), {} if given is None else given.cells)
    for name in plan.order:
        if name in trace.cells:
            trace = resolved(plan, trace, name)
        else:
            trace = trace.updated({name: draw(plan, trace, name, component_sampler(plan, name), seed)})
    return trace


def fill(plan: Plan, trace: Trace) -> Trace:
    """Adds the values of the deterministic nodes whose parents all have values.

    Observed values that stand for others (see `Component.observes_in_context`) become these before.
    """
    for name in plan.order:
        if name in trace.cells or plan.system[name].is_random:
            trace = resolved(plan, trace, name)
            continue
        if all(edge.parent in trace.inputs or edge.parent in trace.cells for edge in plan.parents(name)):
            trace = trace.updated({name: draw(plan, trace, name)})
    return trace


def resolved(plan: Plan, trace: Trace, name: str) -> Trace:
    """The trace with the values of one node that its observed ones stand for, where its parents' are known.

    Raises:
        DataError: for a value that stands for none, naming node and row.
    """
    component = plan.system[name].component
    if not getattr(component, "observes_in_context", False) or name not in trace.cells:
        return trace
    draws = flat_draws(trace.cells[name])
    known = {*trace.inputs, *trace.cells}.issuperset(edge.parent for edge in plan.parents(name))
    if not known or all(each.record for each in draws):
        return trace
    elements = node_inputs(plan, trace, name)
    if len(elements.values) != len(draws):
        return trace  # a plate with too few values or too many, which whatever scores it refuses
    names = row_names(trace)
    with naming(name, [names[row] for row in elements.rows]):
        return trace.updated({name: elements.cells(component.in_context(elements.values, draws))})


def draw(plan: Plan, trace: Trace, name: str, sampler: Sampler | None = None, seed: int = 0) -> list[Cell]:
    """One node's cells, given those of its parents.

    Args:
        sampler: makes the draws of a random node of what the node's function returned; see `component_sampler`.
        seed: of the run. A draw's own is made of it, the node's name, the row's (see `row_names`) and its place there.
    """
    elements = node_inputs(plan, trace, name)
    if not plan.system[name].is_random:
        return elements.cells([Draw(value) for value in elements.values])
    if not elements.values:
        return elements.cells([])
    from sysdag.components.random_streams import seed_of

    assert sampler is not None
    names = row_names(trace)
    with naming(name, [names[row] for row in elements.rows]):
        try:
            draws = sampler(elements.values, elements.seeds([seed_of(seed, name, row) for row in names]))
        except Exception as error:
            if (element := failed_element(error)) is not None:
                with at_row(elements.rows[element]):
                    raise
            raise
    return elements.cells(draws)


def component_sampler(plan: Plan, name: str) -> Sampler:
    """Sampling from the node's component in this process."""

    def sampler(values: Sequence[Any], seeds: Sequence[int]) -> list[Draw]:
        component = at_work(plan, name)
        return component.sample(values, generator=component.generator_for(seeds))

    return sampler


def at_work(plan: Plan, name: str) -> Component:
    """The component of a random node, with its weights where they work (see `sysdag.components.residence`)."""
    from sysdag.components.residence import admit

    component = plan.system[name].component
    assert component is not None
    admit(component)
    return component


@contextlib.contextmanager
def naming(name: str, rows: Sequence[int | str]) -> Iterator[None]:
    """Context in which a component's error about an element tells the node and the element's row.

    A `DataError` says so itself; an error of another kind, as a tool raises, is raised as it is with a note. An
    `EndpointError`, of a server that a component asks, tells the node.
    """
    try:
        yield
    except EndpointError as error:
        raise EndpointError(f"Node {name!r}: {error}", status=error.status) from error
    except Exception as error:
        element = failed_element(error)
        if element is None:
            raise
        if not isinstance(error, DataError):
            error.add_note(f"In node {name!r}, row {rows[element]}.")
            raise
        with at_row(failed_row(error)):
            raise DataError(f"Node {name!r}, row {rows[element]}: {error}") from error


def check_inputs(plan: Plan, inputs: Mapping[str, Sequence[Any]], *, but: Collection[int] = ()) -> dict[str, list[Any]]:
    """The inputs as lists, one a row, with those of `row_options` that are there.

    Args:
        but: rows whose values are not looked at.

    Raises:
        PlanError: for missing or unknown names, a bare string where a list of rows is expected, or ragged columns.
        DataError: for a value of another type than its input's.
    """
    names = [given.name for given in plan.system.inputs]
    if not isinstance(inputs, Mapping) or set(inputs) - set(row_options(plan)) != set(names):
        got = list(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise PlanError(f"Inputs must be a dict with one list of values for each of {names}, got {got}.")
    for name, column in inputs.items():
        if isinstance(column, (str, bytes)) or not isinstance(column, Sequence):
            raise PlanError(f"Input {name!r} must be a list with one value a row, got {type(column).__name__}.")
    lengths = {name: len(column) for name, column in inputs.items()}
    if len(set(lengths.values())) > 1:
        raise PlanError(f"Inputs must have the same number of rows, got {lengths}.")
    for given in plan.system.inputs:
        for row, value in enumerate(inputs[given.name]):
            if row not in but and given.value_type is not None and not isinstance(value, given.value_type):
                expected, found = given.value_type.__name__, f"{type(value).__name__} {shown(value, 80)}"
                raise DataError(f"Row {row}: input {given.name!r} must be {expected}, got {found}.")
    return {name: list(column) for name, column in inputs.items()}
