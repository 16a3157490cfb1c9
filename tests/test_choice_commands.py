"""The command line on a system with a choice: sample, validate, train, eval and report."""

import json
import sys
from pathlib import Path

import pytest
from tiny import char_tokenizer, llama
from tiny_sentences import write_folder
from typer.testing import CliRunner

from sysdag import Draw, Trace
from sysdag.cli import app
from sysdag.reporting.values import shown_choice

MODULE = "system_of_choices"
SYSTEM = """
from pathlib import Path

from sysdag import Input, System, node
from sysdag.components import BiEncoder, CausalLM, Choice

HERE = Path(__file__).parent
question, passages = Input("question", str), Input("passages", list)


@node(Choice(BiEncoder(HERE / "encoder"), k=2, temperature=0.1))
def found(question, passages):
    return question, passages


@node(CausalLM(HERE / "reader", max_new_tokens=4))
def answer(question, found):
    return f"{found[0]} {found[1]} {question} "


system = System((question & passages) >> found, (question & found) >> answer)


def score(run):
    return len(set(run["answer"]))
"""
PASSAGES = ["the first one", "another", "a third", "the last"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_folder(tmp_path / "encoder", "mean, normalised")
    llama(1).save_pretrained(tmp_path / "reader")
    char_tokenizer().save_pretrained(tmp_path / "reader")
    (tmp_path / f"{MODULE}.py").write_text(SYSTEM)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop(MODULE, None)
    sys.path[:] = [entry for entry in sys.path if not (Path(entry) / f"{MODULE}.py").is_file()]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def write(file, rows):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(chosen, rejected, **others):
    return {
        "question": "which", "passages": PASSAGES, "chosen": "yes", "rejected": "no",
        "chosen_intermediates": {"found": chosen}, "rejected_intermediates": {"found": rejected}, **others,
    }  # fmt: skip


def test_from_inputs_to_a_report(place):
    system = f"{MODULE}.py:system"
    write("inputs.jsonl", [{"question": q, "passages": PASSAGES[:n]} for q, n in (("why", 2), ("how", 3), ("who", 4))])
    run("sample", system, "inputs.jsonl", "--output", "runs.jsonl", "--runs", 3, "--seed", 1)
    trace = Trace.from_jsonl(place / "runs.jsonl")
    assert len(trace) == 9
    for value, cell, options in zip(trace["found"], trace.cells["found"], trace.inputs["passages"], strict=True):
        assert cell.record["options"] == options
        assert value == [options[index] for index in cell.record["indices"]]
    write("pairs.jsonl", [pair([0, 1], ["a third", "another"]), pair(["the last", 0], [2, 3], question="what")])
    assert "2 rows: 2 can be used" in run("validate", system, "pairs.jsonl", "--objective", "direct")
    options = ("--max-steps", 2, "--per-device-train-batch-size", 2, "--use-cpu", "true", "--logging-steps", 1)
    run(
        "train",
        system,
        "pairs.jsonl",
        "--objective",
        "direct",
        "--output-dir",
        "out",
        *options,
        "--learning-rate",
        0.01,
    )
    [losses] = [
        [line["loss"] for line in map(json.loads, Path("out/log.jsonl").read_text().splitlines()) if "loss" in line]
    ]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    run("eval", "out", "inputs.jsonl", "--by", f"{MODULE}.py:score", "--against", system)
    run("report", "out")


def test_wrong_rows_are_told_with_their_line_and_node(place):
    write(
        "pairs.jsonl",
        [pair([0, 1], [1, 0]), pair(["the first one", "no such"], [0, 4]), pair([0, 1], [1, 0], passages=[])],
    )
    told = run("validate", f"{MODULE}.py:system", "pairs.jsonl", "--objective", "direct", code=1)
    assert "Row 1 (line 2), chosen, node 'found'" in told
    assert "'no such' is no option of its row" in told
    assert "Row 1 (line 2), rejected, node 'found'" in told
    assert "the index 4 is none of the 4 options'" in told
    assert "Row 2 (line 3), chosen, node 'found'" in told
    assert "the list of options is empty, so nothing can be chosen" in told


def test_logged_indices_are_options_in_the_runs(place):
    rows = [{"question": "why", "passages": PASSAGES, "found": [3, "another"], "answer": "so"}]
    write("logged.jsonl", rows)
    run("import", "logged.jsonl", "--system", f"{MODULE}.py:system", "--output", "runs.jsonl")
    trace = Trace.from_jsonl(place / "runs.jsonl")
    assert trace["found"] == [["the last", "another"]]
    assert trace.cells["found"][0].record["indices"] == [3, 1]
    write("logged.jsonl", [{**rows[0], "found": [3, "no such"]}])
    told = run("import", "logged.jsonl", "--system", f"{MODULE}.py:system", "--output", "other.jsonl", code=1)
    assert "node 'found'" in told
    assert "'no such' is no option of its row" in told


def test_a_report_shows_the_options_and_which_was_chosen():
    options = [f"option {number}" for number in range(40)]
    one = shown_choice(Draw("option 1", {"options": options[:3], "index": 1}))
    assert [(element.words[0][1], element.note) for element in one.elements] == [
        ("option 0", ""), ("option 1", "chosen"), ("option 2", ""),
    ]  # fmt: skip
    two = shown_choice(Draw([options[39], options[0]], {"options": options, "indices": [39, 0]}))
    assert len(two.elements) == 33
    assert (two.elements[-1].words[0][1], two.elements[-1].note) == ("option 39", "chosen 1")
    assert (two.elements[0].note, two.note) == ("chosen 2", "and 7 more options")
    plate = shown_choice((Draw("option 1", {"options": options[:3], "index": 1}),) * 2)
    assert [[element.note for element in each.elements] for each in plate.elements] == [["", "chosen", ""]] * 2
    assert shown_choice(Draw("text", {"token_ids": [1]})) is None
    assert shown_choice((Draw("text"),)) is None
