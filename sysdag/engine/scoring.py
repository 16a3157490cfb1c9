"""The two passes over a comparison's terms: all scores first, then forward and backward, micro-batch by micro-batch.

The loss depends on the models through scalars alone, so the first pass can do without graphs: the loss's derivative by
the scores gives each element a coefficient, and sum_i coefficient_i score_i, differentiated micro-batch by micro-batch,
has the gradient of the loss. A step whose graphs fit in memory keeps them from the first pass.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.component import Component, evaluating
from sysdag.components.residence import admit
from sysdag.engine.finite import check_finite
from sysdag.engine.kept_work import Kept, KeptGradient, KeptGraph, Room
from sysdag.engine.micro_batch import MicroBatch, RandomState, whole
from sysdag.engine.scored import MicroBatchScores, Scored, mean_of, on_the_host
from sysdag.errors import TrainingError
from sysdag.execution.likelihood import sum_by_row
from sysdag.graph.plan import Plan
from sysdag.objectives.comparison import Term

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Turn:
    """One micro-batch's part of the loss.

    Attributes:
        batch: what is scored.
        coefficients: d loss / d score of each element, on the host.
        auxiliary: the micro-batch's share of its node's auxiliary loss (see `Component.take_auxiliary_loss`).
        finished: parameters that have this gradient already (an interrupted backward had reached them).
    """

    batch: MicroBatch
    coefficients: Float[Tensor, " n"]
    auxiliary: float = 0.0
    finished: frozenset[nn.Parameter] = frozenset()

    def select(self, kept: Sequence[int]) -> Turn:
        """Some of the elements, by their position here."""
        share = self.auxiliary * len(kept) / len(self.coefficients)
        return replace(self, batch=self.batch.select(kept), coefficients=self.coefficients[list(kept)], auxiliary=share)

    def without(self, finished: Iterable[nn.Parameter]) -> Turn:
        """The same for the other parameters only, computed anew."""
        return replace(self, batch=self.batch.anew(), finished=self.finished | frozenset(finished))


@dataclass
class Budget:
    """How much a call of a component gets.

    Attributes:
        max_tokens: of a micro-batch, as `Component.micro_batches` counts them. Halved when memory runs out.
        keeps_graphs: whether the first pass keeps its graphs; dropped when memory runs out.
        reuses: whether it keeps some of its work where it keeps no graphs; dropped likewise.
    """

    max_tokens: int
    keeps_graphs: bool
    reuses: bool = True

    def shrink(self, batch: MicroBatch, component: Component) -> list[list[int]]:
        """The micro-batch's elements in two or more parts, after memory ran out on it.

        Raises:
            TrainingError: for a single element, which cannot be split.
        """
        if len(batch.rows) == 1:
            raise TrainingError(
                f"Node {batch.name!r}, {batch.called(0)}: memory ran out on a single element. Shorter "
                "texts (max_length), gradient_checkpointing=True, bf16=True or a smaller model need less. The weights "
                "were not changed."
            )
        parts = [list(range(len(batch.rows)))]
        while len(parts) == 1 and self.max_tokens > 1:
            self.max_tokens //= 2
            parts = component.micro_batches(batch.inputs, batch.draws, self.max_tokens)
        logger.warning(
            "Memory ran out at node %r; micro-batches hold at most %d tokens from now on (micro_batch_tokens).",
            batch.name, self.max_tokens,
        )  # fmt: skip
        return parts


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
                    queue.appendleft(batch)
                elif scored.forget_gradients():
                    logger.warning("Memory ran out with gradients that waited; from now on none do.")
                    budget.reuses = False
                    queue.appendleft(batch)
                else:
                    shrunk = budget.shrink(batch, component)
                    queue.extendleft(batch.select(part) for part in reversed(shrunk))
                continue
            frozen = None if isinstance(reference, Stored) else reference
            is_random = RandomState.now(component.device) != before
            scored.batches.append(replace(batch, random=before, is_random=is_random, kept=found.kept))
            auxiliary = found.auxiliary and (found.auxiliary[0], found.auxiliary[1].detach())
            waiting.append(
                MicroBatchScores(
                    term, batch, component, frozen, found.policy.detach(), found.reference, auxiliary, found.typicality
                )
            )
            rows += batch.rows
            if budget.keeps_graphs:
                parts.append(found)
            for row, residual in zip(batch.rows, found.residuals or (), strict=False):
                scored.residuals.setdefault(term.name, {}).setdefault(row, []).append(residual)
        for filler in extra:
            _both(filler, component, reference, _Wanted(weighs=weighs))
        if budget.keeps_graphs and parts and reference is not None:
            scored.graphs[term.name] = sum_by_row(
                [each.policy for each in parts], rows, len(term.trace), component.device
            )
            losses = [(len(each.policy), each.auxiliary[1]) for each in parts if each.auxiliary is not None]
            if losses:
                scored.auxiliary_graphs[term.name] = mean_of(losses)
    if waiting:
        scored.device = waiting[0].policy.device
    brought = on_the_host(waiting)
    check_finite(brought)
    scored.take(terms, brought)
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


def turns(
    batches: Sequence[MicroBatch],
    coefficients: Mapping[str, Tensor],
    rounds: Callable[[int], int] | None = None,
    balanced: Collection[str] = (),
) -> list[Turn]:
    """What the second pass has to do: nothing whose coefficient is exactly 0, except where `rounds` evens out numbers.

    Elements are left out of a micro-batch only where that changes no other's score: not under dropout. Of a node whose
    coefficients are all 0 one element stays, so that its parameters get gradients of 0 and not none.

    Args:
        coefficients: by node, d loss / d score of each row, on the host.
        balanced: nodes with an auxiliary loss, of which every element counts.
    """
    counts = {name: sum(len(each.rows) for each in batches if each.name == name) for name in balanced}
    found: dict[str, list[Turn]] = {}
    for batch in batches:
        of_row = coefficients[batch.name]
        share = len(batch.rows) / counts[batch.name] if batch.name in counts else 0.0
        turn = Turn(batch, of_row[list(batch.rows)], share)
        found.setdefault(batch.name, []).append(turn)
    every = [turn for own in found.values() for turn in (_needed(own) if rounds is None else _evened(own, rounds))]
    # What waited goes first, the smaller things before the graph: no other graph is built beside it.
    return sorted(every, key=lambda turn: (turn.batch.kept is None, isinstance(turn.batch.kept, KeptGraph)))


def _needed(turns: Sequence[Turn]) -> list[Turn]:
    found = []
    for turn in turns:
        kept = [at for at, coefficient in enumerate(turn.coefficients.tolist()) if coefficient]
        if turn.auxiliary or (kept and turn.batch.kept is not None):
            found.append(turn)
        elif kept:
            found.append(turn.select(kept) if len(kept) < len(turn.coefficients) and not turn.batch.is_random else turn)
    return found or [turns[0].select([0])]


def _evened(turns: Sequence[Turn], rounds: Callable[[int], int]) -> list[Turn]:
    filler = turns[0].select([0])
    filler = replace(filler, coefficients=torch.zeros_like(filler.coefficients), auxiliary=0.0)
    return [*turns, *[filler] * (rounds(len(turns)) - len(turns))]


def part_of_loss(turn: Turn, component: Component) -> Float[Tensor, ""]:
    """sum_i coefficient_i score_i of a micro-batch, with its share of the node's auxiliary loss, where there is one.

    From what the first pass kept; else scored again under the random state of the first pass.
    """
    if turn.batch.kept is not None:
        return turn.batch.kept.part_of_loss(turn.coefficients, turn.auxiliary)
    admit(component)
    frozen = [parameter for parameter in turn.finished if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        assert turn.batch.random is not None
        with turn.batch.random.replayed(), torch.enable_grad():
            scores = turn.batch.score(component)
            part, auxiliary = (turn.coefficients.to(scores) * scores).sum(), component.take_auxiliary_loss()
            if auxiliary is None:
                return part
            factor, loss = auxiliary
            return part + factor * turn.auxiliary * loss
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class _KnownByScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, coefficients: list[Tensor], *scores: Tensor) -> Tensor:
        ctx.coefficients = coefficients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(each * grad.to(each) for each in ctx.coefficients)


def known_by_scores(loss: Float[Tensor, ""], coefficients: Mapping[str, Tensor], scored: Scored) -> Float[Tensor, ""]:
    """The loss, a number, as a function of what was scored, whose derivatives are known: the coefficients of the kept
    graphs' scores, and the factors of auxiliary losses."""
    graphs = [*scored.graphs.values(), *scored.auxiliary_graphs.values()]
    known = [coefficients[name].to(values) for name, values in scored.graphs.items()]
    known += [graph.new_tensor(scored.auxiliary[name][0]) for name, graph in scored.auxiliary_graphs.items()]
    return _KnownByScores.apply(loss, known, *graphs)


class _Zero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.shapes)


def zero_of(parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
    """A zero that depends on all parameters; their gradients by it are zeros that take no memory."""
    return _Zero.apply(*parameters)


Result = TypeVar("Result")


def attempt(run: Callable[[], Result]) -> Result | None:
    """What `run` returns, or None after memory ran out in it; its tensors are then gone and cached memory is freed."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, or on a CPU whose process is limited."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(sign in str(error) for sign in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))
