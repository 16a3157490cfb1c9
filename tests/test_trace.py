"""Traces: their columns, and JSON lines without loss."""

import copy
import cProfile
import dataclasses
import json
import math
import pickle
import pstats
import re

import pytest
from any_values import same, traces
from hypothesis import given, settings

from sysdag.errors import DataError
from sysdag.traces.cells import Draw, value_of
from sysdag.traces.trace import Trace


@pytest.fixture
def trace():
    """Three rows: an input, a node, and a plate of two, none and one elements."""
    return Trace(
        {"x": ["p", "q", "r"]},
        {
            "a": [Draw(f"a{row}", {"token_ids": [row, row + 1]}, -float(row)) for row in range(3)],
            "b": [(Draw("b0", {"n": 1}, -1.5), Draw("b1")), (), (Draw("b2"),)],
        },
    )


def written(trace, tmp_path) -> Trace:
    trace.to_jsonl(tmp_path / "trace.jsonl")
    return Trace.from_jsonl(tmp_path / "trace.jsonl")


def test_values(trace):
    assert len(trace) == 3
    assert trace["x"] == ["p", "q", "r"]
    assert trace["a"] == ["a0", "a1", "a2"]
    assert trace["b"] == [["b0", "b1"], [], ["b2"]]
    assert value_of(Draw(3)) == 3
    assert len(Trace({}, {})) == 0


def test_unknown_name(trace):
    with pytest.raises(DataError, match=re.escape("The trace has no values of 'c'; it holds ['x', 'a', 'b'].")):
        trace["c"]


def test_columns_of_different_lengths(trace):
    message = "A trace needs the same number of rows in every column, got {'x': 3, 'a': 3, 'b': 3, 'c': 1}."
    with pytest.raises(DataError, match=re.escape(message)):
        trace.updated({"c": [Draw(1)]})


def test_a_name_is_an_input_or_a_node(trace):
    with pytest.raises(DataError, match="'x' is both an input and a node of the trace"):
        trace.updated({"x": [Draw(1)] * 3})


def test_select_repeats_and_reorders(trace):
    selected = trace.select(iter([2, 0, 0]))
    assert selected["x"] == ["r", "p", "p"]
    assert selected["b"] == [["b2"], ["b0", "b1"], ["b0", "b1"]]
    assert selected.cells["a"][0] is trace.cells["a"][2]
    assert len(trace.select([])) == 0
    with pytest.raises(IndexError):
        trace.select([3])


def test_only_and_updated_leave_the_trace_as_it_was(trace):
    assert list(trace.only(["b", "missing"]).cells) == ["b"]
    assert trace.only([]).inputs == trace.inputs
    changed = trace.updated({"a": [Draw("n")] * 3, "c": [Draw(0)] * 3})
    assert changed["a"] == ["n"] * 3
    assert list(changed.cells) == ["a", "b", "c"]
    assert trace["a"] == ["a0", "a1", "a2"]


def test_concatenate(trace):
    joined = Trace.concatenate([trace, trace.select([1]), trace.select([])])
    assert joined["x"] == ["p", "q", "r", "q"]
    assert joined["a"] == ["a0", "a1", "a2", "a1"]
    message = "Traces hold different names: ['x', 'a', 'b'] and ['x', 'a']."
    with pytest.raises(DataError, match=re.escape(message)):
        Trace.concatenate([trace, trace.only(["a"])])
    with pytest.raises(DataError, match="at least one trace"):
        Trace.concatenate([])


def test_columns_go_where_their_rows_go(trace):
    scored = dataclasses.replace(trace, columns={"score": [0.5, None, {"a": 1}], "x": [0, 0, 1]})
    assert scored.select([2, 0]).columns == {"score": [{"a": 1}, 0.5], "x": [1, 0]}
    assert scored.only(["a"]).columns == scored.updated({"c": [Draw(0)] * 3}).columns == scored.columns
    assert Trace.concatenate([scored, scored.select([1])]).columns["x"] == [0, 0, 1, 0]
    assert len(Trace({}, {}, {"score": [1, 2]})) == 2
    with pytest.raises(DataError, match=re.escape("'column score': 1")):
        dataclasses.replace(trace, columns={"score": [1]})
    with pytest.raises(DataError, match=re.escape("['x', 'a', 'b'] with columns ['score', 'x'] and ['x', 'a', 'b'].")):
        Trace.concatenate([scored, trace])


def test_columns_are_plain_json_in_a_line(trace, tmp_path):
    scored = dataclasses.replace(trace, columns={"score": [0.5, None, {"a": [1]}]})
    scored.save(tmp_path / "trace.jsonl")
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line)["columns"]["score"] for line in lines] == [0.5, None, {"a": [1]}]
    assert same(Trace.load(tmp_path / "trace.jsonl"), scored)
    assert "columns" not in next(trace.rows())


def test_traces_cross_processes(trace):
    assert same(pickle.loads(pickle.dumps(trace)), trace)
    assert same(copy.deepcopy(trace), trace)


def test_round_trip(trace, tmp_path):
    assert same(written(trace, tmp_path), trace)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3
    assert rows[0]["inputs"] == {"x": "p"}
    assert rows[1]["nodes"]["a"]["value"] == "a1"
    assert rows[1]["nodes"]["a"]["log_prob"] == -1.0
    assert rows[1]["nodes"]["b"] == []


@pytest.mark.parametrize("log_prob", [None, 0.0, -0.0, -1e-300, -math.inf, math.inf, math.nan, 0.1 + 0.2, -3])
def test_log_probs_round_trip_in_strict_json(log_prob, tmp_path):
    trace = Trace({}, {"a": [Draw("v", {}, log_prob)]})
    assert same(written(trace, tmp_path), trace)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "trace.jsonl").read_text(), parse_constant=refuse)


def test_text_is_written_to_be_read(tmp_path):
    trace = Trace({"x": ["größer 漢字 🙂"]}, {})
    trace.to_jsonl(tmp_path / "trace.jsonl")
    assert "größer 漢字 🙂" in (tmp_path / "trace.jsonl").read_text(encoding="utf-8")


def test_a_value_that_cannot_be_written_names_its_node(tmp_path):
    with pytest.raises(DataError, match=r"'a': a value of type builtins\.set cannot be written"):
        Trace({}, {"a": [Draw({1})]}).to_jsonl(tmp_path / "trace.jsonl")
    with pytest.raises(DataError, match=r"'x': a value of type builtins\.complex"):
        Trace({"x": [[1j]]}, {}).to_jsonl(tmp_path / "trace.jsonl")


GOOD = '{"inputs": {"x": 1}, "nodes": {"a": {"value": 1, "record": {}, "log_prob": null}}}'
CORRUPTED = {
    "cut short": GOOD[:-10],
    "empty": "",
    "a list": "[]",
    "no nodes": '{"inputs": {"x": 1}}',
    "inputs are a list": '{"inputs": [], "nodes": {}}',
    "other names": GOOD.replace('"a"', '"b"'),
    "a plate of numbers": GOOD.replace('"nodes": {"a": {', '"nodes": {"a": [1], "z": {'),
    "no record": GOOD.replace('"record": {}, ', ""),
    "log_prob is text": GOOD.replace("null", '"-1"'),
    "unknown kind": GOOD.replace('"x": 1', '"x": {"__set__": [1]}'),
    "two kinds": GOOD.replace('"x": 1', '"x": {"__tuple__": [], "__dict__": {}}'),
    "no kind": GOOD.replace('"x": 1', '"x": {}'),
    "array is no base64": GOOD.replace('"x": 1', '"x": {"__npy__": "*"}'),
    "array is cut": GOOD.replace('"x": 1', '"x": {"__npy__": "k05VTVBZAQ=="}'),
    "image is no image": GOOD.replace('"x": 1', '"x": {"__png__": "AAAA"}'),
    "float is text": GOOD.replace('"x": 1', '"x": {"__float__": "many"}'),
}


@pytest.mark.parametrize("kind", CORRUPTED)
def test_corrupted_lines_are_named(kind, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([GOOD, CORRUPTED[kind], GOOD]) + "\n")
    with pytest.raises(
        DataError, match=re.escape(f"{path}, line 2: not a run that `sysdag sample` or Trace.to_jsonl wrote (")
    ):
        Trace.from_jsonl(path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.encode().replace(b'"x": 1', b'"x": "\xff"') + b"\n")
    with pytest.raises(DataError, match="line 2"):
        Trace.from_jsonl(path)


def test_a_file_without_runs(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl holds no runs"):
        Trace.from_jsonl(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_any_trace_comes_back_from_a_file(tmp_path_factory, ending):
    path = tmp_path_factory.mktemp("traces") / f"trace.{ending}"

    @settings(max_examples=60, deadline=None)
    @given(traces)
    def check(trace):
        trace.save(path)
        assert same(Trace.load(path), trace)

    check()
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_trace_that_cannot_be_written_leaves_the_old_file(trace, ending, tmp_path):
    path = tmp_path / f"trace.{ending}"
    trace.save(path)
    with pytest.raises(DataError, match=r"'a': a value of type builtins\.set cannot be written"):
        trace.updated({"a": [Draw("v"), Draw("w"), Draw({1})]}).save(path)
    assert same(Trace.load(path), trace)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("action", ["save", "load"])
def test_another_ending_is_refused(trace, action, tmp_path):
    with pytest.raises(DataError, match=r"runs\.csv: traces are stored in files that end in \.jsonl or \.parquet"):
        getattr(trace, action)(tmp_path / "runs.csv")


def test_reading_lines_takes_time_in_proportion_to_their_number(tmp_path):
    """Counted in calls of Python, which no other process disturbs."""

    def calls(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text((GOOD + "\n") * count)
        profile = cProfile.Profile()
        profile.runcall(Trace.load, path)
        return pstats.Stats(profile).total_calls

    few, many = calls(50), calls(500)
    assert many < 11 * few


def test_deep_values_are_refused_before_they_are_written(tmp_path):
    value = []
    for _ in range(3000):
        value = [value]
    for ending in ("jsonl", "parquet"):
        with pytest.raises(DataError, match="'x': a value is nested more than 64 levels deep"):
            Trace({"x": [value]}, {}).save(tmp_path / f"trace.{ending}")


@pytest.mark.parametrize("place", ["inputs", "nodes", "columns", "record"])
def test_a_name_that_is_no_text_is_told_with_its_line(place, tmp_path):
    draw = {"value": "v", "record": {"token_ids": [1]}, "log_prob": None}
    row = {"inputs": {"x": "a"}, "nodes": {"y": draw}, "columns": {"score": 1.0}}
    (draw["record"] if place == "record" else row[place])["\ud800"] = draw if place == "nodes" else 1
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"runs.jsonl, line 1: .*the name '\\ud800' is no text"):
        Trace.from_jsonl(path)
