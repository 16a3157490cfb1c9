"""Latent candidates: the few diverse values over which SysDPO-Sampling approximates the sum over intermediates.

SysDPO (arXiv 2502.17721), section on SysDPO-Sampling: y_1..y_k distinct, the same for winner and loser and for policy
and reference. Several latent nodes give joint paths, drawn along the topological order.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sysdag.components.decoding import check_truncation
from sysdag.components.random_streams import RowGenerator, row_seeds, seed_of
from sysdag.errors import DataError, PlanError
from sysdag.execution.branching import check_presence, skipped_rows
from sysdag.execution.execute import at_work, fill, flat_draws, naming, node_inputs
from sysdag.graph.parts import part_of
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT, Cell, Draw
from sysdag.traces.trace import Trace

_SEED = "seed"  # the column with the seed of each prompt, while its candidates are drawn


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
        rows = Trace(inputs, {}, {_SEED: seeds})
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
        columns = {name: column for name, column in found.trace.columns.items() if name != _SEED}
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


@dataclass(frozen=True, kw_only=True)
class DiverseBeamSearch(CandidateStrategy):
    """Diverse beam search with one beam a group (Vijayakumar et al. 2016, arXiv 1610.02424).

    The first latent gets `num_candidates` values; each later one extends every path by as many values as are needed to
    reach that number. Deterministic given the weights.

    Args:
        num_candidates: k; the paper uses 2 to 4.
        diversity_penalty: subtracted from a token's log-probability for each earlier group that chose it at this step,
            in nats. The paper uses 20, which drives later groups so far from the first that one candidate has all the
            responsibility on a real language model; 1 keeps them within its reach (`python -m bench diversity`).
        ngram_size: n counts n-grams that earlier groups already contain; 1 counts tokens chosen at this step (Hamming
            diversity, the paper's).
    """

    diversity_penalty: float = 1.0
    ngram_size: int = 2

    def paths(self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None) -> Candidates:
        prompt = list(range(len(rows)))
        for name in latents:
            _refuse_plate(plan, name, self)
            fewest = min((prompt.count(p) for p in set(prompt)), default=1)
            elements = node_inputs(plan, fill(plan, rows), name)
            wanted = math.ceil(self.num_candidates / fewest)
            found: list[list[Draw]] = []
            if elements.values:
                with naming(name, [prompt[row] for row in elements.rows]):
                    component = at_work(plan, name)
                    found = component.search(elements.values, wanted, self.diversity_penalty, self.ngram_size)
            rows, parents = with_values(rows, name, elements.skipped, found)
            prompt = [prompt[parent] for parent in parents]
        return _distinct(plan, Candidates(rows, tuple(prompt)), latents, self.num_candidates)


@dataclass(frozen=True, kw_only=True)
class MonteCarlo(CandidateStrategy):
    """`num_candidates` runs of the latent nodes for each prompt.

    As in the paper, the joint probabilities of the distinct ones are summed as they are: a lower bound on p(z|x).

    Args:
        temperature, top_p, top_k: of sampling; by default the components' own, each of them. top_k=0 is all tokens.
        distinct: keep repeated paths once. With False each counts, and the sum is no bound.
    """

    num_candidates: int = 4
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    distinct: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_truncation(type(self).__name__, self.temperature, self.top_p, self.top_k)

    @property
    def is_lower_bound(self) -> bool:
        return self.distinct

    def paths(self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None) -> Candidates:
        prompt = [row for row in range(len(rows)) for _ in range(self.num_candidates)]
        seeds = [seed_of(seed, number) for seed in rows.columns[_SEED] for number in range(self.num_candidates)]
        rows = rows.select(prompt)
        log_proposal: list[float] | None = [0.0] * len(prompt)
        for name in latents:
            elements = node_inputs(plan, fill(plan, rows), name)
            component: Any = at_work(plan, name)
            options = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            options = {option: value for option, value in options.items() if value is not None}
            draw = component.propose if options else component.sample
            seeded = component.generator_for(elements.seeds([seed_of(seed, name) for seed in seeds]))
            with naming(name, [prompt[row] for row in elements.rows]):
                draws = draw(elements.values, generator=seeded, **options) if elements.values else []
            known = [each.log_prob for each in draws if each.log_prob is not None]
            if log_proposal is None or len(known) < len(draws):  # a server's draws, which nothing here has scored
                log_proposal = None
            else:
                for row, log_prob in zip(elements.rows, known, strict=True):
                    log_proposal[row] += log_prob
            rows = rows.updated({name: elements.cells(draws)})
        found = Candidates(rows, tuple(prompt), None if log_proposal is None else tuple(log_proposal))
        return _distinct(plan, found, latents, self.num_candidates) if self.distinct else found


@dataclass(frozen=True, kw_only=True)
class ImportanceSampling(MonteCarlo):
    """`num_candidates` runs weighted by the inverse of the probability that they were drawn with.

    log p(z|x) is estimated by logmeanexp [log p(y|x) - log q(y|x) + log p(z|x, y)]: exp of it is unbiased, whatever
    the temperature, provided that q covers p (top_p < 1 and top_k do not). Repeated draws count each. Not in the paper.
    """

    distinct: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distinct:
            raise PlanError("ImportanceSampling needs every draw, repeated ones too; distinct must be False.")

    def paths(self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None) -> Candidates:
        found = super().paths(plan, rows, latents, generator)
        if found.log_proposal is None:
            unknown = [name for name in latents if any(d.log_prob is None for d in flat_draws(found.trace.cells[name]))]
            raise PlanError(
                f"ImportanceSampling: the draws of {unknown} have no log-probability, which weighs them. A server's "
                "own are not taken, as they are of its rounding, and seldom of the distribution that it drew from: "
                "Server(..., score_draws=True) computes them here; or use MonteCarlo, or decoder='local'."
            )
        log_k = math.log(self.num_candidates)
        return replace(found, log_weight=tuple(-log_q - log_k for log_q in found.log_proposal))


@dataclass(frozen=True, kw_only=True)
class Exhaustive(CandidateStrategy):
    """Every value of every latent node, where all of them draw from finitely many: exact.

    `Categorical` and `Tabular` do; so does `Choice`, from the options that a row has.

    Args:
        num_candidates: most paths of one prompt; more are refused, before they are made, rather than left out.
    """

    num_candidates: int = 4096

    def paths(self, plan: Plan, rows: Trace, latents: Sequence[str], generator: torch.Generator | None) -> Candidates:
        prompt = list(range(len(rows)))
        for name in latents:
            _refuse_plate(plan, name, self)
            component: Any = plan.system[name].component
            elements = node_inputs(plan, fill(plan, rows), name)
            with naming(name, [prompt[row] for row in elements.rows]):
                counts = component.outcome_counts(elements.values)
                if counts is None:
                    raise PlanError(
                        f"Exhaustive needs latents with finitely many values; node {name!r} is {component!r}. Use "
                        "another strategy."
                    )
                paths = Counter(prompt[row] for row in elements.skipped)
                for row, count in zip(elements.rows, counts, strict=True):
                    paths[prompt[row]] += count
                self._check_number(name, paths)
                found = component.outcomes(elements.values)
                rows, parents = with_values(rows, name, elements.skipped, found)
                prompt = [prompt[parent] for parent in parents]
        return Candidates(rows, tuple(prompt))

    def _check_number(self, name: str, paths: Mapping[int, int]) -> None:
        row, most = max(paths.items(), key=lambda item: item[1], default=(0, 0))
        if most > self.num_candidates:
            raise PlanError(
                f"Exhaustive: node {name!r} makes {most} paths a prompt, more than num_candidates="
                f"{self.num_candidates}, in row {row}. Raise it, or use another strategy."
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


def _refuse_plate(plan: Plan, name: str, strategy: CandidateStrategy) -> None:
    if plan.is_plate(name):
        raise PlanError(
            f"Node {name!r} is a plate and latent; {type(strategy).__name__} searches single values. Use MonteCarlo."
        )


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


def _distinct(plan: Plan, paths: Candidates, latents: Sequence[str], limit: int) -> Candidates:
    """The first `limit` different paths of each prompt."""
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
    return paths.select(kept)


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
