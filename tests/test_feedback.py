"""Feedback in columns: thumbs, scores and ranks become pairs, weighted pairs and unpaired rows."""

import sys

import numpy
import pytest
from test_judge_command import answers_of, call, runs
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.errors import DataError, JudgeError
from sysdag.evaluation.judges import ColumnScore
from sysdag.evaluation.labels import label_runs
from sysdag.evaluation.ranking import Judged, choose_pairs, judge_runs
from sysdag.traces.cells import Draw
from sysdag.traces.feedback import read_feedback
from sysdag.traces.pairs import preference_row
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace
from sysdag.traces.unpaired import unpaired_row


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (True, False), (1, 0), (1, -1), (1.0, 0.0), ("1", "0"), ("+1", "-1"), ("up", "down"), ("UP", "Down"),
        ("true", "false"), ("True", "False"), ("thumbs_up", "thumbs-down"), ("Thumbs Up", "thumbs down"),
        ("\N{THUMBS UP SIGN}", "\N{THUMBS DOWN SIGN}"), (numpy.bool_(True), numpy.int64(0)), (" up ", "down\n"),
    ],
)  # fmt: skip
def test_thumbs_as_logs_write_them(up, down):
    assert read_feedback([up, None, down, "", up], "thumbs", "thumb") == [1.0, None, 0.0, None, 1.0]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["up", "maybe"], "thumbs", "column 't', run 1: expected a thumb (true or false, 1 or 0, +1 or -1, 'up' or 'd"),
        ([1, 2], "thumbs", "run 1: expected a thumb"),
        ([0.5], "thumbs", "Scores are read with --holds scores"),
        ([float("nan")], "thumbs", "run 0: expected a thumb"),
        ([["up"]], "thumbs", "got list ['up']"),
        ([1, 0, -1], "thumbs", "column 't' has 0 (run 1) and -1 or 'down' (run 2): whether 0 is a thumb down or none"),
        (["0", "down"], "thumbs", "cannot be told"),
        (["up"], "scores", "expected a finite number, or nothing (null), got str 'up'. Thumbs are read with --holds t"),
        ([float("inf")], "scores", "expected a finite number"),
        (["1_000"], "scores", "got str '1_000'"),
        (["nan"], "scores", "got str 'nan'"),
        ([0], "ranks", "expected a rank (a whole number from 1 on, 1 the best), or nothing (null), got int 0"),
        ([1.5], "ranks", "got float 1.5"),
        ([True], "ranks", "got bool True"),
        (["first"], "ranks", "got str 'first'"),
    ],
)
def test_anything_else_is_refused_by_column_run_and_what_was_expected(values, kind, message):
    with pytest.raises(DataError) as caught:
        read_feedback(values, kind, "column 't'")
    assert message in str(caught.value)


def test_numbers_may_be_text_as_in_csv():
    assert read_feedback(["4.5", " -3 ", "1e-3", 2, True, None], "scores", "s") == [4.5, -3, 0.001, 2, 1, None]
    assert read_feedback(["1", 2.0, 3, ""], "ranks", "r") == [1, 2, 3, None]


RANKED = {"why": ["d", "a", "c", "b"], "how": ["x", "y"], "who": ["z"]}
RANKS = [4, 1, 3, 2, 1, 1, 1]


def test_ranked_lists_as_ends_as_all_pairs_and_weighted(folder):
    runs(RANKED, rank=RANKS).save("runs.jsonl")
    text = call("runs.jsonl", "--by", "rank", "--holds", "ranks", "--output", "ends.jsonl")
    assert answers_of("ends.jsonl") == [("why", "a", "d")]
    assert "1 without: all runs equally good" in text
    assert "1 without: one run only" in text
    call("runs.jsonl", "--by", "rank", "--holds", "ranks", "--pairs-per-prompt", 2, "--output", "two.jsonl")
    assert answers_of("two.jsonl") == [("why", "a", "d"), ("why", "b", "c")]
    text = call("runs.jsonl", "--by", "rank", "--holds", "ranks", "--pairing", "all", "--output", "all.jsonl",
                "--weighting", "prompt")  # fmt: skip
    pairs = [(better, worse) for _, better, worse in answers_of("all.jsonl")]
    assert set(pairs) == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")}
    assert "Pairs left out: 1 equally good" in text
    assert [row["weight"] for row in read_rows("all.jsonl")] == [pytest.approx(1 / 6)] * 6
    call("runs.jsonl", "--by", "rank", "--holds", "ranks", "--pairing", "all", "--output", "gap.parquet",
         "--weighting", "gap", "--margin", 2, "--margin-scale", 0.5)  # fmt: skip
    rows = read_rows("gap.parquet")
    # |4 - 1| = 3, |4 - 2| = 2, |3 - 1| = 2; the others are closer than 2.
    assert [(r["chosen"].value + r["rejected"].value, r["weight"], r["margin"]) for r in rows] == [
        ("ad", pytest.approx(3 / 7), 1.5), ("ac", pytest.approx(2 / 7), 1.0), ("bd", pytest.approx(2 / 7), 1.0),
    ]  # fmt: skip


def test_weights_of_each_prompt_sum_to_one():
    trace = runs({"why": ["a", "b", "c"], "how": ["d", "e"]})
    judged = Judged([1.0, 2.0, 5.0, 0.5, 0.25])
    found = choose_pairs(trace, judged, ["answer"], pairing="all")
    for weighting in ("prompt", "gap"):
        weights = found.weights(judged, weighting)
        assert sum(weights[:3]) == pytest.approx(1)
        assert weights[3:] == [1.0]
    assert found.weights(judged, "gap")[:3] == pytest.approx([4 / 8, 3 / 8, 1 / 8])


def test_a_margin_is_the_difference_of_the_scores(folder):
    runs({"why": ["aa", "b"]}, stars=["4.5", "2"]).save("runs.jsonl")
    call("runs.jsonl", "--by", "stars", "--output", "pairs.jsonl", "--margin-scale", 1)
    assert [row["margin"] for row in read_rows("pairs.jsonl")] == [2.5]
    call("runs.jsonl", "--by", "stars", "--lower-is-better", "--output", "pairs.jsonl", "--margin-scale", 2)
    assert [(row["chosen"].value, row["margin"]) for row in read_rows("pairs.jsonl")] == [("b", 5.0)]
    call("runs.jsonl", "--by", "stars", "--output", "pairs.jsonl")
    assert {"weight", "margin"}.isdisjoint(read_rows("pairs.jsonl")[0])


def test_one_logged_answer_is_enough_for_an_unpaired_row(folder):
    thumbs = ["up", "down", None, "up"]
    trace = runs({"why": ["a"], "how": ["b"], "who": ["c"], "when": ["d"]}, thumb=thumbs, user=["A", "B", "C", None])
    trace.save("runs.parquet")
    text = call("runs.parquet", "--by", "thumb", "--holds", "thumbs", "--rows", "unpaired", "--output", "rows.jsonl")
    assert "3 unpaired rows: 2 true, 1 false." in text
    assert "1 left out: no thumb" in text
    rows = read_rows("rows.jsonl")
    assert [sorted(row) for row in rows] == [
        ["intermediates", "label", "output", "question", "thumb", "user"],
        ["intermediates", "label", "output", "question", "thumb", "user"],
        ["intermediates", "label", "output", "question", "thumb"],
    ]
    assert [(row["question"], row["output"].value, row["label"]) for row in rows] == [
        ("why", "a", True), ("how", "b", False), ("when", "d", True),
    ]  # fmt: skip
    assert rows[0]["output"].record == {"token_ids": [97]}
    assert rows[1]["intermediates"]["draft"].record == {"token_ids": [1]}
    call("runs.parquet", "--by", "thumb", "--holds", "thumbs", "--rows", "unpaired", "--output", "rows.parquet")
    again = read_rows("rows.parquet")
    assert [row["label"] for row in again] == [True, False, True]
    assert again[0]["intermediates"]["draft"].record == rows[0]["intermediates"]["draft"].record


def test_scores_and_ranks_have_a_threshold_for_labels(folder):
    runs({"why": ["a", "b", "c", "d"]}, stars=[5, 3, 4, 1], rank=[1, 3, 2, 4]).save("runs.jsonl")
    unpaired = ["runs.jsonl", "--rows", "unpaired", "--output", "rows.jsonl"]
    text = call(*unpaired, "--by", "stars", "--threshold", 4, "--margin", 2)
    assert [(row["output"].value, row["label"]) for row in read_rows("rows.jsonl")] == [
        ("a", True), ("c", True), ("d", False),
    ]  # fmt: skip
    assert "1 left out: misses 4 by less than the margin 2" in text
    call(*unpaired, "--by", "rank", "--holds", "ranks", "--threshold", 1)
    assert [row["label"] for row in read_rows("rows.jsonl")] == [True, False, False, False]


def test_contradictions_are_told():
    trace = runs({"why": ["same", "same", "other"]})
    found = label_runs(trace, Judged([1.0, 0.0, 1.0]), ["answer"], threshold=0.5)
    assert found.contradicted == 2
    assert "2 rows say true and false of equal outputs to equal inputs; they are kept." in str(found)


WRONG = [
    (["--by", "thumb", "--rows", "unpaired", "--holds", "thumbs", "--threshold", "1"], 2, "--threshold belongs to"),
    (["--by", "stars", "--rows", "unpaired"], 2, "needs --threshold"),
    (["--by", "thumb", "--rows", "unpaired", "--holds", "thumbs", "--margin", "1"], 2, "--margin belongs to"),
    (["--by", "judging.py:prefer", "--margin-scale", "1"], 2, "--margin-scale needs scores"),
    (["--by", "stars", "--threshold", "1"], 2, "--threshold is about labels"),
    (["--by", "stars", "--rows", "unpaired", "--threshold", "1", "--pairing", "all"], 2, "--pairing is about pairs"),
    (["--by", "rank", "--holds", "ranks", "--lower-is-better"], 2, "--lower-is-better belongs to scores"),
    (["--by", "judging.py:score", "--holds", "thumbs"], 2, "--holds says what a column holds"),
    (["--by", "judging.py:prefer", "--rows", "unpaired"], 1, "compares runs with each other and says of none"),
    (["--by", "stars", "--holds", "thumbs"], 1, "column 'stars', run 0: expected a thumb"),
    (["--by", "nothing", "--holds", "thumbs"], 1, "is not written: 0 pairs"),
    (["--by", "nothing", "--holds", "thumbs", "--rows", "unpaired"], 1, "4 left out: no thumb"),
]


@pytest.mark.parametrize(("options", "code", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_mistakes_end_in_a_message_and_write_nothing(folder, monkeypatch, options, code, message):
    columns = {"stars": [5, 3, 4, 1], "rank": [1, 3, 2, 4], "thumb": ["up"] * 4, "nothing": [None] * 4}
    runs({"why": ["a", "b", "c", "d"]}, **columns).save("runs.jsonl")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "judging", raising=False)
    (folder / "judging.py").write_text("def score(run):\n    return 1\ndef prefer(first, second):\n    return 0\n")
    text = call("runs.jsonl", *options, "--output", "out.jsonl", code=code)
    assert message in " ".join(text.split())
    assert not (folder / "out.jsonl").exists()


def test_columns_that_would_mean_something_else_stay_behind_and_are_named(folder):
    columns = {"weight": [9, 9], "margin": [1, 1], "group": ["g", "g"], "score": [1, 2], "prompt": [0, 0]}
    runs({"why": ["a", "b"]}, **columns).save("runs.jsonl")
    text = call("runs.jsonl", "--by", "score", "--output", "pairs.jsonl")
    (row,) = read_rows("pairs.jsonl")
    assert row["group"] == "g"
    assert {"weight", "margin", "prompt", "score"}.isdisjoint(row)
    assert "stay behind: margin, weight." in text


def test_inputs_with_the_name_of_a_column_of_feedback_are_refused():
    for name, make in (("chosen", lambda t: preference_row(t, 0, 0, ["answer"])),
                       ("label", lambda t: unpaired_row(t, 0, True, ["answer"]))):  # fmt: skip
        trace = Trace({name: ["a"]}, {"answer": [Draw("b")]})
        with pytest.raises(DataError, match=f"The input '{name}' has the name of a column"):
            make(trace)


def test_a_column_of_thumbs_in_python():
    trace = runs({"why": ["a", "b"]}, thumb=["down", "up"])
    judged = judge_runs(trace, ColumnScore("thumb", holds="thumbs"), ["answer"])
    assert judged.scores == [0.0, 1.0]
    assert choose_pairs(trace, judged, ["answer"]).pairs == [(1, 0)]
    with pytest.raises(JudgeError, match="run 0: expected a thumb .* got nothing"):
        ColumnScore("thumb", holds="thumbs").scores(runs({"why": ["a"]}, thumb=[None]))
    with pytest.raises(JudgeError, match="holds must be one of scores, thumbs, ranks, got 'stars'"):
        ColumnScore("thumb", holds="stars")


def test_eval_reads_thumbs_of_two_files_of_runs(folder):
    answers = {"why": ["a"], "how": ["b"], "who": ["c"], "when": ["d"]}
    runs(answers, thumb=["up", "down", "up", "up"]).save("one.jsonl")
    runs(answers, thumb=[False, False, True, False]).save("other.jsonl")
    result = CliRunner().invoke(
        app, ["eval", "--traces", "one.jsonl", "other.jsonl", "--by", "thumb", "--holds", "thumbs"]
    )
    assert result.exit_code == 0, result.output
    assert "wins, ties, losses   2, 2, 0" in result.output
    assert "mean score of A      0.75" in result.output
    runs(answers, thumb=["up", None, "up", "up"]).save("one.jsonl")
    result = CliRunner().invoke(
        app, ["eval", "--traces", "one.jsonl", "other.jsonl", "--by", "thumb", "--holds", "thumbs"]
    )
    assert result.exit_code == 1
    assert "column 'thumb', run 1: expected a thumb" in result.output
