"""The strategies that candidates are found by: diverse beam search, runs of the latents, weighted runs, all values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sysdag.components.decoding import check_truncation
from sysdag.components.random_streams import seed_of
from sysdag.errors import PlanError
from sysdag.execution.execute import at_work, fill, flat_draws, naming, node_inputs
from sysdag.graph.plan import Plan
from sysdag.objectives.candidates import SEED_COLUMN, Candidates, CandidateStrategy, with_values
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace


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
        seeds = [seed_of(seed, number) for seed in rows.columns[SEED_COLUMN] for number in range(self.num_candidates)]
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


def _refuse_plate(plan: Plan, name: str, strategy: CandidateStrategy) -> None:
    if plan.is_plate(name):
        raise PlanError(
            f"Node {name!r} is a plate and latent; {type(strategy).__name__} searches single values. Use MonteCarlo."
        )


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
