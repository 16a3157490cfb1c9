"""Latent candidates: the few diverse values over which SysDPO-Sampling approximates the sum over intermediates.

SysDPO (arXiv 2502.17721), section on SysDPO-Sampling: y_1..y_k distinct, the same for winner and loser and for policy
and reference. Several latent nodes give joint paths, drawn along the topological order.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sysdag.components.random_streams import RowGenerator, row_seeds, seed_of
from sysdag.errors import DataError, PlanError
from sysdag.execution.branching import check_presence, skipped_rows
from sysdag.execution.execute import at_work, fill, naming, node_inputs
from sysdag.graph.parts import part_of
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT, Cell
from sysdag.traces.trace import Trace

SEED_COLUMN = "seed"  # of each prompt, while its candidates are drawn


@dataclass(frozen=True)
class Candidates:
    """Latent values for a batch of prompts.

    Attributes:
        trace: one row a candidate, those of one prompt next to each other: the inputs and the latents' cells.
        prompt: for each row, the prompt it belongs to, ascending.
        log_proposal: for each row, the log-probability of its path under the distribution it was drawn from; None
            where candidates were searched and not drawn.
        log_weight: for each row, what is added to log p(y, z|x) before the sum over candidates: 0 for a plain sum,
            -log q(y|x) - log k for importance sampling.
    """

    trace: Trace
    prompt: tuple[int, ...]
    log_proposal: tuple[float, ...] | None = None
    log_weight: tuple[float, ...] | None = None

    def select(self, rows: Sequence[int]) -> Candidates:
        """The candidates of the given rows."""

        def pick(column: tuple[float, ...] | None) -> tuple[float, ...] | None:
            return None if column is None else tuple(column[row] for row in rows)

        prompt = tuple(self.prompt[row] for row in rows)
        return Candidates(self.trace.select(rows), prompt, pick(self.log_proposal), pick(self.log_weight))

    def of_prompt(self, prompt: int) -> Candidates:
        """The candidates of one prompt, as prompt 0."""
        found = self.select([row for row, p in enumerate(self.prompt) if p == prompt])
        return replace(found, prompt=(0,) * len(found.prompt))

    @staticmethod
    def join(parts: Sequence[Candidates]) -> Candidates:
        """Candidates of one prompt each, as those of prompts 0, 1, ..."""

        def chain(name: str) -> tuple[float, ...] | None:
            columns = [getattr(part, name) for part in parts]
            return None if None in columns else tuple(itertools.chain.from_iterable(columns))

        return Candidates(
            Trace.concatenate([part.trace for part in parts]),
            tuple(number for number, part in enumerate(parts) for _ in part.prompt),
            chain("log_proposal"),
            chain("log_weight"),
        )


@dataclass(frozen=True, kw_only=True)
class CandidateStrategy(ABC):
    """How candidates are found.

    A strategy of one's own is a frozen dataclass that implements `paths`; its fields are its options. A configuration
    file names it by its import path: `candidates: {strategy: "my_module:MyStrategy", num_candidates: 4}`.

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

    @property
    def is_lower_bound(self) -> bool:
        """Whether the sum over candidates is a plain one over distinct values, and so at most p(z|x)."""
        return True

    def draw(self, plan: Plan, inputs: Mapping[str, Sequence[Any]], generator: RowGenerator = None) -> Candidates:
        """Candidates for each prompt, from the components as they are now.

        Args:
            plan: the system; its latents under Sampling are drawn.
            inputs: for each input, one value a prompt.
            generator: a CPU generator, torch's global one by default; or a seed for each prompt, which its candidates
                then depend on alone.
        """
        latents = plan.latents("sampling")
        shared = [name for name in latents if plan.system[name].likelihood == "none"]
        seeds = row_seeds(generator, len(next(iter(inputs.values()))))
        rows = Trace(inputs, {}, {SEED_COLUMN: seeds})
        if isinstance(generator, Sequence):
            generator = torch.Generator().manual_seed(seed_of(*seeds))
        for name in shared:
            elements = node_inputs(plan, fill(plan, rows), name)
            component = at_work(plan, name)
            seeded = component.generator_for(elements.seeds([seed_of(seed, name) for seed in seeds]))
            with naming(name, elements.rows):
                draws = component.sample(elements.values, generator=seeded) if elements.values else []
            rows = rows.updated({name: elements.cells(draws)})
        drawn = [name for name in latents if name not in shared]
        found = self.paths(plan, rows, drawn, generator)
        self._check(found, len(rows), drawn)
        found = _followed(plan, found, len(rows), drawn)
        for name in drawn:
            check_presence(found.trace, name, found.trace.cells[name], _skipped(plan, found.trace, name))
        columns = {name: column for name, column in found.trace.columns.items() if name != SEED_COLUMN}
        return replace(found, trace=replace(found.trace, columns=columns))

    @abstractmethod
    def paths(self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None) -> Candidates:
        """Joint paths of the latents for each row: the method that a strategy implements.

        `sysdag.execution.fill(plan, rows)` adds the deterministic nodes that a latent's function reads.

        Args:
            rows: one row a prompt: its inputs, the cells of latents that all candidates share, and in the column `seed`
                a seed of its own, which what is drawn for it may be made of.
            latents: names of the nodes to be drawn, in topological order.
            generator: of other randomness; a CPU generator, torch's global one for None.

        Returns:
            A trace of `rows`, each repeated for its candidates, with a cell for every latent, `ABSENT` where it does
            not run (`sysdag.execution.skipped_rows`); and the prompt of each, ascending from 0.
        """

    def _check(self, found: Any, prompts: int, latents: Sequence[str]) -> None:
        name = f"{type(self).__name__}.paths"
        if not isinstance(found, Candidates):
            raise PlanError(f"{name} must return Candidates, got {type(found).__name__}.")
        if missing := [latent for latent in latents if latent not in found.trace.cells]:
            raise PlanError(f"{name} returned no cells of the latents {missing}; it must draw each of {list(latents)}.")
        if len(found.prompt) != len(found.trace) or list(found.prompt) != sorted(found.prompt):
            raise PlanError(
                f"{name} must return one prompt for each of its {len(found.trace)} rows, ascending; got "
                f"{len(found.prompt)}{'' if len(found.prompt) != len(found.trace) else ' in another order'}."
            )
        if missing_prompts := sorted({*range(prompts)} ^ {*found.prompt}):
            raise PlanError(
                f"{name} must return candidates of the prompts 0 to {prompts - 1}; prompt {missing_prompts[0]} "
                f"{'has none' if missing_prompts[0] < prompts else 'is none of them'}."
            )


def _skipped(plan: Plan, rows: Trace, name: str) -> frozenset[int]:
    """The rows in which a latent does not run; a router may be computed of latents before it."""
    return skipped_rows(plan, fill(plan, rows), name) if plan.switches_over(name) else frozenset()


def _followed(plan: Plan, found: Candidates, prompts: int, latents: Sequence[str]) -> Candidates:
    """The paths that an observed part of a completion can follow.

    Behind a part that ended without its marker (`Component.is_over`) it has probability 0, so that the path adds
    nothing to a sum.

    Raises:
        DataError: where none is left of a prompt, naming it.
    """
    for name in plan.observed("sampling"):
        own, component = part_of(plan.system[name]), plan.system[name].component
        if own is None or component is None or not any(e.parent in latents for e in plan.arguments(name)):
            continue
        elements = node_inputs(plan, fill(plan, found.trace), name)
        over = {row for row, given in zip(elements.rows, elements.values, strict=True) if component.is_over(given)}
        left = found.select([row for row in range(len(found.trace)) if row not in over])
        with naming(name, list(range(prompts))):
            for prompt in range(prompts):
                if prompt not in left.prompt:
                    markers = own.partition.markers[: own.place]
                    raise DataError(
                        f"none of its {found.prompt.count(prompt)} candidates wrote {list(markers)} within "
                        "max_new_tokens, so that what is observed can follow none of them. Give the parts before it "
                        "more max_new_tokens, draw more candidates, or observe all parts (objective='direct').",
                        element=prompt,
                    )
        found = left
    return found


def with_values(
    rows: Trace, name: str, skipped: Collection[int], found: Sequence[Sequence[Cell]]
) -> tuple[Trace, list[int]]:
    """Rows repeated once for each value found for them, with that value added, and the row that each comes from.

    Args:
        skipped: rows in which the node does not run, which stay as they are.
        found: of each other row.
    """
    others = iter(found)
    by_row = [[ABSENT] if row in skipped else next(others) for row in range(len(rows))]
    parents = [row for row, cells in enumerate(by_row) for _ in cells]
    return rows.select(parents).updated({name: [cell for cells in by_row for cell in cells]}), parents


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
