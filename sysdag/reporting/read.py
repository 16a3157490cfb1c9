"""The folder of a training, read for a report: what is missing is left out, what is damaged is named by its line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdag.errors import DataError, SerializationError
from sysdag.files.run_files import FORMAT_VERSION, LOG_FILE, RUN_FILE, TRACE_FOLDER
from sysdag.reporting.history import History
from sysdag.reporting.topology import Topology
from sysdag.saving.schema import check_data
from sysdag.traces.trace import Trace

EVALUATION_FILE, STATE_FILE = "eval.json", "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Run:
    """What a training left.

    Attributes:
        folder: where.
        name: the folder's own.
        facts: the content of `run.json`; empty without one.
        history: the log.
        topology: the graph; None where it is not known.
        traces: by `before` and `after`, those that are there.
        evaluation: the content of `eval.json`, or None.
        notes: what a reader has to know of missing parts, as sentences.
    """

    folder: Path
    name: str
    facts: Mapping[str, Any]
    history: History
    topology: Topology | None
    traces: Mapping[str, Trace]
    evaluation: Any
    notes: tuple[str, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        """The training's configuration; empty where it is not known."""
        config = self.facts.get("config")
        return config if isinstance(config, Mapping) else {}


def read_run(folder: str | Path) -> Run:
    """Reads the folder of a training: `run.json`, `log.jsonl`, `traces/` and `eval.json`, as far as they are there.

    Without a log the history of the newest checkpoint serves. A last line that a killed process left unfinished is
    left out; what else is damaged is an error.

    Raises:
        DataError: if the folder holds no training, or naming the file and line that is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {found}; give the output_dir of a training.")
    facts = _facts(folder)
    lines, notes = _log(folder)
    if not facts and lines is None:
        raise DataError(
            f"{folder} holds no record of a training: expected {RUN_FILE} and {LOG_FILE}, or a folder checkpoint-N "
            f"with {STATE_FILE}. Give the output_dir of a training."
        )
    if not facts:
        notes.append(f"There is no {RUN_FILE}: the graph, the configuration and the versions are not known.")
    if lines is None:
        notes.append(f"There is neither a {LOG_FILE} nor a checkpoint: nothing of the training's course is known.")
    places = {name: folder / TRACE_FOLDER / f"{name}.jsonl" for name in ("before", "after")}
    traces = {name: Trace.from_jsonl(place) for name, place in places.items() if place.is_file()}
    evaluation = folder / EVALUATION_FILE
    return Run(
        folder=folder,
        name=folder.resolve().name,
        facts=facts,
        history=History.of(lines or []),
        topology=_topology(folder, facts),
        traces=traces,
        evaluation=_json(evaluation) if evaluation.is_file() else None,
        notes=tuple(notes),
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a text in UTF-8 ({error}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not valid JSON ({error.msg}).") from error


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / RUN_FILE
    if not file.is_file():
        return {}
    facts = _json(file)
    if not isinstance(facts, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(facts).__name__}.")
    if facts.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{file}: format_version is {facts.get('format_version')!r}, and this version of sysdag reads "
            f"{FORMAT_VERSION}; use the sysdag that wrote it."
        )
    return facts


def _topology(folder: Path, facts: Mapping[str, Any]) -> Topology | None:
    if not isinstance(facts.get("system"), Mapping):
        return None
    try:
        check_data(facts["system"])
        return Topology.of(facts["system"])
    except (SerializationError, DataError) as error:
        raise DataError(f"{folder / RUN_FILE}, 'system': {error}") from error


def _log(folder: Path) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """The lines of the log, and what has to be said of it; None where there is none."""
    file = folder / LOG_FILE
    if not file.is_file():
        return _history_of_checkpoint(folder)
    lines, notes = [], []
    parts = file.read_bytes().split(b"\n")
    for number, raw in enumerate(parts, start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except ValueError as error:
            if number == len(parts):  # no line feed behind it
                notes.append(f"The last line of {LOG_FILE} was cut off, and is left out.")
                continue
            raise DataError(f"{file}, line {number}: not valid JSON ({error}).") from error
        lines.append(_checked(line, f"{file}, line {number}"))
    return lines, notes


def _history_of_checkpoint(folder: Path) -> tuple[list[dict[str, Any]] | None, list[str]]:
    numbered = {int(found[1]): path for path in folder.iterdir() if (found := _CHECKPOINT.fullmatch(path.name))}
    for step in sorted(numbered, reverse=True):
        file = numbered[step] / STATE_FILE
        if file.is_file():
            state = _json(file)
            history = state.get("log_history") if isinstance(state, dict) else None
            if not isinstance(history, list):
                raise DataError(f"{file}: expected a list 'log_history', got {type(history).__name__}.")
            note = f"There is no {LOG_FILE}; the log is that of {numbered[step].name}."
            return [_checked(line, f"{file}, log_history[{i}]") for i, line in enumerate(history)], [note]
    return None, []


def _checked(line: Any, place: str) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise DataError(f"{place}: expected an object of metrics, got {type(line).__name__}.")
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not math.isfinite(step) or step != int(step):
        raise DataError(f"{place}: 'step' must be a whole number, got {step!r}.")
    return line | {"step": int(step)}
