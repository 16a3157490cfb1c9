"""Can this graph represent the optimum of this reward? Theorem 1 of SysDPO on systems that can be enumerated.

SysDPO (arXiv 2502.17721), Theorem 1: in the population, with full support, the minimiser's implicit reward
beta log p/q equals the true reward up to a function of the inputs, wherever the factorisation can represent it. On a
system whose nodes all draw from finitely many values both sides can be computed, and this module does.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sysdag.errors import PlanError
from sysdag.execution.branching import skipped_rows
from sysdag.execution.execute import fill, node_inputs
from sysdag.execution.likelihood import log_probs
from sysdag.graph.plan import Objective, Plan
from sysdag.graph.system import System
from sysdag.objectives.candidate_sums import candidate_log_sum
from sysdag.objectives.candidates import Candidates, CandidateStrategy, with_values
from sysdag.traces.trace import Trace

Reward = Callable[[Mapping[str, Any], Mapping[str, Any]], float]


@dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """What minimising the population loss reached.

    Attributes:
        objective: `direct` (reward of a whole run) or `sampling` (reward of the outputs).
        deviation: largest |beta log p/q - r - f(x)| over all inputs and outcomes, in units of the reward; f(x) is the
            value that makes the deviation of each input smallest.
        gradient: largest absolute entry of the loss's gradient at the end: how far from a minimum.
        missing_edges: (parent, child) pairs without which the optimum does not factorise over the graph; for
            `sampling` always empty, since only a marginal has to be represented.
        system: a copy of the system with the weights that were reached.
    """

    objective: Objective
    deviation: float
    gradient: float
    missing_edges: tuple[tuple[str, str], ...]
    system: System

    def __str__(self) -> str:
        lines = [f"{self.objective}: the implicit reward deviates from the reward by at most {self.deviation:.3g}"]
        for parent, child in self.missing_edges:
            lines.append(f"  the optimum needs {parent} >> {child}, which the graph does not have")
        return "\n".join(lines)


def enumerate_outcomes(plan: Plan, inputs: Mapping[str, Any], nodes: Sequence[str] | None = None) -> Trace:
    """Every combination of values of the given random nodes (all by default) for one value of each input.

    Raises:
        PlanError: if a node's component has no finite set of values, or the node is a plate.
    """
    rows = Trace({name: [value] for name, value in inputs.items()}, {})
    return _enumerated(plan, rows, plan.random_nodes if nodes is None else nodes)


def _enumerated(plan: Plan, rows: Trace, nodes: Sequence[str]) -> Trace:
    """Each row with every combination of the nodes' values, those of branches that it does not take left out."""
    for name in nodes:
        component: Any = plan.system[name].component
        filled = fill(plan, rows)
        skipped = skipped_rows(plan, filled, name)
        known = {*filled.inputs, *filled.cells}.issuperset(edge.parent for edge in plan.parents(name))
        reached: list[Any] = [None] * (len(rows) - len(skipped))  # of outputs without latents
        if known:
            reached = node_inputs(plan, filled, name).values
        if plan.is_plate(name) or component.outcome_counts(reached) is None:
            raise PlanError(
                f"Node {name!r} ({component!r}) cannot be enumerated; it needs finitely many values, and no plate."
            )
        rows, _ = with_values(rows, name, skipped, component.outcomes(reached))
    return fill(plan, rows)


def check_alignment(
    system: System,
    reward: Reward,
    inputs: Mapping[str, Sequence[Any]],
    *,
    objective: Objective = "direct",
    beta: float = 1.0,
    candidates: CandidateStrategy | None = None,
    seed: int = 0,
    max_iterations: int = 2000,
) -> AlignmentReport:
    """Minimises the population loss over every pair of outcomes, and measures how well the reward was recovered.

    The loss is the sum over all pairs (s, s') of one input of -sigma(r(s) - r(s')) log sigma(m(s) - m(s')), with m the
    implicit reward: every pair is compared, and preferred with its Bradley-Terry probability. The given system is left
    as it is; copies of its components train, in fp64, by L-BFGS.

    Args:
        system: all of its random nodes draw from finitely many values.
        reward: of one run, from its inputs and the values of its nodes; for `sampling` it may look at outputs alone.
        inputs: for each input, the values to range over, one a row.
        objective: `direct` or `sampling`.
        beta: as in training.
        candidates: for `sampling`, drawn once from the reference in place of the sum over all latents.
        seed: of the candidates.
        max_iterations: of L-BFGS.

    Raises:
        PlanError: if a node cannot be enumerated, or candidates are given for `direct`.
    """
    if candidates is not None and objective != "sampling":
        raise PlanError("candidates belong to objective='sampling'.")
    reference = _copy(system).compile()
    reference.check(objective)
    policy = _copy(system).compile()
    rows = [{name: column[row] for name, column in inputs.items()} for row in range(len(next(iter(inputs.values()))))]
    generator = torch.Generator().manual_seed(seed)
    truths = [_Population(reference, row, reward, objective) for row in rows]
    trained = truths
    if candidates is not None:
        drawn = [candidates.draw(reference, {k: [v] for k, v in row.items()}, generator) for row in rows]
        trained = [_Population(reference, row, reward, objective, c) for row, c in zip(rows, drawn, strict=True)]
    gradient = _minimise(policy, trained, beta, max_iterations)
    with torch.no_grad():
        deviation = max(population.deviation(policy, beta) for population in truths)
    missing = _missing_edges(reference, rows, reward, beta) if objective == "direct" else ()
    return AlignmentReport(
        objective=objective, deviation=deviation, gradient=gradient, missing_edges=missing, system=policy.system
    )


class _Population:
    """Every outcome of one input: its reward, and its log-probability under the reference.

    For `sampling` the outcomes are those of the outputs, summed over latents: all of them, or the given candidates.
    """

    def __init__(
        self,
        reference: Plan,
        row: Mapping[str, Any],
        reward: Reward,
        objective: Objective,
        drawn: Candidates | None = None,
    ) -> None:
        outputs = reference.system.outputs
        if drawn is None:
            self.trace = enumerate_outcomes(reference, row)
            self.log_weight = torch.zeros(len(self.trace), dtype=torch.float64)
        else:
            weight = drawn.log_weight or (0.0,) * len(drawn.prompt)
            weighed = replace(drawn.trace, columns={"log_weight": weight})
            self.trace = _enumerated(reference, weighed, reference.results)
            self.log_weight = torch.tensor(self.trace.columns["log_weight"], dtype=torch.float64)
        names = reference.random_nodes if objective == "direct" else outputs
        keys = list(zip(*(map(repr, self.trace[name]) for name in names), strict=True))
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        group_of = {key: group for group, key in enumerate(first)}
        self.group = torch.tensor([group_of[key] for key in keys])
        self.count = len(group_of)
        rewards = []
        for number in first.values():
            values = {
                name: self.trace[name][number] for name in (reference.order if objective == "direct" else outputs)
            }
            rewards.append(float(reward(row, values)))
        self.reward = torch.tensor(rewards, dtype=torch.float64)
        self.reference = self.log_p(reference).detach()

    def log_p(self, plan: Plan) -> Tensor:
        """Log-probability of each outcome."""
        joint = torch.stack([value.double() for value in log_probs(plan, self.trace).values()]).sum(0) + self.log_weight
        return candidate_log_sum(joint, self.group, self.count)

    def loss(self, plan: Plan, beta: float) -> Tensor:
        implicit = beta * (self.log_p(plan) - self.reference)
        preferred = torch.sigmoid(self.reward[:, None] - self.reward[None, :])
        return -(preferred * F.logsigmoid(implicit[:, None] - implicit[None, :])).sum() / self.count**2

    def deviation(self, plan: Plan, beta: float) -> float:
        difference = beta * (self.log_p(plan) - self.reference) - self.reward
        return float((difference.max() - difference.min()) / 2)


def _minimise(policy: Plan, populations: Sequence[_Population], beta: float, max_iterations: int) -> float:
    modules = {id(policy.system[n].component): policy.system[n].component.module for n in policy.random_nodes}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]

    def loss() -> Tensor:
        return torch.stack([population.loss(policy, beta) for population in populations]).sum()

    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, max_eval=4 * max_iterations, history_size=50, tolerance_grad=1e-13,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    gradients = torch.autograd.grad(loss(), parameters)
    return max(float(gradient.abs().max()) for gradient in gradients)


def _copy(system: System) -> System:
    """The system with copies of its components, in fp64; nodes that share one go on sharing."""
    copies: dict[int, Any] = {}
    for n in system.nodes:
        if n.component is not None and id(n.component) not in copies:
            copies[id(n.component)] = copy.deepcopy(n.component)
            copies[id(n.component)].module.double().requires_grad_(True)
    return system.with_components({n.name: copies[id(n.component)] for n in system.nodes if n.component is not None})


def _missing_edges(
    plan: Plan, rows: Sequence[Mapping[str, Any]], reward: Reward, beta: float
) -> tuple[tuple[str, str], ...]:
    """Arrows that the optimum q exp(r / beta) / Z needs and the graph lacks.

    With full support each node's conditional given all earlier values is defined, and depends on exactly the parents it
    needs: an earlier variable that changes it while all others stay is one.
    """
    table: dict[tuple[Any, ...], float] = {}
    names = [i.name for i in plan.system.inputs]
    order = list(plan.random_nodes)
    for row in rows:
        trace = enumerate_outcomes(plan, row)
        log_q = torch.stack(list(log_probs(plan, trace).values())).sum(0).detach()
        for number in range(len(trace)):
            values = {name: trace[name][number] for name in plan.order}
            key = (*(_hashable(row[name]) for name in names), *(_hashable(trace[name][number]) for name in order))
            table[key] = math.exp(float(log_q[number]) + float(reward(row, values)) / beta)
    missing = []
    for depth, child in enumerate(order):
        known = len(names) + depth
        conditional = _conditional(table, known)
        parents = {edge.parent for edge in plan.parents(child)} | set(_random_sources(plan, child))
        for place, earlier in enumerate([*names, *order[:depth]]):
            if earlier not in parents and _depends(conditional, place):
                missing.append((earlier, child))
    return tuple(missing)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _random_sources(plan: Plan, child: str) -> Iterator[str]:
    """Inputs and random nodes that reach the child through deterministic nodes alone."""
    for edge in plan.parents(child):
        yield edge.parent
        if edge.parent in plan.order and not plan.system[edge.parent].is_random:
            yield from _random_sources(plan, edge.parent)


def _conditional(table: Mapping[tuple[Any, ...], float], known: int) -> dict[tuple[Any, ...], dict[Any, float]]:
    """p(value at place `known` | values before it), from joint weights."""
    sums: dict[tuple[Any, ...], dict[Any, float]] = defaultdict(lambda: defaultdict(float))
    for key, weight in table.items():
        sums[key[:known]][key[known]] += weight
    return {given: {value: w / sum(row.values()) for value, w in row.items()} for given, row in sums.items()}


def _depends(conditional: Mapping[tuple[Any, ...], Mapping[Any, float]], place: int) -> bool:
    seen: dict[tuple[Any, ...], Mapping[Any, float]] = {}
    for given, row in conditional.items():
        rest = (*given[:place], *given[place + 1 :])
        first = seen.setdefault(rest, row)
        if any(abs(first[value] - row[value]) > 1e-9 for value in row):
            return True
    return False
