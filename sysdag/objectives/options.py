"""The options of an objective and of its nodes, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sysdag.data.checks import Wanted
from sysdag.errors import PlanError
from sysdag.graph.plan import Objective
from sysdag.objectives.losses import KINDS, LOSSES, Kind
from sysdag.objectives.own_losses import look_up
from sysdag.objectives.unpaired_losses import NEEDS_KL, NEEDS_SHIFT, UNPAIRED_LOSSES

_OF_SINGLE_RUNS = Kind()
_SAMPLING_ONLY = (
    "responsibility_temperature",
    "candidate_length_normalization",
    "candidates_from",
    "candidates_refresh_steps",
)


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What the objective knows of one node.

    Attributes:
        beta: the node's own strength of regularisation; the objective's by default.
        scale: multiplies beta; a diffusion node's convention sets its natural size (see `Diffusion`).
        trainable: whether the node's component learns.
        learning_rate: the component's own; the trainer's by default.
    """

    beta: float | None = None
    scale: float = 1.0
    trainable: bool = True
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a step is computed; its gradient is the same either way.

    Attributes:
        engine: `one_pass` keeps the graphs of everything that a step scores. `two_pass` scores without graphs, then
            runs each micro-batch forward and backward: one more forward, the memory of one micro-batch. `auto` takes
            two passes on the first step, measures there what the graphs take, and one pass from then on if twice that
            is free.
        micro_batch_tokens: most tokens of a micro-batch, counted as the component does: packed tokens of a language
            model, positions of a diffusion model's latents. Halved by itself when memory runs out.
        offload_idle: keeps frozen weights (of references, under adapters, of frozen models) on the host while their
            model does not work; in two passes only. They stay there after training, and come when the system runs.

    Raises:
        PlanError: naming the option that is out of range, or contradicts another.
    """

    engine: Literal["auto", "one_pass", "two_pass"] = "auto"
    micro_batch_tokens: int = 8192
    offload_idle: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ("auto", "one_pass", "two_pass"):
            raise PlanError(f"engine must be 'auto', 'one_pass' or 'two_pass', got {self.engine!r}.")
        if self.micro_batch_tokens < 1:
            raise PlanError(f"micro_batch_tokens must be 1 or more, got {self.micro_batch_tokens}.")
        if self.offload_idle and self.engine == "one_pass":
            raise PlanError(
                "offload_idle=True needs two passes: the graphs of engine='one_pass' hold every model's weights."
            )


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """What becomes of the reference during training; the names and defaults are TRL's.

    Attributes:
        precompute_ref_log_probs: scores the datasets by the reference once, before training, and keeps the numbers in
            a file; see `sysdag.engine.precompute`.
        sync_ref_model: moves the reference towards the policy every `ref_model_sync_steps` optimizer steps (TR-DPO,
            Gorbatovski et al. 2024, arXiv 2404.09656): reference = alpha policy + (1 - alpha) reference.
        ref_model_mixup_alpha: alpha, in (0, 1].
        ref_model_sync_steps: optimizer steps between two moves.

    Raises:
        PlanError: naming the option that is out of range, has no effect, or contradicts another.
    """

    precompute_ref_log_probs: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    def __post_init__(self) -> None:
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise PlanError(
                "sync_ref_model moves the reference, so its scores cannot be computed beforehand: drop it or "
                "precompute_ref_log_probs."
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise PlanError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}.")
        if self.ref_model_sync_steps < 1:
            raise PlanError(f"ref_model_sync_steps must be 1 or more, got {self.ref_model_sync_steps}.")
        for option in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if not self.sync_ref_model and getattr(self, option) != getattr(ReferenceOptions, option):
                raise PlanError(f"{option} has no effect without sync_ref_model=True.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Which preference objective, and with what constants; the names are TRL's.

    Attributes:
        objective: `direct` or `sampling`.
        beta: strength of the regularisation towards the reference.
        loss_type, loss_weights: names in `sysdag.objectives.losses.LOSSES`, or for single runs with a label in
            `sysdag.objectives.unpaired_losses.UNPAIRED_LOSSES`, and one weight each (1 by default). A loss of one's own
            is named once it is registered (`sysdag.objectives.register_loss`), or by where it stands:
            `FILE.py:function` or `package.module:function`; it is tried out on a few pairs.
        label_smoothing: probability that a preference is flipped, for `sigmoid`, `robust`, `exo_pair` (which needs it),
            `aot`, `aot_unpaired`, `simpo` and `cpo`.
        discopop_tau: temperature of the blend in `discopop`.
        simpo_gamma: margin that `simpo` asks for, in nats times beta a token.
        cpo_alpha: weight of the winners' negative log-likelihood in `cpo`.
        desirable_weight, undesirable_weight: what the losses of unpaired runs of either label are multiplied with, so
            that unequal numbers of them can be evened out.
        reference_free: takes log q = 0, a reference that gives all runs one probability: it is neither loaded nor
            scored. `simpo` and `cpo` by themselves, or with `sft`, are so without being told.
        ld_alpha: weight of the tokens behind the length that both sides of a pair have, node by node, in [0, 1]
            (LD-DPO, Liu et al. 2024, arXiv 2409.06411); None weighs all alike. Only Direct.
        use_weighting: weighs each pair by how probable the policy finds it, beside what it would draw itself: exp of
            the mean over terms of log p - log sum p^2, of winner times loser, over all exact nodes (WPO, Zhou et al.
            2024, arXiv 2406.11827). Only Direct.
        group_dro: trains for the group of pairs (a column `group`) whose loss is largest; see
            `sysdag.objectives.group_weights`.
        group_dro_step_size: of the groups' weights, eta in q_g <- q_g exp(eta loss_g).
        responsibility_temperature: t in t log sum exp(joint / t) over candidates; above 1 it keeps one candidate from
            taking the whole gradient. 1 is the paper's.
        candidate_length_normalization: divides each candidate's joint log-probability by its number of tokens before
            the sum, so that long candidates are not left out. Off in the paper.
        candidates_from: whose distribution candidates are drawn from.
        candidates_refresh_steps: optimizer steps for which a prompt's candidates are kept.

    Raises:
        PlanError: naming the option that is unknown, out of range, or that the chosen losses would ignore.
        LoadingError: for a loss that is not where its name says.
    """

    objective: Objective = "direct"
    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_free: bool = False
    ld_alpha: float | None = None
    use_weighting: bool = False
    group_dro: bool = False
    group_dro_step_size: float = 0.01
    responsibility_temperature: float = 1.0
    candidate_length_normalization: bool = False
    candidates_from: Literal["policy", "reference"] = "policy"
    candidates_refresh_steps: int = 1

    def __post_init__(self) -> None:
        if self.objective not in ("direct", "sampling"):
            raise PlanError(f"objective must be 'direct' or 'sampling', got {self.objective!r}.")
        if not self.beta > 0:
            raise PlanError(f"beta must be positive, got {self.beta}.")
        look_up(self.loss_type, self.beta)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise PlanError(
                f"loss_weights needs one weight for each of loss_type {list(self.loss_type)}, got {self.loss_weights}."
            )
        self._check_losses()
        self._check_weighting()
        self._check_unpaired()
        if not self.responsibility_temperature > 0:
            raise PlanError(f"responsibility_temperature must be positive, got {self.responsibility_temperature}.")
        if self.candidates_from not in ("policy", "reference"):
            raise PlanError(f"candidates_from must be 'policy' or 'reference', got {self.candidates_from!r}.")
        if self.candidates_refresh_steps < 1:
            raise PlanError(f"candidates_refresh_steps must be 1 or more, got {self.candidates_refresh_steps}.")
        if self.objective == "direct":
            for option in _SAMPLING_ONLY:
                if getattr(self, option) != getattr(ObjectiveOptions, option):
                    raise PlanError(f"{option} has no effect on objective='direct', which observes the intermediates.")

    def _check_losses(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise PlanError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}.")
        if self.label_smoothing and not any(kind.smooths for kind in self.kinds):
            raise PlanError(
                f"label_smoothing={self.label_smoothing} has no effect on loss_type {list(self.loss_type)}; it belongs "
                f"to {sorted(name for name, kind in KINDS.items() if kind.smooths)}."
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise PlanError("loss_type 'exo_pair' needs a label_smoothing above 0; the paper recommends 1e-3.")
        for option, least in (("discopop_tau", "positive"), ("simpo_gamma", "finite"), ("cpo_alpha", "0 or more")):
            value = getattr(self, option)
            served = [name for name, kind in KINDS.items() if option in kind.constants]
            if value != getattr(ObjectiveOptions, option) and not set(served) & set(self.loss_type):
                raise PlanError(f"{option} has no effect on loss_type {list(self.loss_type)}; it belongs to {served}.")
            is_low = value <= 0 if least == "positive" else value < 0 if least == "0 or more" else False
            if is_low or not math.isfinite(value):
                raise PlanError(f"{option} must be {least}, got {value}.")
        if self.reference_free and "aot" in self.loss_type:
            raise PlanError("reference_free=True leaves loss_type 'aot' nothing that the policy is to dominate.")
        if not self.needs_reference and self.candidates_from == "reference":
            raise PlanError("candidates_from='reference' needs a reference, and this objective has none.")

    def _check_weighting(self) -> None:
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise PlanError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}.")
        if self.ld_alpha is not None and self.objective == "sampling":
            raise PlanError(
                "ld_alpha does not go with objective='sampling': its sum over candidates is one of probabilities, and "
                "a likelihood whose tokens are weighted is none."
            )
        counted = [name for name in self.loss_type if name in ("sft", "cpo")]
        if self.ld_alpha is not None and counted:
            raise PlanError(
                f"ld_alpha does not go with loss_type {counted[0]!r}, in which the winner's tokens count alike."
            )
        if self.use_weighting and self.objective == "sampling":
            raise PlanError(
                "use_weighting does not go with objective='sampling': it weighs whole runs, of which only the outputs "
                "are observed."
            )
        if self.group_dro_step_size <= 0 or not math.isfinite(self.group_dro_step_size):
            raise PlanError(f"group_dro_step_size must be positive, got {self.group_dro_step_size}.")
        if not self.group_dro and self.group_dro_step_size != ObjectiveOptions.group_dro_step_size:
            raise PlanError("group_dro_step_size has no effect without group_dro=True.")
        for option in ("use_weighting", "group_dro"):
            if getattr(self, option) and self.compares_pairs:
                raise PlanError(
                    f"{option}=True weighs single pairs, and {self.compares_pairs} sorts them over the batch."
                )

    def _check_unpaired(self) -> None:
        single = [name for name in self.loss_type if name in UNPAIRED_LOSSES]
        if single and len(single) < len(self.loss_type):
            other = next(name for name in self.loss_type if name not in UNPAIRED_LOSSES)
            raise PlanError(
                f"loss_type {single[0]!r} takes single runs with a label, and {other!r} pairs of runs; no row is both. "
                f"Those of single runs are {sorted(UNPAIRED_LOSSES)}."
            )
        for option in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, option)
            if weight < 0 or not math.isfinite(weight):
                raise PlanError(f"{option} must be finite and 0 or more, got {weight}.")
            if weight != 1 and not single:
                raise PlanError(
                    f"{option} has no effect on loss_type {list(self.loss_type)}; it belongs to the losses of single "
                    f"runs, {sorted(UNPAIRED_LOSSES)}."
                )
        if single and not self.desirable_weight and not self.undesirable_weight:
            raise PlanError("desirable_weight and undesirable_weight are both 0, so nothing is trained.")
        whys = {
            "reference_free": "asks on which side of the reference a run is",
            "ld_alpha": "has one run, and no other length to compare with",
            "use_weighting": "has one run, and WPO weighs two",
        }
        for option, why in whys.items():
            if single and getattr(self, option) != getattr(ObjectiveOptions, option):
                raise PlanError(f"{option} does not go with loss_type {single[0]!r}, which {why}.")

    @property
    def is_unpaired(self) -> bool:
        """Whether it is trained on single runs with a label, and not on pairs."""
        return any(name in UNPAIRED_LOSSES for name in self.loss_type)

    @property
    def needs_kl(self) -> bool:
        """Whether a loss has a KL term, which is estimated by mismatched runs."""
        return NEEDS_KL in self.loss_type

    @property
    def needs_shift(self) -> bool:
        """Whether a loss has a running shift."""
        return NEEDS_SHIFT in self.loss_type

    @property
    def wanted(self) -> Wanted:
        """Of which kind rows have to be."""
        single, pairs = sorted(UNPAIRED_LOSSES), sorted(name for name in LOSSES if ":" not in name)
        if self.is_unpaired:
            why = f"loss_type {self.loss_type[0]!r} takes single runs; those of pairs are {pairs}."
        else:
            why = f"loss_type {self.loss_type[0]!r} compares two runs; those that need no pairs are {single}."
        return Wanted(self.is_unpaired, why)

    @property
    def kinds(self) -> list[Kind]:
        """Of the losses, in their order."""
        return [KINDS.get(name, _OF_SINGLE_RUNS) for name in self.loss_type]

    @property
    def _kinds_by_name(self) -> list[tuple[str, Kind]]:
        return list(zip(self.loss_type, self.kinds, strict=True))

    @property
    def needs_reference(self) -> bool:
        """Whether anything is compared with the reference's scores."""
        without = any(not kind.needs_reference for kind in self.kinds)
        return not self.reference_free and not (
            without and all(name == "sft" or not kind.needs_reference for name, kind in self._kinds_by_name)
        )

    @property
    def compares_pairs(self) -> str | None:
        """The first loss that depends on which pairs are in a batch together."""
        return next((name for name, kind in self._kinds_by_name if kind.compares_pairs), None)

    @property
    def constants(self) -> dict[str, float]:
        """Of the losses, by name."""
        return {name: getattr(self, name) for kind in self.kinds for name in kind.constants}

    @property
    def weights(self) -> tuple[float, ...]:
        return self.loss_weights or (1.0,) * len(self.loss_type)
