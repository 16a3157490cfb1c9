"""`sysdag sample`, the runs behind it, and the file that they go on in."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import sampled_systems
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sysdag import DataError, Input, PlanError, System, Trace, node
from sysdag.cli import app
from sysdag.components import CausalLM, Tabular
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.random_streams import seed_of
from sysdag.data.inputs import inputs_of
from sysdag.errors import RunError
from sysdag.execution.batches import LocalEngine, Runs, load
from sysdag.execution.running import run
from sysdag.execution.trace_file import TraceFile

SYSTEMS = str(Path(sampled_systems.__file__))
LOOPED = sampled_systems.looped.compile()
INPUTS = {"x": ["a", "b", "a", "b", "b"]}


def sample(*arguments, code=0):
    result = CliRunner().invoke(app, ["sample", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def rows(tmp_path):
    """A file of five inputs."""
    file = tmp_path / "inputs.jsonl"
    file.write_text("".join(json.dumps({"x": value}) + "\n" for value in INPUTS["x"]))
    return file


@pytest.fixture
def whole(tmp_path, rows):
    """The file of 15 runs in batches of 4, made in one go."""
    sample(f"{SYSTEMS}:looped", rows, "--output", tmp_path / "whole.jsonl", "--runs", 3, "--seed", 7, "--batch-size", 4)
    return tmp_path / "whole.jsonl"


def again(rows, output, *options, system=f"{SYSTEMS}:looped", code=0):
    return sample(system, rows, "--output", output, "--runs", 3, "--seed", 7, "--batch-size", 4, *options, code=code)


def copied(whole, to, size=None):
    """The traces up to a byte, and what stands beside them."""
    to.write_bytes(whole.read_bytes()[:size])
    for beside in ("run.json", "sha256"):
        Path(f"{to}.{beside}").write_bytes(Path(f"{whole}.{beside}").read_bytes())
    return to


# Runs


def test_every_input_is_run_as_often_as_asked_and_numbered(whole):
    trace = Trace.from_jsonl(whole)
    assert list(trace.columns["prompt"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert list(trace.columns["run"]) == [0, 1, 2] * 5
    assert trace["x"] == [value for value in INPUTS["x"] for _ in range(3)]
    assert set(trace.cells) == set(LOOPED.order)
    scored = LOOPED.log_probs(trace)
    assert scored["turn[1]"].tolist() == pytest.approx([cell.log_prob for cell in trace.cells["turn[1]"]])


def test_the_command_writes_what_run_yields(whole):
    traces = list(run(LOOPED, INPUTS, runs=3, seed=7, batch_size=4))
    assert [len(trace) for trace in traces] == [4, 4, 4, 3]
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert lines == [json.loads(json.dumps(row)) for trace in traces for row in trace.rows()]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**40), size=st.integers(1, 6), runs=st.integers(1, 3), data=st.data())
def test_a_batch_is_the_same_whatever_ran_before_it(seed, size, runs, data):
    traces = [list(t.rows()) for t in run(LOOPED, INPUTS, runs=runs, seed=seed, batch_size=size)]
    first = data.draw(st.integers(0, len(traces)))
    torch.rand(3)
    rest = run(LOOPED, INPUTS, runs=runs, seed=seed, batch_size=size, first_batch=first)
    assert [list(t.rows()) for t in rest] == traces[first:]


def test_seeds_batches_and_nodes_have_randomness_of_their_own():
    keys = [
        (seed, node, f"{row}, run {run}")
        for seed in (0, 1, 11) for row in (0, 1, 10) for run in (0, 1) for node in ("a", "b", "a[0]", "a[1]")
    ]  # fmt: skip
    assert len({seed_of(seed_of(*key), place) for key in keys for place in range(3)}) == 3 * len(keys)
    # What a seed stands for must not change: files of traces are resumed by it.
    assert seed_of(0, "draft", "0, run 0") == 998448920778180981
    frequency = sum(cell.value == "a" for t in run(LOOPED, {"x": ["a"] * 4000}) for cell in t.cells["coin"]) / 4000
    assert frequency == pytest.approx(0.6, abs=0.03)


def test_an_engine_by_name_or_as_an_object():
    # First, as it moves the models: on a GPU, where another test may have left them, other numbers are drawn.
    on_cpu = [list(t.rows()) for t in run(LOOPED, INPUTS, engine=LocalEngine(device="cpu"))]
    assert [list(t.rows()) for t in run(LOOPED, INPUTS)] == on_cpu
    assert [list(t.rows()) for t in run(LOOPED, INPUTS, engine="local")] == on_cpu
    with pytest.raises(PlanError, match="engine must be 'local' or 'ray', .*got 'rya'"):
        run(LOOPED, INPUTS, engine="rya")


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"z": ["a"]}, {}, r"each of \['x'\], got \['z'\]"),
        ({"x": []}, {}, "no input to run"),
        (INPUTS, {"runs": 0}, "must be 1 or more, got 0 and 16"),
        (INPUTS, {"batch_size": 0}, "must be 1 or more, got 1 and 0"),
    ],
)
def test_wrong_runs_are_refused_before_anything_runs(inputs, options, message):
    with pytest.raises(PlanError, match=message):
        run(LOOPED, inputs, **options)


def test_models_go_to_the_device_unless_they_chose_theirs():
    table = Tabular(sampled_systems.TABLE)
    load("coin", table, None)
    load("coin", table, "auto" if not torch.accelerator.is_available() else None)
    assert table.device.type == "cpu"
    table.module.hf_device_map = {"": "cpu"}
    load("coin", table, "meta")
    assert table.device.type == "cpu"
    del table.module.hf_device_map
    load("coin", table, "meta")
    assert table.device.type == "meta"


# Resumption


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_anywhere_becomes_that_of_one_go(whole, rows, tmp_path, data):
    expected = whole.read_bytes()
    size = data.draw(st.integers(0, len(expected)))
    cut = copied(whole, tmp_path / "cut.jsonl", size)
    again(rows, cut, "--resume")
    assert cut.read_bytes() == expected


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
def test_a_killed_run_goes_on_where_it_was(tmp_path, rows, monkeypatch):
    options = [f"{SYSTEMS}:sleepy", rows, "--runs", 6, "--batch-size", 3, "--output"]
    killed, expected = tmp_path / "killed.jsonl", tmp_path / "expected.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=sample, args=(*options, killed))
    process.start()
    deadline = time.monotonic() + 120
    while not killed.exists() or len(killed.read_bytes().splitlines()) < 6:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = killed.read_bytes()
    assert 6 <= left.count(b"\n") < 30
    monkeypatch.setattr(sampled_systems.time, "sleep", lambda seconds: None)
    sample(*options, killed, "--resume")
    sample(*options, expected)
    assert killed.read_bytes() == expected.read_bytes()
    assert killed.read_bytes().startswith(left)


def test_resuming_does_not_run_what_is_there(whole, rows, tmp_path, monkeypatch):
    seen = []
    before = Runs.batch
    monkeypatch.setattr(Runs, "batch", lambda self, number: seen.append(number) or before(self, number))
    lines = whole.read_bytes().splitlines(keepends=True)
    cut = copied(whole, tmp_path / "cut.jsonl", len(b"".join(lines[:9])))
    again(rows, cut, "--resume")
    assert seen == [2, 3]
    assert "is complete: 15 runs" in again(rows, cut, "--resume")
    assert seen == [2, 3]


def test_resuming_what_is_not_there_begins(rows, tmp_path, whole):
    for name in ("new.jsonl", "empty.jsonl"):
        if name == "empty.jsonl":  # killed after the file was made and before anything was written
            (tmp_path / name).touch()
        again(rows, tmp_path / name, "--resume")
        assert (tmp_path / name).read_bytes() == whole.read_bytes()


OTHER = Path(SYSTEMS).read_text()


@pytest.mark.parametrize(
    ("options", "edit", "message"),
    [
        (["--seed", 8], None, "seed was 7, and is now 8"),
        (["--batch-size", 5], None, "batch_size was 4, and is now 5"),
        (["--runs", 2], None, "runs was 3, and is now 2"),
        ([], ("return [turn", "return ['b'"), "node letters source_sha256 was"),
        ([], ("times=2", "times=3"), "had ['coin', 'letters', 'spread', 'turn[0]', 'turn[1]'], and has now ['coin', "),
        ([], ('"b": 0.4}', '"b": 0.3, "c": 0.1}'), "component coin repr was 'Tabular(2 keys, 2 values)', and is now"),
    ],
)
def test_another_run_is_not_resumed(whole, rows, tmp_path, options, edit, message):
    """The system under the same names, in a folder of its own; only what `edit` replaces differs."""
    folder = tmp_path / "edited"
    folder.mkdir()
    (folder / "sampled_systems.py").write_text(OTHER.replace(*edit) if edit else OTHER)
    cut = copied(whole, tmp_path / "cut.jsonl", 2000)
    loaded = sys.modules.pop("sampled_systems")
    try:
        output = again(rows, cut, "--resume", *options, system=f"{folder / 'sampled_systems.py'}:looped", code=1)
    finally:
        sys.modules["sampled_systems"] = loaded
        sys.path.remove(str(folder))
    assert message in output
    assert "begun by another run" in output
    assert cut.read_bytes() == whole.read_bytes()[:2000]


def test_other_inputs_are_not_resumed(whole, rows, tmp_path):
    rows.write_text(rows.read_text().replace('"b"', '"a"', 1))
    shown = again(rows, whole, "--resume", code=1)
    assert "was begun on other inputs and cannot be resumed: row 1 has been run, and is another now." in shown
    assert "Give those inputs back that it was begun on" in shown


@pytest.mark.parametrize("cut", [0, 3, 4, 8, 12])  # so many of the 15 runs are there, in batches of 4
def test_inputs_that_have_not_been_run_may_change(whole, rows, tmp_path, cut):
    """The first 4 runs are of rows 0 and 1, the first 8 of rows up to 2, the first 12 of rows up to 3."""
    lines = whole.read_bytes().splitlines(keepends=True)
    done = {0: 0, 3: 0, 4: 2, 8: 3, 12: 4}[cut]  # rows of which a run in a whole batch is there
    for row in range(5):
        values = [*INPUTS["x"]]
        values[row] = "a" if values[row] == "b" else "b"
        rows.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
        path = copied(whole, tmp_path / f"{row}.jsonl", len(b"".join(lines[:cut])))
        if row < done:
            assert f"row {row} has been run, and is another now" in again(rows, path, "--resume", code=1)
        else:
            again(rows, path, "--resume")
            again(rows, tmp_path / "expected.jsonl", "--overwrite")
            assert path.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
            again(rows, path, "--resume")  # its record says what it is of


@pytest.mark.parametrize("count", [3, 4, 6, 9])
def test_rows_may_be_added_or_taken_away_behind_those_that_were_run(whole, rows, tmp_path, count):
    lines = whole.read_bytes().splitlines(keepends=True)
    values = (INPUTS["x"] * 2)[:count]
    rows.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    for cut in (8, 15):
        path = copied(whole, tmp_path / "cut.jsonl", len(b"".join(lines[:cut])))
        if 3 * count < cut:
            assert "more than the" in again(rows, path, "--resume", code=1)
            continue
        again(rows, path, "--resume")
        again(rows, tmp_path / "expected.jsonl", "--overwrite")
        assert path.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_a_file_of_an_earlier_version_is_not_resumed(whole, rows):
    side = Path(f"{whole}.run.json")
    begun = json.loads(side.read_text())
    side.write_text(json.dumps({**begun, "format_version": 1, "inputs_sha256": "x"}))
    assert "format_version was 1, and is now 4" in again(rows, whole, "--resume", code=1)
    for change in ({"skipped": [1]}, {"skipped": {"a": {}}}, {"skipped": {"1": {"who": 1}}}, {"rows_sha256": 3}):
        side.write_text(json.dumps({**begun, **change}))
        assert "whole.jsonl.run.json cannot be read" in again(rows, whole, "--resume", code=1)


# Bad rows


BAD = [
    '{"x": "a"}',
    '{"x": ',
    '{"x": 3}',
    '{"z": "a"}',
    '{"x": "b"}',
    '{"x": "c"}',  # which the table of the node `coin` has not
    '{"x": "b"}',
]


def runs_of(path):
    return [(row["columns"]["prompt"], row["columns"]["run"]) for row in map(json.loads, path.read_text().splitlines())]


@pytest.fixture
def bad(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(BAD) + "\n")
    return file


def test_bad_rows_are_skipped_and_named(bad, tmp_path):
    output = tmp_path / "traces.jsonl"
    shown = again(bad, output, "--on-error", "skip")
    assert runs_of(output) == [(row, run) for row in (0, 4, 6) for run in range(3)]
    assert Trace.from_jsonl(output)["x"] == ["a"] * 3 + ["b"] * 6
    assert "Wrote 9 runs to" in shown
    named = shown.partition("Skipped 4 of 7 rows; ")[2].splitlines()
    assert named[0] == f"{output}.run.json has them all:"
    assert named[1].startswith("  Row 1 (line 2): not JSON: ")
    assert named[2] == "  Row 2 (line 3): input 'x' must be str, got int 3."
    assert named[3].startswith("  Row 3 (line 4): input 'x' is missing; the row has ['z'].")
    assert named[4].startswith("  Row 5 (line 6): Node 'coin', row 5, run 0: ")
    record = json.loads(Path(f"{output}.run.json").read_text())["skipped"]
    assert sorted(record) == ["1", "2", "3", "5"]
    assert record["2"] == {"why": "input 'x' must be str, got int 3.", "from_run": 0}


@pytest.mark.parametrize("line", ['{"x": ', '{"x": 3}', '{"x": "c"}'])
def test_a_bad_row_stops_by_default(rows, tmp_path, line):
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[:3], line, lines[4]]))
    output = tmp_path / "traces.jsonl"
    assert again(rows, output, code=1).startswith("Error: ")
    assert again(rows, output, "--on-error", "stop", "--overwrite", code=1).startswith("Error: ")
    # It is corrected, and what was run is kept.
    kept = output.read_bytes() if output.exists() else b""
    assert len(kept.splitlines()) == (8 if line.endswith('"c"}') else 0)
    rows.write_text("\n".join([*lines[:3], '{"x": "b"}', lines[4]]))
    again(rows, output, "--resume")
    again(rows, tmp_path / "expected.jsonl")
    assert output.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert output.read_bytes().startswith(kept)


def test_other_rows_run_as_they_do_in_one_go(bad, tmp_path):
    """Resuming a file that was cut anywhere gives the same file, and the same rows skipped."""
    whole = tmp_path / "whole.jsonl"
    again(bad, whole, "--on-error", "skip")
    for size in range(0, len(whole.read_bytes()), 97):
        cut = copied(whole, tmp_path / "cut.jsonl", size)
        shown = again(bad, cut, "--on-error", "skip", "--resume")
        assert cut.read_bytes() == whole.read_bytes()
        assert "Skipped 4 of 7 rows; " in shown
    assert Path(f"{cut}.run.json").read_bytes() == Path(f"{whole}.run.json").read_bytes()
    shown = again(bad, whole, "--on-error", "skip", "--resume")
    assert "is complete: 9 runs." in shown
    assert "Row 5 (line 6): Node 'coin'" in shown


def test_rows_stay_skipped_where_their_batch_is_written(bad, tmp_path):
    output = tmp_path / "traces.jsonl"
    again(bad, output, "--on-error", "skip")
    lines = output.read_bytes().splitlines(keepends=True)
    # 3 runs a row and 4 a batch: the runs of row 1 are in batches 0 and 1, those of row 5 in 3 and 4.
    # Of what is left, batches 0 to 2 are whole, with 3 runs, none and none; batch 3 has lost two of its 3.
    output.write_bytes(b"".join(lines[:4]))
    bad.write_text("\n".join('{"x": "b"}' if number in (1, 5) else line for number, line in enumerate(BAD)))
    shown = again(bad, output, "--on-error", "skip", "--resume")
    assert runs_of(output) == [(row, run) for row in (0, 4, 5, 6) for run in range(3)]
    assert "Skipped 3 of 7 rows" in shown
    assert "Row 1 (line 2): not JSON" in shown
    assert "Row 5" not in shown


def test_a_row_that_fails_in_its_second_batch_keeps_its_first_runs(tmp_path):
    file, output = tmp_path / "inputs.json", tmp_path / "traces.jsonl"
    file.write_text(json.dumps([{"y": value} for value in (1, 2, 0, 4)]))
    options = (f"{SYSTEMS}:dividing", file, "--runs", 3, "--batch-size", 4, "--output", output)
    shown = sample(*options, "--on-error", "skip")
    assert runs_of(output) == [(row, run) for row in (0, 1, 3) for run in range(3)]
    assert "Row 2 (row 2): ZeroDivisionError: division by zero. In the function of node 'reciprocal'" in shown
    whole = output.read_bytes()
    for size in range(0, len(whole), 61):
        output.write_bytes(whole[:size])
        sample(*options, "--on-error", "skip", "--resume")
        assert output.read_bytes() == whole


def test_nothing_but_bad_rows(tmp_path):
    file, output = tmp_path / "inputs.jsonl", tmp_path / "traces.jsonl"
    file.write_text('{"x": 1}\n{\n')
    shown = again(file, output, "--on-error", "skip", code=1)
    assert "None of the 2 rows can be used. Row 0 (line 1): input 'x' must be str" in shown
    file.write_text('{"x": "c"}\n{"x": "d"}\n')
    shown = again(file, output, "--on-error", "skip", code=1)
    assert "Wrote 0 runs" in shown
    assert "Skipped 2 of 2 rows" in shown


def test_what_is_no_rows_fault_is_not_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sampled_systems.shared, "sample", lambda inputs, generator=None: 1 / 0)
    file = tmp_path / "inputs.jsonl"
    file.write_text('{"x": "a"}\n{"x": "b"}\n')
    shown = again(file, tmp_path / "traces.jsonl", "--on-error", "skip", code=1)
    assert "ZeroDivisionError: division by zero. In node 'coin', rows 0, run 0 to 1, run 0." in shown


def test_inputs_of_a_known_shape_and_of_renamed_columns(tmp_path):
    file, output = tmp_path / "inputs.jsonl", tmp_path / "traces.jsonl"
    file.write_text(json.dumps({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}) + "\n")
    sample(f"{SYSTEMS}:looped", file, "--output", output, "--shape", "shp")
    assert Trace.from_jsonl(output)["x"] == ["a"]
    sample(f"{SYSTEMS}:looped", file, "--output", output, "--rename", "human_ref_A=x", "--overwrite")
    assert Trace.from_jsonl(output)["x"] == ["b"]
    shown = sample(f"{SYSTEMS}:looped", file, "--output", output, "--overwrite", code=1)
    assert "These are the columns of shp: --shape shp makes pairs of them" in shown


def test_another_temperature_is_not_resumed(tmp_path):
    def file(temperature):
        component = CausalLM("somewhere", temperature=temperature)
        plan = System(sampled_systems.x >> node(component, name="draft")(lambda x: x)).compile()
        assert component.lm._model is None
        return TraceFile(tmp_path / "t.jsonl", plan, Runs(inputs=INPUTS), existing="resume")

    file(1.0)._begin()
    file(1.0)
    with pytest.raises(DataError, match="component draft temperature was 1.0, and is now 0.5"):
        file(0.5)


def test_what_was_changed_or_damaged_is_not_resumed(whole, rows, tmp_path):
    lines = whole.read_bytes().splitlines(keepends=True)
    cut = copied(whole, tmp_path / "cut.jsonl")
    cut.write_bytes(b"".join(lines) + lines[0])
    assert "more than the 15 runs" in again(rows, cut, "--resume", code=1)
    cut.write_bytes(b"".join(lines[1:]))
    assert "its lines 1 to 4 are not what was written there; cut.jsonl.sha256" in again(rows, cut, "--resume", code=1)
    cut.write_bytes(b"".join(lines[:7]) + b"{}\n")
    assert "its lines 5 to 8 are not what was written there" in again(rows, cut, "--resume", code=1)
    cut.write_bytes(whole.read_bytes())
    Path(f"{cut}.sha256").unlink()
    assert "cut.jsonl.sha256, which tells whether it is as it was written, cannot" in again(
        rows, cut, "--resume", code=1
    )
    Path(f"{cut}.sha256").touch()
    again(rows, cut, "--resume")
    assert cut.read_bytes() == whole.read_bytes()
    Path(f"{cut}.run.json").write_text("{")
    assert "cut.jsonl.run.json cannot be read" in again(rows, cut, "--resume", code=1)
    Path(f"{cut}.run.json").unlink()
    assert "which says what made it, is not beside it" in again(rows, cut, "--resume", code=1)


def test_a_flipped_byte_anywhere_is_not_resumed(whole, rows, tmp_path):
    """One that leaves every line JSON, the right runs at their places, and the file its length."""
    lines = whole.read_bytes().splitlines(keepends=True)
    at = len(lines[0]) + lines[1].index(b'"nodes"')
    place = whole.read_bytes().index(b'"a"', at) + 1
    for size in (len(b"".join(lines[:9])), None):
        cut = copied(whole, tmp_path / "cut.jsonl", size)
        data = bytearray(cut.read_bytes())
        data[place] ^= 3  # "a" becomes "b"
        cut.write_bytes(data)
        shown = again(rows, cut, "--resume", code=1)
        assert "its lines 1 to 4 are not what was written there" in shown
        assert cut.read_bytes() == data


def test_the_hashes_beside_the_runs_are_those_of_the_file_up_to_each_batch(whole):
    data = whole.read_bytes()
    ends = [len(b"".join(data.splitlines(keepends=True)[:count])) for count in (4, 8, 12, 15)]
    expected = [f"{end} {hashlib.sha256(data[:end]).hexdigest()}" for end in ends]
    assert Path(f"{whole}.sha256").read_text().splitlines() == expected


def test_an_output_that_exists_is_kept_unless_it_is_overwritten(whole, rows, tmp_path):
    other = copied(whole, tmp_path / "other.jsonl", 100)
    output = again(rows, other, code=1)
    assert "--resume" in output
    assert "--overwrite" in output
    assert other.read_bytes() == whole.read_bytes()[:100]
    again(rows, other, "--overwrite", "--seed", 9)
    assert other.read_bytes() != whole.read_bytes()
    assert "seed was 9, and is now 7" in again(rows, other, "--resume", code=1)
    again(rows, other, "--overwrite")
    assert other.read_bytes() == whole.read_bytes()


def test_nothing_is_replaced_before_there_is_something_new(whole, tmp_path):
    file = tmp_path / "zeros.jsonl"
    file.write_text('{"y": 0}\n')
    old = whole.read_bytes()
    sample(f"{SYSTEMS}:dividing", file, "--output", whole, "--overwrite", code=1)
    assert whole.read_bytes() == old


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_of_two_that_write_one_file_one_ends(tmp_path, whole, existing):
    path = tmp_path / "runs.jsonl"
    wanted = Runs(inputs=INPUTS, runs=3, seed=7, batch_size=4)
    traces = list(run(LOOPED, INPUTS, runs=3, seed=7, batch_size=4))
    first = TraceFile(path, LOOPED, wanted)
    first.append(traces[0])
    second = TraceFile(path, LOOPED, wanted, existing=existing)
    first.append(traces[1])
    with pytest.raises(DataError, match="where [0-9]+ were left: another process"):
        second.append(traces[second.batches])
    third = TraceFile(path, LOOPED, wanted, existing="resume")
    for trace in traces[third.batches :]:
        third.append(trace)
    with pytest.raises(DataError, match="another process writes to it"):
        first.append(traces[2])
    assert path.read_bytes() == whole.read_bytes()


# Errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dividing", "ZeroDivisionError: division by zero. In the function of node 'reciprocal', row 4, run 1."),
        ("odd", "'unwritable': a value of type builtins.object cannot be written"),
    ],
)
def test_an_error_names_node_and_row_and_what_was_written_stays(tmp_path, name, message):
    file, output = tmp_path / "inputs.json", tmp_path / "traces.jsonl"
    file.write_text(json.dumps([{"y": value} for value in (1, 2, 4, 8, 0, 3)]))
    shown = sample(f"{SYSTEMS}:{name}", file, "--runs", 2, "--batch-size", 3, "--output", output, code=1)
    if name == "dividing":
        message = message.replace("run 1", "run 0")
    assert f"Error: {message}" in shown
    assert len(Trace.from_jsonl(output)) == 6


def test_a_component_that_fails_names_node_and_rows():
    class Broken(Tabular):
        def sample(self, inputs, *, generator=None):
            if "b" in inputs:
                raise MemoryError("too much")
            return super().sample(inputs, generator=generator)

    plan = System(sampled_systems.x >> node(Broken(sampled_systems.TABLE), name="draft")(lambda x: x)).compile()
    traces = run(plan, {"x": list("aaab")}, batch_size=2)
    assert len(next(traces)) == 2
    with pytest.raises(RunError, match=r"MemoryError: too much. In node 'draft', rows 2, run 0 to 3, run 0."):
        next(traces)
    with pytest.raises(DataError, match=r"Node 'coin', row 1, run 0: .*no row for 'c'"):
        list(run(LOOPED, {"x": ["a", "c"]}))


def test_a_model_that_is_not_there_names_its_node(tmp_path):
    plan = System(sampled_systems.x >> node(CausalLM(tmp_path), name="draft")(lambda x: x)).compile()
    with pytest.raises(RunError, match=r"Node 'draft': the model of CausalLM\(.* cannot be loaded \("):
        next(run(plan, INPUTS))


def test_inputs_are_checked_before_a_model_loads(tmp_path, monkeypatch):
    (tmp_path / "far_system.py").write_text(
        "from sysdag import Input, System, node\nfrom sysdag.components import CausalLM\n"
        "@node(CausalLM('nowhere'))\ndef draft(question): return question\n"
        "system = System(Input('question', str) >> draft)\n"
    )
    monkeypatch.setattr(PretrainedLM, "_load_model", lambda self: pytest.fail("a model was loaded"))
    file = tmp_path / "inputs.jsonl"
    system, output = tmp_path / "far_system.py", tmp_path / "traces.jsonl"
    for line, message in (
        ('{"prompt": 3}', "Row 1 (line 2): input 'question' must be str, got int 3."),
        ('{"text": "x"}', "Row 1 (line 2): input 'question' is missing; the row has ['text']"),
        ('{"text": ', "inputs.jsonl"),
    ):
        file.write_text('{"question": "x"}\n' + line + "\n")
        assert message in sample(system, file, "--output", output, code=1)
    file.write_text('{"question": "x"}\n')
    assert "ends in .jsonl" in sample(system, file, "--output", tmp_path / "traces.txt", code=1)
    assert not output.exists()


def test_columns_of_inputs():
    plan = sampled_systems.two_inputs.compile()
    assert inputs_of(plan, [{"x": "a", "y": 1, "id": 7}, {"y": 2, "x": "b"}]) == (
        {"x": ["a", "b"], "y": [1, 2]},
        ["id"],
    )
    with pytest.raises(DataError, match=r"Row 0: input 'x' is missing; the row has \['prompt', 'y'\]"):
        inputs_of(plan, [{"prompt": "a", "y": 1}])
    assert inputs_of(LOOPED, [{"prompt": "a"}, {"x": "b"}]) == ({"x": ["a", "b"]}, [])
    assert inputs_of(LOOPED, [{"x": "b", "prompt": "c"}, {"prompt": "d"}]) == ({"x": ["b", "d"]}, ["prompt"])
    with pytest.raises(DataError, match=r"no rows of inputs; expected one for each run, with \['x'\]"):
        inputs_of(LOOPED, [])
    with pytest.raises(PlanError, match="no inputs"):
        inputs_of(System(node(Tabular({(): {"a": 1.0}}), name="root")(lambda: ())).compile(), [{}])


def test_columns_that_are_no_inputs_stay_beside_the_runs_or_are_ignored_with_a_note(tmp_path):
    file, output = tmp_path / "inputs.csv", tmp_path / "traces.jsonl"
    file.write_text("id,coin,prompt\n1,x,a\n2,x,b\n3,x,a\n")
    shown = sample(f"{SYSTEMS}:looped", file, "--output", output, "--limit", 2)
    assert "no inputs of the system are ignored: coin." in shown
    assert "Columns that stay beside the runs: id." in shown
    assert list(Trace.from_jsonl(output).columns) == ["id", "prompt", "run"]
    assert Trace.from_jsonl(output)["x"] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--actors", "coin=2"], "--actors and --gpus-per-actor belong to --engine ray"),
        (["--gpus-per-actor", "1"], "--actors and --gpus-per-actor belong to --engine ray"),
        (["--engine", "ray", "--actors", "coin"], "--actors coin: expected NODE=N"),
        (["--engine", "ray", "--actors", "coin=0"], "--actors coin=0: expected NODE=N"),
        (["--batch-size", "0"], "--batch-size"),
        (["--engine", "slurm"], "--engine"),
        (["--on-error", "ignore"], "--on-error"),
        (["--rename", "prompt"], "--rename prompt: expected OLD=NEW, as question=prompt."),
        (["--rename", "a=b", "--rename", "a=c"], "'a' is renamed twice."),
        (["--shape", "shq"], "--shape shq is unknown; those that are known: orca_dpo_pairs,"),
    ],
)
def test_wrong_options_end_in_exit_code_2(rows, tmp_path, options, message):
    shown = sample(f"{SYSTEMS}:looped", rows, "--output", tmp_path / "traces.jsonl", *options, code=2)
    assert message in " ".join(shown.split())
    assert not (tmp_path / "traces.jsonl").exists()


def test_there_is_no_progress_bar_where_stderr_is_no_terminal(rows, tmp_path):
    assert again(rows, tmp_path / "new.jsonl") == f"Wrote 15 runs to {tmp_path / 'new.jsonl'}.\n"


def test_an_input_may_be_whatever_a_node_reads():
    @node
    def length(x):
        return len(x)

    plan = System(Input("x") >> length).compile()
    [trace] = run(plan, {"x": [{"a": 1}, [1, 2, 3]]})
    assert trace["length"] == [1, 3]
