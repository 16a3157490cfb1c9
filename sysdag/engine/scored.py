"""What the first pass found, on the host, where a batch's loss is computed.

The host waits for the scores anyhow, to see that they are finite. So what a comparison, a loss and the metrics make of
these few numbers takes no launch of a kernel and no second wait, and components may be on several devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.component import Component
from sysdag.engine.host_copy import to_host
from sysdag.engine.kept_work import KeptGradient
from sysdag.engine.micro_batch import MicroBatch
from sysdag.execution.likelihood import sum_by_row
from sysdag.objectives.comparison import Term

HOST = torch.device("cpu")


@dataclass
class Scored:
    """Scores of every term, by node, one a row of the term's trace, on the host; and the micro-batches they came from.

    Attributes:
        device: where the first of a component that trains was computed; None where nothing was.
        graphs: the policy's scores where they were computed, with their graphs, where a step keeps these.
        auxiliary: by node, the coefficient of its auxiliary loss and its mean over the elements, where it has one.
        auxiliary_graphs: these means with their graphs, likewise.
        residuals: by node and row, where a component has any (see `Component.take_residuals`).
        typicality: of every row, where it was asked for (see `Component.typicality`).
    """

    policy: dict[str, Tensor] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)
    graphs: dict[str, Tensor] = field(default_factory=dict)
    batches: list[MicroBatch] = field(default_factory=list)
    auxiliary: dict[str, tuple[float, Tensor]] = field(default_factory=dict)
    auxiliary_graphs: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)
    typicality: dict[str, Tensor] = field(default_factory=dict)
    device: torch.device | None = None

    def keep_graphs(
        self,
        term: Term,
        policy: Sequence[Tensor],
        rows: Sequence[int],
        auxiliary: Sequence[tuple[float, Tensor] | None],
    ) -> None:
        """Keeps the graphs of a term's micro-batches: of their scores, and of their auxiliary losses."""
        if not policy:  # no run takes its branch
            return
        self.graphs[term.name] = sum_by_row(policy, rows, len(term.trace), policy[0].device)
        losses = [(len(scores), each[1]) for scores, each in zip(policy, auxiliary, strict=True) if each is not None]
        if losses:
            self.auxiliary_graphs[term.name] = mean_of(losses)

    def drop_graphs(self) -> None:
        self.graphs, self.auxiliary_graphs = {}, {}

    def forget_gradients(self) -> bool:
        """Lets go of single elements' gradients; whether there were any."""
        before = self.batches
        self.batches = [replace(b, kept=None) if isinstance(b.kept, KeptGradient) else b for b in before]
        return any(isinstance(batch.kept, KeptGradient) for batch in before)

    def take(self, terms: Sequence[Term], found: Sequence[MicroBatchScores], *, weighs: bool) -> None:
        """Puts the scores of the terms' micro-batches, brought to the host, in the order of their rows.

        Args:
            weighs: whether their typicality was asked for.
        """
        by_node: dict[str, list[MicroBatchScores]] = {term.name: [] for term in terms}
        for each in found:
            by_node[each.term.name].append(each)
        for term in terms:
            own = by_node[term.name]
            rows, count = [row for each in own for row in each.batch.rows], len(term.trace)
            self.policy[term.name] = sum_by_row([each.policy for each in own], rows, count, HOST)
            self.reference[term.name] = sum_by_row([each.reference_or_zeros() for each in own], rows, count, HOST)
            if weighs:
                typical = [each.typicality for each in own if each.typicality is not None]
                self.typicality[term.name] = sum_by_row(typical, rows, count, HOST)
            losses = [(len(each.policy), *each.auxiliary) for each in own if each.auxiliary is not None]
            if losses:
                self.auxiliary[term.name] = losses[0][1], mean_of([(number, loss) for number, _, loss in losses])


def mean_of(losses: Sequence[tuple[int, Tensor]]) -> Float[Tensor, ""]:
    """Of auxiliary losses, by the number of elements that each is a mean over."""
    total = torch.stack([count * loss for count, loss in losses]).sum()
    return total / sum(count for count, _ in losses)


class MicroBatchScores(NamedTuple):
    """Of one micro-batch: its scores (n,), without graphs, and what scored: it says where in a draw something happened.

    Attributes:
        reference: None where none was run.
        auxiliary, typicality: see `Scored`.
    """

    term: Term
    batch: MicroBatch
    component: Component
    frozen: Component | None
    policy: Tensor
    reference: Tensor | None
    auxiliary: tuple[float, Tensor] | None = None
    typicality: Tensor | None = None

    def reference_or_zeros(self) -> Tensor:
        return torch.zeros_like(self.policy) if self.reference is None else self.reference


def on_the_host(found: Sequence[MicroBatchScores]) -> list[MicroBatchScores]:
    """The same with their numbers on the host, which waits for them once."""
    asked = {
        id(tensor): tensor
        for each in found
        for tensor in (each.policy, each.reference, each.auxiliary and each.auxiliary[1], each.typicality)
        if tensor is not None
    }
    numbers: dict[int, Any] = dict(zip(asked, to_host(list(asked.values())), strict=True))
    return [
        each._replace(
            policy=numbers[id(each.policy)],
            reference=numbers.get(id(each.reference)),
            auxiliary=each.auxiliary and (each.auxiliary[0], numbers[id(each.auxiliary[1])]),
            typicality=numbers.get(id(each.typicality)),
        )
        for each in found
    ]
