"""One training step: score every node of winners and losers, form the margin, differentiate it by the scores.

`SystemModel` holds a system's policies as one `torch.nn.Module`, so that whatever trains modules can train a system.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sysdag.components import acceleration, precision
from sysdag.components.component import Component
from sysdag.components.memory import SavedBytes
from sysdag.components.module_walk import modules_of, parameters_of
from sysdag.components.random_streams import RowGenerator, seed_of
from sysdag.components.residence import Residence
from sysdag.data.preferences import Feedback, UnpairedRun, collate
from sysdag.engine.batch_losses import batch_losses
from sysdag.engine.distributed import rounds_of, whole_weights
from sysdag.engine.kept_work import Room
from sysdag.engine.out_of_memory import Budget
from sysdag.engine.precompute import ReferenceScores
from sysdag.engine.safeguard import loser_scales
from sysdag.engine.scored import Scored
from sysdag.engine.scoring import Stored, component_of, score
from sysdag.engine.turns import Turn, known_by_scores, part_of_loss, turns, zero_of
from sysdag.engine.zero_points import kl_term
from sysdag.errors import PlanError
from sysdag.graph.plan import Plan
from sysdag.objectives.candidate_cache import CandidateCache, key_of
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.objectives.comparison import Comparison, DirectComparison, Generators, SamplingComparison, Term
from sysdag.objectives.group_weights import GroupWeights
from sysdag.objectives.loss_checks import check_losses, check_pairs, warn_of_plain_sums
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions
from sysdag.objectives.reward_shift import RewardShift
from sysdag.saving.serialization import component_keys

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StepOutput:
    """What one batch gave.

    Attributes:
        loss: () differentiable where the step keeps its graphs (one pass); in two passes a number.
        losses: (P,) the loss of each pair or unpaired run, a number; this and the other numbers are on the CPU.
        balance: () what the auxiliary losses of the nodes add to their mean in `loss`, a number.
        metrics: (P,) one value a pair or unpaired run, nan where it has none, by the names that their means are logged
            under.
        log_ratios: for each scored node, policy minus reference of every run (all candidates for Sampling), detached.
        scores: the policy's part of the same, for judging how small a difference is.
        turns: the parts of the loss, micro-batch by micro-batch; see `sysdag.engine.replay.accumulate_gradients`.
    """

    loss: Tensor
    losses: Tensor
    balance: Tensor
    metrics: dict[str, Tensor]
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
        check_losses(plan, options)
        if options.objective == "sampling" and candidates is None:
            raise PlanError("objective='sampling' needs candidates=DiverseBeamSearch(...) or another strategy.")
        if options.objective == "direct" and candidates is not None:
            raise PlanError("objective='direct' observes the intermediates and has no use for candidates; drop them.")
        warn_of_plain_sums(options, candidates)
        self.plan, self.options = plan, options
        self.factors = plan.factors(options.objective)
        self.nodes = self._node_options(dict(nodes or {}))
        self.components: dict[str, Component] = {}
        self.references: dict[str, Component | Stored] = {}
        self.stored: ReferenceScores | None = None
        modules: dict[str, nn.Module] = {}
        for key, component in component_keys(plan.system).items():
            served = [name for name in self.factors if plan.system[name].component is component]
            trains = bool(served) and self._agreed(served, "trainable")
            if trains:
                component.prepare_training()
            if component.module is None:
                continue
            self.components[key] = component
            modules[key] = component.module
            _freeze(component, not trains)
            if trains:
                self.references[key] = component.reference() if options.needs_reference else Stored()
        if not self.references:
            raise PlanError("No node is trainable; there is nothing to align.")
        for key in self.references:
            if not any(parameter.requires_grad for parameter in self.components[key].own_parameters().values()):
                raise PlanError(
                    f"Node {key!r} is to be trained, but no weight of {self.components[key]!r} requires a gradient: it "
                    "is frozen, or shares its model with adapters of other nodes. Give it a peft_config or a model of "
                    "its own, or set trainable=False."
                )
            _check_precision(key, self.components[key])
        self.policies = nn.ModuleDict(modules)
        self.candidates = None if candidates is None else CandidateCache(candidates, options.candidates_refresh_steps)
        self.engine = engine or EngineOptions()
        self.budget = Budget(self.engine.micro_batch_tokens, self.engine.engine == "one_pass")
        self._rounds: Callable[[int], int] | None = None
        self._knows_rounds = False
        measures = self.engine.engine == "auto" and not self.engine.offload_idle
        self._graph_bytes: SavedBytes | None = SavedBytes() if measures else None
        self.residence: Residence | None = None
        self.groups: GroupWeights | None = None
        self.shift = RewardShift()
        self.proposal = plan if options.candidates_from == "policy" else self.reference_plan()

    def reference_plan(self) -> Plan:
        """The plan whose components are the references."""
        frozen = {id(self.components[key]): reference for key, reference in self.references.items()}
        assert not any(isinstance(reference, Stored) for reference in frozen.values())
        nodes = [self.plan.system[name] for name in self.plan.random_nodes]
        return self.plan.system.with_components(
            {n.name: frozen.get(id(n.component), n.component) for n in nodes}
        ).compile()

    def _node_options(self, given: dict[str, NodeOptions]) -> dict[str, NodeOptions]:
        found = options_by_node(self.plan, given)
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
            if isinstance(reference, Component) and reference.module is not None:
                reference.module.to(device)

    def let_references_move(self) -> None:
        """Gives references weights of their own where they are an adapter switched off, in weights they share."""
        for key, reference in self.references.items():
            if isinstance(reference, Component) and moved_pairs(self.components[key], reference) is None:
                self.references[key] = self.components[key].moving_reference()
        if self.options.candidates_from == "reference":
            self.proposal = self.reference_plan()

    def drop_references(self) -> None:
        """Frees the references, whose scores are stored."""
        if self.stored is not None:
            self.references = {key: Stored() for key in self.references}

    def rounds(self) -> Callable[[int], int] | None:
        """See `sysdag.engine.distributed.rounds_of`; decided at the first step, when the model has been wrapped."""
        if not self._knows_rounds:
            self._rounds, self._knows_rounds = rounds_of(self), True
            if self._rounds is not None and self.plan.system.switches:
                raise PlanError(
                    f"The switch {self.plan.system.switches[0].name!r} does not serve sharded models (FSDP2): "
                    "processes call each model equally often, and skipped branches do not. Use DDP or ZeRO-2."
                )
            if self._rounds is not None and self.engine.engine == "one_pass":
                raise PlanError("engine='one_pass' does not serve sharded models (FSDP2); use 'two_pass'.")
            if self._rounds is not None:
                self._graph_bytes = None  # two passes
        return self._rounds

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **others: Any
    ) -> None:
        """Has every trained model recompute its activations in the backward; without reentrance by default.

        Raises:
            PlanError: if a trained component has no model that can.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for key in self.references:
            component = self.components[key]
            if component.module is not None and not acceleration.enable_checkpointing(
                component.module, options, **others
            ):
                raise PlanError(f"gradient_checkpointing=True: {component!r} has no model that supports it.")

    # The name that transformers before 5.20 calls.
    gradient_checkpointing_enable = activation_checkpointing_enable

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in parameters_of(self) if parameter.requires_grad]

    def forward(
        self,
        work: Sequence[Feedback] | Turn | None,
        generator: Generators = None,
        step: int | None = None,
    ) -> Any:
        """Whatever runs the models goes through here, so that wrappers of the module (DDP, FSDP, autocast) see it.

        Args:
            work: a batch of pairs or unpaired runs, as `sysdag.data.encode_rows` gives them, to be scored; or a `Turn`
                of the output of one, to be differentiated; or None.
            generator: a CPU generator for noise and candidates, torch's global one by default; or one for each pair, so
                that a pair's noise is the same in any batch.
            step: number of optimizer steps so far, for candidates that are kept; None draws anew and keeps nothing.
                With it and no generator a prompt's candidates depend on torch's seed, the step and the prompt alone.

        Returns:
            A `StepOutput` for a batch; for a turn its part of the loss, (); for None a zero that depends on every
            trained parameter, whose backward lets data-parallel wrappers exchange what the turns have accumulated.

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

    def _step(self, pairs: Sequence[Feedback], generator: Generators, step: int | None) -> StepOutput:
        check_pairs(self.options, pairs)
        stored = self.stored
        rounds = self.rounds()
        self._settle()
        with whole_weights(self) if rounds is not None and self.candidates is not None else contextlib.nullcontext():
            comparison = self.compare(pairs, generator if stored is None else stored.generators(pairs), step)
        trains = torch.is_grad_enabled()
        if trains and self._graph_bytes is not None and self._graph_bytes.total:
            self.budget.keeps_graphs = self._graph_bytes.fits()
            self._graph_bytes = None
        if self.budget.keeps_graphs and self._would_recompute_another_adapter():
            self.budget.keeps_graphs = False
        budget = self.budget if trains else replace(self.budget, keeps_graphs=False)
        kl = kl_term(self, _runs(pairs), comparison, generator) if self.options.needs_kl else None
        # A first step that measures graphs builds each in the second pass.
        room = Room.of(self) if trains and rounds is None and self._graph_bytes is None else None
        weighs = self.options.use_weighting
        scored = score(self.plan, comparison.terms, self.reference_of, budget, rounds, room, weighs=weighs)
        self.take_stored(scored, comparison.terms, pairs)
        leaves = {name: values.clone().requires_grad_(trains) for name, values in scored.policy.items()}
        scores, metrics = comparison.combine(leaves, scored.reference)
        losses, shown = batch_losses(self, pairs, scores, scored, kl, trains=trains)
        metrics |= shown
        balance = sum((factor * value for factor, value in scored.auxiliary.values()), losses.new_zeros(()))
        metrics |= {f"nodes/{name}/aux_loss": value.expand(len(pairs)) for name, (_, value) in scored.auxiliary.items()}
        coefficients: dict[str, Tensor] = {}
        loss = losses.mean()
        if trains:
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            coefficients = dict(zip(leaves, found, strict=True))
            for name, residuals in scored.residuals.items():
                mu = component_of(self.plan, name).winner_safeguard
                if mu is not None:
                    scales = loser_scales(
                        name, residuals, coefficients[name], mu, lambda place: pairs[place].described(place)
                    )
                    coefficients[name] = coefficients[name] * torch.cat([torch.ones_like(scales), scales])
                    metrics[f"nodes/{name}/loser_scale"] = scales
        output = StepOutput(
            loss=(loss.detach() + balance).to(self.device_of(scored), non_blocking=True),
            losses=losses.detach(),
            balance=balance,
            metrics={name: values.detach().float() for name, values in metrics.items()},
            log_ratios={name: values - scored.reference[name] for name, values in scored.policy.items()},
            scores=scored.policy,
            turns=(),
        )
        if trains:
            trained = [batch for batch in scored.batches if self.reference_of(component_of(self.plan, batch.name))]
            output.turns = tuple(turns(trained, coefficients, rounds, scored.auxiliary))
            if budget.keeps_graphs:
                output.loss = known_by_scores(output.loss, coefficients, scored)
        return output

    def device_of(self, scored: Scored) -> torch.device:
        """Where a batch's loss lies, and over which processes reach each other: that of what trains."""
        return scored.device or next(parameter.device for parameter in self.trained_parameters())

    def take_stored(self, scored: Scored, terms: Sequence[Term], pairs: Sequence[Feedback]) -> None:
        """Puts what is known of the reference without running it in its place among scores: those on file, or 0."""
        for term in terms:
            if self.stored is not None and self.reference_of(component_of(self.plan, term.name)):
                scored.reference[term.name] = self.stored.of(term, pairs)
        if not self.options.needs_reference:
            scored.reference = {name: torch.zeros_like(values) for name, values in scored.policy.items()}

    def _settle(self) -> None:
        """At the first step, when wrappers and devices are settled: lets idle models go to the host, if asked to."""
        if not self.engine.offload_idle or self.residence is not None:
            return
        if self.rounds() is not None:
            raise PlanError("offload_idle=True does not serve sharded models (FSDP2), which come and go by themselves.")
        frozen = [reference for reference in self.references.values() if isinstance(reference, Component)]
        self.residence = Residence([*self.components.values(), *frozen])

    def split(self, turn: Turn) -> list[Turn]:
        """A turn in parts, after memory ran out in it.

        Raises:
            TrainingError: if it cannot be split.
        """
        return [turn.select(part) for part in self.budget.shrink(turn.batch, component_of(self.plan, turn.batch.name))]

    def engine_state(self) -> dict[str, Any]:
        """What the engine has found out about memory, ready for JSON."""
        found = self._graph_bytes
        return {
            "options": asdict(self.engine),
            "max_tokens": self.budget.max_tokens,
            "keeps_graphs": self.budget.keeps_graphs,
            "reuses": self.budget.reuses,
            "graph_bytes": None
            if found is None
            else {"total": found.total, "devices": sorted(map(str, found.devices))},
        }

    def load_engine_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from an `engine_state`, unless the engine's options have changed since."""
        if state["options"] != asdict(self.engine):
            return
        self.budget.max_tokens, self.budget.keeps_graphs = state["max_tokens"], state["keeps_graphs"]
        self.budget.reuses = state.get("reuses", True)
        self._graph_bytes = None
        if state["graph_bytes"] is not None:
            self._graph_bytes = SavedBytes()
            self._graph_bytes.total = state["graph_bytes"]["total"]
            self._graph_bytes.devices = set(map(torch.device, state["graph_bytes"]["devices"]))

    def reference_of(self, component: Component) -> Component | Stored | None:
        """What scores in a trained component's place as its reference; None for one that does not train."""
        key = next((key for key, own in self.components.items() if own is component), None)
        found = None if key is None else self.references.get(key)
        return found if found is None or self.stored is None else Stored()

    def _would_recompute_another_adapter(self) -> bool:
        """Whether a backward may run a forward again (gradient checkpointing) after another node's adapter ran."""
        modules = [component.module for component in self.components.values() if component.module is not None]
        first = [id(next(module.parameters(), None)) for module in modules]
        return len(set(first)) < len(first) and any(
            getattr(part, "gradient_checkpointing", False) for module in modules for part in modules_of(module)
        )

    def compare(self, pairs: Sequence[Feedback], generator: Generators, step: int | None) -> Comparison:
        """What a batch asks to be scored, its candidates drawn."""
        if self.candidates is None:
            return DirectComparison(self.plan, self.options, self.nodes, pairs, generator)
        inputs = collate(pairs)[0].inputs
        of_candidates: RowGenerator
        if isinstance(generator, Sequence):  # those of the noise go on as they are
            of_candidates = [each.initial_seed() for each in generator]
        elif generator is None and step is not None:  # in a batch of any size, in any place of it and in any process
            rows = [{name: column[row] for name, column in inputs.items()} for row in range(len(pairs))]
            of_candidates = [seed_of(torch.initial_seed(), step, key_of(row)) for row in rows]
        else:
            of_candidates = generator
        drawn = self.candidates.draw(self.proposal, inputs, of_candidates, step)
        is_lower_bound = self.candidates.strategy.is_lower_bound
        return SamplingComparison(self.plan, self.options, pairs, drawn, is_lower_bound, generator)


def _runs(batch: Sequence[Feedback]) -> list[UnpairedRun]:
    return [run for run in batch if isinstance(run, UnpairedRun)]


def moved_pairs(policy: Component, reference: Component) -> dict[str, tuple[nn.Parameter, nn.Parameter]] | None:
    """Each tensor that trains with the reference's, by name; None where the reference has not its own of every one."""
    own, frozen = policy.own_parameters(), reference.own_parameters()
    trained = {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    if any(name not in frozen or frozen[name] is parameter for name, parameter in trained.items()):
        return None
    return {name: (parameter, frozen[name]) for name, parameter in trained.items()}


def options_by_node(plan: Plan, given: Mapping[str, NodeOptions]) -> dict[str, NodeOptions]:
    """The options of every random node; a base name stands for all visits of a loop.

    Raises:
        PlanError: for a name that is no random node's.
    """
    found = {}
    for name in plan.random_nodes:
        base = plan.system[name].base_name
        found[name] = given.get(name, given.get(base, NodeOptions()))
    known = {*found, *(plan.system[name].base_name for name in found)}
    unknown = [name for name in given if name not in known]
    if unknown:
        raise PlanError(f"nodes: {unknown[0]!r} is no random node of the system; those are {list(found)}.")
    return found


def _check_precision(key: str, component: Component) -> None:
    """Refuses weights that cannot train in their dtype, and says where 16 bits are trained."""
    trained = [parameter for parameter in component.own_parameters().values() if parameter.requires_grad]
    if any(parameter.dtype == torch.float16 for parameter in trained):
        raise PlanError(
            f"Node {key!r}: {component!r} would train weights in float16, where small gradients are 0 and an optimizer "
            "step loses most updates. Load them in float32 and set fp16=True, or use bfloat16."
        )
    count = sum(parameter.numel() for parameter in trained if precision.is_half(parameter.dtype))
    if count:
        logger.warning(
            "Node %r trains %d numbers in bfloat16: the optimizer works on fp32 copies of them, 4 bytes each, so that "
            "small updates are not lost. With dtype='float32', and bf16=True to compute in bfloat16, they train "
            "themselves.", key, count,
        )  # fmt: skip


def _freeze(component: Component, frozen: bool) -> None:
    """Freezes a component's parameters; or lets those train again that an earlier training froze, and no others."""
    for parameter in component.own_parameters().values():
        if frozen and parameter.requires_grad:
            parameter.requires_grad_(False)
            parameter._sysdag_froze = True  # type: ignore[attr-defined]
        elif not frozen and getattr(parameter, "_sysdag_froze", False):
            parameter.requires_grad_(True)
            del parameter._sysdag_froze  # type: ignore[attr-defined]
