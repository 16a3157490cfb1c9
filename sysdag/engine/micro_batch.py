"""Elements of one node that are scored together, and the random state they were scored under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.component import Component
from sysdag.engine.kept_work import Kept
from sysdag.execution.execute import naming
from sysdag.execution.likelihood import aligned
from sysdag.graph.plan import Plan
from sysdag.objectives.comparison import Term
from sysdag.objectives.tail_weight import TailWeight
from sysdag.traces.cells import Draw


@dataclass(frozen=True, eq=False)
class RandomState:
    """torch's global generators: the CPU's, and that of one GPU."""

    cpu: Tensor
    device: torch.device
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, gpu)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, self.device)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Runs from this state and comes back to the present one."""
        with torch.random.fork_rng([] if self.gpu is None else [self.device]):
            self.restore()
            yield

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        same_gpu = self.gpu is None or (other.gpu is not None and torch.equal(self.gpu, other.gpu))
        return torch.equal(self.cpu, other.cpu) and same_gpu


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Elements of one term that one call of the component scores.

    Attributes:
        name: the node.
        rows: the row of the term's trace that each element belongs to.
        inputs, draws, noise: what the component gets.
        random: the state that the first pass scored under.
        is_random: whether the first pass drew from it (dropout).
        kept: what the first pass kept of all these elements.
        term: whose rows these are.
    """

    name: str
    rows: tuple[int, ...]
    inputs: tuple[Any, ...]
    draws: tuple[Draw, ...]
    noise: Any = None
    random: RandomState | None = None
    is_random: bool = False
    kept: Kept | None = None
    term: Term | None = None

    def called(self, at: int) -> str:
        """What an error calls the element's pair."""
        return f"row {self.rows[at]} of the batch" if self.term is None else self.term.called(self.rows[at])

    def _rows(self) -> list[int | str]:
        """What errors of a component call each element's row."""
        return [row if self.term is None else self.term.row_name(row) for row in self.rows]

    def score(self, component: Component) -> Float[Tensor, " n"]:
        """The component's scores of these elements."""
        with naming(self.name, self._rows()):
            if isinstance(self.noise, TailWeight):
                return component.weighted_score(self.inputs, self.draws, self.noise.heads, self.noise.tail)
            return component.score(self.inputs, self.draws, self.noise)

    def typicality(self, component: Component) -> Float[Tensor, " n"]:
        """See `Component.typicality`."""
        with naming(self.name, self._rows()):
            return component.typicality(self.inputs, self.draws)

    def select(self, kept: Sequence[int]) -> MicroBatch:
        """Some of the elements, by their position here, of which nothing is kept."""
        return replace(
            self,
            kept=None,
            rows=tuple(self.rows[at] for at in kept),
            inputs=tuple(self.inputs[at] for at in kept),
            draws=tuple(self.draws[at] for at in kept),
            noise=None if self.noise is None else self.noise.select(list(kept)),
        )

    def anew(self) -> MicroBatch:
        """The same, of which nothing is kept."""
        return replace(self, kept=None)

    def split(self, component: Component, max_tokens: int | None) -> list[MicroBatch]:
        """Parts of at most `max_tokens` each, where one element alone is not larger."""
        parts = component.micro_batches(self.inputs, self.draws, max_tokens)
        return [self] if len(parts) == 1 else [self.select(part) for part in parts]


def whole(plan: Plan, term: Term) -> MicroBatch:
    """All elements of a term as one micro-batch."""
    elements, draws = aligned(plan, term.trace, term.name)
    return MicroBatch(term.name, tuple(elements.rows), tuple(elements.values), tuple(draws), term.noise, term=term)
