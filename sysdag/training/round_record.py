"""What is on the disk of rounds: which stages are done and what they gave, and how long they took.

A stage counts as done once `rounds.json` says so, which is replaced whole after the stage's files are. A stage that was
cut off is done again, or goes on where its own files say, and leaves the same files. What differs from run to run, the
times, is in `progress.jsonl`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from sysdag.errors import OptionError
from sysdag.files.atomic import append_whole, explaining_disk_errors
from sysdag.files.series_files import ROUNDS_FILE, first_difference, read_series, write_series

PROGRESS_FILE = "progress.jsonl"
STAGES = ("sample", "judge", "train", "eval")


class RoundRecord:
    """The record of rounds in a folder.

    Args:
        folder: the rounds' `output_dir`.
        options: all that the files of a round depend on, JSON-ready.
        limits: how many rounds, and when they end early; these may change when rounds go on.

    Raises:
        OptionError: if the folder holds rounds with other options; the first difference is named.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], limits: Mapping[str, Any]) -> None:
        self._folder, self._file = folder, folder / ROUNDS_FILE
        found = read_series(self._file)
        options = json.loads(json.dumps(options))
        if found is not None and (difference := first_difference(found["options"], options, "options")):
            raise OptionError(
                f"{folder} holds rounds that were begun otherwise: {difference}. Make it the same to go on, or choose "
                "another output_dir."
            )
        self.facts: dict[str, Any] = found or {"options": options, "rounds": []}
        self.facts |= {"limits": dict(limits), "status": "running"}

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """What each round gave, by stage; number 0 is the system as it starts."""
        return self.facts["rounds"]

    def of(self, number: int) -> dict[str, Any]:
        """What a round has given so far."""
        while len(self.rounds) <= number:
            count = len(self.rounds)
            self.rounds.append({"round": count, "folder": f"round-{count}"})
        return self.rounds[number]

    def save(self) -> None:
        write_series(self._file, {name: value for name, value in self.facts.items() if name != "format_version"})

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[dict[str, Any]]:
        """Yields a dict for what the stage gives; without an error the stage is done when the context ends."""
        began = time.monotonic()
        given: dict[str, Any] = {}
        yield given
        self.of(number)[name] = given
        self.save()
        line = {"round": number, "stage": name, "seconds": round(time.monotonic() - began, 3)}
        data = (json.dumps(line) + "\n").encode()
        advice = "The rounds up to here are kept: free some space, and run the same command again."
        with (
            explaining_disk_errors(PROGRESS_FILE, self._folder, len(data), advice),
            (self._folder / PROGRESS_FILE).open("ab", buffering=0) as file,
        ):
            append_whole(file, data)

    def time_left(self, number: int, name: str, last: int) -> str:
        """How long it takes from a stage of a round to the end of the last round, in words."""
        seconds: dict[str, list[float]] = defaultdict(list)
        for line in self._times():
            if line["round"]:
                seconds[line["stage"]].append(line["seconds"])
        left = [stage for stage in STAGES[STAGES.index(name) :]] + [*STAGES] * (last - number)
        if not number or not seconds.keys() >= set(left):
            return "time left: known after the first round"
        total = sum(fmean(seconds[stage]) for stage in left)
        return f"about {timedelta(seconds=round(total))} left"

    def _times(self) -> Iterator[dict[str, Any]]:
        file = self._folder / PROGRESS_FILE
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            try:
                yield json.loads(line)
            except ValueError:  # cut off
                continue
