"""The record of a training on disk, in its `output_dir`.

`run.json` says what makes the run what it is, and how it ended: `id` (its checkpoints have it, too), `system` (as
`system_to_dict` gives it), `mermaid`,
`config`, `candidates`, `versions`, `data` (pairs and hash of each dataset), `started`, `resumed`, `finished`, `status`
(`running`, `finished` or `failed: why`). `log.jsonl` has one line for each log of the Trainer: `step`, `epoch` and the
metrics. `traces/before.jsonl` and `traces/after.jsonl` hold runs of the same prompts before and after training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sysdag.files import atomic

RUN_FILE, LOG_FILE, TRACE_FOLDER = "run.json", "log.jsonl", "traces"
FORMAT_VERSION = 1


def read_run(folder: str | Path) -> dict[str, Any]:
    """The `run.json` of a folder; empty where there is none that can be read."""
    try:
        run = json.loads((Path(folder) / RUN_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a folder's `log.jsonl`, in order; a line that was cut off is left out."""
    file = Path(folder) / LOG_FILE
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    return [line for line in map(_parsed, lines) if line is not None]


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Replaces the `run.json` of a folder."""
    text = json.dumps(run, indent=1, ensure_ascii=False, default=str)
    atomic.write_text(folder / RUN_FILE, text + "\n")


def append_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to the `log.jsonl` of a folder, whole or not at all."""
    with (folder / LOG_FILE).open("ab", buffering=0) as file:
        atomic.append_whole(file, (json.dumps(line, allow_nan=False) + "\n").encode())


def keep_lines(folder: Path, step: int) -> None:
    """Drops the lines of a folder's `log.jsonl` past a step, and those that were cut off; makes the file if need be."""
    kept = [line for line in read_log(folder) if line["step"] <= step]
    atomic.write_text(folder / LOG_FILE, "".join(json.dumps(line) + "\n" for line in kept))


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
