"""Commands on a disk that takes no more than so many bytes of a file: each runs in a process of its own.

The limit is the operating system's (RLIMIT_FSIZE), which cuts the write that passes it and fails the next one, as a
full disk does.
"""

import gc
import os
import resource
import sys
from pathlib import Path

from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.execution import batches, trace_file  # noqa: F401 - what the server of processes imports ahead
from sysdag.files.atomic import append_whole
from sysdag.files.keyed_lines import KeyedLines


def limited(limit):
    sys.dont_write_bytecode = True  # which would be cut, and be what later imports read
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def command(told, folder, limit, *arguments):
    """Runs a command; leaves its exit code and what it said in the file `told`."""
    gc.freeze()
    os.chdir(folder)
    limited(limit)
    result = CliRunner().invoke(app, list(arguments))
    limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    crash = "" if result.exception is None or isinstance(result.exception, SystemExit) else repr(result.exception)
    told.write_text(f"{result.exit_code}\n{result.output}{crash}")


def appended(told, file, limit):
    """Appends 7 bytes to a file that may have no more than `limit`."""
    limited(limit)
    with file.open("ab", buffering=0) as opened:
        try:
            append_whole(opened, b"second\n")
        except OSError as error:
            code = error.errno
    limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    told.write_text(str(code))


def kept_rows(told, file):
    """Puts a row that is cut off, and then, with room again, another one."""
    kept = KeyedLines(file, ["value"])
    kept.put({"key": "a", "value": 1})
    limited(file.stat().st_size + 10)
    try:
        kept.put({"key": "b", "value": "x" * 50})
    except Exception as error:  # noqa: BLE001 - the test reads which it is
        text = f"{type(error).__name__}: {error}"
    limited(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    kept.put({"key": "c", "value": 3})
    assert kept.get("c") == {"key": "c", "value": 3}
    Path(told).write_text(text)
