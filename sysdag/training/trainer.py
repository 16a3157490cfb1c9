"""Training a system with transformers' Trainer, which brings accelerate, schedulers, checkpoints and trackers."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from sysdag.components import acceleration, adapter
from sysdag.data.encoding import encode_pairs
from sysdag.data.preferences import PreferencePair
from sysdag.engine.distributed import gathered
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import StepOutput, SystemModel
from sysdag.errors import DataError, PlanError, TrainingError
from sysdag.graph.system import System
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.saving.serialization import load_weights
from sysdag.training.checkpoint import CheckpointTrainer
from sysdag.training.config import SysDPOConfig
from sysdag.training.references import ReferenceKeeper
from sysdag.training.run_record import RunRecord

logger = logging.getLogger(__name__)


class SysDPOTrainer(CheckpointTrainer):
    """Aligns all models of a system jointly from preferences about its outputs.

    Args:
        model: the system; its components are trained in place.
        args: the configuration.
        candidates: for `objective="sampling"`, how latent candidates are found.
        train_dataset, eval_dataset: preference rows (see `sysdag.data.encode_pairs`); `eval_dataset` may be a dict.
        kwargs: what else `transformers.Trainer` takes, as `optimizers`; what would have no effect is refused.

    Raises:
        PlanError: for options that the system cannot serve.
        DataError: for a row that cannot be used, or a `train_dataset` that is a dict of several or has no row.
    """

    args: SysDPOConfig

    def __init__(
        self,
        model: System,
        args: SysDPOConfig,
        *,
        candidates: CandidateStrategy | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, System):
            raise PlanError(f"SysDPOTrainer(model=...) takes a sysdag.System, got {type(model).__name__}.")
        _check_train_dataset(train_dataset)
        for name in kwargs:
            if name in _NOT_TAKEN:
                raise PlanError(f"SysDPOTrainer takes no {name}: {_NOT_TAKEN[name]}.")
        self.system = model
        plan = model.compile()
        system_model = SystemModel(
            plan, args.objective_options(), args.node_options(), candidates, args.engine_options()
        )
        if args.disable_dropout:
            adapter.disable_dropout(system_model)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._evaluated_batches = 0
        self._warned_of_collapse = False

        def encode(rows: Any) -> Any:
            if rows is None or (isinstance(rows, list) and rows and isinstance(rows[0], PreferencePair)):
                return rows
            if isinstance(rows, dict):
                return {name: encode(part) for name, part in rows.items()}
            return encode_pairs(plan, rows, system_model.options.objective, empty=args.empty)

        datasets = {"train_dataset": encode(train_dataset), "eval_dataset": encode(eval_dataset)}
        output_dir = args.output_dir or "trainer_output"
        self._references = ReferenceKeeper(system_model, args.reference_options(), datasets, output_dir)
        self._record = RunRecord(system_model, datasets)
        if args.torch_compile:
            # Trainer would compile the module that holds the system, whose forward is mostly Python.
            options = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
            for component in system_model.components.values():
                if component.module is not None:
                    acceleration.compile_blocks(component.module, options)
            args.torch_compile = False
        if args.deepspeed is not None and args.fp16:
            raise PlanError(
                "DeepSpeed scales losses of fp16 inside its backward, which parts of a loss bypass; use bf16."
            )
        if args.fp16 and args.device.type == "cpu":
            raise PlanError("fp16=True has no effect on a CPU; use bf16=True there.")
        super().__init__(
            model=system_model,
            args=args,
            data_collator=lambda pairs: {"pairs": pairs},
            callbacks=[*(callbacks or []), self._references, self._record],
            **datasets,
            **kwargs,
        )
        if args.log_traces and self.is_fsdp_enabled:
            raise PlanError("log_traces does not serve sharded models (FSDP); set it to 0, or use DDP or DeepSpeed.")
        system_model.move_references(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `CheckpointTrainer`; the record of the run (see `sysdag.training.run_record`) tells how it ended."""
        with self._record.running():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One pair of parameter groups (with and without weight decay) for each component, at its learning rate."""
        trained: Any = self.model if model is None else model
        rates = {key: self._system_model.learning_rate(key) for key in self._system_model.references}
        if self.optimizer is not None or all(rate is None for rate in rates.values()):
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
        rate_of = {
            id(parameter): rate
            for key, rate in rates.items()
            for parameter in self._system_model.components[key].own_parameters().values()
        }
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                rate = rate_of.get(id(parameter))
                groups[self.args.learning_rate if rate is None else rate, name in decayed].append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = optimizer_class(
            [
                {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay if decay else 0.0}
                for (rate, decay), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mode = "train" if model.training else "eval"
        generator, step = None, int(self.state.global_step) if mode == "train" else None
        if mode == "eval":
            generator = torch.Generator().manual_seed(self.args.seed + self._evaluated_batches)
            self._evaluated_batches += 1
        output: StepOutput = self._system_model(inputs["pairs"], generator, step)
        if mode == "train" and self.state.global_step == 0 and self.args.check_reference:
            _check_reference(output)
        for name, value in output.metrics.items():
            self._metrics[mode][name].append(value)
        return (output.loss, output) if return_outputs else output.loss

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Loss and gradients of one batch, in one pass or two.

        The models run without their data-parallel wrapper, which would exchange gradients at every backward; it
        exchanges what has accumulated, once, at the end.
        """
        model.train()
        with self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        share = 1 / self.current_gradient_accumulation_steps
        accumulate_gradients(self._system_model, output, lambda part: self._differentiate(part * share))
        if self._uses_deepspeed:  # its exchange takes the optimizer's step, too
            self._check_gradients()
        distributed = self.accelerator.num_processes > 1 or self._uses_deepspeed
        if distributed and self._system_model.rounds() is None:
            self.accelerator.backward(model(None))
        if not self._uses_deepspeed:
            self._check_gradients()
        return loss.detach() * share

    def _differentiate(self, part: torch.Tensor) -> None:
        if not self._uses_deepspeed:
            self.accelerator.backward(part)
            return
        # DeepSpeed exchanges gradients at every backward, also of the bare models, but processes need not have equally
        # many parts. This reaches none of its hooks.
        parameters = self._system_model.trained_parameters()
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(part, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; noise and candidates are the same at every evaluation, and the preference
        metrics are among the returned ones, so that `metric_for_best_model` can name them."""
        self._references.prepare(int(self.state.global_step))
        self._evaluated_batches = 0
        self._metrics["eval"].clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        preferences = {f"{prefix}_{name}": value for name, value in self._take("eval").items()}
        return output._replace(metrics={**(output.metrics or {}), **preferences})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._take("train") | self._node_gradient_norms()
            self._warn_of_collapse(logs)
        super().log(logs, start_time)

    def _take(self, mode: str) -> dict[str, float]:
        """Means of the metrics since the last call, over all processes."""
        names = sorted(self._metrics[mode])
        if not names:
            return {}
        sums = torch.tensor(
            [[sum(self._metrics[mode][name]), len(self._metrics[mode][name])] for name in names],
            device=self.args.device,
        )
        total, count = self.accelerator.reduce(sums, "sum").T
        self._metrics[mode].clear()
        return dict(zip(names, (total / count).tolist(), strict=True))

    def _warn_of_collapse(self, logs: Mapping[str, float]) -> None:
        """Says once when the latents' models have stopped learning (one candidate has all the responsibility)."""
        size, gap = logs.get("candidates/effective_sample_size"), logs.get("candidates/responsibility_gap")
        if size is None or gap is None or self._warned_of_collapse or size > 1.05 or gap > 0.01:
            return
        self._warned_of_collapse = True
        logger.warning(
            "Responsibilities have collapsed: the effective sample size of the candidates is %.3f and winner and loser "
            "share the same one (mean |w_w - w_l| = %.4f), so the latent nodes' models hardly learn. More diverse "
            "candidates, responsibility_temperature > 1 or candidate_length_normalization=True spread them.",
            size,
            gap,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or "trainer_output")
            self.system.save_pretrained(folder)
            if self._staging is not None:  # a checkpoint
                self._references.save(folder)
            self._save_arguments(folder)
            if self._staging is None:
                self._write_card(folder, datasets=self.dataset_names)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resume(Path(resume_from_checkpoint))
        with gathered(self._system_model, here=True, changed=True):
            load_weights(self.system, resume_from_checkpoint)
            self._references.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # the Trainer calls this only where there is one
        with gathered(self._system_model, here=True, changed=True):
            load_weights(self.system, self.state.best_model_checkpoint)


def _check_train_dataset(rows: Any) -> None:
    if isinstance(rows, Mapping):
        raise DataError(
            f"train_dataset must be one dataset, got a dict of {sorted(map(str, rows))}; choose one of them."
        )
    if isinstance(rows, Sized) and not len(rows):
        raise DataError("train_dataset has no rows, so there is nothing to train on.")


def _check_reference(output: StepOutput) -> None:
    """At step 0 the policy is the reference: every margin must be 0 up to rounding."""
    for name, difference in output.log_ratios.items():
        worst = float(difference.abs().max())
        allowed = 1e-3 * max(1.0, float(output.scores[name].abs().max()) * _ROUNDING.get(difference.dtype, 0.01))
        if worst > allowed:
            raise TrainingError(
                f"Node {name!r}: policy and reference differ by {worst:.3g} nats before the first step, at most "
                f"{allowed:.3g} is rounding. The reference is not the model that training starts from: dropout may be "
                "on (disable_dropout=True turns it off), or the adapter was trained before. "
                "check_reference=False trains all the same."
            )


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
_ROUNDING = {torch.float32: 0.01, torch.float64: 0.0}
