"""Runs grouped by input, rows of preferences out of them, and files of such rows."""

import errno
import json
import os

import pytest
from any_values import draws, same, values
from hypothesis import given, settings
from hypothesis import strategies as st

from sysdag.data.encoding import encode_pairs
from sysdag.errors import DataError, SerializationError
from sysdag.traces.cells import Draw
from sysdag.traces.pairs import output_names, preference_row, runs_by_input, write_pairs
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace

TRACE = Trace(
    {"x": ["p", "q", "p", 1, True, 1.0], "y": [0] * 6},
    {
        "a": [Draw(f"a{row}", {"token_ids": [row], "finished": True}, -1.0) for row in range(6)],
        "b": [(Draw("b"),)] * 6,
        "c": [Draw(row) for row in range(6)],
    },
)


def test_runs_are_grouped_by_equal_inputs_in_order():
    assert runs_by_input(TRACE) == [[0, 2], [1], [3], [4], [5]]
    with pytest.raises(DataError, match=r"'x': a value of type builtins\.set"):
        runs_by_input(Trace({"x": [{1}]}, {}))


def test_the_last_node_is_the_output_by_default():
    assert output_names(TRACE) == ("c",)
    assert output_names(TRACE, ["b", "a", "b"]) == ("b", "a")
    with pytest.raises(DataError, match=r"no node 'x'; its nodes are \['a', 'b', 'c'\]"):
        output_names(TRACE, ["x"])
    with pytest.raises(DataError, match="no nodes"):
        output_names(Trace({"x": [1]}, {}))


def test_a_row_holds_the_draws_themselves():
    row = preference_row(TRACE, 2, 0, ["c"])
    assert list(row) == ["x", "y", "chosen", "chosen_intermediates", "rejected", "rejected_intermediates"]
    assert row["x"] == "p"
    assert row["chosen"] is TRACE.cells["c"][2]
    assert row["rejected_intermediates"] == {"a": TRACE.cells["a"][0], "b": [TRACE.cells["b"][0][0]]}
    several = preference_row(TRACE, 2, 0, ["c", "b"])
    assert several["chosen"] == {"c": TRACE.cells["c"][2], "b": list(TRACE.cells["b"][2])}
    assert several["chosen_intermediates"].keys() == {"a"}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_come_back_and_their_ids_are_scored(ending, tmp_path):
    from test_data import LM, SAMPLED, SEED

    trace = SAMPLED.sample({"question": ["q", "q"]}, seed=SEED)
    assert trace["draft"][0] != trace["draft"][1]
    write_pairs(
        tmp_path / f"pairs.{ending}", [preference_row(trace, 0, 1, ["choose"]), preference_row(trace, 1, 0, ["choose"])]
    )
    rows = read_rows(tmp_path / f"pairs.{ending}")
    for side, number in (("chosen", 1), ("rejected", 0)):
        pair = encode_pairs(SAMPLED, rows, "direct")[1]
        assert same(getattr(pair, side)["draft"], trace.cells["draft"][number])
        assert same(getattr(pair, side)["choose"], trace.cells["choose"][number])
    assert LM.tokenizer(trace["draft"][0], add_special_tokens=False)["input_ids"]


# What a row may hold, draws wherever a value may stand.
rows = st.lists(
    st.dictionaries(
        st.sampled_from(["x", "chosen", "rejected", "chosen_intermediates"]),
        st.recursive(
            values | draws | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["a", "b", "__draw__"]), inner, max_size=2)
            ),
            max_leaves=4,
        ),
        min_size=1,
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_any_rows_come_back(ending, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / f"pairs.{ending}"

    @settings(max_examples=60, deadline=None)
    @given(rows)
    def check(rows):
        write_pairs(path, rows)
        found = read_rows(path)
        if ending == "parquet" and all(value is None for row in rows for value in row.values()):
            assert not any(found)
        else:
            assert same(
                list(found), [{name: value for name, value in row.items() if value is not None} for row in rows]
            )

    check()
    assert os.listdir(path.parent) == [path.name]


def test_a_dict_that_looks_like_an_image_is_no_image(tmp_path):
    rows = [{"x": {"bytes": b"a", "path": "p"}}, {"x": {"path": "q"}}, {"x": {"bytes": b"b", "path": None}}]
    write_pairs(tmp_path / "p.parquet", rows)
    assert read_rows(tmp_path / "p.parquet") == rows


@pytest.mark.parametrize("log_probs", [(0.0, 0), (None, -1), (float("nan"), None), (-1.5, None)], ids=str)
def test_log_probs_of_several_types_come_back(log_probs, tmp_path):
    rows = [{"x": Draw("a", {"n": 1}, log_prob)} for log_prob in log_probs]
    write_pairs(tmp_path / "p.parquet", rows)
    assert same(list(read_rows(tmp_path / "p.parquet")), rows)


def test_a_line_can_be_read_by_people(tmp_path):
    write_pairs(
        tmp_path / "p.jsonl", [{"prompt": "größer", "chosen": Draw("a", {"token_ids": [1]}, -0.5), "rejected": None}]
    )
    line = (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert json.loads(line) == {
        "prompt": "größer",
        "chosen": {"__draw__": {"value": "a", "record": {"__dict__": {"token_ids": [1]}}, "log_prob": -0.5}},
    }
    assert "größer" in line


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_disk_that_fails_leaves_the_old_file(ending, tmp_path, monkeypatch):
    path = tmp_path / f"p.{ending}"
    write_pairs(path, [{"chosen": "a"}])
    old = path.read_bytes()

    def fails(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    told = (
        rf"p.{ending} could not be written to .*: No space left on device. It needs more than .* KiB, and .* are free"
    )
    with pytest.raises(SerializationError, match=rf"{told} .*The p.{ending} that is there is as it was"):
        write_pairs(path, [{"chosen": "b"}])
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]


def test_a_row_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.jsonl"
    write_pairs(path, [{"chosen": "a"}])
    with pytest.raises(DataError, match=r"Row 1, 'chosen': a value of type builtins\.set"):
        write_pairs(path, [{"chosen": "a"}, {"chosen": {1}}])
    assert path.read_text() == '{"chosen": "a"}\n'
    with pytest.raises(DataError, match=r"p\.txt: rows of preferences are written to files that end in"):
        write_pairs(tmp_path / "p.txt", [])
    assert os.listdir(tmp_path) == ["p.jsonl"]
