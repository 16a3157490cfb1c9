"""transformers' Trainer with checkpoints that are whole or not there, and that go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import copy
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from sysdag.components import prompt_date
from sysdag.components.footprint import bytes_of
from sysdag.engine.distributed import gathered, wait_for_everyone
from sysdag.engine.finite import check_gradients, gradient_norms
from sysdag.engine.out_of_memory import is_out_of_memory
from sysdag.engine.step import SystemModel
from sysdag.errors import SerializationError, TrainingError
from sysdag.files import atomic
from sysdag.graph.system import System
from sysdag.saving.model_card import write_card
from sysdag.saving.serialization import check_same_system, copy_system
from sysdag.training.resume import (
    check_state,
    checkpoint_to_resume,
    checkpoints_in,
    data_facts,
    model_facts,
    read_state,
    restore_state,
    run_of,
    write_state,
)
from sysdag.training.step_means import StepMeans

logger = logging.getLogger(__name__)


class CheckpointTrainer(Trainer):
    """Writes checkpoints beside their place and moves them there when they are complete; checks them when resuming.

    A checkpoint also holds `sysdag_state.json` (one for each process, as the random states): the engine's state, the
    kept candidates' ages, and hashes of what must not differ; see `sysdag.training.resume`.
    """

    system: System
    args: Any
    dataset_names: Sequence[str] = ()  # for the model card
    _steps: StepMeans
    _staging: Path | None = None
    _run: dict[str, Any] | None = None
    _run_id: str = ""  # of this training, and of the one it goes on from
    _gradient_norms: torch.Tensor | None = None

    @property
    def _system_model(self) -> SystemModel:
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`.

        Raises:
            SerializationError: for a checkpoint of another training, or a full disk; the last checkpoint is intact.
            TrainingError: for scores or gradients that are not finite, or when memory runs out.
        """
        if self.args.should_save:
            atomic.finish(Path(self.args.output_dir))
        wait_for_everyone(self.accelerator)
        if self._run is None:  # while the references are what training starts from
            self._run = model_facts(self._system_model)
        if resume_from_checkpoint:
            resume_from_checkpoint = str(checkpoint_to_resume(Path(self.args.output_dir), resume_from_checkpoint))
        self._run_id = uuid.uuid4().hex
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"Memory ran out after step {self.state.global_step} ({atomic.first_line(error)}). The weights in "
                f"memory may be changed in part. {self._last_checkpoint()} The optimizer's state may be what does "
                "not fit: adapters, an 8-bit optimizer or a smaller model need less."
            ) from error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`, which takes one step too many after the checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def _facts(self) -> dict[str, Any]:
        """What a run that resumes must have in common with the one that made a checkpoint."""
        if self._run is None:
            self._run = model_facts(self._system_model)
        if "sha256 of the training pairs" not in self._run:
            pairs: Any = self.train_dataset or []
            self._run |= data_facts(pairs)
            self._run["option disable_dropout"] = self.args.disable_dropout
            self._run |= {f"option {name}": value for name, value in asdict(self.args.reference_options()).items()}
        order = {}
        if not self.args.ignore_data_skip:
            order["seed of the data's order"] = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return {**self._run, **order}

    def _last_checkpoint(self) -> str:
        last = self._own_checkpoints()
        return f"{last[-1]} is complete: resume from there." if last else "There is no checkpoint yet."

    def _own_checkpoints(self) -> list[Path]:
        return [path for path in checkpoints_in(Path(self.args.output_dir)) if run_of(path) == self._run_id]

    def how_to_resume(self) -> str:
        """Where training can go on, in words, for a user who stopped it."""
        last = self._own_checkpoints()
        if not last:
            return (
                f"There is no checkpoint in {self.args.output_dir} yet; save_steps={self.args.save_steps} says how "
                "often one is made."
            )
        return f"{last[-1]} is complete; the same command with --resume_from_checkpoint {last[-1]} goes on from there."

    def _state_file(self, folder: Path) -> Path:
        number = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return folder / f"sysdag_state{number}.json"

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the system, from which `System.from_pretrained` loads it; to be called by all processes."""
        with gathered(self._system_model, here=self.args.should_save):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:  # transformers before 5.23 know no `private`
        """As in `transformers.Trainer`: makes the repository that `push_to_hub` goes to.

        Raises:
            TrainingError: if the Hub does not make it, before anything is trained.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # what the client's HTTP library raises has no base in common with the Hub's errors
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            raise TrainingError(
                f"The Hub did not make the repository {name!r}, which push_to_hub needs: {atomic.first_line(error)}. "
                "Check the connection and `hf auth login`."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer's own would write the weights a second time.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            assert self.lr_scheduler is not None  # training has begun
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(super()._get_output_dir(trial))
        place = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        advice = f"{self._last_checkpoint()} Free some space, or lower save_total_limit."
        what = f"The checkpoint of step {self.state.global_step}"
        with atomic.explaining_disk_errors(what, place, self._checkpoint_bytes(), advice), self._staged(run_folder):
            self._write_checkpoint(model, trial, place)
        if self.args.push_to_hub:
            if self._is_about_to_push():
                copy_system(place, run_folder)
                self.create_model_card()
            super()._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(str(run_folder), self.args.save_total_limit, self.state.best_model_checkpoint, True)

    def _write_checkpoint(self, model: nn.Module, trial: Any, place: Path) -> None:
        """Writes all of a checkpoint, which will lie at `place`, to the folder of the moment."""
        assert self._staging is not None  # inside `_staged`
        folder = self._staging / place.name
        super()._save_checkpoint(model, trial)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        file, means = self._state_file(folder), self._steps.state()
        if not self.args.should_save:
            write_state(file, self._system_model, self._facts(), None, self._run_id, means)
        wait_for_everyone(self.accelerator)
        if self.args.should_save:
            write_state(file, self._system_model, self._facts(), folder, self._run_id, means)

    @contextlib.contextmanager
    def _staged(self, folder: Path) -> Iterator[None]:
        """Has what is written inside go to a temporary folder, which all processes share, and moves it into place."""
        if self.args.should_save:
            atomic.prepare(folder)
        wait_for_everyone(self.accelerator)
        self._staging = folder / atomic.SAVING
        try:
            yield
            if self.args.should_save:
                atomic.commit(folder)
        except BaseException:
            if self.args.should_save:
                atomic.abandon(folder)
            raise
        finally:
            self._staging = None
        wait_for_everyone(self.accelerator)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # the upload runs beside training, so it needs the checkpoint in its final place
            super()._push_from_checkpoint(checkpoint_folder)

    def _is_about_to_push(self) -> bool:
        """Whether the Trainer will upload `output_dir` now, into which it copies no weights of a system itself."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return False
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        return self.args.hub_always_push or not running

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        language: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Writes `README.md` into `output_dir`, unless one of the user's own is there; see `sysdag.saving.model_card`.

        Args:
            model_name: the title; by default the name of the repository or folder.
            dataset_name: names of the data; those on the Hub are listed in the metadata.
            tags, language, license: more metadata.
        """
        if self.is_world_process_zero():
            names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or self.dataset_names)
            self._write_card(
                Path(self.args.output_dir), name=model_name, datasets=names, language=language, license=license,
                tags=[tags] if isinstance(tags, str) else list(tags or ()),
            )  # fmt: skip

    def _write_card(self, folder: Path, **about: Any) -> None:
        repository = getattr(self, "hub_model_id", None)
        about["name"] = about.get("name") or (repository or folder.absolute().name).rpartition("/")[2]
        run_folder = Path(self.args.output_dir)
        if not write_card(self.system, folder, run_folder=run_folder, loads_from=repository, **about):
            logger.warning("%s has a README.md that sysdag did not write, so it is left as it is.", folder)

    def _checkpoint_bytes(self) -> int:
        """At most what a checkpoint takes, without the few small files."""
        kept: list[torch.Tensor] = list(self._system_model.parameters())
        for state in getattr(self.optimizer, "state", {}).values():
            kept += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(map(bytes_of, kept))

    def _save_arguments(self, folder: Path) -> None:
        args = copy.copy(self.args)
        args.hub_token = None  # the folder may be shown to others
        with atomic.replacing(folder) as temporary:
            torch.save(args, temporary / "training_args.bin")

    def _resume(self, folder: Path) -> None:
        """Checks a checkpoint before anything is loaded from it; engine and candidates then go on from there."""
        check_same_system(self.system, folder)
        self._run_id = run_of(folder) or self._run_id
        file = self._state_file(folder)
        state = read_state(file)
        others = sorted(folder.glob("sysdag_state*.json"))
        checked = state or (read_state(others[0]) if others else None)
        self._steps.resume(None if checked is None else checked.get("means"))
        if checked is not None and checked.get("prompt_date"):
            prompt_date.settle(checked["prompt_date"])
        if self.args.check_resume:
            if checked is None:
                raise SerializationError(
                    f"{folder} has no {file.name}, so it cannot be told whether this training made it. Set "
                    "check_resume=False to go on from its weights, optimizer and random state."
                )
            check_state(checked, self._facts(), folder)
        if state is not None:
            restore_state(state, self._system_model, file)

    @property
    def _uses_deepspeed(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _check_gradients(self) -> None:
        """Stops before an optimizer step whose gradient is not finite; a GradScaler skips such steps itself."""
        if not self.accelerator.sync_gradients:
            return
        components, scaler = self._system_model.components, getattr(self.accelerator, "scaler", None)
        norms = gradient_norms(components)
        if scaler is None:
            check_gradients(components, norms, lambda flags: self.accelerator.reduce(flags, reduction="sum"))
        self._gradient_norms = norms if scaler is None else norms / scaler.get_scale()

    def _node_gradient_norms(self) -> dict[str, float]:
        """`nodes/<component>/grad_norm` of the last update before clipping, as the Trainer's `grad_norm` is.

        Nothing under DeepSpeed, where a process sees its own gradients before and none after they are exchanged.
        """
        if self._gradient_norms is None or self._uses_deepspeed:
            return {}
        found = zip(self._system_model.components, self._gradient_norms.tolist(), strict=True)
        trained = self._system_model.references
        return {f"nodes/{name}/grad_norm": norm for name, norm in found if name in trained}
