"""`sysdag import`: runs out of plain logs, and the whole way from a log to rows that training takes."""

import json
import math
import sys

import pandas
import pytest
from PIL import Image
from typer.testing import CliRunner

from sysdag.cli import app
from sysdag.data.encoding import encode_pairs
from sysdag.saving.loading import load_system
from sysdag.traces.cells import Draw
from sysdag.traces.pairs import write_pairs
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace

SYSTEM = """
from sysdag import Input, System, node
from sysdag.components import Categorical, Opaque, Tabular

question, page = Input("question", str), Input("page")

@node(Opaque(str.upper))
def draft(question):
    return question

@node(Opaque(str.lower))
def answer(question, draft):
    return draft

@node(Tabular({name: {"yes": 0.5, "no": 0.5} for name in ("q", "r")}))
def choice(question):
    return question

@node
def letters(question) -> list:
    return list(question)

@node(Opaque(str.upper))
def loud(letters):
    return letters

@node(Opaque(str.upper))
def read(page, question):
    return question

chain = System(question >> draft, (question & draft) >> answer)
chooser = System(question >> choice)
plate = System(question >> letters, letters.each() >> loud)
both = System(question >> draft, (question & draft) >> answer, outputs=["draft", "answer"])
two = System((page & question) >> read)
"""
LOG = [
    {"question": "q", "answer": "good", "draft": "d0", "thumb": "up", "user": "Ann", "gold": "g"},
    {"question": "q", "answer": "bad", "draft": "d1", "thumb": "down", "user": "Bob", "gold": "g"},
    {"question": "r", "answer": "so so", "draft": "d2", "thumb": None, "user": "Ann"},
    {"question": "s", "answer": "fine", "draft": "d3", "thumb": "up", "user": "Cy", "gold": "h"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "logged_system", raising=False)
    (tmp_path / "logged_system.py").write_text(SYSTEM)
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.replace("│", "").split())


def imported(rows, *options, system="chain", code=0, name="log.jsonl"):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return call("import", name, "--system", f"logged_system.py:{system}", "--output", "runs.jsonl", *options, code=code)


def test_a_log_becomes_runs_with_its_columns_beside_them(folder):
    text = imported(LOG)
    trace = Trace.load("runs.jsonl")
    assert trace["question"] == ["q", "q", "r", "s"]
    assert list(trace.cells) == ["draft", "answer"]
    assert trace["answer"] == ["good", "bad", "so so", "fine"]
    assert trace.columns == {
        "thumb": ["up", "down", None, "up"], "user": ["Ann", "Bob", "Ann", "Cy"], "gold": ["g", "g", None, "h"],
    }  # fmt: skip
    assert all(cell.record == {} and cell.log_prob is None for cell in trace.cells["answer"])
    assert "Wrote 4 runs of 3 inputs to runs.jsonl." in text
    assert "Nodes: draft, answer. Columns beside them: thumb, user, gold." in text
    Trace.load("runs.jsonl").save("again.parquet")
    assert Trace.load("again.parquet").columns == trace.columns


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "jsonl.gz"])
def test_every_form_that_rows_are_read_from(folder, form):
    frame = pandas.DataFrame(LOG)
    if form == "json":
        frame.to_json("log.json", orient="records")
    elif form == "csv":
        frame.to_csv("log.csv", index=False)
    elif form == "parquet":
        frame.to_parquet("log.parquet")
    else:
        frame.to_json("log.jsonl.gz", orient="records", lines=True)
    call("import", f"log.{form}", "--system", "logged_system.py:chain", "--output", "runs.parquet")
    trace = Trace.load("runs.parquet")
    assert trace["answer"] == ["good", "bad", "so so", "fine"]
    assert [value or None for value in trace.columns["thumb"]] == ["up", "down", None, "up"]
    call("judge", "runs.parquet", "--by", "thumb", "--holds", "thumbs", "--rows", "unpaired", "--output", "u.jsonl")
    assert [row["label"] for row in read_rows("u.jsonl")] == [True, False, True]


def test_names_of_a_log_and_of_trl(folder):
    rows = [{"Q": "q", "reply": "one", "intermediates": {"draft": "d"}}]
    imported(rows, "--rename", "Q=question", "--rename", "reply=answer")
    assert Trace.load("runs.jsonl")["answer"] == ["one"]
    assert Trace.load("runs.jsonl")["draft"] == ["d"]
    kto = [{"prompt": "q", "completion": [{"role": "assistant", "content": "two"}], "label": True}]
    imported(kto, "--overwrite")
    trace = Trace.load("runs.jsonl")
    assert (trace["question"], trace["answer"], trace.columns) == (["q"], ["two"], {"label": [True]})
    imported([{"question": "q", "output": {"draft": "d", "answer": "a"}}], "--overwrite", system="both")
    assert Trace.load("runs.jsonl")["draft"] == ["d"]
    imported([{"question": "ab", "loud": ["A", "B"], "letters": ["a", "b"]}], "--overwrite", system="plate")
    assert Trace.load("runs.jsonl")["loud"] == [["A", "B"]]
    assert isinstance(Trace.load("runs.jsonl").cells["loud"][0], tuple)
    (folder / "log.csv").write_text("question,answer,intermediates.draft\nq,a,d\n")
    call("import", "log.csv", "--system", "logged_system.py:chain", "--output", "c.jsonl")
    assert Trace.load("c.jsonl")["draft"] == ["d"]


def test_draws_of_a_log_keep_their_tokens(folder):
    write_pairs("log.jsonl", [{"question": "q", "answer": Draw("a", {"token_ids": [5]}, -0.5)}])
    text = call("import", "log.jsonl", "--system", "logged_system.py:chain", "--output", "runs.jsonl")
    assert Trace.load("runs.jsonl").cells["answer"][0].record == {"token_ids": [5]}
    assert "No values of draft; Direct needs those of every model." in text


def test_imported_runs_have_the_likelihood_of_what_was_logged(folder):
    imported([{"question": "q", "choice": "yes"}, {"question": "r", "choice": "no"}], system="chooser")
    plan = load_system("logged_system.py:chooser").compile()
    assert plan.log_probs(Trace.load("runs.jsonl"))["choice"].tolist() == pytest.approx([math.log(0.5)] * 2)


WRONG = [
    ([{"question": "q"}], "chain", "log.jsonl, row 0 (line 1): there is no value of the output 'answer'"),
    ([LOG[0], {"answer": "a"}], "chain", "log.jsonl, row 1 (line 2): input 'question' is missing"),
    ([{"question": 3, "answer": "a"}], "chain", "row 0 (line 1): input 'question' must be str, got int 3"),
    ([{"question": "q", "answer": "a", "output": "b"}], "chain", "two values, in columns 'answer' and 'output'"),
    ([{"question": "q", "answer": "a", "intermediates": {"drafts": "d"}}], "chain", "has 'drafts'; the nodes there"),
    ([{"question": "q", "answer": "a", "intermediates": "d"}], "chain", "'intermediates' must be a dict by node"),
    ([LOG[0], {"question": "q", "answer": "a"}], "chain", "row 1 (line 2): it has no value of node 'draft', which"),
    ([{"question": "q", "choice": "maybe"}], "chooser", "row 0 (line 1): node 'choice'"),
    ([{"question": "q", "loud": "A"}], "plate", "node 'loud' is a plate, whose value is a list, got str"),
    ([{"question": "q", "chosen": "a", "rejected": "b"}], "chain", "These are preferences, which sysdag train takes"),
    ([{"question": "q", "output": "a"}], "both", "'output' must be a dict with one value for each of"),
    ([{"question": "q", "answer": "a", "run": 3}], "chain", "Column 'run' is no input of the system"),
    ([{"question": "q", "prompt": "p", "answer": "a"}], "chain", "--rename prompt=logged_prompt"),
    ([], "chain", "There are no rows"),
]


@pytest.mark.parametrize(("rows", "system", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_a_row_that_cannot_be_used_is_refused_by_number_and_reason(folder, rows, system, message):
    assert message in imported(rows, system=system, code=1)
    assert not (folder / "runs.jsonl").exists()


def test_rows_that_cannot_be_used_are_left_out_on_demand_counted_and_listed(folder):
    rows = [{"question": "q"}, *LOG, {"question": "q", "answer": "a"}]
    text = imported(rows, "--on-error", "skip")
    assert "Skipped 2 of 6 rows; runs.jsonl.skipped.jsonl has them all:" in text
    assert "log.jsonl, row 0 (line 1): there is no value of the output 'answer'" in text
    assert "log.jsonl, row 5 (line 6): it has no value of node 'draft'" in text
    assert len(Trace.load("runs.jsonl")) == 4
    assert [json.loads(line)["place"] for line in (folder / "runs.jsonl.skipped.jsonl").read_text().splitlines()] == [
        "log.jsonl, row 0 (line 1)", "log.jsonl, row 5 (line 6)",
    ]  # fmt: skip
    (folder / "broken.jsonl").write_text('{"question": "q", "answer": "a", "draft": "d"}\n{"question":\n')
    text = call("import", "log.jsonl", "broken.jsonl", "--system", "logged_system.py:chain", "--output", "two.jsonl",
                "--on-error", "skip")  # fmt: skip
    assert "broken.jsonl, row 1 (line 2): not JSON" in text
    assert len(Trace.load("two.jsonl")) == 5
    assert "None of the 1 rows can be used" in imported(
        [{"question": "q"}], "--on-error", "skip", "--overwrite", code=1
    )
    assert len(Trace.load("runs.jsonl")) == 4


def test_an_output_that_exists_stays(folder):
    imported(LOG)
    assert "runs.jsonl exists; replace it (--overwrite)" in imported(LOG[:1], code=1)
    assert len(Trace.load("runs.jsonl")) == 4
    imported(LOG[:1], "--overwrite")
    assert len(Trace.load("runs.jsonl")) == 1


def test_pairs_out_of_a_log_are_taken_by_validate_with_their_columns(folder):
    imported(LOG)
    text = call("judge", "runs.jsonl", "--by", "thumb", "--holds", "thumbs", "--output", "pairs.jsonl")
    assert "1 pairs from 1 of 3 prompts." in text
    assert "Runs left out: 1 without a thumb" in text
    (row,) = read_rows("pairs.jsonl")
    assert (row["chosen"].value, row["rejected"].value, row["gold"]) == ("good", "bad", "g")
    assert row["chosen_intermediates"]["draft"].value == "d0"
    assert "user" not in row
    imported([{"question": "q", "choice": "yes", "thumb": 1}, {"question": "q", "choice": "no", "thumb": -1}],
             "--overwrite", system="chooser")  # fmt: skip
    call("judge", "runs.jsonl", "--by", "thumb", "--holds", "thumbs", "--output", "pairs.jsonl")
    text = call("validate", "logged_system.py:chooser", "pairs.jsonl")
    assert "1 rows: 1 can be used" in text
    text = call("train", "logged_system.py:chooser", "pairs.jsonl", "--output-dir", "out", "--max-steps", "1",
                "--objective", "direct", "--use-cpu", "true", "--beta", "1", "--report-to", "none")  # fmt: skip


def test_training_reads_the_weights_margins_and_groups_that_judge_wrote(folder):
    rows = [{"question": q, "choice": c, "stars": s, "group": "g"} for q, c, s in
            [("q", "yes", 5), ("q", "no", 2), ("r", "no", 4), ("r", "yes", 3)]]  # fmt: skip
    imported(rows, system="chooser")
    call("judge", "runs.jsonl", "--by", "stars", "--output", "pairs.parquet", "--weighting", "gap",
         "--margin-scale", "0.5")  # fmt: skip
    plan = load_system("logged_system.py:chooser").compile()
    pairs = encode_pairs(plan, read_rows("pairs.parquet"), "direct")
    assert [(p.inputs["question"], p.chosen["choice"].value, p.weight, p.margin, p.group) for p in pairs] == [
        ("q", "yes", 1.0, 1.5, "g"), ("r", "no", 1.0, 0.5, "g"),
    ]  # fmt: skip


def test_columns_of_inputs_stay_beside_sampled_runs_for_judges_and_pairs(folder):
    (folder / "inputs.jsonl").write_text(
        '{"question": "q", "gold": "yes", "id": 7, "choice": "no"}\n{"question": "r", "id": 8, "chosen": "x"}\n'
    )
    (folder / "exact.py").write_text("def match(run):\n    return float(run['choice'] == run['gold'])\n")
    text = call("sample", "logged_system.py:chooser", "inputs.jsonl", "--output", "runs.jsonl", "--runs", "8")
    assert "ignored: choice, chosen." in text
    assert "Columns that stay beside the runs: gold, id." in text
    trace = Trace.load("runs.jsonl")
    assert trace.columns["gold"] == ["yes"] * 8 + [None] * 8
    assert trace.columns["id"] == [7] * 8 + [8] * 8
    call("judge", "runs.jsonl", "--by", "exact.py:match", "--output", "pairs.jsonl", "--scores", "scored.jsonl")
    (row,) = read_rows("pairs.jsonl")
    assert (row["chosen"].value, row["rejected"].value, row["gold"], row["id"]) == ("yes", "no", "yes", 7)
    assert Trace.load("scored.jsonl").columns["gold"] == trace.columns["gold"]
    text = call("eval", "--traces", "runs.jsonl", "scored.jsonl", "--by", "exact.py:match")
    assert "mean score of A" in text
    half = (folder / "runs.jsonl").read_bytes()
    call("sample", "logged_system.py:chooser", "inputs.jsonl", "--output", "runs.jsonl", "--runs", "8", "--resume")
    assert (folder / "runs.jsonl").read_bytes() == half
    (folder / "inputs.jsonl").write_text('{"question": "q", "gold": "no", "id": 7}\n{"question": "r", "id": 8}\n')
    text = call("sample", "logged_system.py:chooser", "inputs.jsonl", "--output", "runs.jsonl", "--runs", "8",
                "--resume", code=1)  # fmt: skip
    assert "row 0 has been run, and is another now" in text


def test_images_of_a_log_are_read_from_its_folder(folder):
    from sysdag import Input, System, node
    from sysdag.components.discrete.opaque import Opaque
    from sysdag.data.logs import logged_runs
    from sysdag.traces.rows import Row

    class Painter(Opaque):
        reads_files = True

    @node(Painter(str.upper))
    def picture(scene):
        return scene

    Image.new("RGB", (2, 3), (9, 8, 7)).save(folder / "a.png")
    plan = System(Input("scene") >> picture).compile()
    row = Row({"scene": "sea", "picture": "a.png"}, folder=folder)
    assert logged_runs(plan, [row]).trace["picture"][0].getpixel((0, 0)) == (9, 8, 7)
