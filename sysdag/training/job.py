"""What `sysdag train` does: check the data, train, save the system, and tell where everything is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sysdag.data.row_encoding import encode_row
from sysdag.data.validation import validate_rows
from sysdag.engine.step import SystemModel, options_by_node
from sysdag.errors import OptionError
from sysdag.files.run_files import LOG_FILE, RUN_FILE, TRACE_FOLDER
from sysdag.graph.plan import Plan
from sysdag.graph.system import System
from sysdag.objectives.loss_checks import check_losses
from sysdag.objectives.strategy_options import strategy_options
from sysdag.saving.loading import load_system
from sysdag.saving.serialization import load_weights
from sysdag.traces.readers import read_all
from sysdag.traces.rows import numbered
from sysdag.training.resume import checkpoint_to_resume, checkpoints_in
from sysdag.training.scales import beyond_scale
from sysdag.training.train_options import TrainJob
from sysdag.training.trainer import SysDPOTrainer
from sysdag.training.unpaired_batches import check_unpaired

_LOOKED_AT = 4  # rows of a dry run, to tell the sizes of images
_RESUMED = {"true": True, "last": True, "latest": True, "false": None}  # any other value is a checkpoint's folder


class Interrupted(KeyboardInterrupt):
    """A training that was interrupted; the message says how to go on."""


def train(job: TrainJob, say: Callable[[str], None] = print) -> SysDPOTrainer | None:
    """Trains as asked for, and saves the aligned system to the job's `output_dir`.

    Args:
        job: what to train on what, and how.
        say: takes what is told on the way; called in the main process alone.

    Returns:
        The trainer; None for a dry run.

    Raises:
        SysdagError: for a system, data or options that cannot be used; before any weights load where that can be told.
        Interrupted: after Ctrl-C, with the checkpoint to resume from.
    """
    args = job.args
    told = say if args.process_index == 0 else _silent
    _check_processes(args.world_size)
    system = job.system if isinstance(job.system, System) else load_system(job.system)
    plan = system.compile()
    plan.check(args.objective_options().objective)
    check_losses(plan, args.objective_options())
    check_unpaired(args)
    named = f"System {job.system}\n" if isinstance(job.system, str) else ""
    told(f"{named}{plan}\n")
    train_rows = _rows(job, plan, job.dataset, job.split, told)
    eval_rows = None
    if job.eval_dataset is not None:
        split = job.eval_split or ("train" if Path(job.eval_dataset).is_file() else "test")  # a file is one split
        eval_rows = _rows(job, plan, job.eval_dataset, split, told)
    if job.dry_run:
        told("\n".join([_outlined(job), *_scales(job, plan, train_rows)]))
        return None
    if args.disable_tqdm is None or not sys.stderr.isatty():
        args.disable_tqdm = True
    folder, resumed = Path(args.output_dir or "trainer_output"), _resumed(args.resume_from_checkpoint)
    if resumed is not None:
        resumed = str(checkpoint_to_resume(folder, resumed))
    elif (folder / RUN_FILE).is_file():
        left = ", ".join(path.name for path in checkpoints_in(folder))
        told(
            f"{args.output_dir} holds an earlier training: its record and its system will be replaced."
            f"{f' Its checkpoints stay ({left}); training does not go on from them.' if left else ''}"
        )
    try:
        trainer = SysDPOTrainer(
            system, args, candidates=job.candidates, train_dataset=train_rows, eval_dataset=eval_rows
        )
    except RuntimeError as error:
        if "to be installed" not in str(error):  # as the Trainer's reporters say it
            raise
        raise OptionError(f"report_to: {error}") from error
    if job.weights is not None:  # the references are those of the system as it is
        load_weights(system, job.weights)
        trainer.args.check_reference = False
    trainer.dataset_names = (job.dataset,)
    model: Any = trainer.model
    told(f"{_outlined(job)}\n{_trained(model, trainer.learning_rates)}")
    try:
        trainer.train(resume_from_checkpoint=resumed)
    except KeyboardInterrupt as error:
        raise Interrupted(trainer.how_to_resume()) from error
    if eval_rows is not None and not _is_evaluated(trainer):
        trainer.evaluate()
    trainer.save_model()
    told(_places(folder))
    return trainer


def _resumed(option: str | None) -> str | bool | None:
    """What `--resume_from_checkpoint` means: a folder, True for the last checkpoint, None for a new training."""
    return _RESUMED.get(str(option).lower(), option)


def _check_processes(count: int) -> None:
    """Refuses processes that a launcher started together and that know nothing of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != count:
        raise OptionError(
            f"{started} processes were started, but each of them would train on all data by itself: there is no "
            "accelerator that they could use together. --use_cpu has them train together on the CPU."
        )


def _silent(text: str) -> None:
    """Processes beside the main one tell nothing."""


def _rows(job: TrainJob, plan: Plan, source: str, split: str, told: Callable[[str], None]) -> list[Any]:
    """The rows that can be trained on.

    Raises:
        DataError: for a source that cannot be read; with all that is wrong, if a row cannot be used or none is left.
    """
    found = read_all(source, split=split, rename=job.rename, shape=job.shape)
    objective: Any = job.args.objective
    report = validate_rows(
        plan, found.rows, objective, strict=job.strict, empty=job.args.empty, damaged=found.damaged,
        wanted=job.args.objective_options().wanted,
    )  # fmt: skip
    report.raise_if_unusable(source)
    told(f"{source}: {report}\n")
    return numbered(found.rows, report.kept)


def _outlined(job: TrainJob) -> str:
    args = job.args
    candidates = "" if job.candidates is None else f", candidates {_options(strategy_options(job.candidates))}"
    rate = "of each model by what trains" if args.learning_rate is None else f"{args.learning_rate:g}"
    rows = "runs" if args.objective_options().is_unpaired else "pairs"
    return (
        f"Objective {args.objective}, loss {'+'.join(args.loss_type)}, beta {args.beta:g}{candidates}; learning rate "
        f"{rate}, {args.train_batch_size} {rows} a step and process"
        f"{f', over {args.gradient_accumulation_steps} such steps' if args.gradient_accumulation_steps > 1 else ''}; "
        f"output to {args.output_dir}"
    )


def _scales(job: TrainJob, plan: Plan, rows: list[Any]) -> list[str]:
    """What a dry run says of betas; weights are not loaded."""
    objective: Any = job.args.objective
    encoded = (encode_row(plan, row, number, objective, loads=False)[0] for number, row in enumerate(rows[:_LOOKED_AT]))
    pairs = [pair for pair in encoded if pair is not None]
    nodes = options_by_node(plan, job.args.node_options())
    return beyond_scale(plan, pairs, objective=objective, beta=job.args.beta, nodes=nodes) if pairs else []


def _options(options: dict[str, Any]) -> str:
    name, *others = options.values()
    given = [f"{key}={value}" for key, value in list(options.items())[1:] if value is not None]
    return f"{name}({', '.join(given)})" if others else str(name)


def _trained(model: SystemModel, rates: Mapping[str, float]) -> str:
    """A line for each component: what of it trains."""
    lines = []
    for key, component in model.components.items():
        parameters = list(component.own_parameters().values())
        count = sum(p.numel() for p in parameters if p.requires_grad)
        of = sum(p.numel() for p in component.module.parameters()) if component.module is not None else 0
        what = f"trains {count:,} of {of:,} parameters" if key in model.references else "is frozen"
        lines.append(f"{key}: {component!r} {what}{f', learning rate {rates[key]:g}' if key in rates else ''}")
    return "\n".join(lines) + "\n"


def _is_evaluated(trainer: SysDPOTrainer) -> bool:
    """Whether the model as it is now has been evaluated already."""
    evaluated = [entry["step"] for entry in trainer.state.log_history if any(k.startswith("eval_") for k in entry)]
    return bool(evaluated) and evaluated[-1] == trainer.state.global_step and not trainer.args.load_best_model_at_end


def _places(folder: Path) -> str:
    traces = f", {folder / TRACE_FOLDER}" if (folder / TRACE_FOLDER).is_dir() else ""
    return (
        f"The aligned system is in {folder}: System.from_pretrained({str(folder)!r}).\n"
        f"What it was trained with is in {folder / RUN_FILE}, its log in {folder / LOG_FILE}{traces}."
    )
