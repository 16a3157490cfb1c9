"""Training a system with transformers' Trainer, which brings accelerate, schedulers, checkpoints and trackers."""

from __future__ import annotations

import copy
import functools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback

from sysdag.components import acceleration, adapter_layers, prompt_date
from sysdag.components.precision import keep_fp32_copies
from sysdag.data.encoding import encode_rows
from sysdag.data.preferences import Feedback, PreferencePair, UnpairedRun
from sysdag.engine.distributed import added_up, first_says, gathered
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import StepOutput, SystemModel
from sysdag.errors import PlanError
from sysdag.graph.plan import Plan
from sysdag.graph.system import System
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.objectives.loss_checks import check_losses, check_pairs
from sysdag.saving.serialization import load_weights, save_system
from sysdag.training.arguments import check_arguments, check_batches, check_dataset, check_precision
from sysdag.training.checkpoint import CheckpointTrainer
from sysdag.training.config import SysDPOConfig
from sysdag.training.initialisation import initialise, mark_trained, warn_if_trained
from sysdag.training.learning_rates import learning_rates
from sysdag.training.log_lines import show_lines
from sysdag.training.movement import MovementCheck
from sysdag.training.pair_groups import PairGroups
from sysdag.training.pair_means import PairMeans
from sysdag.training.reference_check import check_reference
from sysdag.training.references import ReferenceKeeper
from sysdag.training.resume import pairs_hash
from sysdag.training.run_record import RunRecord
from sysdag.training.scales import beyond_scale
from sysdag.training.step_means import StepMeans
from sysdag.training.unpaired_batches import Batches, check_unpaired, fix_mismatches, warn_if_uneven

logger = logging.getLogger(__name__)


class SysDPOTrainer(CheckpointTrainer):
    """Aligns all models of a system jointly from preferences about its outputs.

    Args:
        model: the system; its components are trained in place.
        args: the configuration; `SysDPOConfig()` by default.
        candidates: for `objective="sampling"`, how latent candidates are found.
        train_dataset, eval_dataset: rows of pairs, or of single runs with a label where the loss takes them (see
            `sysdag.data.encode_rows`); `eval_dataset` may be a dict.
        kwargs: what else `transformers.Trainer` takes, as `optimizers`; what would have no effect is refused.

    Attributes:
        learning_rates: of each component that trains, by its key.

    Models that have not been loaded are loaded here, and a new adapter's start follows `args.seed`. Where an earlier
    trainer has trained the system, a warning names its nodes; `System.fresh` gives the untrained one.

    Raises:
        PlanError: for options that the system cannot serve.
        RunError: for a model that cannot be loaded.
        DataError: for a row that cannot be used, a dataset without rows, or several as `train_dataset`.
    """

    args: SysDPOConfig

    def __init__(
        self,
        model: System,
        args: SysDPOConfig | None = None,
        *,
        candidates: CandidateStrategy | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, System):
            raise PlanError(f"SysDPOTrainer(model=...) takes a sysdag.System, got {type(model).__name__}.")
        args = SysDPOConfig() if args is None else args
        check_arguments(args, candidates, kwargs)
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            check_dataset(name, rows)
        check_precision(args)
        check_batches(args)
        check_unpaired(args)
        self.system = model
        prompt_date.settle(first_says(prompt_date.moment().isoformat()))
        plan = model.compile()
        plan.check(args.objective_options().objective)
        check_losses(plan, args.objective_options())
        initialise(model, args.seed)
        system_model = SystemModel(
            plan, args.objective_options(), args.node_options(), candidates, args.engine_options()
        )
        warn_if_trained(
            (key, system_model.components[key].own_parameters().values()) for key in system_model.references
        )
        self.learning_rates = learning_rates(system_model, args.learning_rate)
        if args.learning_rate is None:
            args = copy.copy(args)
            args.learning_rate = min(self.learning_rates.values())
        if args.disable_dropout:
            adapter_layers.disable_dropout(system_model)
        self._steps, self._evaluated = StepMeans(self._added_up), PairMeans()
        self._warned_of_collapse = self._said_scales = False
        self._encode = functools.partial(_encoded, plan, args)
        datasets = {
            name: self._encode(name, rows)
            for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset))
        }
        warn_if_uneven(args.objective_options(), datasets["train_dataset"] or [])
        self._groups = PairGroups(system_model, datasets, self._added_up)
        output_dir = args.output_dir or "trainer_output"
        self._references = ReferenceKeeper(system_model, args.reference_options(), datasets, output_dir)
        self._record = RunRecord(system_model, datasets, lambda: self._run_id)
        if args.torch_compile:
            # Trainer would compile the module that holds the system, whose forward is mostly Python.
            options = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
            for component in system_model.components.values():
                if component.module is not None:
                    acceleration.compile_blocks(component.module, options)
            args.torch_compile = False
        super().__init__(
            model=system_model,
            args=args,
            data_collator=Batches(args.objective_options(), datasets["train_dataset"]),
            callbacks=[
                *(callbacks or []),
                self._references,
                self._record,
                MovementCheck(system_model),
                self._steps,
                self._groups,
            ],
            **datasets,
            **kwargs,
        )
        show_lines(self)
        if args.log_traces and self.is_fsdp_enabled:
            raise PlanError("log_traces does not serve sharded models (FSDP); set it to 0, or use DDP or DeepSpeed.")
        system_model.move_references(self.args.device)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `CheckpointTrainer`; the record of the run (see `sysdag.training.run_record`) tells how it ended."""
        with self._record.running():
            try:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
                return output._replace(training_loss=output.metrics["train_loss"])
            finally:
                if self.state.global_step:
                    mark_trained(self._system_model.trained_parameters())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One pair of parameter groups (with and without weight decay) for each component, at its learning rate.

        Of weights of 16 bits the optimizer keeps fp32 copies; see `sysdag.components.precision`.
        """
        optimizer = self._make_optimizer(model)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper, in a second training
        if isinstance(inner, torch.optim.Optimizer):
            keep_fp32_copies(inner)
        return optimizer

    def _make_optimizer(self, model: nn.Module | None) -> torch.optim.Optimizer:
        trained: Any = self.model if model is None else model
        rates = self.learning_rates
        if self.optimizer is not None or all(rate == self.args.learning_rate for rate in rates.values()):
            return super().create_optimizer(model)
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[tuple[float | None, bool], list[nn.Parameter]] = defaultdict(list)
        rate_of = {
            id(parameter): rate
            for key, rate in rates.items()
            for parameter in self._system_model.components[key].own_parameters().values()
        }
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                rate = rate_of.get(id(parameter), self.args.learning_rate)
                groups[rate, name in decayed].append(parameter)
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
        pairs = inputs["pairs"]
        if model.training:
            step = int(self.state.global_step)
            output: StepOutput = self._system_model(pairs, None, step)
            if step == 0:
                self._check_start(output, pairs)
            self._steps.add_metrics(output.metrics)
        else:
            output = self._system_model(pairs, [self._generator_of(pair) for pair in pairs])
        return (output.loss, output) if return_outputs else output.loss

    def _generator_of(self, pair: Feedback) -> torch.Generator:
        """Of a pair's noise in evaluations: the same in any batch and process."""
        return torch.Generator().manual_seed(self.args.seed + int(pairs_hash([pair])[:15], 16))

    def _check_start(self, output: StepOutput, pairs: Sequence[Feedback]) -> None:
        if self.args.check_reference:
            check_reference(output, self._system_model, self.args.disable_dropout)
        if not self._said_scales:
            self._said_scales = True
            model = self._system_model
            options = model.options
            for said in beyond_scale(
                model.plan, pairs, objective=options.objective, beta=options.beta, nodes=model.nodes,
                scores=output.scores,
            ):  # fmt: skip
                logger.warning("%s", said)
        size = output.metrics.get("candidates/effective_sample_size")
        if size is not None and "candidates/responsibility_gap" in output.metrics:
            self._warn_of_collapse("Before the first step", float(size.mean()))

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Loss and gradients of one batch, in one pass or two.

        The models run without their data-parallel wrapper, which would exchange gradients at every backward; it
        exchanges what has accumulated, once, at the end.
        """
        model.train()
        if self._uses_deepspeed:  # whose hooks want to see each gradient once
            self._system_model.budget.reuses = False
        with self.compute_loss_context_manager():
            _, output = self.compute_loss(model, inputs, return_outputs=True)
        loss = output.loss.detach()  # whoever holds the loss itself holds its graph, also when memory has run out
        share = 1 / self.current_gradient_accumulation_steps
        accumulate_gradients(self._system_model, output, lambda part: self._differentiate(part * share))
        if self._uses_deepspeed:  # its exchange takes the optimizer's step, too
            self._check_gradients()
        distributed = self.accelerator.num_processes > 1 or self._uses_deepspeed
        at_work = {turn.batch.name for turn in output.turns}
        rests = any(name not in at_work for name in self._system_model.factors)  # a branch that no run took
        if (distributed or rests) and self._system_model.rounds() is None:
            self.accelerator.backward(model(None))  # gradients of 0 where there are none
        if not self._uses_deepspeed:
            self._check_gradients()
        loss = loss * share
        self._steps.add_loss(loss)
        return loss

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
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        columns = {
            **output.metrics,
            _LOSS: (output.losses + output.balance).float(),
            **self._groups.column(inputs["pairs"]),
        }
        names = sorted(columns)
        values = torch.stack([columns[name] for name in names], 1).to(self.args.device)
        gathered = self.accelerator.gather_for_metrics(values)  # without the pairs that even out the last batches
        found = dict(zip(names, gathered.T, strict=True))
        self._evaluated.add(self._groups.taken_apart(found))
        self._evaluated.add(found)
        return loss.detach(), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of all rows: what `dataloader_drop_last` leaves out is left out of a training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in `transformers.Trainer`.

        Args:
            eval_dataset: preference rows as the trainer itself takes them, pairs, or a dict of such; by default those
                that the trainer was given.

        Raises:
            DataError: for a row that cannot be used, or where there is none.
        """
        if not isinstance(eval_dataset, str):  # the name of one of several that the trainer was given
            check_dataset("eval_dataset", eval_dataset)
            eval_dataset = self._encode("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; noise and candidates are the same at every evaluation, and the preference
        metrics are among the returned ones, so that `metric_for_best_model` can name them.

        All are means over pairs, the loss too, whatever the sizes of batches and the number of processes.
        """
        self._references.prepare(int(self.state.global_step))
        self._evaluated.clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._evaluated.take()
        found = {f"{prefix}_{name}": value for name, value in (means | self._groups.worst(means)).items()}
        return output._replace(metrics={**(output.metrics or {}), **found})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._steps.take(int(self.state.global_step))
            logs |= means | self._node_gradient_norms()
            logs |= self._groups.weights()
            size, gap = (means.get(f"candidates/{name}") for name in ("effective_sample_size", "responsibility_gap"))
            if size is not None and gap is not None and gap <= _NO_GAP:
                self._warn_of_collapse(f"At step {self.state.global_step}", size)
        if "train_loss" in logs:
            logs["train_loss"] = self._steps.training_loss(int(self.state.global_step))
        super().log(logs, start_time)

    def _added_up(self, sums: torch.Tensor) -> torch.Tensor:
        return added_up(sums, self.args.device)

    def _warn_of_collapse(self, when: str, size: float) -> None:
        """Says once when the latents' models have nothing to learn from (one candidate has all the responsibility)."""
        if self._warned_of_collapse or size > _COLLAPSED:
            return
        self._warned_of_collapse = True
        logger.warning(
            "%s the responsibilities have collapsed: the effective sample size of the candidates is %.3f, so one of "
            "them has nearly all the weight. Where winner and loser share that one, the latent nodes' models hardly "
            "learn. Candidates that are alike in probability (DiverseBeamSearch with a smaller diversity_penalty or "
            "ngram_size > 1, MonteCarlo), shorter latents, responsibility_temperature > 1 or "
            "candidate_length_normalization=True spread them.",
            when,
            size,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or "trainer_output")
            # What is pushed as it goes has to be whole: its checkpoints become the repository's system.
            save_system(self.system, folder, checkpoint=self._staging is not None and not self.args.push_to_hub)
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


_LOSS = "loss"
_COLLAPSED = 1.05  # effective sample size, of at least two candidates
_NO_GAP = 0.01  # mean |w_w - w_l|


def _encoded(plan: Plan, args: SysDPOConfig, name: str, rows: Any) -> Any:
    """Rows as pairs or unpaired runs, which know their row; what are these already, None, and each dataset of a dict
    likewise."""
    if rows is None:
        return rows
    if isinstance(rows, dict):
        return {key: _encoded(plan, args, name, part) for key, part in rows.items()}
    options = args.objective_options()
    if isinstance(rows, list) and rows and isinstance(rows[0], (PreferencePair, UnpairedRun)):
        rows = [each if each.row is not None else replace(each, row=number) for number, each in enumerate(rows)]
    else:
        rows = encode_rows(plan, rows, options.objective, empty=args.empty, wanted=options.wanted)
    check_pairs(options, rows)
    return fix_mismatches(args, name, rows)
