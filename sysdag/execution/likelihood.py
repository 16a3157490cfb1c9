"""The factorised likelihood: log p(s|x) is the sum over random nodes of log p(value | parents' values).

SysDPO (arXiv 2502.17721), equation for the joint of a compound system; a plate's factor is the sum over its elements,
and the visits of an unrolled loop are one factor each under shared weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.component import Component
from sysdag.errors import PlanError
from sysdag.execution.branching import check_presence
from sysdag.execution.execute import Elements, at_work, flat_draws, naming, node_inputs
from sysdag.execution.rows import row_names
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT
from sysdag.traces.trace import Trace


def node_score(plan: Plan, trace: Trace, name: str) -> Float[Tensor, " rows"]:
    """One node's log-likelihood, row by row.

    Args:
        trace: values of the node and of its parents.
    """
    component = at_work(plan, name)
    elements, draws = aligned(plan, trace, name)
    with naming(name, elements.rows):
        parts = [component.score(elements.values, draws)] if draws else []
    return sum_by_row(parts, elements.rows, len(trace), component.device)


def sum_by_row(parts: Sequence[Tensor], rows: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Scores of elements as scores of rows: a plate's elements are summed, a row without any has 0."""
    if not parts:
        return torch.zeros(count, device=device)
    scores = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if list(rows) == list(range(count)):
        return scores
    return scores.new_zeros(count).index_add(0, torch.tensor(rows, device=scores.device), scores)


def aligned(plan: Plan, trace: Trace, name: str) -> tuple[Elements, list]:
    """The component's inputs and the draws they belong to, with the records that these are scored by; none of rows in
    which the node does not run.

    Raises:
        PlanError: if a plate has another number of draws than its parents have elements, or a value is there though
            another branch is taken, naming node and row.
        DataError: for a value that cannot follow its input, naming node and row.
    """
    elements = node_inputs(plan, trace, name)
    cells = trace.cells[name]
    check_presence(trace, name, cells, elements.skipped)
    if elements.is_plate:
        for row, (count, cell) in enumerate(zip(elements.counts, cells, strict=True)):
            if cell is not ABSENT and (not isinstance(cell, tuple) or len(cell) != count):
                got = f"{len(cell)} values" if isinstance(cell, tuple) else "one value"
                raise PlanError(f"Node {name!r}, row {row}: its plate has {count} elements, but the trace holds {got}.")
    names = row_names(trace)
    with naming(name, [names[row] for row in elements.rows]):
        return elements, plan.system[name].component.in_context(elements.values, flat_draws(cells))


def in_context(plan: Plan, trace: Trace, name: str) -> Trace:
    """The trace with one node's values as its inputs have them: observed ones with the records they are scored by.

    Raises:
        as `aligned`.
    """
    component = plan.system[name].component
    if type(component).in_context is Component.in_context or all(d.record for d in flat_draws(trace.cells[name])):
        return trace
    elements, draws = aligned(plan, trace, name)
    return trace.updated({name: elements.cells(draws)})


def log_probs(plan: Plan, trace: Trace, nodes: Iterable[str] | None = None) -> dict[str, Float[Tensor, " rows"]]:
    """Exact natural log-likelihood of each random node's values given its parents', one a row of the trace.

    The joint log-likelihood is the sum over nodes. Computed from the recorded draws (token ids, not text) under the
    components' own distributions, whatever the temperature they were sampled at. Gradients flow to the weights.

    Args:
        nodes: names of the nodes to score; by default all random ones.

    Raises:
        PlanError: if a node's likelihood is not exact, or the trace lacks its values.
    """
    found = {}
    for name in plan.random_nodes if nodes is None else nodes:
        component = plan.system[name].component
        if component is None or component.likelihood != "exact":
            kind = "deterministic" if component is None else component.likelihood
            raise PlanError(
                f"Node {name!r} ({component!r}) has no exact likelihood (it is {kind!r}); name the exact nodes: "
                "log_probs(plan, trace, nodes=[...])."
            )
        if name not in trace.cells:
            raise PlanError(f"The trace has no values of node {name!r}; it holds {list(trace.cells)}.")
        found[name] = node_score(plan, trace, name)
    return found
