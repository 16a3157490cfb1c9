"""Traces on file as they are made: what is written stays, and a run that was cut off goes on behind it.

Batches are appended to the JSON lines of `Trace`, each with one write of whole lines. A file beside them,
`<name>.run.json`, says what they are the traces of; another, `<name>.sha256`, has a line for each batch: the bytes up
to its end, and their SHA-256. A process that dies may leave a part of a batch; what goes on removes that and makes it
again, so the file becomes the one of a run that was never cut off, byte for byte. What was changed since it was written
is refused. Inputs may have been corrected by then, where they have not been run yet: the file of their hashes tells.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sysdag.components import prompt_date
from sysdag.components.language.engines.choice import LOCAL, kind_of
from sysdag.errors import DataError
from sysdag.execution.batches import Runs, Skipped
from sysdag.files.atomic import append_whole, explaining_disk_errors, write_text
from sysdag.files.encoding import encode_json, encode_value
from sysdag.files.series_files import first_difference
from sysdag.graph.plan import Plan
from sysdag.saving.serialization import component_keys, system_to_dict
from sysdag.traces.trace import Trace

FORMAT_VERSION = 4
_WHOLE = "what made it"
_SUM = re.compile(r"\d+ [0-9a-f]{64}")

_LIMITS = ("_max_new_tokens", "_max_length")  # as given; asking a language model for them would load it
_NESTED = ("stop", "generation_config", "grammar")  # options of language models that are no single values


def row_hashes(runs: Runs) -> list[str]:
    """A hash of each row's inputs and columns; "" of a row that has no inputs, as it cannot be read."""
    found = []
    for row in range(runs.total // runs.runs):
        digest = hashlib.sha256()
        for name in sorted(runs.inputs):
            digest.update(json.dumps([name, encode_value(runs.inputs[name][row], name)], sort_keys=True).encode())
        for name in sorted(runs.columns):
            content = ["column", name, encode_json(runs.columns[name][row], name)]
            digest.update(json.dumps(content, sort_keys=True).encode())
        found.append("" if row in runs.skipped and not runs.skipped[row].from_run else digest.hexdigest()[:16])
    return found


def identity(plan: Plan, runs: Runs) -> dict[str, Any]:
    """What a file of traces depends on beside its rows, JSON-ready: the runs, the system and its components.

    Of a component that is its repr (for a model, where it is loaded from) and its plain options; that weights were
    replaced in the folder they are loaded from is not noticed. Of a server that draws, nothing but that it does: it may
    be at another place when the run goes on.
    """
    saved = system_to_dict(plan.system)
    components = component_keys(plan.system)
    return {
        "format_version": FORMAT_VERSION,
        "seed": runs.seed,
        "batch_size": runs.batch_size,
        "runs": runs.runs,
        "component": {key: _options(component) for key, component in components.items()},
        "decoder": {key: kind_of(c.decoder) for key, c in components.items() if hasattr(c, "decoder")},
        "input": {row["name"]: row for row in saved["inputs"]},
        "node": {n.name: row for n, row in zip(plan.system.nodes, saved["nodes"], strict=True)},
        "edges": [" ".join(map(str, row.values())) for row in saved["edges"]],
        "outputs": saved["outputs"],
        **({"switches": saved["switches"]} if "switches" in saved else {}),
    }


def _options(component: Any) -> dict[str, Any]:
    plain = {name: value for name, value in vars(component).items() if not name.startswith("_") or name in _LIMITS}
    options = {name.lstrip("_"): value for name, value in plain.items() if isinstance(value, (str, int, float))}
    options |= {name: plain[name] for name in _NESTED if plain.get(name)}
    return {"repr": re.sub(r" at 0x[0-9a-f]+", "", repr(component)), **options}


class TraceFile:
    """The file that a run writes its traces to. Nothing on the disk changes before the first `append`.

    Args:
        path: of the traces, ending in `.jsonl`.
        plan, runs: what is run.
        existing: what to do where the file exists: `refuse` it, `resume` behind what it holds, or `overwrite` it.

    Attributes:
        batches: how many whole batches the file holds that are kept: the number of the batch to go on with.
        runs: what is run, without the rows that are skipped: those of the given runs, and those that were skipped in
            the batches that are kept.

    Raises:
        DataError: if the file exists and neither is asked for; if what is to be resumed was made by another run or of
            other inputs, with the difference named, or is damaged; or for another ending.
    """

    def __init__(
        self, path: str | Path, plan: Plan, runs: Runs, *, existing: Literal["refuse", "resume", "overwrite"] = "refuse"
    ) -> None:
        self.path = Path(path)
        self.side_path = self.path.with_name(f"{self.path.name}.run.json")
        self.sums_path = self.path.with_name(f"{self.path.name}.sha256")
        self.batches = 0
        self.runs = runs
        self._identity = identity(plan, runs)
        self._kept_bytes = 0
        self._kept_sums: list[str] = []
        self._digest = hashlib.sha256()  # of what is kept
        self._size = 0  # of the file, unless somebody else writes to it
        self._is_open = False
        if self.path.suffix != ".jsonl":
            raise DataError(f"{path}: traces are appended as JSON lines; give a file that ends in .jsonl.")
        if not self.path.exists():
            return
        self._size = self.path.stat().st_size
        if existing == "refuse":
            raise DataError(
                f"{path} exists. Resume it (--resume) to go on where it was cut off, or overwrite it (--overwrite)."
            )
        was_begun = self._size or self.side_path.exists()  # if not, it was cut off before all else
        if existing == "resume" and was_begun:
            begun, earlier = self._begun()
            self._count(replace(runs, skipped=earlier))
            done = self.batches * runs.batch_size
            kept = {row: each for row, each in earlier.items() if row * runs.runs + each.from_run < done}
            self.runs = replace(runs, skipped={**runs.skipped, **kept})
            self._compare_rows(begun, kept, done)

    def skip(self, row: int, why: str) -> None:
        """Leaves a row out of the batch that is next, and of those behind it.

        Args:
            why: what is wrong with it.
        """
        from_run = next(run for place, run in self.runs.pairs(self.batches) if place == row)
        self.runs = replace(self.runs, skipped={**self.runs.skipped, row: Skipped(why=why, from_run=from_run)})
        if self._is_open:
            self._write_side()

    def append(self, trace: Trace) -> None:
        """Writes a batch behind what is there; what an interrupted run left of it is removed first.

        Raises:
            DataError: naming the node whose value cannot be written without loss; or if another process wrote to the
                file. Nothing of the batch is written.
            SerializationError: where the disk does not take it; the batches before are intact.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in trace.rows()]
        data = "".join(lines).encode("utf-8")
        advice = (
            f"{self.path.name} has {self.batches} whole batches of {self.runs.batches}: free some space, and resume."
        )
        with explaining_disk_errors("A batch of runs", self.path.parent, len(data), advice):
            if not self._is_open:
                self._begin()
            with self.path.open("ab", buffering=0) as file:
                self._check_alone(file.tell())
                append_whole(file, data)
                os.fsync(file.fileno())
            self._size += len(data)
            self._digest.update(data)
            with self.sums_path.open("ab", buffering=0) as file:
                append_whole(file, self._sum().encode())
        self.batches += 1

    def _sum(self) -> str:
        return f"{self._size} {self._digest.hexdigest()}\n"

    def _begin(self) -> None:
        with self.path.open("ab") as file:
            self._check_alone(file.tell())
            file.truncate(self._kept_bytes)
        write_text(self.sums_path, "".join(self._kept_sums))
        self._write_side()
        self._size = self._kept_bytes
        self._is_open = True

    def _write_side(self) -> None:
        skipped = {str(row): vars(each) for row, each in sorted(self.runs.skipped.items())}
        beside = {"skipped": skipped, "prompt_date": prompt_date.moment().isoformat()}
        facts = self._identity | beside | {"rows_sha256": row_hashes(self.runs)}
        write_text(self.side_path, json.dumps(facts, indent=2) + "\n")

    def _check_alone(self, size: int) -> None:
        if size != self._size:
            raise DataError(
                f"{self.path} has {size} bytes where {self._size} were left: another process writes to it. End one of "
                "the two, and resume."
            )

    def _begun(self) -> tuple[list[str], dict[int, Skipped]]:
        """The rows' hashes and the skipped rows that the file was begun with; another run is refused."""
        try:
            begun = json.loads(self.side_path.read_text(encoding="utf-8"))
            hashes = [str(each) for each in begun.pop("rows_sha256", ())]
            date = datetime.fromisoformat(begun.pop("prompt_date", prompt_date.moment().isoformat()))
            begun.setdefault("decoder", dict.fromkeys(self._identity["decoder"], LOCAL))  # of a time without others
            skipped = {int(row): Skipped(**each) for row, each in begun.pop("skipped", {}).items()}
        except FileNotFoundError as error:
            raise DataError(
                f"{self.path} cannot be resumed: {self.side_path.name}, which says what made it, is not beside it. "
                "Overwrite it (--overwrite), or write to another file."
            ) from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.side_path} cannot be read ({error}); {self.path.name} cannot be resumed."
            ) from error
        version = {"format_version": begun.get("format_version")}
        if difference := first_difference(version, {"format_version": FORMAT_VERSION}, _WHOLE) or first_difference(
            begun, self._identity, _WHOLE
        ):
            raise DataError(
                f"{self.path} was begun by another run and cannot be resumed: {difference}. Make them the same, "
                "overwrite it (--overwrite), or write to another file."
            )
        prompt_date.settle(date)
        return hashes, skipped

    def _compare_rows(self, begun: list[str], skipped: Mapping[int, Skipped], done: int) -> None:
        """Refuses inputs of which one that has been run is another now.

        Args:
            begun: the hash of each row when the file was begun.
            skipped: rows that stay skipped, whatever they are now.
            done: how many runs are kept, skipped ones among them.
        """
        now = row_hashes(self.runs)
        for row in range(min(-(-done // self.runs.runs), len(begun))):
            if row in skipped or (row < len(now) and now[row] == begun[row]):
                continue
            what = "is another now" if row < len(now) else "is not there any more"
            raise DataError(
                f"{self.path} was begun on other inputs and cannot be resumed: row {row} has been run, and {what}. "
                "Rows that have not been run may change. Give those inputs back that it was begun on, overwrite it "
                "(--overwrite), or write to another file."
            )

    def _count(self, begun: Runs) -> None:
        """Finds the whole batches of the file, and that they are as they were written.

        Args:
            begun: the runs, without the rows that were skipped when the file was written.
        """
        ends = itertools.accumulate(len(begun.pairs(number)) for number in range(begun.batches))
        sums = self._sums()
        count, end, first, digest = 0, 0, 1, hashlib.sha256()
        wanted = next(ends, None)
        with self.path.open("rb") as file:
            lines = (line for line in file if line.endswith(b"\n"))
            while wanted is not None:
                while count < wanted and (line := next(lines, None)) is not None:
                    count, end = count + 1, end + len(line)
                    digest.update(line)
                if count < wanted or self.batches == len(sums):
                    break
                if sums[self.batches] != f"{end} {digest.hexdigest()}":
                    if self.batches == begun.batches - 1:
                        self._check_end(lines, count)
                    raise DataError(
                        f"{self.path} cannot be resumed: its lines {first} to {count} are not what was written there; "
                        f"{self.sums_path.name} has their hash. Give the file back as it was, overwrite it "
                        "(--overwrite), or write to another file."
                    )
                self.batches, self._kept_bytes, self._digest = self.batches + 1, end, digest.copy()
                first, wanted = count + 1, next(ends, None)
            if wanted is None:
                self._check_end(lines, count)
        self._kept_sums = [f"{each}\n" for each in sums[: self.batches]]

    def _check_end(self, lines: Iterator[bytes], count: int) -> None:
        """Refuses a file with more runs than are asked for."""
        if next(lines, None) is not None:
            raise DataError(f"{self.path} holds more than the {count} runs that are asked for; it was changed.")

    def _sums(self) -> list[str]:
        """For each batch that was written whole, the bytes up to its end and their hash.

        Raises:
            DataError: where they are missing.
        """
        try:
            found = self.sums_path.read_bytes().decode("latin-1").split("\n")[:-1]
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be resumed: {self.sums_path.name}, which tells whether it is as it was written, "
                "cannot be read. Overwrite it (--overwrite), or write to another file."
            ) from error
        return list(itertools.takewhile(_SUM.fullmatch, found))
