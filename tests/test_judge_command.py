"""`sysdag judge`: from traces to preference pairs and scores."""

import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import JudgeServer
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.commands.judge_options import chosen_judge
from sysdag.evaluation.judges import FunctionScore, function_judge
from sysdag.evaluation.ranking import Judged, choose_pairs, judge_runs, schedule
from sysdag.evaluation.verdicts import Verdict
from sysdag.traces.cells import Draw
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace

FUNCTIONS = """
def length(run):
    return len(run["answer"])

def longer(first, second):
    return (len(first["answer"]) > len(second["answer"])) - (len(first["answer"]) < len(second["answer"]))

def broken(run):
    return run["reply"]

def inputs_apart(inputs, values):
    return 1.0
"""
SYSTEM = """
from sysdag import Input, System, node
from sysdag.components import Opaque

question = Input("question")

@node(Opaque(str.upper))
def draft(question):
    return question

@node(Opaque(str.lower))
def answer(draft):
    return draft

system = System(question >> draft >> answer)
both = System(question >> draft >> answer, outputs=["draft", "answer"])
other = System(question >> draft)
"""


def runs(answers, **columns):
    """Of each question, the answers; drafts are numbered."""
    rows = [(question, answer) for question, found in answers.items() for answer in found]
    drafts = [Draw(f"draft {row}", {"token_ids": [row]}) for row in range(len(rows))]
    cells = [Draw(answer, {"token_ids": [ord(character) for character in answer]}) for _, answer in rows]
    return Trace({"question": [question for question, _ in rows]}, {"draft": drafts, "answer": cells}, columns)


ANSWERS = {"why": ["bb", "a", "dddd", "ccc"], "how": ["aa", "bb"], "who": ["alone"], "when": ["x", "yyy", "zz"]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("by_length", "answering_system"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "by_length.py").write_text(FUNCTIONS)
    (tmp_path / "answering_system.py").write_text(SYSTEM)
    runs(ANSWERS, reward=[float(i) for i in range(10)]).save(tmp_path / "runs.jsonl")
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["judge", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def answers_of(path):
    return [(row["question"], row["chosen"].value, row["rejected"].value) for row in read_rows(path)]


def test_best_against_worst_with_the_tokens_that_were_sampled(files):
    text = call("runs.jsonl", "--by", "by_length.py:length", "--output", "pairs.jsonl")
    rows = read_rows("pairs.jsonl")
    assert answers_of("pairs.jsonl") == [("why", "dddd", "a"), ("when", "yyy", "x")]
    assert rows[0]["chosen"].record == {"token_ids": [100] * 4}
    assert rows[0]["chosen_intermediates"]["draft"].record == {"token_ids": [2]}
    assert rows[0]["rejected_intermediates"]["draft"].value == "draft 1"
    assert "2 pairs from 2 of 4 prompts." in text
    assert "1 without: all runs equally good" in text
    assert "1 without: one run only" in text


def test_second_best_against_second_worst_and_margins(files):
    call("runs.jsonl", "--by", "by_length.py:length", "--pairs-per-prompt", 2, "--output", "pairs.parquet")
    assert answers_of("pairs.parquet") == [("why", "dddd", "a"), ("why", "ccc", "bb"), ("when", "yyy", "x")]
    text = call(
        "runs.jsonl", "--by", "by_length.py:length", "--pairs-per-prompt", 2, "--margin", 3, "--output", "p.jsonl"
    )
    assert answers_of("p.jsonl") == [("why", "dddd", "a")]
    assert "1 without: scores differ by less than the margin 3" in text


def test_lower_is_better_turns_pairs_round(files):
    call("runs.jsonl", "--by", "by_length.py:length", "--lower-is-better", "--output", "pairs.jsonl")
    assert answers_of("pairs.jsonl") == [("why", "a", "dddd"), ("when", "x", "yyy")]


def test_scores_that_are_there(files):
    call("runs.jsonl", "--by", "reward", "--output", "pairs.jsonl")
    assert answers_of("pairs.jsonl") == [("why", "ccc", "bb"), ("how", "bb", "aa"), ("when", "zz", "x")]


def test_several_files_are_one(files):
    trace = runs(ANSWERS)
    trace.select(range(3)).save(files / "a.jsonl")
    trace.select(range(3, 10)).save(files / "b.parquet")
    call("a.jsonl", "b.parquet", "--by", "by_length.py:length", "--output", "pairs.jsonl")
    assert answers_of("pairs.jsonl") == [("why", "dddd", "a"), ("when", "yyy", "x")]


def test_scores_beside_pairs_or_alone(files):
    call("runs.jsonl", "--by", "by_length.py:length", "--scores", "scored.parquet", "--score-name", "length")
    scored = Trace.load("scored.parquet")
    assert list(scored.columns) == ["reward", "length"]
    assert scored.columns["length"] == [2, 1, 4, 3, 2, 2, 5, 1, 3, 2]
    assert scored.cells["answer"][0].record == {"token_ids": [98, 98]}
    call("runs.jsonl", "--by", "by_length.py:longer", "--scores", "won.jsonl", "--output", "pairs.jsonl")
    won = [None if s is None else round(s, 3) for s in Trace.load("won.jsonl").columns["score"]]
    assert won == [0.333, 0, 1, 0.667, 0.5, 0.5, None, 0, 1, 0.5]
    assert answers_of("pairs.jsonl") == [("why", "dddd", "a"), ("when", "yyy", "x")]


def test_a_function_that_compares_reports_its_consistency(files):
    text = call("runs.jsonl", "--by", "by_length.py:longer", "--output", "pairs.jsonl")
    assert "10 comparisons in both orders; the orders agree in 10 of 10 (100%)" in text
    assert "The run shown first is preferred in 9 of 18 (50%) answers." in text


def test_a_language_model_judges_and_goes_on_where_it_was(files, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-secret-secret")
    with JudgeServer() as server:
        arguments = ["runs.jsonl", "--by", server.url, "--model", "m", "--api-key-env", "A_KEY",
                     "--output", "pairs.jsonl", "--criteria", "Length alone."]  # fmt: skip
        text = call(*arguments)
        pairs = (files / "pairs.jsonl").read_bytes()
        assert answers_of("pairs.jsonl") == [("why", "dddd", "a"), ("when", "yyy", "x")]
        assert len(server.requests) == 20
        assert "Criteria: Length alone." in server.requests[0]["messages"][0]["content"]
        assert server.headers[0]["Authorization"] == "Bearer sk-secret-secret"
        cached = files / "pairs.jsonl.answers.jsonl"
        lines = cached.read_text().splitlines(keepends=True)
        cached.write_text("".join(lines[:12]))
        server.requests.clear()
        assert call(*arguments) == text
        assert len(server.requests) == 8
        assert (files / "pairs.jsonl").read_bytes() == pairs
        (files / "asking.txt").write_text("{first}|{second}. End with VERDICT: A, VERDICT: B or VERDICT: TIE")
        server.respond = lambda text: "VERDICT: A"
        text = call(*arguments, "--template", "asking.txt", "--scores", "s.jsonl", "--cache", "c.jsonl", code=1)
        assert "pairs.jsonl is not written: 0 pairs from 0 of 4 prompts." in text
        assert "The run shown first is preferred in 20 of 20 (100%) answers." in text
        assert Trace.load("s.jsonl").columns["score"][:2] == [0.5, 0.5]
        assert (files / "pairs.jsonl").read_bytes() == pairs
    for path in files.iterdir():
        if path.is_file():
            assert b"sk-secret" not in path.read_bytes()
    assert "sk-secret" not in text


def test_the_nodes_that_are_judged(files):
    call("runs.jsonl", "--by", "reward", "--system", "answering_system.py:both", "--output", "both.jsonl")
    row = read_rows("both.jsonl")[0]
    assert set(row["chosen"]) == {"draft", "answer"}
    call("runs.jsonl", "--by", "reward", "--node", "draft", "--output", "drafts.jsonl")
    row = read_rows("drafts.jsonl")[0]
    assert row["chosen"].value == "draft 3"


def test_a_pair_has_different_outputs(files):
    runs({"why": ["same", "same", "other"]}, score=[3, 1, 2]).save("same.jsonl")
    text = call("same.jsonl", "--by", "score", "--output", "pairs.jsonl", code=1)
    assert "1 without: better and worse runs have equal outputs" in text


WRONG = [
    (["runs.jsonl", "--by", "by_length.py:length"], 2, "Name --output for preference pairs, --scores"),
    (["runs.jsonl", "--output", "p.jsonl"], 2, "--by"),
    (["runs.jsonl", "--by", "reward", "--output", "p.csv"], 2, "its ending must be .jsonl or .parquet"),
    (["runs.jsonl", "--by", "reward", "--output", "runs.jsonl"], 1, "is a file that this command reads"),
    (["runs.jsonl", "--by", "reward", "--output", "p.jsonl", "--model", "m"], 2, "--model belongs to an endpoint"),
    (["runs.jsonl", "--by", "http://127.0.0.1:9/v1", "--output", "p.jsonl"], 2, "needs --model"),
    (["runs.jsonl", "--by", "http://127.0.0.1:9/v1", "--model", "m", "--request", "[1]", "--output", "p.jsonl"], 2,
     "expected a JSON object"),
    (["runs.jsonl", "--by", "http://127.0.0.1:9/v1", "--model", "m", "--request", "{", "--output", "p.jsonl"], 2,
     "not JSON"),
    (["runs.jsonl", "--by", "http://h/v1", "--model", "m", "--lower-is-better", "--output", "p.jsonl"], 2,
     "belongs to scores"),
    (["runs.jsonl", "--by", "reward", "--node", "draft", "--system", "s.py", "--output", "p.jsonl"], 2, "give one of"),
    (["runs.jsonl", "--by", "reward", "--output", "x.jsonl", "--scores", "x.jsonl"], 2, "go to files of their own"),
    (["runs.jsonl", "--by", "by_length.py:length", "--scores", "s.jsonl", "--margin", "1"], 2, "is about rows for"),
    (["runs.jsonl", "--by", "reward", "--scores", "s.jsonl", "--pairs-per-prompt", "2"], 2, "is about rows for"),
    (["runs.jsonl", "--by", "reward", "--output", "p.jsonl", "--score-name", "s"], 2, "names the column of --scores"),
    (["runs.jsonl", "--by", "reward", "--output", "p.jsonl", "--comparisons", "3"], 2, "belongs to a judge that comp"),
    (["runs.jsonl", "--by", "http://h/v1", "--model", "m", "--cache", "runs.jsonl", "--output", "p.jsonl"], 2,
     "answers go to a file of their own"),
    (["runs.jsonl", "--by", "http://h/v1", "--model", "m", "--cache", "p.jsonl", "--output", "p.jsonl"], 2,
     "p.jsonl is a file of something else"),
    (["runs.jsonl", "--by", "reward", "--pairs-per-prompt", "0", "--output", "p.jsonl"], 2, "pairs-per-prompt"),
    (["nowhere.jsonl", "--by", "reward", "--output", "p.jsonl"], 1, "nowhere.jsonl"),
    (["by_length.py", "--by", "reward", "--output", "p.jsonl"], 1, "end in .jsonl or .parquet"),
    (["runs.jsonl", "--by", "rewards", "--output", "p.jsonl"], 1, "no column 'rewards'; their columns are ['reward']"),
    (["runs.jsonl", "--by", "by_length.py", "--output", "p.jsonl"], 1, "names no function; say which of"),
    (["runs.jsonl", "--by", "by_length.py:broken", "--output", "p.jsonl"], 1, "run 0: KeyError: 'reply'; the run has"),
    (["runs.jsonl", "--by", "by_length.py:inputs_apart", "--output", "p.jsonl"], 1, "a judge takes one run"),
    (["runs.jsonl", "--by", "by_length.py:longer", "--margin", "1", "--output", "p.jsonl"], 1,
     "gives no scores; margin"),
    (["runs.jsonl", "--by", "reward", "--node", "reply", "--output", "p.jsonl"], 1, "reply"),
    (["runs.jsonl", "--by", "reward", "--system", "answering_system.py:none", "--output", "p.jsonl"], 1,
     "has no 'none'"),
    (["runs.jsonl", "--by", "by_length.py:length", "--scores", "s.jsonl", "--score-name", "reward"], 1,
     "have a column 'reward' already"),
    (["runs.jsonl", "--by", "http://h/v1", "--model", "m", "--api-key-env", "NO_SUCH", "--output", "p.jsonl"], 1,
     "variable NO_SUCH"),
    (["runs.jsonl", "--by", "http://h/v1", "--model", "m", "--template", "by_length.py", "--output", "p.jsonl"], 1,
     "--template by_length.py has no {first}"),
    (["single.jsonl", "--by", "by_length.py:longer", "--output", "p.jsonl"], 1, "has one run only; sample several"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_mistakes_end_in_a_message_and_write_nothing(files, arguments, code, message):
    runs({"why": ["a"]}).save("single.jsonl")
    before = sorted(path.name for path in files.iterdir())
    text = call(*arguments, code=code)
    assert message in " ".join(text.replace("│", "").split())
    assert "Traceback" not in text
    assert [n for n in sorted(path.name for path in files.iterdir()) if n != "__pycache__"] == [
        name for name in before if name != "__pycache__"
    ]


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_of_the_context_are_text_before_typer_0_29(tmp_path, kind):
    (tmp_path / "asking.txt").write_text("{first}|{second}. End with VERDICT: A, VERDICT: B or VERDICT: TIE")
    given = {"by": "http://h/v1", "lower_is_better": False, "model": "m", "api_key_env": None, "criteria": None,
             "request": None, "concurrency": 1, "timeout": 1.0, "retries": 0,
             "template": kind(tmp_path / "asking.txt"), "cache": kind(tmp_path / "answers.jsonl")}  # fmt: skip
    judge = chosen_judge(types.SimpleNamespace(params=given), tmp_path / "pairs.jsonl")
    assert judge.template.startswith("{first}|{second}.")
    assert judge.endpoint.cache == tmp_path / "answers.jsonl"


# The library


@given(st.integers(0, 12), st.integers(1, 80))
def test_comparisons_are_distinct_and_balanced(count, most):
    rows = [10 * row for row in range(count)]
    pairs = schedule(rows, most)
    every = count * (count - 1) // 2
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == min(most, every)
    met = Counter(row for pair in pairs for row in pair)
    assert all(one != other for one, other in pairs)
    if len(pairs) in (every, count):
        assert len(set(met.values())) <= 1
    if most >= count / 2:
        assert len(met) == count or count == 1


def test_a_margin_of_a_decimal_fraction_is_reached():
    trace = runs({"why": ["a", "b"], "how": ["c", "d"]})
    judged = Judged([0.3, 0.2, 0.3, 0.201])
    assert choose_pairs(trace, judged, ["answer"], margin=0.1).pairs == [(0, 1)]


@given(st.lists(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=6), min_size=1, max_size=4),
       st.integers(1, 3), st.sampled_from([0.0, 1.0, 2.0]), st.booleans())  # fmt: skip
def test_pairs_are_ordered_apart_and_disjoint(scores, most, margin, lower):
    trace = runs({f"q{i}": [f"{i}.{j}" for j in range(len(found))] for i, found in enumerate(scores)})
    flat = [score for found in scores for score in found]
    chosen = choose_pairs(trace, Judged(flat, lower), ["answer"], pairs_per_prompt=most, margin=margin)
    question = trace["question"]
    for better, worse in chosen.pairs:
        assert question[better] == question[worse]
        difference = flat[better] - flat[worse]
        assert (-difference if lower else difference) >= max(margin, 1)
    used = [row for pair in chosen.pairs for row in pair]
    assert len(used) == len(set(used))
    per_prompt = Counter(question[better] for better, _ in chosen.pairs)
    assert all(count <= most for count in per_prompt.values())
    assert len(per_prompt) + sum(chosen.without.values()) == chosen.prompts == len(scores)
    for number, found in enumerate(scores):
        known = [score for score in found if score is not None]
        wide = bool(known) and max(known) - min(known) >= max(margin, 1)
        assert (f"q{number}" in per_prompt) == wide


class Unsure:
    """Cannot be read on two long answers, and always prefers a long one to a short one."""

    name = "unsure"

    def compare(self, first, second, outputs):
        pairs = zip(first["answer"], second["answer"], strict=True)
        lengths = [(len(one), len(other)) for one, other in pairs]
        return [Verdict((float(one > other),) * 2 if min(one, other) == 1 else (None, 0.5)) for one, other in lengths]

    def to_dict(self):
        return {"kind": "unsure"}


def test_unread_verdicts_count_for_neither_run():
    judged = judge_runs(runs({"why": ["aaa", "bbb", "c"], "how": ["ddd", "eee"]}), Unsure(), ["answer"])
    assert judged.scores == [1.0, 1.0, 0.0, None, None]
    assert choose_pairs(runs({"how": ["ddd", "eee"]}), Judged([None, None]), ["answer"]).without == {
        "fewer than two runs with a verdict": 1
    }


def test_scores_and_wins_rank_alike():
    trace = runs(ANSWERS)
    longer = function_judge(lambda one, other: (len(one["answer"]) > len(other["answer"])) - (
        len(one["answer"]) < len(other["answer"])))  # fmt: skip
    by_score = choose_pairs(
        trace, judge_runs(trace, FunctionScore("l", lambda run: len(run["answer"])), []), ["answer"]
    )
    by_wins = choose_pairs(trace, judge_runs(trace, longer, ["answer"]), ["answer"])
    assert by_score.pairs == by_wins.pairs == [(2, 1), (8, 7)]
    assert json.dumps(by_score.without) == json.dumps(by_wins.without)
