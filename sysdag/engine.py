"""One training step: score every node of winners and losers, form the margin, differentiate it by the scores.

`SystemModel` holds a system's policies as one `torch.nn.Module`, so that whatever trains modules can train a system.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.candidate_cache import CandidateCache
from sysdag.candidates import CandidateStrategy
from sysdag.comparison import Comparison, DirectComparison, SamplingComparison
from sysdag.component import Component
from sysdag.data import PreferencePair
from sysdag.errors import PlanError
from sysdag.memory import SavedBytes
from sysdag.objective import preference_loss
from sysdag.options import EngineOptions, NodeOptions, ObjectiveOptions
from sysdag.plan import Plan
from sysdag.scoring import Budget, Turn, component_of, part_of_loss, score, turns, zero_of
from sysdag.serialization import component_keys


@dataclass(kw_only=True)
class StepOutput:
    """What one batch gave.

    Attributes:
        loss: () differentiable where the step keeps its graphs (one pass); in two passes a number.
        metrics: means over the batch's pairs, by the names they are logged under.
        log_ratios: for each scored node, policy minus reference of every run (all candidates for Sampling), detached.
        scores: the policy's part of the same, for judging how small a difference is.
        turns: the parts of the loss, micro-batch by micro-batch; see `sysdag.replay.accumulate_gradients`.
    """

    loss: Tensor
    metrics: dict[str, float]
    log_ratios: dict[str, Tensor]
    scores: dict[str, Tensor]
    turns: tuple[Turn, ...]


class SystemModel(nn.Module):
    """A system's trainable components beside their frozen references, under one objective.

    Args:
        plan: the system.
        options: the objective.
        nodes: options by node name (or base name, for all visits of a loop).
        candidates: for Sampling, how latent candidates are found.
        engine: one pass or two, and how much at once.

    Raises:
        PlanError: if the objective cannot be served, or an option names no node or contradicts another.
    """

    def __init__(
        self,
        plan: Plan,
        options: ObjectiveOptions,
        nodes: Mapping[str, NodeOptions] | None = None,
        candidates: CandidateStrategy | None = None,
        engine: EngineOptions | None = None,
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
        self.engine = engine or EngineOptions()
        self.budget = Budget(self.engine.micro_batch_tokens, self.engine.engine == "one_pass")
        self.rounds: Callable[[int], int] | None = None
        self._graph_bytes: SavedBytes | None = SavedBytes() if self.engine.engine == "auto" else None
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

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(
        self,
        work: Sequence[PreferencePair] | Turn | None,
        generator: torch.Generator | None = None,
        step: int | None = None,
    ) -> Any:
        """Whatever runs the models goes through here, so that wrappers of the module (DDP, FSDP, autocast) see it.

        Args:
            work: a batch of preference pairs, as `sysdag.data.encode_pairs` gives them, to be scored; or a `Turn` of
                the output of one, to be differentiated; or None.
            generator: a CPU generator for noise and candidates; torch's global one by default.
            step: number of optimizer steps so far, for candidates that are kept; None draws anew and keeps nothing.

        Returns:
            A `StepOutput` for pairs; for a turn its part of the loss, (); for None a zero that depends on every trained
            parameter, whose backward lets data-parallel wrappers exchange what the turns have accumulated.

        Raises:
            TrainingError: if a score is not finite, naming the node and the pair.
        """
        if work is None:
            return zero_of(self.trained_parameters())
        if not isinstance(work, Turn):
            return self._step(work, generator, step)
        component = component_of(self.plan, work.batch.name)
        with self._graph_bytes or contextlib.nullcontext():
            return part_of_loss(work, component)

    def _step(self, pairs: Sequence[PreferencePair], generator: torch.Generator | None, step: int | None) -> StepOutput:
        comparison = self.compare(pairs, generator, step)
        trains = torch.is_grad_enabled()
        if trains and self._graph_bytes is not None and self._graph_bytes.total:
            self.budget.keeps_graphs = self._graph_bytes.fits()
            self._graph_bytes = None
        budget = self.budget if trains else replace(self.budget, keeps_graphs=False)
        scored = score(self.plan, comparison.terms, self._reference_of, budget, self.rounds)
        leaves = {name: values.detach().requires_grad_(trains) for name, values in scored.policy.items()}
        scores, metrics = comparison.combine(leaves, scored.reference)
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
        output = StepOutput(
            loss=loss.detach(),
            metrics={name: float(value.detach().float().mean()) for name, value in metrics.items()},
            log_ratios={name: values.detach() - scored.reference[name] for name, values in scored.policy.items()},
            scores={name: values.detach() for name, values in scored.policy.items()},
            turns=(),
        )
        if trains:
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            coefficients = dict(zip(leaves, found, strict=True))
            trained = [batch for batch in scored.batches if self._reference_of(component_of(self.plan, batch.name))]
            output.turns = tuple(turns(trained, coefficients, self.rounds))
            if budget.keeps_graphs:
                linear = [(coefficients[name] * values).sum() for name, values in scored.policy.items()]
                total = torch.stack(linear).sum()
                output.loss = output.loss + (total - total.detach())
        return output

    def split(self, turn: Turn) -> list[Turn]:
        """A turn in parts, after memory ran out in it.

        Raises:
            TrainingError: if it cannot be split.
        """
        return [turn.select(part) for part in self.budget.shrink(turn.batch, component_of(self.plan, turn.batch.name))]

    def _reference_of(self, component: Component) -> Component | None:
        return next((self.references.get(key) for key, own in self.components.items() if own is component), None)

    def compare(
        self, pairs: Sequence[PreferencePair], generator: torch.Generator | None, step: int | None
    ) -> Comparison:
        """What a batch asks to be scored, its candidates drawn."""
        if self.candidates is None:
            return DirectComparison(self.plan, self.options, self.nodes, pairs, generator)
        inputs = {name: [pair.inputs[name] for pair in pairs] for name in pairs[0].inputs}
        drawn = self.candidates.draw(self.proposal, inputs, generator, step)
        is_lower_bound = self.candidates.strategy.is_lower_bound
        return SamplingComparison(self.plan, self.options, pairs, drawn, is_lower_bound, generator)
