"""What a trainer is given, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from sysdag.errors import DataError, PlanError, shown
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.training.config import SysDPOConfig

# Arguments of transformers' or TRL's trainers that would have no effect.
_NOT_TAKEN = {
    "compute_loss_func": "loss_type and loss_weights of SysDPOConfig choose the loss",
    "compute_metrics": "an evaluation has no predictions; its metrics are those of the preferences, and for others "
    "there are callbacks (on_evaluate) and `sysdag eval`",
    "data_collator": "pairs stay as they are, and micro-batches are put together by each component",
    "model_init": "it is given the system",
    "peft_config": "give it to the components, as in CausalLM(..., peft_config=...)",
    "preprocess_logits_for_metrics": "an evaluation has no logits",
    "processing_class": "each component has its own, as in CausalLM(..., tokenizer=...)",
    "ref_model": "the reference is each component as it is before training; sync_ref_model moves it",
}


def check_arguments(args: Any, candidates: Any, others: Mapping[str, Any]) -> None:
    if not isinstance(args, SysDPOConfig):
        raise PlanError(
            f"SysDPOTrainer(args=...) takes a SysDPOConfig, got {type(args).__module__.partition('.')[0]}."
            f"{type(args).__name__}. Pass SysDPOConfig(...), which has the options of transformers.TrainingArguments "
            "and, under TRL's names, those of DPO."
        )
    if candidates is not None and not isinstance(candidates, CandidateStrategy):
        raise PlanError(
            f"SysDPOTrainer(candidates=...) takes a strategy, as DiverseBeamSearch(num_candidates=4), got "
            f"{shown(candidates)}."
        )
    for name in others:
        if name in _NOT_TAKEN:
            raise PlanError(f"SysDPOTrainer takes no {name}: {_NOT_TAKEN[name]}.")


def check_dataset(name: str, rows: Any) -> None:
    if isinstance(rows, Mapping) and name == "train_dataset":
        raise DataError(
            f"train_dataset must be one dataset, got a dict of {sorted(map(str, rows))}; choose one of them."
        )
    if isinstance(rows, Mapping):
        for key, part in rows.items():
            check_dataset(f"{name}[{key!r}]", part)
    if isinstance(rows, Sized) and not len(rows):
        what = "train" if name == "train_dataset" else "evaluate"
        raise DataError(f"{name} has no rows, so there is nothing to {what} on.")


def check_batches(args: SysDPOConfig) -> None:
    """Refuses batches that come in parts where a loss compares the pairs of a whole one.

    The parts of a batch that `micro_batch_tokens` makes are none: the loss sees all their scores.
    """
    name = args.objective_options().compares_pairs
    if name is None:
        return
    said = f"loss_type {name!r} sorts the pairs of a batch"
    if args.gradient_accumulation_steps > 1:
        raise PlanError(
            f"{said}, and gradient_accumulation_steps={args.gradient_accumulation_steps} would sort each part by "
            "itself. Raise per_device_train_batch_size instead: micro_batch_tokens bounds what is computed at once, "
            "whatever the batch."
        )
    if args.world_size > 1:
        raise PlanError(f"{said}, and {args.world_size} processes would each sort their own. Train it in one process.")


def check_precision(args: SysDPOConfig) -> None:
    if args.deepspeed is not None and args.fp16:
        raise PlanError("DeepSpeed scales losses of fp16 inside its backward, which parts of a loss bypass; use bf16.")
    if args.fp16 and args.device.type == "cpu":
        raise PlanError("fp16=True has no effect on a CPU; use bf16=True and use_cpu=True there.")
