"""Runs to be compared, with the records that a real system would keep, and a server of `sysdag label` for them."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from urllib.parse import urlsplit

import httpx

from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace


def runs(prompts=5, each=2, *, text="draft {run} of {prompt}"):
    """Runs of `question` -> `draft` -> `answer`; texts and token ids tell them apart."""
    numbers = [(prompt, run) for prompt in range(prompts) for run in range(each)]
    return Trace(
        {"question": [f"question {prompt}" for prompt, _ in numbers]},
        {
            "draft": [Draw(text.format(prompt=p, run=r), {"token_ids": [1, p, r]}, -0.5) for p, r in numbers],
            "answer": [Draw(f"answer {r} to {p}", {"token_ids": [2, p, r]}, -0.25) for p, r in numbers],
        },
    )


def without_what_is_derived(path, version=2):
    """Makes a database one of before: without what is derived from its events."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        for index in ("assignments_open", "assignments_held", "assignments_labelled", "pairs_free"):
            database.execute(f"DROP INDEX {index}")
        for table, column in (("assignments", "choice"), ("assignments", "label"), ("pairs", "votes")):
            database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        database.execute("DROP TABLE progress")
        database.execute(f"PRAGMA user_version = {version}")


class Running:
    """A `sysdag label` process that serves traces, until the block ends."""

    def __init__(self, traces, database, *options):
        self.command = [
            sys.executable, "-m", "sysdag.cli", "label", str(traces), "--database", str(database), "--no-browser",
            "--port", "0", *options,
        ]  # fmt: skip

    def __enter__(self):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for line in self.process.stdout:
            if found := re.search(r"http://\S+", line):
                self.link = found.group()
                return self
        raise AssertionError(f"no link: {self.process.communicate()[1]}")

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def interrupt(self):
        """What it prints from Ctrl-C on."""
        self.process.send_signal(signal.SIGINT)
        output, errors = self.process.communicate(timeout=20)
        assert not errors, errors
        return output

    @contextlib.contextmanager
    def client(self):
        parts = urlsplit(self.link)
        origin = f"{parts.scheme}://{parts.netloc}"
        with httpx.Client(base_url=origin, headers={"origin": origin}) as client:
            client.get(f"/?{parts.query}").raise_for_status()
            yield client
