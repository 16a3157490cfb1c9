"""What becomes of the references while policies train: scored beforehand and dropped, or moved after the policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sysdag.components.component import Component
from sysdag.data.preferences import Feedback, UnpairedRun
from sysdag.engine.distributed import rounds_of, whole
from sysdag.engine.precompute import FILE_NAME as SCORES_FILE
from sysdag.engine.precompute import ReferenceScores, check, compute, fingerprint
from sysdag.engine.step import SystemModel, moved_pairs
from sysdag.errors import PlanError, SerializationError
from sysdag.objectives.options import ReferenceOptions

FILE_NAME = "references.safetensors"


class ReferenceKeeper(TrainerCallback):
    """Precomputes or synchronises a model's references, as the options say.

    Args:
        model: whose references they are.
        options: see `sysdag.objectives.options.ReferenceOptions`.
        datasets: all pairs that the trainer was given, by name; None for one that was not.
        output_dir: where reference scores are kept.

    Raises:
        PlanError: if the references cannot be treated so.
    """

    def __init__(
        self, model: SystemModel, options: ReferenceOptions, datasets: Mapping[str, Any], output_dir: str | Path
    ) -> None:
        self.model, self.options = model, options
        for name in ("precompute_ref_log_probs", "sync_ref_model"):
            if getattr(options, name) and not model.options.needs_reference:
                raise PlanError(
                    f"{name}=True has no use: loss_type {list(model.options.loss_type)} trains without a reference."
                )
        if options.sync_ref_model:
            model.let_references_move()
        self._file = Path(output_dir) / SCORES_FILE
        self._pairs: list[Feedback] = []
        if options.precompute_ref_log_probs:
            check(model.options, None if model.candidates is None else model.candidates.strategy)
            _check_inputs_stay(model)
            for name, part in datasets.items():
                self._pairs += _all_pairs(name, part)
            others = [run.mismatched for run in self._pairs if isinstance(run, UnpairedRun)]
            self._pairs += [run for run in others if run is not None]
        self._moved()

    def prepare(self, step: int) -> None:
        """Computes reference scores, or reads them, if that is asked for and has not been done.

        Args:
            step: optimizer steps that the policy has made.

        Raises:
            PlanError: if they would have to be computed after training has started.
            SerializationError: if the stored ones belong to something else.
        """
        if self.options.precompute_ref_log_probs and self.model.stored is None:
            precompute(self.model, self._pairs, self._file, may_compute=step == 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with args.main_process_first(desc="scoring by the reference"):
            self.prepare(state.global_step)
        self.model.drop_references()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.options.sync_ref_model and state.global_step % self.options.ref_model_sync_steps == 0:
            self.sync()

    def _moved(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        # Looked up anew: sharding replaces parameters.
        return moved_parameters(self.model) if self.options.sync_ref_model else {}

    @torch.no_grad()
    def sync(self) -> None:
        """reference = alpha policy + (1 - alpha) reference."""
        alpha = self.options.ref_model_mixup_alpha
        for policy, reference in self._moved().values():
            moved = policy if type(policy.data) is type(reference.data) else whole(policy)
            reference.mul_(1 - alpha).add_(moved.to(reference), alpha=alpha)

    def save(self, folder: Path) -> None:
        """Writes references that move, to a checkpoint."""
        from safetensors.torch import save_file

        if moved := self._moved():
            tensors = {name: reference.detach().cpu().clone() for name, (_, reference) in moved.items()}
            save_file(tensors, Path(folder) / FILE_NAME)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Replaces references that move by those that `save` wrote.

        Raises:
            SerializationError: if the checkpoint has none, or other tensors.
        """
        from safetensors.torch import load_file

        moved = self._moved()
        if not moved:
            return
        file = Path(folder) / FILE_NAME
        if not file.is_file():
            raise SerializationError(
                f"{file} is missing, so the reference that sync_ref_model had moved is not known. Resume from a "
                "checkpoint that was made with sync_ref_model=True."
            )
        saved = load_file(file)
        own = {name: reference for name, (_, reference) in moved.items()}
        different = sorted(
            name
            for name in own.keys() | saved.keys()
            if name not in own or name not in saved or own[name].shape != saved[name].shape
        )
        if different:
            raise SerializationError(f"{file} holds other references: {different[0]!r} is missing or of another shape.")
        for name, reference in own.items():
            reference.copy_(saved[name])


def precompute(model: SystemModel, pairs: Sequence[Feedback], file: Path, *, may_compute: bool = True) -> None:
    """Takes the references' scores of `pairs` from a file, which is written where it does not exist.

    `SystemModel.drop_references` then frees them. To be called before policies and references have changed.

    Args:
        may_compute: whether the references are still what training starts from as far as the caller knows.

    Raises:
        PlanError: if the runs to be scored are not known before training, or the file is missing and may not be made.
        SerializationError: if the file's scores were made from something else.
    """
    check(model.options, None if model.candidates is None else model.candidates.strategy)
    if rounds_of(model) is not None:
        raise PlanError("precompute_ref_log_probs: models that are sharded over processes are not supported.")
    references = {key: found for key, found in model.references.items() if isinstance(found, Component)}
    expected = fingerprint(model.plan, pairs, references, model.options)
    if not file.exists():
        if not may_compute:
            raise PlanError(
                f"precompute_ref_log_probs: {file} is missing, and training has started, so the policy may no longer "
                "equal the reference. Resume with the file that the first run wrote."
            )
        training = model.training
        model.eval()
        try:
            made = compute(
                model.reference_plan(),
                lambda some, generators: model.compare(some, generators, None),
                pairs,
                expected,
                replace(model.budget, keeps_graphs=False),
            )
        finally:
            model.train(training)
        made.save(file)
    model.stored = ReferenceScores.load(file)
    model.stored.check(expected, file)


def _check_inputs_stay(model: SystemModel) -> None:
    for key in model.references:
        if model.components[key].drops_inputs:
            raise PlanError(
                f"precompute_ref_log_probs: node {key!r} drops captions while it trains, and the reference scored each "
                "pair under its own. Set caption_dropout=0, or leave precompute_ref_log_probs out."
            )


def moved_parameters(model: SystemModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Policy and reference of each tensor that trains.

    Raises:
        PlanError: naming a node whose reference has no weights of its own.
    """
    found: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for key, reference in model.references.items():
        assert isinstance(reference, Component)  # only stored scores take a reference's place
        moved = moved_pairs(model.components[key], reference)
        if moved is None:
            raise PlanError(
                f"sync_ref_model: the reference of node {key!r} has no weights of its own for what trains, so none "
                f"that could move. Override `moving_reference(self)` in {type(model.components[key]).__name__} to "
                "return a frozen copy, or leave it out."
            )
        found |= {f"{key}.{name}": pair for name, pair in moved.items()}
    return found


def _all_pairs(name: str, part: Any) -> Iterable[Feedback]:
    if part is None:
        return []
    if isinstance(part, Mapping):
        return [pair for key, inner in part.items() for pair in _all_pairs(f"{name}[{key!r}]", inner)]
    if not isinstance(part, list):
        raise PlanError(
            f"precompute_ref_log_probs: {name} is a {type(part).__name__}; it must be a list or a dataset that ends."
        )
    return part
