"""Traces as Parquet: what others read there, and what is no trace."""

import dataclasses
import json
import re
import sys

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from any_values import same

from sysdag.errors import DataError
from sysdag.traces.cells import Draw
from sysdag.traces.trace import Trace

TRACE = Trace(
    {"question": ["p", "q"], "prompt": [{"a": 1}, None]},
    {
        "draft": [Draw("d0", {"token_ids": [3, 1], "finished": True}, -1.5), Draw("d1")],
        "route": [Draw(2), Draw(5)],
        "image": [(Draw("i0", {"n": 1}, -0.5), Draw("i1", {}, -2.0)), ()],
    },
    {"prompt": [0, 1], "score": [0.25, 1.0]},
)


@pytest.fixture
def path(tmp_path):
    TRACE.save(tmp_path / "runs.parquet")
    return tmp_path / "runs.parquet"


def test_pandas_reads_texts_and_numbers_as_such(path):
    table = pandas.read_parquet(path)
    assert list(table["question"]) == ["p", "q"]
    assert list(table["draft"]) == ["d0", "d1"]
    assert list(table["draft.log_prob"].fillna(0)) == [-1.5, 0]
    assert json.loads(table["draft.record"][0])["__dict__"]["token_ids"] == [3, 1]
    assert list(table["route"] + 1) == [3, 6]
    assert list(map(list, table["image"])) == [["i0", "i1"], []]
    assert list(map(list, table["image.log_prob"])) == [[-0.5, -2.0], []]
    assert list(table["prompt"]) == ['{"__dict__": {"a": 1}}', "null"]
    assert list(table["columns.prompt"]) == [0, 1]
    assert table["columns.score"].mean() == 0.625
    assert {"route.log_prob", "route.record"}.isdisjoint(table.columns)


def test_columns_whose_names_collide_are_kept_apart(tmp_path):
    trace = Trace({"a.record": ["r"]}, {"a": [Draw("v", {"n": 1}, -1.0)], "a.log_prob": [Draw(1)]})
    trace.save(tmp_path / "t.parquet")
    assert same(Trace.load(tmp_path / "t.parquet"), trace)


@pytest.mark.parametrize(
    "value", [2**63 - 1, -(2**63), 2**63, -(2**63) - 1, "\ud800", "a\0b", float("nan"), -0.0, b"\xff"], ids=ascii
)
def test_values_at_the_ends_of_arrows_types(value, tmp_path):
    trace = Trace(
        {"x": [value, None]}, {"a": [Draw(value), Draw(value)], "b": [(Draw(value),), ()]}, {"c": [value] * 2}
    )
    trace.save(tmp_path / "t.parquet")
    assert same(Trace.load(tmp_path / "t.parquet"), trace)


def test_a_trace_without_runs_keeps_its_names(tmp_path):
    empty = dataclasses.replace(TRACE.select([]))
    empty.save(tmp_path / "t.parquet")
    assert same(Trace.load(tmp_path / "t.parquet"), empty)


def rewritten(path, change):
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(change(table), path)
    return path


def test_a_damaged_value_is_named(path):
    def change(table):
        at = table.column_names.index("draft.record")
        return table.set_column(at, "draft.record", pyarrow.array([table["draft.record"][0].as_py(), "{"]))

    with pytest.raises(DataError, match=re.escape(f"{path}: not the runs that Trace.save wrote (row 1, column 'dra")):
        Trace.load(rewritten(path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.replace_schema_metadata({}), "it has no metadata of a trace"),
        (lambda table: table.replace_schema_metadata({b"sysdag.trace": b"[]"}), "list indices must be"),
        (lambda table: table.replace_schema_metadata({b"sysdag.trace": b'{"format_version": 9}'}), "version 9"),
        (lambda table: table.drop_columns(["route"]), "route"),
    ],
)
def test_another_table_is_no_trace(path, change, message):
    with pytest.raises(DataError, match=rf"runs\.parquet: not the runs that Trace\.save wrote .*{message}"):
        Trace.load(rewritten(path, change))


def test_a_truncated_file_is_named(path):
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"runs\.parquet is no Parquet file, or is damaged: "):
        Trace.load(path)


@pytest.mark.parametrize("action", ["save", "load"])
def test_without_pyarrow_the_extra_is_named(path, action, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'Parquet needs pyarrow: pip install "sysdag\[data\]"'):
        getattr(TRACE, action)(path)
