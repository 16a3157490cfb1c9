"""What writes the record of a training (see `sysdag.files.run_files`) while it runs.

Only the main process writes. A failure to write is reported once and never ends a training.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback

from sysdag.engine.step import SystemModel
from sysdag.errors import DataError, SerializationError
from sysdag.execution.execute import sample
from sysdag.files import atomic, run_files
from sysdag.files.encoding import encode_value
from sysdag.objectives.strategy_options import strategy_options
from sysdag.saving.serialization import system_to_dict
from sysdag.training.resume import pairs_hash
from sysdag.versions import installed_versions

logger = logging.getLogger(__name__)
_SECRET = re.compile(r"(token|secret|password|passwd|credentials?|api_?key)$", re.IGNORECASE)


class RunRecord(TrainerCallback):
    """Writes the record of a training.

    Args:
        model: what is trained.
        datasets: `train_dataset` and `eval_dataset` as pairs (or a dict of such, or None).
        run_id: gives the id of the training, which its checkpoints have, too.
    """

    def __init__(self, model: SystemModel, datasets: Mapping[str, Any], run_id: Callable[[], str]) -> None:
        self._model, self._datasets, self._run_id = model, datasets, run_id
        self._folder = Path()
        self._run: dict[str, Any] | None = None
        self._early: list[dict[str, Any]] = []
        self._args: Any = None
        self._warned = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Has the record's status tell how the training inside ended."""
        self._run = None
        try:
            yield
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else _reason(error)
            self._end(f"failed: {reason}")
            raise
        if self._run is not None and self._args.log_traces:
            try:
                self._write_traces("after")
            except Exception as error:  # noqa: BLE001 - a tool's failure must not lose the weights that are trained
                logger.warning(
                    "Training is done, but %s/after.jsonl is not: %s", run_files.TRACE_FOLDER, _reason(error)
                )
        self._end("finished")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index != 0:
            return
        self._args, self._folder = args, Path(args.output_dir or "trainer_output")
        step = int(state.global_step)
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = self._described(step)
            self._save()
            run_files.keep_lines(self._folder, step if step else -1)
            if not step:
                for name in ("before", "after"):  # of an earlier training in this folder
                    self._trace_file(name).unlink(missing_ok=True)
        for logs in self._early if not step else ():
            self._append(logs)
        self._early.clear()
        if args.log_traces and not step:
            self._write_traces("before")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if args.process_index != 0:
            return
        line = {"step": int(state.global_step), **{name: _plain(value) for name, value in (logs or {}).items()}}
        if self._run is None:  # an evaluation before training
            self._early.append(line)
        else:
            self._append(line)

    def _described(self, step: int) -> dict[str, Any]:
        now = _now()
        run = {
            "format_version": run_files.FORMAT_VERSION,
            "id": self._run_id(),
            "started": now,
            "finished": None,
            "status": "running",
            "resumed": [],
            "system": system_to_dict(self._model.plan.system),
            "mermaid": self._model.plan.to_mermaid(),
            "config": without_secrets(self._args.to_dict()),
            "candidates": None,
            "versions": installed_versions(),
            "data": {name: _facts(self._datasets.get(f"{name}_dataset")) for name in ("train", "eval")},
        }
        if self._model.candidates is not None:
            run["candidates"] = strategy_options(self._model.candidates.strategy)
        if step:
            before = run_files.read_run(self._folder)
            run["started"] = before.get("started", now)
            run["resumed"] = [*before.get("resumed", []), {"at": now, "step": step}]
        return run

    def _end(self, status: str) -> None:
        if self._run is not None:
            self._run |= {"status": status, "finished": _now()}
            with self._writing():
                self._save()

    def _save(self) -> None:
        assert self._run is not None
        run_files.write_run(self._folder, self._run)

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._writing():
            run_files.append_line(self._folder, line)

    def _trace_file(self, name: str) -> Path:
        return self._folder / run_files.TRACE_FOLDER / f"{name}.jsonl"

    def _write_traces(self, name: str) -> None:
        inputs = _first_prompts(self._datasets, self._args.log_traces)
        if not inputs:
            return
        with _random_state_kept(self._args.device):
            trace = sample(self._model.plan, inputs, seed=self._args.seed)
        file = self._trace_file(name)
        with self._writing():
            file.parent.mkdir(exist_ok=True)
            trace.to_jsonl(file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, DataError, SerializationError) as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "The record of this run in %s is incomplete: %s. Training goes on; further failures to write it "
                    "are not reported.",
                    self._folder,
                    _reason(error),
                )


def _facts(part: Any) -> Any:
    if part is None:
        return None
    if isinstance(part, Mapping):
        return {name: _facts(each) for name, each in part.items()}
    return {"pairs": len(part), "sha256": pairs_hash(part)}


def _first_prompts(datasets: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """The first distinct inputs of the evaluation data, or of the training data, as columns."""
    part = datasets.get("eval_dataset") or datasets.get("train_dataset") or []
    pairs = itertools.chain.from_iterable(part.values()) if isinstance(part, Mapping) else part
    found: dict[str, Mapping[str, Any]] = {}
    for pair in pairs:
        if len(found) == count:
            break
        key = json.dumps({name: encode_value(value, name) for name, value in pair.inputs.items()}, sort_keys=True)
        found.setdefault(key, pair.inputs)
    rows = list(found.values())
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leaves every global generator as it was, whatever components or node functions draw from them."""
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the options that hold a token, a password or the like."""
    return {
        name: without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not _SECRET.search(str(name))
    }


def _plain(value: Any) -> Any:
    """A logged value for JSON; a number that is not finite becomes null."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {atomic.first_line(error)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
