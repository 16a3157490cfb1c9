"""The second pass: what is left to differentiate of a batch's loss once its scores are known.

The loss depends on the models through scores alone, so its derivative by them gives each element a coefficient, and
sum_i coefficient_i score_i, differentiated micro-batch by micro-batch, has the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.component import Component
from sysdag.components.residence import admit
from sysdag.engine.host_copy import beside
from sysdag.engine.kept_work import KeptGraph
from sysdag.engine.micro_batch import MicroBatch
from sysdag.engine.scored import HOST, Scored


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
            part, auxiliary = (beside(turn.coefficients, scores) * scores).sum(), component.take_auxiliary_loss()
            if auxiliary is None:
                return part
            factor, loss = auxiliary
            return part + factor * turn.auxiliary * loss
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


class _KnownByScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, derivatives: list[Tensor], *scores: Tensor) -> Tensor:
        ctx.derivatives, ctx.dtypes = derivatives, [values.dtype for values in scores]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # A loss scale may be more than 16 bits hold, and its product with a derivative not.
        products = [grad.to(each.device) * each for each in ctx.derivatives]
        return None, None, *(each.to(dtype) for each, dtype in zip(products, ctx.dtypes, strict=True))


def known_by_scores(loss: Float[Tensor, ""], coefficients: Mapping[str, Tensor], scored: Scored) -> Float[Tensor, ""]:
    """The loss, a number, as a function of what was scored, whose derivatives are known: the coefficients of the kept
    graphs' scores, and the factors of auxiliary losses."""
    factors = {name: torch.tensor(factor, device=HOST) for name, (factor, _) in scored.auxiliary.items()}
    derivatives = [
        known[name].to(values.device, torch.promote_types(values.dtype, torch.float32), non_blocking=True)
        for known, graphs in ((coefficients, scored.graphs), (factors, scored.auxiliary_graphs))
        for name, values in graphs.items()
    ]
    return _KnownByScores.apply(loss, derivatives, *scored.graphs.values(), *scored.auxiliary_graphs.values())


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
