"""A disk that is full ends a command in a message: the file, what it needs and what is free, how to go on."""

import errno
import json
import multiprocessing
import re
import sys
from pathlib import Path

import pytest
import sampled_systems
from full_disk_runs import appended, command, kept_rows
from report_runs import write_run

from sysdag import Trace
from sysdag.files.keyed_lines import KeyedLines
from sysdag.labelling.session import open_labels
from sysdag.traces.cells import Draw

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
SYSTEM = """
from sysdag import Input, System, node
from sysdag.components import Tabular

question = Input("question")

@node(Tabular({"any": {"yes": 0.5, "no": 0.5}}))
def answer(question):
    return "any"

system = System(question >> answer)
"""
QUESTIONS = 40


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        context.set_forkserver_preload(["full_disk_runs"])
        yield context


def told(processes, folder, function, *arguments):
    """What the function left in a file, in a process of its own."""
    file = folder / "told.txt"
    process = processes.Process(target=function, args=(file, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0
    return file.read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all that the commands read."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "answering.py").write_text(SYSTEM)
    questions = [f"Question {number} of {QUESTIONS}?" for number in range(QUESTIONS)]
    both = [question for question in questions for _ in range(2)]
    answers = [Draw(f"answer {run} " * 200, {}) for run in range(len(both))]
    Trace({"question": both}, {"answer": answers}, {"reward": list(map(float, range(len(both))))}).save(
        folder / "runs.jsonl"
    )
    Trace.load(folder / "runs.jsonl").save(folder / "others.jsonl")
    pairs = [{"question": question, "chosen": "yes", "rejected": "no"} for question in questions]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    logs = [{"question": question, "output": "yes"} for question in questions]
    (folder / "logs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logs))
    write_run(folder / "training")
    with open_labels(Trace.load(folder / "runs.jsonl"), folder / "labels.sqlite") as store:
        task = store.queue("me").task
        while task is not None:
            task = store.label("me", task.pair, "left", f"request-{task.pair}").task
    return folder


JUDGE = ["judge", "runs.jsonl", "--by", "reward"]
COMMANDS = {
    "judge, pairs": ([*JUDGE, "--output", "new.jsonl"], "new.jsonl"),
    "judge, Parquet": ([*JUDGE, "--output", "new.parquet"], "new.parquet"),
    "judge, scores": ([*JUDGE, "--scores", "new.jsonl"], "new.jsonl"),
    "judge, scores in Parquet": ([*JUDGE, "--scores", "new.parquet"], "new.parquet"),
    "eval": (["eval", "--traces", "runs.jsonl", "others.jsonl", "--by", "reward", "--output", "new.json"], "new.json"),
    "report": (["report", "training", "--output", "new.html"], "new.html"),
    "label": (["label", "runs.jsonl", "--export", "new.jsonl"], "new.jsonl"),
    "validate": (["validate", "answering.py:system", "pairs.jsonl", "--output", "new.jsonl"], "new.jsonl"),
    "import": (["import", "logs.jsonl", "--system", "answering.py:system", "--output", "new.jsonl"], "new.jsonl"),
    "plan": (["plan", "answering.py:system", "--output", "new.svg"], "new.svg"),
}


@pytest.mark.parametrize("case", COMMANDS)
@pytest.mark.parametrize("existed", [False, True])
def test_a_file_that_does_not_fit_is_told_and_an_older_one_stays(case, existed, processes, made):
    arguments, name = COMMANDS[case]
    file = made / name
    if existed:
        if case == "import":
            arguments = [*arguments, "--overwrite"]
        file.write_text("old")
    before = sorted(path.name for path in made.iterdir())
    limit = {"eval": 200, "label": 100_000}.get(case, 700)  # which a database has room in
    text = told(processes, made, command, made, limit, *arguments)
    reason = re.escape(f"{name} could not be written to ") + r"\S*: File too large. It needs more than [\d.]+ KiB, and "
    assert re.search(rf"^1\n(.*\n)*Error: {reason}[\d.]+ MiB are free on that disk .*Free some space there", text), text
    assert (f"The {name} that is there is as it was." in text) == existed
    if existed:
        assert file.read_text() == "old"
        file.unlink()
    left = {path.name for path in made.iterdir()} - {"__pycache__", "told.txt", name}
    assert left == {*before} - {"__pycache__", "told.txt", name}


def test_runs_that_do_not_fit_are_told_and_go_on_where_they_were(processes, tmp_path):
    (tmp_path / "inputs.jsonl").write_text("".join(json.dumps({"x": "ab"[row % 2]}) + "\n" for row in range(12)))
    system = f"{sampled_systems.__file__}:looped"
    given = ["sample", system, "inputs.jsonl", "--runs", "3", "--batch-size", "4", "--seed", "7", "--output"]
    code, _, whole = told(processes, tmp_path, command, tmp_path, 2**40, *given, "whole.jsonl").partition("\n")
    assert code == "0", whole
    limit = (tmp_path / "whole.jsonl").stat().st_size - 300
    text = told(processes, tmp_path, command, tmp_path, limit, *given, "cut.jsonl")
    expected = (
        r"A batch of runs could not be written to \S+: File too large. It needs up to [\d.]+ KiB, and [\d.]+ MiB "
    )
    assert re.search(
        rf"^1\nError: {expected}are free .*cut.jsonl has 8 whole batches of 9: free some space, and resume", text
    )
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(lines[:32])
    told(processes, tmp_path, command, tmp_path, 2**40, *given, "cut.jsonl", "--resume")
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_is_appended_to_a_file_is_there_whole_or_not_at_all(processes, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b"first\n")
    assert told(processes, tmp_path, appended, file, 9) == str(errno.EFBIG)
    assert file.read_bytes() == b"first\n"


def test_a_row_that_was_cut_off_spoils_none_behind_it(processes, tmp_path):
    text = told(processes, tmp_path, kept_rows, tmp_path / "answers.jsonl")
    assert text.startswith("SerializationError: A row of answers.jsonl could not be written to ")
    again = KeyedLines(tmp_path / "answers.jsonl", ["value"])
    assert [again.get(key) for key in "abc"] == [{"key": "a", "value": 1}, None, {"key": "c", "value": 3}]
    assert again.damaged == 1
