"""What a batch of preferences asks to be scored, and how the scores make up a margin.

The loss sees a system only through scalars, one score for each node and run. A comparison lists those scores as `terms`
and combines them, whoever computed them and whether or not they carry gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sysdag.components.component import Component
from sysdag.data.preferences import Feedback, UnpairedRun, collate
from sysdag.execution.branching import without_skipped
from sysdag.execution.execute import fill, flat_draws
from sysdag.execution.likelihood import in_context
from sysdag.graph.plan import Plan
from sysdag.objectives.candidate_sums import candidate_log_sum, certificate, effective_sample_size, responsibilities
from sysdag.objectives.candidates import Candidates, distinct_ngrams
from sysdag.objectives.losses import PairScores
from sysdag.objectives.options import NodeOptions, ObjectiveOptions
from sysdag.objectives.tail_weight import shared_lengths
from sysdag.objectives.unpaired_losses import RunScores, split_sides
from sysdag.traces.cells import ABSENT, Cell, value_of
from sysdag.traces.trace import Trace


@dataclass(frozen=True, eq=False)
class Term:
    """One node to be scored on the rows of a trace.

    Attributes:
        name: the node.
        trace: values of the node and of its parents.
        pair_of: for each row, the pair of the batch that it belongs to.
        noise: of a bound, the same for policy and reference; of an exact node its `TailWeight`, where it has one.
        pairs: of the batch, which errors name.
    """

    name: str
    trace: Trace
    pair_of: Sequence[int]
    noise: Any = None
    pairs: Sequence[Feedback] = ()

    def called(self, row: int) -> str:
        """What an error calls the pair of a row."""
        pair = self.pair_of[row]
        return self.pairs[pair].called(pair) if self.pairs else f"pair {pair} of the batch"

    def row_name(self, row: int) -> int | str:
        """The number of a row in the data set, with its line; its number here where that is not known."""
        return (self.pairs[self.pair_of[row]].row_name if self.pairs else None) or row

    def described(self, row: int) -> str:
        """`called`, with the pair's inputs in short."""
        pair = self.pair_of[row]
        return self.pairs[pair].described(pair) if self.pairs else self.called(row)


Generators = torch.Generator | Sequence[torch.Generator] | None
"""Of a comparison's noise: one for the batch (torch's global one where None), or one for each pair."""

Scores = Mapping[str, Tensor]


class Comparison(Protocol):
    """The terms of a batch, and what their scores combine to."""

    @property
    def terms(self) -> Sequence[Term]:
        """Each is scored once by the policy and once by the reference."""
        ...

    def combine(self, policy: Scores, reference: Scores) -> tuple[PairScores | RunScores, dict[str, Tensor]]:
        """What the losses see, and the metrics to log, each (P,): one value a pair or unpaired run, nan for none.

        Args:
            policy, reference: by node, the scores of its term's rows, on the CPU.
        """
        ...

    def beside(self, batch: Sequence[Feedback], generator: Generators) -> Comparison:
        """The same of other runs of the same inputs, by the same candidates."""
        ...


class _Sides:
    """How the rows of a comparison, winners followed by losers or single runs, become what losses and logs see."""

    def __init__(self, batch: Sequence[Feedback]) -> None:
        self.count, self.number = len(batch), len(batch[0].sides)
        single = [each.label for each in batch if isinstance(each, UnpairedRun)]
        self.desirable = torch.tensor(single, device="cpu") if single else None

    @property
    def rows(self) -> list[int]:
        """The pair or run that each row belongs to."""
        return [*range(self.count)] * self.number

    def metrics(self, name: str, values: Tensor) -> dict[str, Tensor]:
        if self.desirable is not None:
            return split_sides(name, values, self.desirable)
        chosen, rejected = values.detach().chunk(2)
        return {f"{name}/chosen": chosen, f"{name}/rejected": rejected}

    def of_node(self, name: str, rewards: Tensor) -> dict[str, Tensor]:
        found = self.metrics(f"nodes/{name}/rewards", rewards)
        if self.desirable is None:
            chosen, rejected = found.values()
            found[f"nodes/{name}/rewards/margins"] = chosen - rejected
        return found

    def scores(self, rewards: Tensor, policy: Tensor | None, lengths: Tensor, nll: Tensor) -> PairScores | RunScores:
        if self.desirable is not None:
            return RunScores(rewards=rewards, desirable=self.desirable)
        (chosen, rejected), (chosen_lengths, rejected_lengths) = rewards.chunk(2), lengths.chunk(2)
        chosen_policy, rejected_policy = (None, None) if policy is None else policy.chunk(2)
        return PairScores(
            chosen_rewards=chosen, rejected_rewards=rejected, chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths, chosen_nll=nll, chosen_policy=chosen_policy,
            rejected_policy=rejected_policy,
        )  # fmt: skip


class DirectComparison:
    """SysDPO-Direct: every random node is observed, each side under its own parents' values.

    The margin is the sum over nodes of beta_i (log p_i - log q_i), winner minus loser; a bound stands in for log p_i
    with one (t, eps) for the two sides of a pair. Of an unpaired run that sum is the reward.
    """

    def __init__(
        self,
        plan: Plan,
        options: ObjectiveOptions,
        nodes: Mapping[str, NodeOptions],
        pairs: Sequence[Feedback],
        generator: Generators,
    ) -> None:
        self.plan, self.options, self.nodes = plan, options, nodes
        self.sides = sides = _Sides(pairs)
        trace = fill(plan, Trace.concatenate(collate(pairs)))
        for name in plan.factors("direct"):
            trace = in_context(plan, trace, name)
        self.trace = trace

        def beside(name: str) -> Any:
            component, cells = plan.system[name].component, self.trace.cells[name]
            if options.ld_alpha is not None and component.likelihood == "exact":
                return shared_lengths(component, cells, options.ld_alpha)
            return shared_noise(component, cells, generator, sides.number)

        self.terms: Sequence[Term] = [
            Term(name, self.trace, sides.rows, beside(name), pairs) for name in plan.factors("direct")
        ]

    def beside(self, batch: Sequence[Feedback], generator: Generators) -> DirectComparison:
        return DirectComparison(self.plan, self.options, self.nodes, batch, generator)

    def combine(self, policy: Scores, reference: Scores) -> tuple[PairScores | RunScores, dict[str, Tensor]]:
        count = self.sides.count
        metrics: dict[str, Tensor] = {}
        rewards, policies, lengths, log_probs, nll = [], [], [], [], []
        for name, score in policy.items():
            node = self.nodes[name]
            beta = (self.options.beta if node.beta is None else node.beta) * node.scale
            rewards.append(beta * (score - reference[name]))
            policies.append(beta * score)
            lengths.append(term_lengths(self.plan, self.trace, name))
            nll.append(-node.scale * count * score[:count] / lengths[-1][:count].sum().clamp(min=1))
            metrics |= self.sides.of_node(name, rewards[-1])
            if self.plan.switches_over(name):
                metrics[f"nodes/{name}/taken"] = runs_in(self.trace, name, score).view(self.sides.number, count).mean(0)
            if self.plan.system[name].likelihood == "exact":
                log_probs.append(score.detach())
        if log_probs:
            metrics |= self.sides.metrics("logps", sum(log_probs[1:], log_probs[0]))
        policy_part = sum(policies[1:], policies[0]) if len(log_probs) == len(policies) else None
        return self.sides.scores(
            sum(rewards[1:], rewards[0]), policy_part, sum(lengths[1:], lengths[0]), sum(nll[1:], nll[0])
        ), metrics


class SamplingComparison:
    """SysDPO-Sampling: outputs are observed, latents stand for themselves in candidates shared by both sides.

    log p-hat(z|x) is the log-sum over candidates of their joint with z; an output that no candidate changes is the same
    term in every summand and leaves the sum. The share of a node in the margin is that of its log-ratios, weighted by
    the responsibilities. An output has the length that it has behind the first candidate.

    An unpaired run is one side. Between two sides a candidate's log p(y|x) enters by the difference of its
    responsibilities; of one side it enters whole.
    """

    def __init__(
        self, plan: Plan, options: ObjectiveOptions, pairs: Sequence[Feedback], drawn: Candidates,
        is_lower_bound: bool, generator: Generators,
    ) -> None:  # fmt: skip
        self.plan, self.options, self.drawn, self.is_lower_bound = plan, options, drawn, is_lower_bound
        self.sides = _Sides(pairs)
        count, number = self.sides.count, self.sides.number
        given = collate(pairs)
        self.latents = [name for name in plan.latents("sampling") if name in plan.factors("sampling")]
        prompt = list(drawn.prompt)
        self.prompt = [p + side * count for side in range(number) for p in prompt]
        by_candidate = Trace.concatenate([drawn.trace.updated(side.select(prompt).cells) for side in given])
        first = drawn.trace.select([prompt.index(p) for p in range(count)])
        by_pair = observed_behind(plan, Trace.concatenate([first.updated(side.cells) for side in given]))
        latent_trace, joint_trace = fill(plan, drawn.trace), observed_behind(plan, by_candidate)
        for name in plan.factors("sampling"):
            if name in self.latents:
                latent_trace = in_context(plan, latent_trace, name)
            elif plan.system[name].likelihood == "exact":
                joint_trace = in_context(plan, joint_trace, name)  # an answer's tokens may depend on the candidate
        self.observed = joint_trace.select([self.prompt.index(side) for side in range(number * count)])

        def term(name: str) -> Term:
            if name in self.latents:
                return Term(name, latent_trace, prompt, pairs=pairs)
            if plan.system[name].likelihood == "exact":
                return Term(name, joint_trace, prompt * number, pairs=pairs)
            noise = shared_noise(plan.system[name].component, by_pair.cells[name], generator, number)
            return Term(name, by_pair, self.sides.rows, noise, pairs)

        self.terms: Sequence[Term] = [term(name) for name in plan.factors("sampling")]

    def beside(self, batch: Sequence[Feedback], generator: Generators) -> SamplingComparison:
        return SamplingComparison(self.plan, self.options, batch, self.drawn, self.is_lower_bound, generator)

    def combine(self, policy: Scores, reference: Scores) -> tuple[PairScores | RunScores, dict[str, Tensor]]:
        count = self.sides.count
        inside = [term.name for term in self.terms if self.plan.system[term.name].likelihood == "exact"]
        index = torch.tensor(self.prompt, device="cpu")
        terms = sum(
            self._spread(t.name, term_lengths(self.plan, t.trace, t.name)) for t in self.terms if t.name in inside
        )
        log_p, weights = self._log_sum([self._spread(name, policy[name]) for name in inside], terms, index)
        if self.options.needs_reference:
            log_q, _ = self._log_sum([self._spread(name, reference[name]) for name in inside], terms, index)
        else:
            log_q = torch.zeros_like(log_p)
        policy_part = self.options.beta * log_p if len(inside) == len(self.terms) else None
        rewards = self.options.beta * (log_p - log_q)
        metrics = self._candidate_metrics(policy, log_p.detach(), weights, index)
        metrics |= self.sides.metrics("logps", log_p)
        for name, score in policy.items():
            log_ratio = score - reference[name]
            if name in inside:
                log_ratio = torch.zeros_like(rewards).index_add(
                    0, index, weights * self._spread(name, log_ratio).detach()
                )
            else:
                log_p, rewards = log_p + score, rewards + self.options.beta * log_ratio
            metrics |= self.sides.of_node(name, self.options.beta * log_ratio)
            if self.plan.switches_over(name):
                metrics[f"nodes/{name}/taken"] = self._taken(name, weights, index)
        lengths = sum(term_lengths(self.plan, self.observed, name) for name in self.plan.results)
        assert isinstance(lengths, Tensor)
        nll = -count * log_p[:count] / lengths[:count].sum().clamp(min=1)
        return self.sides.scores(rewards, policy_part, lengths, nll), metrics

    def _taken(self, name: str, weights: Tensor, index: Tensor) -> Tensor:
        """How much of each pair's two runs, or of one, takes a node's branch, by the candidates' responsibilities."""
        term = next(term for term in self.terms if term.name == name)
        runs = runs_in(term.trace, name, weights)
        if self.plan.system[name].likelihood == "exact":  # else it is outside of the sum over candidates
            total = self.sides.number * self.sides.count
            runs = weights.new_zeros(total).index_add(0, index, weights * self._spread(name, runs))
        return runs.view(self.sides.number, self.sides.count).mean(0)

    def _spread(self, name: str, values: Tensor) -> Tensor:
        """One value for each side and candidate; a latent's is shared by the sides."""
        return values.repeat(self.sides.number) if name in self.latents else values

    def _log_sum(self, scores: Sequence[Tensor], terms: Any, index: Tensor) -> tuple[Tensor, Tensor]:
        """log p-hat(z|x) of every side, and the candidates' responsibilities (without gradient)."""
        joint, total = sum(scores[1:], scores[0]), self.sides.number * self.sides.count
        if self.drawn.log_weight is not None:
            joint = joint + joint.new_tensor(self.drawn.log_weight).repeat(self.sides.number)
        if self.options.candidate_length_normalization:
            joint = joint / terms.clamp(min=1)
        temperature = self.options.responsibility_temperature
        log_sum = temperature * candidate_log_sum(joint / temperature, index, total)
        return log_sum, responsibilities(joint.detach() / temperature, index, total)

    def _candidate_metrics(self, policy: Scores, log_p: Tensor, weights: Tensor, index: Tensor) -> dict[str, Tensor]:
        count, number = self.sides.count, self.sides.number
        rows = len(index) // number
        of_pair = index[:rows]
        found = torch.bincount(of_pair, minlength=count).float()
        sizes = effective_sample_size(weights, index, number * count).view(number, count)
        metrics = {
            "candidates/effective_sample_size": sizes.mean(0),
            "candidates/count": found,
            "candidates/distinct_2": torch.tensor(self._distinct_bigrams(), device="cpu"),
        }
        if number == 2:
            gap = torch.zeros_like(log_p[:count]).index_add(0, of_pair, (weights[:rows] - weights[rows:]).abs())
            metrics["candidates/responsibility_gap"] = gap / found
        if self.is_lower_bound and not any(self._is_continuous(name) for name in self.latents):
            latent = torch.stack([policy[name].detach() for name in self.latents]).sum(0)
            coverage = latent.new_zeros(count).index_add(0, index[:rows], latent.exp())
            metrics["candidates/coverage"] = coverage
            plain = self.options.responsibility_temperature == 1 and not self.options.candidate_length_normalization
            if plain and not any(self._is_continuous(term.name) for term in self.terms):
                lower, upper = certificate(log_p, coverage.repeat(number))
                metrics |= {"candidates/certified_lower": lower[:count], "candidates/certified_upper": upper[:count]}
        return metrics

    def _distinct_bigrams(self) -> list[float]:
        """Distinct-2 of each prompt's candidates."""
        texts: list[list[str]] = [[] for _ in range(self.sides.count)]
        for name in self.latents:
            for prompt, cell in zip(self.drawn.prompt, self.drawn.trace.cells[name], strict=True):
                texts[prompt] += [] if cell is ABSENT else [str(value_of(cell))]
        return [distinct_ngrams(own) for own in texts]

    def _is_continuous(self, name: str) -> bool:
        """Whether the exact score of a node is a density: no share of all probability, and without an upper limit."""
        component = self.plan.system[name].component
        if component.likelihood != "exact" or component.is_density is not None:
            return bool(component.is_density)
        term = next(term for term in self.terms if term.name == name)
        return any(_is_real(draw.value) for draw in flat_draws(term.trace.cells[name]))


def observed_behind(plan: Plan, trace: Trace) -> Trace:
    """The trace with deterministic nodes, and an output's value at the branch alone that its candidate takes."""
    return fill(plan, without_skipped(plan, fill(plan, trace))) if plan.system.switches else fill(plan, trace)


def _is_real(value: Any) -> bool:
    """Whether a value is of real numbers, which exact components draw from densities unless they say otherwise."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_real, value))
    kind = getattr(value, "dtype", None)
    if isinstance(kind, torch.dtype):
        return kind.is_floating_point or kind.is_complex
    return isinstance(value, (float, complex)) or getattr(kind, "kind", "") in ("f", "c")


def runs_in(trace: Trace, name: str, like: Tensor) -> Tensor:
    """1 for each row in which a node runs, 0 for the others, as the numbers of `like` are."""
    return like.new_tensor([float(cell is not ABSENT) for cell in trace.cells[name]])


def term_lengths(plan: Plan, trace: Trace, name: str) -> Tensor:
    """How many terms each row's score of a node sums."""
    component = plan.system[name].component
    return torch.tensor([float(sum(component.lengths(flat_draws([cell])))) for cell in trace.cells[name]], device="cpu")


def shared_noise(component: Component, cells: Sequence[Cell], generator: Generators, sides: int = 2) -> Any:
    """Noise for winners followed by losers, one draw shared by the two sides of a pair (and of a plate's element).

    With one generator for each pair, a pair's noise does not depend on the others in its batch.

    Args:
        sides: 1 for runs that are no pairs.
    """
    if component.likelihood != "bound":
        return None
    count = len(cells) // sides
    columns = [flat_draws([cell]) for cell in cells]
    if not any(columns):  # no run takes its branch
        return None
    if isinstance(generator, Sequence):
        parts = [shared_noise(component, cells[p::count], own, sides) for p, own in enumerate(generator)]
        parts = [part for part in parts if part is not None]
        joined = [(side, p) for p in range(count) for side in range(sides) for _ in columns[p + side * count]]
        return parts[0].join(parts).select(sorted(range(len(joined)), key=joined.__getitem__))
    longest = [max(columns[row::count], key=len) for row in range(count)]
    starts = [0]
    for column in longest:
        starts.append(starts[-1] + len(column))
    noise = component.noise([draw for column in longest for draw in column], generator)
    shared = noise.select(
        [starts[row % count] + place for row, column in enumerate(columns) for place in range(len(column))]
    )
    return component.fit_noise(shared, [draw for column in columns for draw in column], generator)
