"""Latent candidates: the few diverse values over which SysDPO-Sampling approximates the sum over intermediates.

SysDPO (arXiv 2502.17721), section on SysDPO-Sampling: y_1..y_k distinct, the same for winner and loser and for policy
and reference. Several latent nodes give joint paths, drawn along the topological order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sysdag.beam import diverse_beam_search
from sysdag.errors import PlanError
from sysdag.execute import fill, flat_draws, node_inputs
from sysdag.plan import Plan
from sysdag.trace import Cell, Trace

__all__ = ["CandidateStrategy", "Candidates", "DiverseBeamSearch", "MonteCarlo", "distinct_ngrams", "diverse_beam_search"]


@dataclass(frozen=True)
class Candidates:
    """Latent values for a batch of prompts.

    Attributes:
        trace: one row a candidate, those of one prompt next to each other: the inputs and the latents' cells.
        prompt: for each row, the prompt it belongs to, ascending.
    """

    trace: Trace
    prompt: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CandidateStrategy(ABC):
    """How candidates are found.

    Args:
        num_candidates: k, most candidates for one prompt, at least 2.

    Raises:
        PlanError: for k = 1, with the reason.
    """

    num_candidates: int = 2

    def __post_init__(self) -> None:
        if self.num_candidates == 1:
            raise PlanError(
                "num_candidates=1 is refused: with a single candidate log p(y|x) is the same for winner and loser and "
                "cancels, so the models of the latent nodes get exactly zero gradient. Use 2 or more."
            )
        if not isinstance(self.num_candidates, int) or self.num_candidates < 2:
            raise PlanError(f"num_candidates must be an integer of 2 or more, got {self.num_candidates!r}.")

    def draw(self, plan: Plan, inputs: Mapping[str, Sequence[Any]], generator: torch.Generator | None = None) -> Candidates:
        """Distinct candidates for each prompt, from the components as they are now."""
        prompts = len(next(iter(inputs.values())))
        latents = plan.latents("sampling")
        shared = [name for name in latents if plan.system[name].likelihood == "none"]
        rows = Trace(inputs, {})
        for name in shared:
            rows = _extend(plan, rows, name, [[cell] for cell in self._sampled(plan, rows, name, generator)])[0]
        searched = [name for name in latents if name not in shared]
        paths = self._paths(plan, rows, searched, generator)
        kept = _first_distinct(plan, paths, searched, self.num_candidates)
        return Candidates(paths.trace.select(kept), tuple(paths.prompt[row] for row in kept)) if prompts else paths

    @abstractmethod
    def _paths(
        self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None
    ) -> Candidates:
        """Joint paths of the latents for each row, best first, possibly repeated."""

    @staticmethod
    def _sampled(plan: Plan, rows: Trace, name: str, generator: torch.Generator | None) -> list[Cell]:
        elements = node_inputs(plan, fill(plan, rows), name)
        return elements.cells(plan.system[name].component.sample(elements.values, generator=generator))


@dataclass(frozen=True, kw_only=True)
class DiverseBeamSearch(CandidateStrategy):
    """Diverse beam search with one beam a group (Vijayakumar et al. 2016, arXiv 1610.02424).

    The first latent gets `num_candidates` values; each later one extends every path by as many values as are needed to
    reach that number. Deterministic given the weights.

    Args:
        num_candidates: k; the paper uses 2 to 4.
        diversity_penalty: subtracted from a token's log-probability for each earlier group that chose it at this step,
            in nats; the paper uses 20.
    """

    diversity_penalty: float = 20.0

    def _paths(
        self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None
    ) -> Candidates:
        prompt = list(range(len(rows)))
        for name in latents:
            fewest = min((prompt.count(p) for p in set(prompt)), default=1)
            wanted = math.ceil(self.num_candidates / fewest)
            elements = node_inputs(plan, fill(plan, rows), name)
            if elements.counts is not None:
                raise PlanError(
                    f"Node {name!r} is a plate and latent; DiverseBeamSearch searches single values. Use MonteCarlo."
                )
            found = plan.system[name].component.search(elements.values, wanted, self.diversity_penalty)
            rows, parents = _extend(plan, rows, name, found)
            prompt = [prompt[parent] for parent in parents]
        return Candidates(rows, tuple(prompt))


@dataclass(frozen=True, kw_only=True)
class MonteCarlo(CandidateStrategy):
    """`num_candidates` runs of the latent nodes for each prompt; repeated paths are kept once.

    As in the paper, the candidates' joint probabilities are summed as they are: the sum is a lower bound on p(z|x).
    """

    def _paths(
        self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None
    ) -> Candidates:
        prompt = [row for row in range(len(rows)) for _ in range(self.num_candidates)]
        rows = rows.select(prompt)
        for name in latents:
            rows = rows.updated({name: self._sampled(plan, rows, name, generator)})
        return Candidates(rows, tuple(prompt))


def _extend(plan: Plan, rows: Trace, name: str, found: Sequence[Sequence[Cell]]) -> tuple[Trace, list[int]]:
    """Rows repeated once for each value found for them, with that value added; and the row each came from."""
    parents = [row for row, cells in enumerate(found) for _ in cells]
    return rows.select(parents).updated({name: [cell for cells in found for cell in cells]}), parents


def _first_distinct(plan: Plan, paths: Candidates, latents: Sequence[str], limit: int) -> list[int]:
    seen: dict[int, set[Any]] = {}
    kept = []
    for row, prompt in enumerate(paths.prompt):
        key = tuple(
            tuple(plan.system[name].component.key(draw) for draw in flat_draws([paths.trace.cells[name][row]]))
            for name in latents
        )
        found = seen.setdefault(prompt, set())
        if key not in found and len(found) < limit:
            found.add(key)
            kept.append(row)
    return kept


def distinct_ngrams(values: Sequence[Any], n: int = 2) -> float:
    """Distinct-n of texts: different word n-grams over all of them (Li et al. 2016, arXiv 1510.03055); 0 without any.

    Texts without spaces are split into characters.
    """
    grams: list[tuple[str, ...]] = []
    for value in values:
        text = str(value)
        words = text.split() if " " in text else list(text)
        grams += [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
