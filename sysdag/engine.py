"""One training step: score every node of winners and losers, form the margin, return a differentiable loss.

`SystemModel` holds a system's policies as one `torch.nn.Module`, so that whatever trains modules can train a system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.candidate_cache import CandidateCache
from sysdag.candidates import Candidates, CandidateStrategy, distinct_ngrams
from sysdag.component import Component
from sysdag.data import PreferencePair, collate
from sysdag.errors import PlanError, TrainingError
from sysdag.execute import fill, flat_draws
from sysdag.likelihood import node_score
from sysdag.objective import (
    PairScores,
    candidate_log_sum,
    certificate,
    effective_sample_size,
    preference_loss,
    responsibilities,
)
from sysdag.options import NodeOptions, ObjectiveOptions
from sysdag.plan import Plan
from sysdag.serialization import component_keys
from sysdag.trace import Cell, Trace


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one batch gave.

    Attributes:
        loss: () differentiable.
        metrics: means over the batch's pairs, by the names they are logged under.
        log_ratios: for each scored node, policy minus reference of every run (all candidates for Sampling), detached.
        scores: the policy's part of the same, for judging how small a difference is.
    """

    loss: Tensor
    metrics: dict[str, float]
    log_ratios: dict[str, Tensor]
    scores: dict[str, Tensor]


class SystemModel(nn.Module):
    """A system's trainable components beside their frozen references, under one objective.

    Args:
        plan: the system.
        options: the objective.
        nodes: options by node name (or base name, for all visits of a loop).
        candidates: for Sampling, how latent candidates are found.

    Raises:
        PlanError: if the objective cannot be served, or an option names no node or contradicts another.
    """

    def __init__(
        self,
        plan: Plan,
        options: ObjectiveOptions,
        nodes: Mapping[str, NodeOptions] | None = None,
        candidates: CandidateStrategy | None = None,
    ) -> None:
        super().__init__()
        plan.check(options.objective)
        if options.objective == "sampling" and candidates is None:
            raise PlanError("objective='sampling' needs candidates=DiverseBeamSearch(...) or another strategy.")
        if options.objective == "direct" and candidates is not None:
            raise PlanError("objective='direct' observes the intermediates and has no use for candidates; drop them.")
        self.plan, self.options = plan, options
        self.factors = plan.factors(options.objective)
        self.nodes = self._node_options(dict(nodes or {}))
        self.components: dict[str, Component] = {}
        self.references: dict[str, Component] = {}
        modules: dict[str, nn.Module] = {}
        for key, component in component_keys(plan.system).items():
            if component.module is None:
                continue
            self.components[key] = component
            modules[key] = component.module
            served = [name for name in self.factors if plan.system[name].component is component]
            if served and self._agreed(served, "trainable"):
                self.references[key] = component.reference()
            else:
                component.module.requires_grad_(False)
        if not self.references:
            raise PlanError("No node is trainable; there is nothing to align.")
        self.policies = nn.ModuleDict(modules)
        self.candidates = None if candidates is None else CandidateCache(candidates, options.candidates_refresh_steps)
        self.proposal = plan if options.candidates_from == "policy" else self._reference_plan()

    def _reference_plan(self) -> Plan:
        """The plan whose components are the references."""
        return self.plan.system.with_components(
            {name: self.references.get(self._key(name), self.plan.system[name].component) for name in self.plan.random_nodes}
        ).compile()

    def _node_options(self, given: dict[str, NodeOptions]) -> dict[str, NodeOptions]:
        found = {}
        for name in self.plan.random_nodes:
            base = self.plan.system[name].base_name
            found[name] = given.get(name, given.get(base, NodeOptions()))
        known = {*found, *(self.plan.system[name].base_name for name in found)}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise PlanError(f"nodes: {unknown[0]!r} is no random node of the system; those are {list(found)}.")
        if self.options.objective == "sampling":
            for name, node in found.items():
                if node.scale != 1.0 or node.beta not in (None, self.options.beta):
                    raise PlanError(
                        f"nodes: {name!r} has its own beta or scale, but objective='sampling' sums over candidates "
                        "inside one logarithm, where only a common beta is defined."
                    )
        return found

    def _agreed(self, names: Sequence[str], option: str) -> Any:
        values = {getattr(self.nodes[name], option) for name in names}
        if len(values) > 1:
            raise PlanError(f"nodes: {list(names)} share one component, but their {option} differ: {sorted(values, key=str)}.")
        return values.pop()

    def learning_rate(self, key: str) -> float | None:
        """The learning rate that the component's nodes ask for, if any."""
        component = self.components[key]
        return self._agreed([n for n in self.factors if self.plan.system[n].component is component], "learning_rate")

    def move_references(self, device: torch.device) -> None:
        """Puts the references beside the policies; they are no part of the module tree, so `.to` leaves them out."""
        for reference in self.references.values():
            if reference.module is not None:
                reference.module.to(device)

    def forward(
        self, pairs: Sequence[PreferencePair], generator: torch.Generator | None = None, step: int | None = None
    ) -> StepOutput:
        """Loss and metrics of a batch of preference pairs.

        Args:
            pairs: what `sysdag.data.encode_pairs` gives.
            generator: a CPU generator for noise and candidates; torch's global one by default.
            step: number of optimizer steps so far, for candidates that are kept; None draws anew and keeps nothing.

        Raises:
            TrainingError: if a score is not finite, naming the node and the pair.
        """
        if self.candidates is None:
            scores, metrics, log_ratios, policy = self._score_direct(pairs, generator)
        else:
            drawn = self.candidates.draw(self.proposal, collate(pairs)[0].inputs, generator, step)
            scores, metrics, log_ratios, policy = self._score_sampling(pairs, drawn, generator)
        loss = preference_loss(
            scores, self.options.loss_type, self.options.weights,
            beta=self.options.beta, label_smoothing=self.options.label_smoothing,
        )  # fmt: skip
        margins = scores.margins.detach()
        metrics |= {
            "rewards/chosen": scores.chosen_rewards,
            "rewards/rejected": scores.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
        }
        return StepOutput(
            loss=loss,
            metrics={name: float(value.detach().float().mean()) for name, value in metrics.items()},
            log_ratios=log_ratios,
            scores=policy,
        )

    def _weight(self, name: str) -> float:
        node = self.nodes[name]
        return (self.options.beta if node.beta is None else node.beta) * node.scale

    def _score(
        self, trace: Trace, name: str, noise: Any, pair_of: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Policy's and reference's scores of one node, one a row of the trace; `pair_of` names rows in errors."""
        policy = node_score(self.plan, trace, name, noise=noise)
        reference = self.references.get(self._key(name))
        if reference is None:
            frozen = policy.detach()
        else:
            with torch.no_grad():
                frozen = node_score(self.plan, trace, name, component=reference, noise=noise).to(policy.device)
        for side, values in (("policy", policy), ("reference", frozen)):
            if not values.isfinite().all():
                row = int((~values.isfinite()).nonzero()[0])
                raise TrainingError(
                    f"Node {name!r}: the {side}'s score of pair {pair_of[row]} of the batch is {values[row].item()}. "
                    "The weights were not changed."
                )
        return policy, frozen

    def _key(self, name: str) -> str:
        component = self.plan.system[name].component
        return next((key for key, other in self.components.items() if other is component), "")

    def _lengths(self, trace: Trace, name: str, device: torch.device) -> Tensor:
        component = self.plan.system[name].component
        column = trace.cells[name]
        return torch.tensor([float(sum(component.lengths(flat_draws([cell])))) for cell in column], device=device)

    def _score_direct(self, pairs: Sequence[PreferencePair], generator: torch.Generator | None):
        count = len(pairs)
        trace = fill(self.plan, Trace.concatenate(collate(pairs)))
        pair_of = [*range(count), *range(count)]
        device = next(self.policies.parameters()).device
        rewards, lengths, log_probs = (torch.zeros(2 * count, device=device) for _ in range(3))
        nll = torch.zeros((), device=device)
        metrics: dict[str, Tensor] = {}
        log_ratios, policies = {}, {}
        for name in self.factors:
            noise = _paired_noise(self.plan.system[name].component, trace.cells[name], generator)
            policy, reference = self._score(trace, name, noise, pair_of)
            terms = self._lengths(trace, name, device)
            reward = self._weight(name) * (policy - reference)
            rewards, lengths = rewards + reward, lengths + terms
            nll = nll - self.nodes[name].scale * policy[:count].sum() / terms[:count].sum().clamp(min=1)
            log_ratios[name], policies[name] = (policy - reference).detach(), policy.detach()
            metrics |= _node_metrics(name, reward[:count], reward[count:])
            if self.plan.system[name].likelihood == "exact":
                log_probs = log_probs + policy.detach()
        metrics |= {"logps/chosen": log_probs[:count], "logps/rejected": log_probs[count:]}
        scores = PairScores(
            chosen_rewards=rewards[:count], rejected_rewards=rewards[count:],
            chosen_lengths=lengths[:count], rejected_lengths=lengths[count:], chosen_nll=nll,
        )  # fmt: skip
        return scores, metrics, log_ratios, policies

    def _score_sampling(
        self, pairs: Sequence[PreferencePair], drawn: Candidates, generator: torch.Generator | None
    ):
        count = len(pairs)
        sides = collate(pairs)
        prompt = list(drawn.prompt)
        latents = self.plan.latents("sampling")
        latent_trace = fill(self.plan, drawn.trace)
        both = [drawn.trace.updated(side.select(prompt).cells) for side in sides]
        trace = fill(self.plan, Trace.concatenate(both))
        index = torch.tensor([*prompt, *(p + count for p in prompt)], device=next(self.policies.parameters()).device)

        log_ratios, policies, shares = {}, {}, {}
        joint = reference_joint = torch.zeros((), device=index.device)
        terms = torch.zeros(len(index), device=index.device)
        for name in self.factors:
            if self.plan.system[name].likelihood == "bound":
                continue
            latent = name in latents
            rows = latent_trace if latent else trace
            policy, reference = self._score(rows, name, None, prompt if latent else [*prompt, *prompt])
            lengths = self._lengths(rows, name, index.device)
            log_ratios[name], policies[name] = (policy - reference).detach(), policy.detach()
            if latent:
                policy, reference, lengths = policy.repeat(2), reference.repeat(2), lengths.repeat(2)
            shares[name] = (policy - reference).detach()
            joint, reference_joint, terms = joint + policy, reference_joint + reference, terms + lengths

        log_p, weights = self._candidate_sum(joint, drawn, terms, index, 2 * count)
        log_q, _ = self._candidate_sum(reference_joint, drawn, terms, index, 2 * count)
        rewards = self.options.beta * (log_p - log_q)
        metrics = self._candidate_metrics(drawn, policies, log_p.detach(), weights, index)
        for name, share in shares.items():
            credit = torch.zeros_like(rewards).index_add(0, index, self.options.beta * weights * share)
            metrics |= _node_metrics(name, credit[:count], credit[count:])
        metrics |= {"logps/chosen": log_p[:count], "logps/rejected": log_p[count:]}
        for name in self.factors:
            if self.plan.system[name].likelihood == "bound":
                policy, reference = self._score_outside(name, sides, drawn, generator)
                log_ratios[name], policies[name] = (policy - reference).detach(), policy.detach()
                reward = self.options.beta * (policy - reference)
                log_p, rewards = log_p + policy, rewards + reward
                metrics |= _node_metrics(name, reward[:count], reward[count:])
        output_lengths = torch.zeros(2 * count, device=index.device)
        for name in self.plan.system.outputs:
            column = Trace({}, {name: [*sides[0].cells[name], *sides[1].cells[name]]})
            output_lengths = output_lengths + self._lengths(column, name, index.device)
        scores = PairScores(
            chosen_rewards=rewards[:count], rejected_rewards=rewards[count:],
            chosen_lengths=output_lengths[:count], rejected_lengths=output_lengths[count:],
            chosen_nll=-log_p[:count].sum() / output_lengths[:count].sum().clamp(min=1),
        )  # fmt: skip
        return scores, metrics, log_ratios, policies

    def _score_outside(
        self, name: str, sides: Sequence[Trace], drawn: Candidates, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Scores of an output that no candidate changes: the same term in every summand, so it leaves the sum."""
        first = [drawn.prompt.index(prompt) for prompt in range(len(sides[0]))]
        shared = drawn.trace.select(first)
        trace = fill(self.plan, Trace.concatenate([shared.updated(side.cells) for side in sides]))
        noise = _paired_noise(self.plan.system[name].component, trace.cells[name], generator)
        return self._score(trace, name, noise, [*range(len(first)), *range(len(first))])

    def _candidate_sum(
        self, joint: Tensor, drawn: Candidates, terms: Tensor, index: Tensor, sides: int
    ) -> tuple[Tensor, Tensor]:
        """log p-hat(z|x) of every side, and the candidates' responsibilities (without gradient)."""
        if drawn.log_weight is not None:
            joint = joint + torch.tensor(drawn.log_weight, dtype=joint.dtype, device=joint.device).repeat(2)
        if self.options.candidate_length_normalization:
            joint = joint / terms.clamp(min=1)
        temperature = self.options.responsibility_temperature
        log_sum = temperature * candidate_log_sum(joint / temperature, index, sides)
        return log_sum, responsibilities(joint.detach() / temperature, index, sides)

    def _candidate_metrics(
        self, drawn: Candidates, policies: Mapping[str, Tensor], log_p: Tensor, weights: Tensor, index: Tensor
    ) -> dict[str, Tensor]:
        count, rows = len(log_p) // 2, len(index) // 2
        latents = [name for name in self.plan.latents("sampling") if name in policies]
        texts = [str(value) for name in latents for value in drawn.trace[name]]
        metrics = {
            "candidates/effective_sample_size": effective_sample_size(weights, index, 2 * count),
            "candidates/count": torch.bincount(index[:rows], minlength=count).float(),
            "candidates/responsibility_gap": (weights[:rows] - weights[rows:]).abs(),
            "candidates/distinct_2": torch.tensor(distinct_ngrams(texts)),
        }
        assert self.candidates is not None
        plain = self.options.responsibility_temperature == 1 and not self.options.candidate_length_normalization
        if self.candidates.strategy.is_lower_bound:
            latent_log_prob = torch.stack([policies[name] for name in latents]).sum(0)
            coverage = latent_log_prob.new_zeros(count).index_add(0, index[:rows], latent_log_prob.exp())
            metrics["candidates/coverage"] = coverage
            if plain:
                lower, upper = certificate(log_p, coverage.repeat(2))
                metrics |= {"candidates/certified_lower": lower[:count], "candidates/certified_upper": upper[:count]}
        return metrics


def _node_metrics(name: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        f"nodes/{name}/rewards/chosen": chosen,
        f"nodes/{name}/rewards/rejected": rejected,
        f"nodes/{name}/rewards/margins": chosen - rejected,
    }


def _paired_noise(component: Component, cells: Sequence[Cell], generator: torch.Generator | None) -> Any:
    """Noise for winners followed by losers, one draw shared by the two sides of a pair (and of a plate's element)."""
    if component.likelihood != "bound":
        return None
    count = len(cells) // 2
    columns = [flat_draws([cell]) for cell in cells]
    longest = [max(columns[row], columns[row + count], key=len) for row in range(count)]
    starts = [0]
    for column in longest:
        starts.append(starts[-1] + len(column))
    noise = component.noise([draw for column in longest for draw in column], generator)
    return noise.select([starts[row % count] + place for row, column in enumerate(columns) for place in range(len(column))])
