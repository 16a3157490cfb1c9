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
from sysdag.candidates import CandidateStrategy
from sysdag.comparison import Comparison, DirectComparison, SamplingComparison, Term
from sysdag.component import Component
from sysdag.data import PreferencePair
from sysdag.errors import PlanError, TrainingError
from sysdag.likelihood import node_score
from sysdag.objective import preference_loss
from sysdag.options import NodeOptions, ObjectiveOptions
from sysdag.plan import Plan
from sysdag.serialization import component_keys


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
        frozen = {id(self.components[key]): reference for key, reference in self.references.items()}
        nodes = [self.plan.system[name] for name in self.plan.random_nodes]
        return self.plan.system.with_components(
            {n.name: frozen.get(id(n.component), n.component) for n in nodes}
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
            raise PlanError(
                f"nodes: {list(names)} share one component, but their {option} differ: {sorted(values, key=str)}."
            )
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
        comparison = self._compare(pairs, generator, step)
        scored = {term.name: self._score(term) for term in comparison.terms}
        policy = {name: ours for name, (ours, _) in scored.items()}
        scores, metrics = comparison.combine(policy, {name: theirs for name, (_, theirs) in scored.items()})
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
            log_ratios={name: (ours - theirs).detach() for name, (ours, theirs) in scored.items()},
            scores={name: ours.detach() for name, ours in policy.items()},
        )

    def _compare(
        self, pairs: Sequence[PreferencePair], generator: torch.Generator | None, step: int | None
    ) -> Comparison:
        if self.candidates is None:
            return DirectComparison(self.plan, self.options, self.nodes, pairs, generator)
        inputs = {name: [pair.inputs[name] for pair in pairs] for name in pairs[0].inputs}
        drawn = self.candidates.draw(self.proposal, inputs, generator, step)
        is_lower_bound = self.candidates.strategy.is_lower_bound
        return SamplingComparison(self.plan, self.options, pairs, drawn, is_lower_bound, generator)

    def _score(self, term: Term) -> tuple[Tensor, Tensor]:
        """Policy's and reference's scores of one term; where nothing trains, they are the same."""
        policy = node_score(self.plan, term.trace, term.name, noise=term.noise)
        component = self.plan.system[term.name].component
        reference = next((self.references.get(key) for key, c in self.components.items() if c is component), None)
        if reference is None:
            frozen = policy = policy.detach()
        else:
            with torch.no_grad():
                frozen = node_score(self.plan, term.trace, term.name, component=reference, noise=term.noise)
        for side, values in (("policy", policy), ("reference", frozen)):
            if not values.isfinite().all():
                row = int((~values.isfinite()).nonzero()[0])
                raise TrainingError(
                    f"Node {term.name!r}: the {side}'s score of pair {term.pair_of[row]} of the batch is "
                    f"{values[row].item()}. The weights were not changed."
                )
        return policy, frozen.to(policy.device)
