"""The first pass over a comparison's terms: all scores, by policy and reference, micro-batch by micro-batch.

It can do without graphs, since the loss depends on the models through scores alone (see `sysdag.engine.turns`); a step
whose graphs fit in memory keeps them.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sysdag.components.component import Component, evaluating
from sysdag.components.residence import admit
from sysdag.engine.finite import check_finite
from sysdag.engine.kept_work import Kept, KeptGradient, KeptGraph, Room
from sysdag.engine.micro_batch import MicroBatch, RandomState, whole
from sysdag.engine.out_of_memory import Budget, attempt, free_cached_memory
from sysdag.engine.scored import MicroBatchScores, Scored, on_the_host
from sysdag.errors import TrainingError
from sysdag.graph.plan import Plan
from sysdag.objectives.comparison import Term

logger = logging.getLogger(__name__)


class Stored:
    """Stands for a reference that is not run: its scores are on file (see `sysdag.engine.precompute`), or all 0."""

    module = None


References = Callable[[Component], Component | Stored | None]


def score(
    plan: Plan,
    terms: Sequence[Term],
    references: References,
    budget: Budget,
    rounds: Callable[[int], int] | None = None,
    room: Room | None = None,
    *,
    weighs: bool = False,
) -> Scored:
    """The first pass: policy and reference side by side, micro-batch by micro-batch.

    Args:
        references: the frozen reference of a component; None where it does not train, and is its own. Zeros stand for
            the scores of one that is not run.
        budget: is shrunk when memory runs out; what was scored before stays.
        rounds: where processes must call the models equally often, the largest of their numbers of micro-batches.
        room: for work of this pass that the second one uses, if any.
        weighs: whether the runs' typicality is found, too, by one more forward.

    Raises:
        TrainingError: if a score is not finite, or memory runs out where a micro-batch cannot be split.
    """
    scored = Scored()
    waiting: list[MicroBatchScores] = []
    for term in terms:
        component = component_of(plan, term.name)
        reference = references(component)
        admit(component, reference if isinstance(reference, Component) else None)
        rows: list[int] = []
        parts: list[_Scores] = []
        queue = deque(whole(plan, term).split(component, budget.max_tokens))
        extra = [] if rounds is None else [queue[0].select([0])] * (rounds(len(queue)) - len(queue))
        while queue:
            batch = queue.popleft()
            before = RandomState.now(component.device)
            keeps = _what_is_kept(batch, component, reference, budget, room, term is terms[-1] and not queue)
            wanted = _Wanted(keeps, room, budget.keeps_graphs, weighs)
            found = attempt(lambda: _both(batch, component, reference, wanted))  # noqa: B023
            if found is None:
                before.restore()
                if rounds is not None:
                    raise TrainingError(
                        f"Node {term.name!r}: memory ran out, and sharded processes must split alike. Set "
                        f"micro_batch_tokens below {budget.max_tokens}. The weights were not changed."
                    )
                if budget.keeps_graphs:
                    logger.warning("Memory ran out with the graphs of a whole step; it goes on in two passes.")
                    budget.keeps_graphs = False
                    parts = []
                    scored.drop_graphs()
                    free_cached_memory()
                    queue.appendleft(batch)
                elif scored.forget_gradients():
                    logger.warning("Memory ran out with gradients that waited; from now on none do.")
                    budget.reuses = False
                    free_cached_memory()
                    queue.appendleft(batch)
                else:
                    shrunk = budget.shrink(batch, component)
                    queue.extendleft(batch.select(part) for part in reversed(shrunk))
                continue
            if reference is not None and scored.device is None:
                scored.device = found.policy.device
            frozen = None if isinstance(reference, Stored) else reference
            is_random = RandomState.now(component.device) != before
            scored.batches.append(replace(batch, random=before, is_random=is_random, kept=found.kept))
            plain = found.detach()
            waiting.append(
                MicroBatchScores(
                    term, batch, component, frozen, plain.policy, plain.reference, plain.auxiliary, plain.typicality
                )
            )
            rows += batch.rows
            if budget.keeps_graphs:
                parts.append(found)
            for row, residual in zip(batch.rows, found.residuals or (), strict=False):
                scored.residuals.setdefault(term.name, {}).setdefault(row, []).append(residual)
        for filler in extra:
            _both(filler, component, reference, _Wanted(weighs=weighs))
        if budget.keeps_graphs and reference is not None:
            scored.keep_graphs(term, [each.policy for each in parts], rows, [each.auxiliary for each in parts])
    brought = on_the_host(waiting)
    check_finite(brought)
    scored.take(terms, brought, weighs=weighs)
    return scored


def component_of(plan: Plan, name: str) -> Component:
    """The component of a random node."""
    component = plan.system[name].component
    assert component is not None  # terms are of random nodes
    return component


@dataclass(frozen=True)
class _Scores:
    """Of one micro-batch, the reference's None where none is run; the auxiliary loss and the residuals that come with
    them, where the component has any."""

    policy: Tensor
    reference: Tensor | None
    auxiliary: tuple[float, Tensor] | None = None
    residuals: list[Tensor] | None = None
    kept: Kept | None = None
    typicality: Tensor | None = None

    def detach(self) -> _Scores:
        found = None if self.auxiliary is None else (self.auxiliary[0], self.auxiliary[1].detach())
        return replace(self, policy=self.policy.detach(), auxiliary=found)


def _what_is_kept(
    batch: MicroBatch,
    component: Component,
    reference: Component | Stored | None,
    budget: Budget,
    room: Room | None,
    is_last: bool,
) -> type[Kept] | None:
    """How a micro-batch's work waits for the second pass, if at all; nothing does whose graphs are kept anyway."""
    if room is None or reference is None or not budget.reuses or budget.keeps_graphs:
        return None
    if is_last:
        return KeptGraph
    if len(batch.rows) > 1:
        return None
    trained = [parameter for parameter in component.own_parameters().values() if parameter.requires_grad]
    return KeptGradient if room.take(trained) else None


@dataclass(frozen=True)
class _Wanted:
    """What scoring a micro-batch is to leave behind beside the scores; see `score` and `_what_is_kept`."""

    keeps: type[Kept] | None = None
    room: Room | None = None
    keep_graph: bool = False
    weighs: bool = False


def _both(batch: MicroBatch, component: Component, reference: Component | Stored | None, wanted: _Wanted) -> _Scores:
    frozen = reference_score(batch, reference) if isinstance(reference, Component) else None
    with torch.set_grad_enabled(reference is not None and (wanted.keep_graph or wanted.keeps is not None)):
        ours = batch.score(component)
        auxiliary, residuals = component.take_auxiliary_loss(), component.take_residuals()
    typical = batch.typicality(component) if wanted.weighs else None
    if reference is None:
        return _Scores(ours, ours, typicality=typical)
    found = _Scores(ours, frozen, auxiliary, residuals, typicality=typical)
    if wanted.keeps is None:
        return found
    kept: Kept | None = None
    if wanted.keeps is KeptGraph:
        kept = KeptGraph(ours, auxiliary)
    elif auxiliary is None and wanted.room is not None:
        kept = KeptGradient(ours, wanted.room.parameters)
    return replace(found.detach(), kept=kept)


@torch.no_grad()
def reference_score(batch: MicroBatch, reference: Component) -> Tensor:
    """The reference's scores, always without dropout, even where it shares the policy's modules."""
    with contextlib.nullcontext() if reference.module is None else evaluating(reference.module):
        return batch.score(reference)
