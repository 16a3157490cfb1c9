"""Thumbs and scores of single runs: the queue, agreement, and the way from labels to rows that judge and train take."""

import contextlib
import sqlite3

import pytest
from labelled_runs import Running, runs, without_what_is_derived
from test_labelling_results import units
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from sysdag.cli import app
from sysdag.errors import LabelError
from sysdag.labelling.agreement import cohen_kappa, krippendorff_alpha, squared
from sysdag.labelling.export import export_scores, export_thumbs
from sysdag.labelling.session import open_labels
from sysdag.labelling.summary import summarize
from sysdag.traces.cells import Draw
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace


@pytest.fixture
def opened(tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda trace, **options: stack.enter_context(
            open_labels(trace, tmp_path / "labels.sqlite", overlap=100, **options)
        )


def give(store, annotator, labels):
    """Labels by run of the trace, in the order of the queue; a run that has none is skipped."""
    while (task := store.queue(annotator).task) is not None:
        assert task.left == task.right
        store.label(annotator, task.pair, labels.get(task.left, "skip"), f"{annotator}-request-{task.pair}")


def call(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def test_alpha_of_interval_data_is_that_of_the_published_table():
    """Krippendorff (2011), section D: the data of section C, as interval data."""
    lines = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    table = [{name: int(label) for name, label in unit.items()} for unit in units(*lines)]
    assert krippendorff_alpha(table, squared) == pytest.approx(0.849, abs=5e-4)


def test_every_input_comes_once_before_any_comes_twice_and_equal_outputs_once(opened):
    trace = runs(4, 3)
    cells = list(trace.cells["answer"])
    cells[1] = Draw(cells[0].value)
    store = opened(trace.updated({"answer": cells}), collect="thumbs")
    pairs = store.pairs()
    assert all(first == second for first, second in pairs)
    shown = [run for run, _ in pairs]
    assert sorted(shown) == [0, *range(2, 12)]
    assert {run // 3 for run in shown[:4]} == set(range(4))


def test_thumbs_become_unpaired_rows_by_majority_with_their_tokens(opened, tmp_path):
    trace = runs(2, 2)
    store = opened(trace, collect="thumbs")
    give(store, "Ann", {0: "up", 1: "down", 2: "up"})
    give(store, "Bob", {0: "up", 1: "down", 2: "down"})
    give(store, "Cy", {0: "down"})
    found = export_thumbs(store, trace)
    told = {row["output"].value: (row["label"], row["labels"], row["agreeing"]) for row in found.rows}
    assert told == {"answer 0 to 0": (True, 3, 2), "answer 1 to 0": (False, 2, 2)}
    assert (found.disagreements, found.unlabelled) == (1, 1)
    trace.save(tmp_path / "runs.jsonl")
    text = call("label", tmp_path / "runs.jsonl", "--database", tmp_path / "labels.sqlite", "--export",
                tmp_path / "rows.parquet")  # fmt: skip
    assert "2 unpaired rows, 1 true and 1 false; left out: 1 disagreements, 1 runs without a label" in text
    assert "annotator labels up down skipped undone" in text
    rows = read_rows(tmp_path / "rows.parquet")
    expected = {row["output"].value: row for row in found.rows}
    for row in rows:
        assert row["output"].record == expected[row["output"].value]["output"].record
        assert row["intermediates"]["draft"].record["token_ids"][0] == 1
        assert row["question"] == "question 0"


def test_scores_become_scored_runs_that_judge_takes(opened, tmp_path):
    trace = runs(2, 2)
    store = opened(trace, collect="scores")
    give(store, "Ann", {0: "5", 1: "2", 2: "3"})
    give(store, "Bob", {0: "4", 1: "2"})
    found = export_scores(store, trace)
    assert found.trace.columns == {"score": [4.5, 2.0, 3.0], "score_labels": [2, 2, 1]}
    assert found.unlabelled == 1
    trace.save(tmp_path / "runs.jsonl")
    text = call("label", tmp_path / "runs.jsonl", "--database", tmp_path / "labels.sqlite", "--export",
                tmp_path / "scored.jsonl")  # fmt: skip
    assert "3 runs with a column 'score', which sysdag judge takes (--by score)" in text
    call("judge", tmp_path / "scored.jsonl", "--by", "score", "--output", tmp_path / "p.jsonl", "--margin-scale", 1)
    (row,) = read_rows(tmp_path / "p.jsonl")
    assert (row["chosen"].value, row["rejected"].value, row["margin"]) == ("answer 0 to 0", "answer 1 to 0", 2.5)
    assert row["chosen"].record == {"token_ids": [2, 0, 0]}
    held = Trace(trace.inputs, trace.cells, {"score": [1, 2, 3, 4]})
    assert export_scores(store, held).name == "label_score"


def test_agreement_on_thumbs_and_scores(opened):
    store = opened(runs(4, 1), collect="thumbs")
    give(store, "Ann", {0: "up", 1: "down", 2: "up", 3: "up"})
    give(store, "Bob", {0: "up", 1: "down", 2: "down", 3: "up"})
    found = summarize(store)
    assert found.agreement.value == pytest.approx(cohen_kappa("uduu", "uddu"))
    assert found.annotators[1].choices == {"up": 2, "down": 2}
    assert found.left_share is None
    assert "4 of 4 runs labelled" in str(found)


def test_agreement_on_scores_knows_that_4_is_near_5(tmp_path):
    values = []
    for name, bobs in (("near", "5421"), ("far", "1421")):
        with open_labels(runs(4, 1), tmp_path / f"{name}.sqlite", collect="scores") as store:
            give(store, "Ann", dict(enumerate("4421")))
            give(store, "Bob", dict(enumerate(bobs)))
            values.append(summarize(store).agreement.value)
            table = [{"Ann": int(a), "Bob": int(b)} for a, b in zip("4421", bobs, strict=True)]
            assert values[-1] == pytest.approx(krippendorff_alpha(table, squared))
    assert values[0] > 0.9 > values[1]


def test_a_label_of_another_kind_and_another_kind_of_database_are_refused(opened, tmp_path):
    trace = runs(2, 2)
    store = opened(trace, collect="thumbs")
    task = store.queue("Ann").task
    with pytest.raises(LabelError, match="'left' is no label here; these are up, down, skip"):
        store.label("Ann", task.pair, "left", "request-1")
    with pytest.raises(LabelError, match="begun with --collect thumbs, and scores is asked for"):
        open_labels(trace, tmp_path / "labels.sqlite", collect="scores")
    with pytest.raises(LabelError, match="collect must be one of pairs, thumbs, scores, got 'stars'"):
        open_labels(trace, tmp_path / "other.sqlite", collect="stars")
    trace.save(tmp_path / "runs.jsonl")
    text = call("label", tmp_path / "runs.jsonl", "--database", tmp_path / "labels.sqlite", "--export",
                tmp_path / "rows.jsonl", code=1)  # fmt: skip
    assert "has no thumbs to export yet" in text


def test_a_database_of_the_first_format_goes_on(tmp_path):
    path = tmp_path / "labels.sqlite"
    open_labels(runs(2, 2), path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DELETE FROM settings WHERE name = 'collect'")
    without_what_is_derived(path, version=1)
    with open_labels(runs(2, 2), path) as store:
        assert store.settings.collect == "pairs"
        store.label("Ann", store.queue("Ann").task.pair, "left", "request-1")
        assert len(store.labels()) == 1


def test_the_server_shows_one_run_blinded_and_has_each_label_on_disk_before_the_next(tmp_path):
    trace = runs(2, 2)
    Trace(trace.inputs, trace.cells, {"gold": ["secret"] * 4, "thumb": ["up"] * 4}).save(tmp_path / "runs.jsonl")
    database = tmp_path / "labels.sqlite"
    with Running(tmp_path / "runs.jsonl", database, "--collect", "thumbs") as server, server.client() as client:
        session = client.get("/api/session").json()
        assert (session["collect"], session["choices"]) == ("thumbs", ["up", "down"])
        state = client.post("/api/queue", json={"annotator": "Ann"}).json()
        assert set(state["task"]) == {"pair", "inputs", "run"}
        assert "secret" not in str(state)
        for number in range(4):
            body = {"annotator": "Ann", "pair": state["task"]["pair"], "choice": "down", "request": f"request-{number}"}
            state = client.post("/api/label", json=body).json()
            with contextlib.closing(sqlite3.connect(database)) as other:
                assert other.execute("SELECT count(*) FROM labels").fetchone() == (number + 1,)
        assert state["task"] is None
        body = {"annotator": "Ann", "pair": 0, "choice": "left", "request": "request-x"}
        assert client.post("/api/label", json=body).status_code == 409
        assert client.get("/api/summary").json()["annotators"][0]["choices"] == {"up": 0, "down": 4}
