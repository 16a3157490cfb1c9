"""Cells of the study: one function call each, kept on disk, so that a study that is stopped goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.measure import described, machine


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        function: `module:function` below `bench.study`; it is called with the cache folder and the options, and
            returns JSON-ready data. Its module's `VERSION` is part of the key: raise it when results would change.
        options: what tells this cell from others, JSON-ready.
        device: where it runs; no part of the key.
    """

    function: str
    options: Mapping[str, Any]
    device: str = "cpu"

    @property
    def key(self) -> str:
        module, _, name = self.function.partition(":")
        version = importlib.import_module(f"bench.study.{module}").VERSION
        content = json.dumps([name, version, self.options], sort_keys=True)
        return f"{module}-{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def __call__(self, cache: Path) -> Any:
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(f"bench.study.{module}"), name)(cache, **self.options)


class CellError(RuntimeError):
    """A cell failed; the others are kept."""


def run_cells(cells: Sequence[Cell], cache: Path, *, workers: int, title: str) -> None:
    """Computes the cells that have no result on disk yet.

    Args:
        cells: equal ones are computed once.
        cache: folder of results (`results/<key>.json`) and of what cells share (base models, runs).
        workers: processes, one torch thread each; 1 computes in this process.
        title: for the progress bar.

    Raises:
        CellError: after all others are done, naming the cells that failed.
    """
    cache = cache.resolve()  # base models are named by absolute paths
    (cache / "results").mkdir(parents=True, exist_ok=True)
    missing = list({cell.key: cell for cell in cells if not _file(cache, cell).exists()}.values())
    if not missing:
        return
    failed: list[str] = []
    with tqdm(total=len(missing), desc=title, smoothing=0.1) as bar, contextlib.ExitStack() as stack:
        if workers == 1:
            quieten()
            done: Iterable[tuple[Cell, str | None]] = ((cell, _compute(cell, cache)) for cell in missing)
        else:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context, initializer=quieten))
            waiting = {pool.submit(_compute, cell, cache): cell for cell in missing}
            done = ((waiting[future], future.result()) for future in as_completed(waiting))
        for cell, problem in done:
            bar.update()
            if problem is not None:
                failed.append(f"{cell.function} {dict(cell.options)}\n{problem}")
    if failed:
        raise CellError(f"{title}: {len(failed)} of {len(missing)} cells failed.\n\n" + "\n\n".join(failed))


def results(cells: Sequence[Cell], cache: Path) -> list[Any]:
    """What the cells returned, in their order, from disk."""
    return [json.loads(_file(cache, cell).read_text())["result"] for cell in cells]


def machines(cells: Sequence[Cell], cache: Path) -> str:
    """What they ran on, in words; several, if it was not the same for all."""
    found = [json.loads(_file(cache, cell).read_text())["machine"] for cell in cells]
    return "; ".join(dict.fromkeys(found))


def _file(cache: Path, cell: Cell) -> Path:
    return cache / "results" / f"{cell.key}.json"


def quieten() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    import diffusers
    import torch
    import transformers

    torch.set_num_threads(1)  # the models are so small that a second thread waits more than it works
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _compute(cell: Cell, cache: Path) -> str | None:
    """Runs a cell and writes its result; returns the traceback of one that failed."""
    started = time.perf_counter()
    try:
        result = cell(cache)
    except Exception:  # noqa: BLE001 - told by the parent, with the others' results kept
        return traceback.format_exc()
    file = _file(cache, cell)
    kept = {
        "function": cell.function, "options": dict(cell.options), "seconds": time.perf_counter() - started,
        "machine": described(machine(), cell.device),
    }  # fmt: skip
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(kept | {"result": result}, indent=1, allow_nan=False) + "\n")
    unfinished.rename(file)
    return None
