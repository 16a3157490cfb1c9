"""The configuration of a training: transformers' TrainingArguments with the options of SysDPO, under TRL's names."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from transformers import TrainingArguments

from sysdag.errors import PlanError
from sysdag.objectives.losses import KINDS, LOSSES
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions, ReferenceOptions
from sysdag.objectives.own_losses import name_of
from sysdag.objectives.unpaired_losses import UNPAIRED_LOSSES


def _option(default: Any, about: str) -> Any:
    """A field whose `about` is what `sysdag train --help` says of it."""
    return field(default=default, metadata={"help": about})


@dataclass
class SysDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the options of SysDPO, under TRL's names.

    Args:
        objective: `direct` (intermediates observed) or `sampling` (approximated by candidates).
        beta: strength of the regularisation towards the reference.
        loss_type: one or more names of `sysdag.objectives.losses.LOSSES`, or of
            `sysdag.objectives.unpaired_losses.UNPAIRED_LOSSES`, or losses of one's own: a function, or where it stands
            (see `sysdag.objectives.options.ObjectiveOptions`). One stands for a list of one; a function becomes its
            name.
        loss_weights: one weight for each loss; all 1 by default.
        label_smoothing: probability that a preference is flipped, for losses that smooth; in [0, 0.5).
        discopop_tau, simpo_gamma, cpo_alpha, desirable_weight, undesirable_weight: constants of single losses; see
            `sysdag.objectives.options.ObjectiveOptions`, as for `reference_free`, `ld_alpha`, `use_weighting`,
            `group_dro` and `group_dro_step_size`.
        empty: `drop` leaves out rows whose chosen output is empty, `keep` trains on them.
        nodes: options by node: `{"answer": {"beta": 0.2, "scale": 1.0, "learning_rate": 1e-5, "trainable": False}}`,
            or the same as a text in JSON.
        responsibility_temperature, candidate_length_normalization, candidates_from, candidates_refresh_steps: of
            Sampling; see `sysdag.objectives.options.ObjectiveOptions`.
        engine, micro_batch_tokens, offload_idle: how a step is computed; see `sysdag.objectives.options.EngineOptions`.
        disable_dropout: sets the dropout probabilities of trained models to 0, as TRL does, so that policy and
            reference agree at step 0.
        precompute_ref_log_probs, sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: what becomes of the
            reference; see `sysdag.objectives.options.ReferenceOptions`.
        check_reference: at step 0 of a training, stop unless policy and reference score alike on every node.
        check_resume: refuse a checkpoint that was made with another objective, other data, other models or another
            seed, and name the difference.
        log_traces: number of prompts, the first of the evaluation data (or of the training data), whose runs before
            and after training are kept in `output_dir/traces`. Training is the same with and without.
        learning_rate: by default 1e-6, as in TRL, for a component whose weights all train, and 1e-5 for one that trains
            an adapter; see `sysdag.training.learning_rates`.

    Defaults that are not TRL's stand with their reasons in docs/faq.md.

    Raises:
        PlanError: naming the option that is unknown, out of range, or contradicts another.
    """

    learning_rate: float | None = _option(  # type: ignore[assignment]
        None, "The initial learning rate; by default 1e-6 for a component whose weights all train, 1e-5 for an adapter."
    )
    logging_steps: float = _option(10, "Log every so many update steps; below 1, a ratio of all steps. 10 as in TRL.")
    remove_unused_columns: bool = _option(False, "Must be false: the columns are the system's inputs and nodes.")
    objective: str = _option("direct", "'direct' (intermediates observed) or 'sampling' (approximated by candidates).")
    beta: float = _option(0.1, "Strength of the regularisation towards the reference.")
    loss_type: list[str] | str = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": f"One or more of {', '.join(LOSSES)}, FILE.py:function; or, on single runs with a label, of "
            f"{', '.join(UNPAIRED_LOSSES)}."
        },
    )
    loss_weights: list[float] | None = _option(None, "One weight for each loss; all 1 by default.")  # noqa: RUF009
    label_smoothing: float = _option(
        0.0,
        "Probability that a preference is flipped, in [0, 0.5): for "
        f"{', '.join(name for name, kind in KINDS.items() if kind.smooths)}.",
    )
    discopop_tau: float = _option(0.05, "Temperature of the blend in discopop.")
    simpo_gamma: float = _option(0.5, "Margin that simpo asks for, in nats times beta a token.")
    cpo_alpha: float = _option(1.0, "Weight of the winners' negative log-likelihood in cpo.")
    desirable_weight: float = _option(1.0, "Weight of the losses of desirable runs.")
    undesirable_weight: float = _option(1.0, "Weight of the losses of undesirable runs.")
    reference_free: bool = _option(False, "Neither load nor score a reference; simpo and cpo have none anyway.")
    ld_alpha: float | None = _option(None, "Weight of tokens behind the length that both sides of a pair have, 0 to 1.")
    use_weighting: bool = _option(False, "Weigh pairs by how probable the policy finds them (WPO).")
    group_dro: bool = _option(False, "Train for the worst of the groups that a column `group` names.")
    group_dro_step_size: float = _option(0.01, "Step size of the groups' weights.")
    empty: str = _option("drop", "'drop' leaves out rows whose chosen output is empty, 'keep' trains on them.")
    responsibility_temperature: float = _option(
        1.0, "Of Sampling: above 1 it keeps one candidate from taking the whole gradient; 1 is the paper's."
    )
    candidate_length_normalization: bool = _option(
        False, "Of Sampling: divide a candidate's log-probability by its number of tokens before the sum."
    )
    candidates_from: str = _option(
        "policy", "Of Sampling: whose distribution candidates are drawn from, or 'reference'."
    )
    candidates_refresh_steps: int = _option(1, "Of Sampling: optimizer steps for which a prompt's candidates are kept.")
    engine: str = _option(
        "auto",
        "'one_pass' keeps the graphs of a step, 'two_pass' needs the memory of one micro-batch; 'auto' measures.",
    )
    micro_batch_tokens: int = _option(8192, "Most tokens of a micro-batch; halved by itself when memory runs out.")
    offload_idle: bool = _option(False, "Keep frozen weights on the host while their model does not work.")
    nodes: dict[str, dict[str, Any]] | str | None = _option(  # noqa: RUF009
        None,
        'Options by node, as JSON: {"answer": {"beta": 0.2, "scale": 1, "learning_rate": 1e-5, "trainable": true}}.',
    )
    disable_dropout: bool = _option(True, "Set the dropout probabilities of trained models to 0.")
    precompute_ref_log_probs: bool = _option(False, "Score the data by the reference once, before training.")
    sync_ref_model: bool = _option(False, "Move the reference towards the policy during training (TR-DPO).")
    ref_model_mixup_alpha: float = _option(0.6, "alpha in reference = alpha policy + (1 - alpha) reference.")
    ref_model_sync_steps: int = _option(512, "Optimizer steps between two such moves.")
    check_reference: bool = _option(True, "Stop unless policy and reference score alike at step 0.")
    check_resume: bool = _option(
        True, "Refuse a checkpoint that was made with another objective, data, models or seed."
    )
    log_traces: int = _option(
        0, "Number of prompts whose runs before and after training are kept in output_dir/traces."
    )

    def __new__(cls, *args: Any, **options: Any) -> Self:
        known = {option.name for option in fields(cls) if option.init}
        for name in options:
            if name not in known:
                raise PlanError(f"SysDPOConfig has no option {name!r}{_elsewhere(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_types()
        losses = [self.loss_type] if isinstance(self.loss_type, str) or callable(self.loss_type) else self.loss_type
        self.loss_type = [each if isinstance(each, str) else name_of(each) for each in losses]
        if isinstance(self.nodes, str):
            self.nodes = _nodes_from_json(self.nodes)
        if self.remove_unused_columns:
            raise PlanError("remove_unused_columns must be False: the columns are the system's inputs and nodes.")
        for name, (served, why) in _SERVED.items():
            if getattr(self, name) not in served:
                raise PlanError(f"{name}={getattr(self, name)!r} has no use here: {why}.")
        if self.empty not in ("drop", "keep"):
            raise PlanError(f"empty must be 'drop' or 'keep', got {self.empty!r}.")
        if self.log_traces < 0:
            raise PlanError(f"log_traces must be 0 or more, got {self.log_traces}.")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # what DDP sees depends on every trained parameter
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # models hold constants in them, equal on all processes
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, of which torch would warn
        self.objective_options()
        self.engine_options()
        self.reference_options()
        self.node_options()
        super().__post_init__()

    def _check_types(self) -> None:
        """Refuses texts and truth values where numbers are meant: what follows would compare them."""
        declared = typing.get_type_hints(type(self))
        for option in fields(self):
            kinds, value = set(_members(declared[option.name])), getattr(self, option.name)
            wanted = "a number" if float in kinds else "an integer" if int in kinds else None
            if wanted is None or type(value) in kinds or any(issubclass(kind, str) for kind in kinds):
                continue
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (value is option.default or (fits and (float in kinds or value == int(value)))):
                raise PlanError(f"{option.name} must be {wanted}, got {value!r} ({type(value).__name__}).")
        if not all(isinstance(weight, (int, float)) for weight in self.loss_weights or ()):
            raise PlanError(f"loss_weights must be numbers, got {self.loss_weights!r}.")
        losses = [self.loss_type] if isinstance(self.loss_type, str) or callable(self.loss_type) else self.loss_type
        if not isinstance(losses, (list, tuple)) or not all(isinstance(n, str) or callable(n) for n in losses):
            raise PlanError(
                f"loss_type must name one or more of {sorted({**LOSSES, **UNPAIRED_LOSSES})}, or be a function "
                f"loss(scores, beta, label_smoothing) of your own, got {self.loss_type!r}."
            )

    def objective_options(self) -> ObjectiveOptions:
        """The objective's part of the configuration, checked."""
        taken = {option.name: getattr(self, option.name) for option in fields(ObjectiveOptions)}
        for name in ("loss_type", "loss_weights"):
            taken[name] = None if taken[name] is None else tuple(taken[name])
        return ObjectiveOptions(**taken)

    def engine_options(self) -> EngineOptions:
        """The engine's part of the configuration, checked."""
        return EngineOptions(**{option.name: getattr(self, option.name) for option in fields(EngineOptions)})

    def reference_options(self) -> ReferenceOptions:
        """The reference's part of the configuration, checked."""
        return ReferenceOptions(**{option.name: getattr(self, option.name) for option in fields(ReferenceOptions)})

    def node_options(self) -> dict[str, NodeOptions]:
        """The nodes' part of the configuration, checked."""
        known = {option.name for option in fields(NodeOptions)}
        found = {}
        assert not isinstance(self.nodes, str)  # __post_init__ has read it
        for name, options in (self.nodes or {}).items():
            if not isinstance(options, dict):
                raise PlanError(f"nodes: {name!r} must have a dict of options, got {options!r}.")
            unknown = set(options) - known
            if unknown:
                raise PlanError(
                    f"nodes: {name!r} has the unknown option {sorted(unknown)[0]!r}; known: {sorted(known)}."
                )
            for option, value in options.items():
                if not isinstance(value, _NODE_TYPES[option]) or (option != "trainable" and isinstance(value, bool)):
                    kinds = " or ".join(kind.__name__ for kind in _NODE_TYPES[option])
                    raise PlanError(f"nodes: {option} of {name!r} must be {kinds}, got {value!r}.")
            found[name] = NodeOptions(**options)
        return found


# Values of options that TrainingArguments has and that would have no effect on a system, or another one.
_FULL_EVAL = "an evaluation would round the weights that train, for good; bf16=True computes in bf16 and keeps them"
_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bf16_full_eval": ((False,), _FULL_EVAL),
    "fp16_full_eval": ((False,), _FULL_EVAL),
    "label_smoothing_factor": ((0.0,), "it is of a classifier's labels; label_smoothing is of preferences"),
    "neftune_noise_alpha": ((None,), "policy and reference would score with different noise"),
    "torch_empty_cache_steps": ((None,), "micro_batch_tokens bounds a step's memory"),
    "train_sampling_strategy": (("random", "sequential"), "a pair has several values, and no one length"),
    "use_liger_kernel": ((False,), "sysdag has kernels of its own, and uses them where they serve"),
}
_NODE_TYPES: dict[str, tuple[type, ...]] = {
    "beta": (float, int, type(None)),
    "scale": (float, int),
    "trainable": (bool,),
    "learning_rate": (float, int, type(None)),
}


def _nodes_from_json(text: str) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PlanError(f"nodes must be JSON, got {text!r}: {error}.") from error
    if not isinstance(found, dict):
        raise PlanError(f"nodes must be a JSON object with options by node, got {text!r}.")
    return found


def _members(declared: Any) -> Iterator[type]:
    """The classes of an annotation, of a union each."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        for each in typing.get_args(declared):
            yield from _members(each)
    elif isinstance(kind := typing.get_origin(declared) or declared, type):
        yield kind


def _elsewhere(name: str, known: Iterable[str]) -> str:
    """What to do instead of giving `SysDPOConfig` an option that it does not have."""
    if name in ELSEWHERE:
        return f": {ELSEWHERE[name]}."
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "; help(SysDPOConfig) lists those there are."


_OF_COMPONENTS = "it belongs to the components, as in CausalLM(..., {})"
# Options of TRL's DPOConfig, of today and of earlier versions, that SysDPOConfig does not have, and what to do instead.
ELSEWHERE = {
    "activation_offloading": "gradient_checkpointing=True, engine='two_pass' and offload_idle=True save memory",
    "dataset_num_proc": "rows are read in this process",
    "f_alpha_divergence_coef": "the reverse KL divergence is the only one",
    "f_divergence_type": "the reverse KL divergence is the only one",
    "generate_during_eval": "log_traces=N keeps runs of N prompts from before and after training",
    "max_completion_length": _OF_COMPONENTS.format("max_new_tokens=256"),
    "max_length": _OF_COMPONENTS.format("max_length=1024"),
    "max_prompt_length": _OF_COMPONENTS.format("max_length=1024, max_new_tokens=256"),
    "model_init_kwargs": _OF_COMPONENTS.format("model_kwargs={...}"),
    "pad_to_multiple_of": "sequences are packed, and not padded to a multiple",
    "pad_token": _OF_COMPONENTS.format("tokenizer=tokenizer"),
    "padding_free": "sequences that share a beginning are packed without padding, where the model can",
    "peft_config": _OF_COMPONENTS.format("peft_config=LoraConfig(...)"),
    "precompute_ref_batch_size": "micro_batch_tokens bounds what is scored at once",
    "ref_model_init_kwargs": "the reference is each component as it is before training",
    "router_aux_loss_coef": "the auxiliary loss of a router is no part of the objective",
    "rpo_alpha": "loss_type=['sigmoid', 'sft'] with loss_weights adds the winner's likelihood",
    "truncation_mode": "a prompt that leaves no room loses tokens at its start, a completion at its end",
    "trust_remote_code": _OF_COMPONENTS.format("model_kwargs={'trust_remote_code': True}"),
}
