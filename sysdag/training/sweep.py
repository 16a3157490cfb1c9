"""Trainings with other options each, one after the other, as if each had a process of its own.

The trap of a loop over trainings is that the second goes on from what the first one trained: here each builds the
system anew, and what options set for good in a process is set back. The record `sweep.json` says which are done.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sysdag.errors import OptionError
from sysdag.files.series_files import SWEEP_FILE, first_difference, read_series, write_series
from sysdag.graph.system import System
from sysdag.objectives.losses import LOSSES
from sysdag.objectives.strategy_options import STRATEGIES
from sysdag.objectives.unpaired_losses import UNPAIRED_LOSSES
from sysdag.saving.loading import load_system
from sysdag.training.job import Interrupted, train
from sysdag.training.series import comparable, globals_kept, last_checkpoint
from sysdag.training.train_options import TrainJob, parse

_KNOWN: dict[str, Sequence[str]] = {
    "objective": ("direct", "sampling"), "loss_type": (*LOSSES, *UNPAIRED_LOSSES), "candidates": tuple(STRATEGIES),
    "engine": ("auto", "one_pass", "two_pass"), "empty": ("drop", "keep"), "candidates_from": ("policy", "reference"),
}  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """One training of a sweep.

    Attributes:
        folder: its name below the sweep's `output_dir`.
        options: what is swept, and the value that it has here.
    """

    folder: str
    options: Mapping[str, Any]


def combinations(swept: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """All combinations of the values, the last option's changing fastest; each with a folder of its own."""
    found: list[Combination] = []
    for values in itertools.product(*swept.values()):
        options = dict(zip(swept, values, strict=True))
        name = "_".join(f"{key}={_in_path(value)}" for key, value in options.items())
        taken = {each.folder for each in found}
        places = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        found.append(Combination(next(place for place in places if place not in taken), options))
    return found


def sweep(arguments: Sequence[str], job: TrainJob, say: Callable[[str], None] = print) -> list[Path]:
    """Trains once for each combination of a sweep that has not been trained yet.

    Args:
        arguments: the command line.
        job: what `sysdag.training.train_options.parse` made of it.
        say: takes what is told on the way.

    Returns:
        The trainings' folders.

    Raises:
        OptionError: for a value that cannot be used, before anything is trained; or if the folder holds trainings with
            other options, the first difference named.
        SysdagError: what `train` raises; or if a component's weights were given as an object, so that a second
            training cannot start from untrained ones.
        Interrupted: after Ctrl-C, with how to go on.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise OptionError(f"--sweep: {started} processes were started, and a sweep runs in one.")
    chosen = combinations(job.sweep)
    jobs = [_parsed(arguments, each) for each in chosen]
    _refuse_equal(chosen, jobs)
    _untrained(job)
    root = Path(job.args.output_dir or "trainer_output")
    record = _Record(root, job, chosen, jobs)
    if not job.dry_run:
        record.save()
    for number, each in enumerate(chosen):
        folder = root / each.folder
        where = f"Training {number + 1} of {len(chosen)}: {each.folder}"
        if record.is_done(each):
            say(f"{where} is done.")
            continue
        say(f"{where}.")
        with globals_kept():
            asked = _parsed(arguments, each)  # anew: it sets accelerate's state, which all trainings share
            asked.args.output_dir, asked.args.resume_from_checkpoint = str(folder), last_checkpoint(folder)
            try:
                train(replace(asked, system=_untrained(asked)), say)
            except Interrupted as error:
                raise Interrupted(f"{where} was interrupted. The same command goes on from there.") from error
        if not job.dry_run:
            record.done(each)
    return [root / each.folder for each in chosen]


class _Record:
    """`sweep.json` of a folder."""

    def __init__(self, root: Path, job: TrainJob, chosen: Sequence[Combination], jobs: Sequence[TrainJob]) -> None:
        self._file = root / SWEEP_FILE
        begun = read_series(self._file)
        options = {
            "system": str(job.system), "dataset": _content(job.dataset), "eval_dataset": _content(job.eval_dataset),
            "split": job.split, "eval_split": job.eval_split, "rename": dict(job.rename), "shape": job.shape,
        }  # fmt: skip
        earlier = {} if begun is None else {run["folder"]: run for run in begun["runs"]}
        runs = [
            {"folder": each.folder, "options": dict(each.options), "config": comparable(asked.args), "done": False}
            for each, asked in zip(chosen, jobs, strict=True)
        ]
        if begun is not None:
            difference = first_difference(begun["options"], options, "options")
            for run in runs:
                before = earlier.get(run["folder"], run)
                changed = first_difference(before["config"], run["config"], "its configuration")
                difference = difference or (changed and f"of {run['folder']}, {changed}")
                run["done"] = before["done"]
            if difference:
                raise OptionError(
                    f"{root} holds a sweep that was begun otherwise: {difference}. Make it the same to go on, or "
                    "choose another output_dir."
                )
        now = {run["folder"] for run in runs}
        kept = [run for folder, run in earlier.items() if folder not in now]  # of values that are swept no more
        self._facts = {"options": options, "swept": dict(job.sweep), "runs": [*runs, *kept]}

    def is_done(self, each: Combination) -> bool:
        return any(run["done"] for run in self._facts["runs"] if run["folder"] == each.folder)

    def done(self, each: Combination) -> None:
        for run in self._facts["runs"]:
            run["done"] = run["done"] or run["folder"] == each.folder
        self.save()

    def save(self) -> None:
        write_series(self._file, self._facts)


def _untrained(job: TrainJob) -> System:
    """The system as in a process of its own."""
    return (job.system if isinstance(job.system, System) else load_system(job.system)).fresh()


def _parsed(arguments: Sequence[str], each: Combination) -> TrainJob:
    try:
        return parse(arguments, swept=each.options)
    except OptionError as error:
        key, value = next(
            ((key, value) for key, value in each.options.items() if key in str(error)), next(iter(each.options.items()))
        )
        known = _KNOWN.get(key, ())
        close = [] if value in known else difflib.get_close_matches(str(value), known, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise OptionError(f"--sweep {key}={value}: {error}{meant}") from error


def _refuse_equal(chosen: Sequence[Combination], jobs: Sequence[TrainJob]) -> None:
    """Refuses two values that mean the same."""
    seen: dict[str, Combination] = {}
    for each, job in zip(chosen, jobs, strict=True):
        key = json.dumps([comparable(job.args), repr(job.candidates)], sort_keys=True)
        if key in seen:
            raise OptionError(f"--sweep: {seen[key].folder} and {each.folder} are the same training; drop one of them.")
        seen[key] = each


def _content(source: str | None) -> Any:
    """A source of rows, and of a file the hash of what it holds."""
    if source is None or not Path(source).is_file():
        return source
    return {"file": source, "sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest()}


def _in_path(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")[:60] or "empty"
