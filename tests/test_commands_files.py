"""What every command does with a file it cannot write, one that it reads, an input that is wrong, and Ctrl-C."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sampled_systems
import torch
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.commands.files import check_output
from sysdag.errors import RunError, SysdagError
from sysdag.execution.batches import LocalEngine, Runs

SYSTEM = f"{Path(sampled_systems.__file__)}:looped"
JUDGE = "def score(run):\n    raise AssertionError('it must not come to this')\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in: inputs, preference rows, traces, and a judge that must not be asked."""
    monkeypatch.chdir(tmp_path)
    Path("inputs.jsonl").write_text('{"x": "a"}\n{"x": "b"}\n')
    Path("rows.jsonl").write_text('{"x": "a", "chosen": "a", "rejected": "b"}\n')
    Path("unasked.py").write_text(JUDGE)
    Path("plain").mkdir()
    assert run("sample", SYSTEM, "inputs.jsonl", "--output", "runs.jsonl", "--runs", "2")[0] == 0
    yield tmp_path
    sys.modules.pop("unasked", None)


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr


COMMANDS = {
    "plan": (["plan", SYSTEM], "--output", ".txt"),
    "validate": (["validate", SYSTEM, "rows.jsonl", "--objective", "sampling"], "--output", ".jsonl"),
    "sample": (["sample", SYSTEM, "inputs.jsonl"], "--output", ".jsonl"),
    "judge": (["judge", "runs.jsonl", "--by", "unasked.py:score"], "--output", ".jsonl"),
    "scores": (["judge", "runs.jsonl", "--by", "unasked.py:score"], "--scores", ".jsonl"),
    "eval": (["eval", SYSTEM, "rows.jsonl", "--against", SYSTEM, "--by", "unasked.py:score"], "--output", ".json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(folder, name):
    arguments, option, ending = COMMANDS[name]
    taken = Path(f"taken{ending}")
    taken.mkdir()
    message = f"Error: {option} {taken} is a folder; name a file in it.\n"
    assert run(*arguments, option, str(taken)) == (1, message)
    absent = Path("absent", f"file{ending}")
    message = f"Error: {option} {absent}: there is no folder absent; make it first, or write elsewhere.\n"
    assert run(*arguments, option, str(absent)) == (1, message)


def test_a_folder_without_permission(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SysdagError, match=r"^--output x.jsonl: the folder \. cannot be written to; write elsewhere\.$"):
        check_output("--output", Path("x.jsonl"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", SYSTEM, "inputs.jsonl", "--output", "./inputs.jsonl", "--overwrite"],
        ["validate", SYSTEM, "rows.jsonl", "--output", "./rows.jsonl"],
    ],
)
def test_no_command_writes_over_what_it_reads(folder, arguments):
    before = Path(arguments[2]).read_bytes()
    message = (
        f"Error: --output {Path(arguments[-1 - ('--overwrite' in arguments)])} is a file that this command reads; "
    )
    assert run(*arguments) == (1, f"{message}write to another one.\n")
    assert Path(arguments[2]).read_bytes() == before
    assert not Path("inputs.jsonl.run.json").exists()


def test_a_report_is_no_other_file_of_the_record(folder):
    Path("plain/run.json").write_text("{}")
    code, told = run("report", "plain", "--output", "plain/run.json")
    assert (code, "its ending must be .html" in told) == (2, True)
    assert Path("plain/run.json").read_text() == "{}"


def test_validate_writes_no_file_without_rows(folder):
    Path("equal.jsonl").write_text('{"x": "a", "chosen": "a", "rejected": "a"}\n')
    code, told = run("validate", SYSTEM, "equal.jsonl", "--objective", "sampling", "--output", "left.jsonl")
    assert (code, told) == (1, "left.jsonl is not written: no row can be used.\n")
    assert not Path("left.jsonl").exists()


def test_a_row_that_cannot_be_used_is_told_with_its_file(folder):
    Path("wrong.jsonl").write_text('{"y": "a"}\n')
    told = (
        "Error: wrong.jsonl: Row 0 (line 1): input 'x' is missing; the row has ['y']. --rename OLD=NEW gives a column "
        "the name that is read (in Python: read_rows(..., rename={'OLD': 'NEW'})).\n"
    )
    assert run("sample", SYSTEM, "wrong.jsonl", "--output", "new.jsonl") == (1, told)
    assert run("eval", SYSTEM, "wrong.jsonl", "--against", "chosen", "--by", "unasked.py:score") == (1, told)


def test_files_that_are_no_traces(folder):
    judge = ["--by", "unasked.py:score", "--output", "new.jsonl"]
    assert run("judge", "absent.jsonl", *judge) == (1, "Error: absent.jsonl: No such file or directory.\n")
    told = "inputs.jsonl, line 1: not a run that `sysdag sample` or Trace.to_jsonl wrote (it has no 'inputs')."
    assert run("judge", "inputs.jsonl", *judge) == (1, f"Error: {told}\n")
    keep = [
        "eval",
        SYSTEM,
        "rows.jsonl",
        "--against",
        SYSTEM,
        "--by",
        "unasked.py:score",
        "--keep-traces",
        "rows.jsonl",
    ]
    assert run(*keep) == (1, "Error: --keep-traces rows.jsonl is a file; name a folder.\n")


def test_a_device_that_is_not_here(folder):
    code, told = run("sample", SYSTEM, "inputs.jsonl", "--output", "new.jsonl", "--device", "quantum")
    assert code == 1
    assert re.match(r"Error: Device 'quantum' cannot be used here \(.*\)\. Give 'auto', 'cpu', or a GPU", told)
    assert not Path("new.jsonl").exists()
    if not torch.cuda.is_available():
        traces = LocalEngine(device="cuda").traces(sampled_systems.looped.compile(), Runs(inputs={"x": ["a"]}), 0)
        with pytest.raises(RunError, match="Device 'cuda' cannot be used here"):
            next(traces)


def test_an_interrupted_sample_says_how_to_go_on(folder, monkeypatch):
    batches = LocalEngine.traces

    def interrupted(self, plan, runs, first):
        yield from list(batches(self, plan, runs, first))[:2]
        raise KeyboardInterrupt

    command = ["sample", SYSTEM, "inputs.jsonl", "--output", "cut.jsonl", "--runs", "3", "--batch-size", "2"]
    told = "\nInterrupted. 4 of 6 runs are in cut.jsonl; the same command with --resume goes on.\n"
    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "traces", interrupted)
        assert run(*command) == (130, told)
    assert run(*command, "--resume") == (0, "Wrote 6 runs to cut.jsonl.\n")
    prompts = [json.loads(line)["columns"]["prompt"] for line in Path("cut.jsonl").read_text().splitlines()]
    assert prompts == [0, 0, 0, 1, 1, 1]


def test_a_reader_that_closes_its_end_of_a_pipe_is_no_error(folder):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sysdag.cli", "plan", SYSTEM]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
