"""`sysdag rounds`: sample, judge, train and eval again and again, from wherever they were cut off."""

import json
import math
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from judge_server import JudgeServer
from safetensors.torch import load_file
from tiny import char_tokenizer, llama
from typer.testing import CliRunner

from sysdag import SysDPOConfig, System
from sysdag.cli import app
from sysdag.errors import OptionError, PlanError
from sysdag.evaluation.judge_choice import JudgeChoice
from sysdag.files.run_files import read_log
from sysdag.labelling.store import LabelStore
from sysdag.saving.loading import load_system
from sysdag.traces.readers import read_rows
from sysdag.traces.trace import Trace
from sysdag.training.round_record import RoundRecord
from sysdag.training.round_settings import rounds_from
from sysdag.training.round_stages import Stages
from sysdag.training.rounds import Rounds
from sysdag.training.trainer import SysDPOTrainer

KILLED = Path(__file__).with_name("killed_rounds.py")
MODULE = "system_of_rounds"
SYSTEM = """
from sysdag import Input, System, node
from sysdag.components import Tabular

TICKETS = [f"t{number}" for number in range(12)]
ticket = Input("ticket", str)


@node(Tabular({name: {"shop": 0.5, "bank": 0.5} for name in TICKETS}))
def team(ticket):
    return ticket


@node(Tabular({name: {"solved": 0.5, "open": 0.25, "lost": 0.25} for name in ("shop", "bank")}))
def outcome(team):
    return team


system = System(ticket >> team, team >> outcome)


def good(run):
    return (run["team"] == "bank") + (run["outcome"] == "solved")


def hopeful(run):
    return run["hope"] + good(run)


def never(run):
    return 1.0
"""
TRAIN = {
    "learning_rate": 0.1, "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 4, "use_cpu": True,
    "report_to": "none", "logging_steps": 2,
}  # fmt: skip
FILE = {
    "system": f"{MODULE}.py:system", "inputs": "inputs.jsonl", "heldout": "heldout.jsonl", "output_dir": "out",
    "rounds": 2, "earlier_share": 0.25, "sample": {"runs": 4, "batch_size": 8},
    "judge": {"by": f"{MODULE}.py:good", "pairs_per_prompt": 2}, "train": TRAIN, "eval": {"runs": 4},
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a system, inputs and held-out inputs, as the working folder."""
    (tmp_path / f"{MODULE}.py").write_text(SYSTEM)
    for name, numbers in (("inputs", range(8)), ("heldout", range(8, 12))):
        rows = [{"ticket": f"t{number}", "hope": number} for number in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop(MODULE, None)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def write(**changes):
    """The file of rounds; a section's changes are of its keys, and None takes a key out."""
    found = json.loads(json.dumps(FILE))
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] |= value
        else:
            found[name] = value
    Path("rounds.yaml").write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def command(*arguments, code=0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def rounds(*arguments, code=0, **changes):
    write(**changes)
    return command("rounds", "rounds.yaml", *arguments, code=code)


def tables(folder):
    return {name: load_file(Path(folder) / name / "model.safetensors")["logits"] for name in ("team", "outcome")}


def facts(folder="out"):
    return json.loads((Path(folder) / "rounds.json").read_text())


def test_each_round_has_a_folder_that_the_other_commands_read(place):
    told = rounds()
    for text in (
        "Before the first round: eval; time left: known after the first round.", "Round 2 of 2: train; about 0:00:0",
        "pairs from", "Ended: 2 rounds are done. The best is ",
    ):  # fmt: skip
        assert text in told, text
    record = facts()
    assert [sorted(each) for each in record["rounds"]] == [
        ["eval", "folder", "round"], *[["eval", "folder", "judge", "round", "sample", "train"]] * 2,
    ]  # fmt: skip
    second = record["rounds"][2]
    assert (second["sample"]["runs"], second["train"]["steps"]) == (32, 6)
    assert record["status"] == "finished"
    scores = [each["eval"]["score"] for each in record["rounds"]]
    assert record["best"] == scores.index(max(scores))

    command("validate", "out/round-2", "out/round-2/train.jsonl")
    command("judge", "out/round-2/runs.jsonl", "--by", f"{MODULE}.py:good", "--pairs-per-prompt", "2",
            "--output", "again.jsonl")  # fmt: skip
    assert Path("again.jsonl").read_bytes() == Path("out/round-2/pairs.jsonl").read_bytes()
    command("eval", "out/round-2", "heldout.jsonl", "--against", f"{MODULE}.py:system", "--by", f"{MODULE}.py:good",
            "--runs", "4", "--batch-size", "8", "--output", "eval.json")  # fmt: skip
    ours, theirs = (json.loads(Path(file).read_text()) for file in ("out/round-2/eval.json", "eval.json"))
    assert {**ours, "sources": 0} == {**theirs, "sources": 0}
    assert ours["scores"]["first"]["estimate"] == second["eval"]["score"]
    command("sample", "out", "heldout.jsonl", "--output", "more.jsonl")
    command("train", "out/round-2", "out/round-2/pairs.jsonl", "--output_dir", "more", "--max_steps", "1", "--use_cpu",
            "--report_to", "none")  # fmt: skip
    assert "round-2: finished, 6 steps" in command("report", "out/round-2")


def test_rounds_that_are_done_are_not_done_again_and_may_become_more(place):
    rounds()
    before = Path("out/round-2/model_is_left_alone")
    before.touch()
    told = rounds()
    assert "Round" not in told.partition("Ended")[0]
    rounds(rounds=3)
    assert len(facts()["rounds"]) == 4
    rounds("--output-dir", "at-once", rounds=3)
    for number in (1, 2, 3):
        for name, table in tables(f"out/round-{number}").items():
            assert table.equal(tables(f"at-once/round-{number}")[name])


def test_what_was_begun_otherwise_is_refused_by_name(place):
    rounds(rounds=1)
    told = rounds(train={"beta": 0.3}, rounds=1, code=2)
    assert "out holds rounds that were begun otherwise: train beta was 0.1, and is now 0.3." in told
    assert "earlier_share was 0.25, and is now 0.5" in rounds(earlier_share=0.5, code=2)
    source = Path(f"{MODULE}.py")
    source.write_text(source.read_text().replace('== "solved")', '== "open")'))
    sys.modules.pop(MODULE)
    assert "judge source_sha256 was" in rounds(code=2)


@pytest.mark.parametrize("reference", ["last_round", "fixed"])
def test_the_reference_is_the_last_rounds_or_stays_that_of_the_start(place, reference):
    """The loss of a round's first step over all pairs, by the formula from the tables on the disk."""
    rounds(reference=reference, earlier_share=0,
           train={"per_device_train_batch_size": 64, "logging_steps": 1, "max_steps": 3})  # fmt: skip
    system = load_system(f"{MODULE}.py:system").fresh()
    start = {name: system[name].component.module["logits"].detach() for name in ("team", "outcome")}
    after_first = tables("out/round-1")
    teams, tickets = ["shop", "bank"], [f"t{number}" for number in range(12)]
    outcomes = ["solved", "open", "lost"]

    def log_prob(of, row, side):
        team = row[f"{side}_intermediates"]["team"].value
        first = of["team"].log_softmax(-1)[tickets.index(row["ticket"]), teams.index(team)]
        return first + of["outcome"].log_softmax(-1)[teams.index(team), outcomes.index(row[side].value)]

    losses = []
    for row in read_rows("out/round-2/pairs.jsonl"):
        ratio = [log_prob(after_first, row, side) - log_prob(start, row, side) for side in ("chosen", "rejected")]
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])))
    expected = torch.stack(losses).mean().item()
    logged = [line["loss"] for line in read_log("out/round-2") if "loss" in line]
    if reference == "fixed":
        assert logged[0] == pytest.approx(expected, abs=1e-5)
        assert abs(expected - math.log(2)) > 1e-3
    else:
        assert logged[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged[-1] < logged[0]


def lines(file):
    return Path(file).read_bytes().splitlines()


def test_a_share_of_the_pairs_is_of_earlier_rounds(place):
    rounds(rounds=3, earlier_share=0.5)
    fresh = {number: lines(f"out/round-{number}/pairs.jsonl") for number in (1, 2, 3)}
    assert not Path("out/round-1/train.jsonl").exists()
    for number in (2, 3):
        mixed = lines(f"out/round-{number}/train.jsonl")
        count, before = len(fresh[number]), [row for each in range(1, number) for row in fresh[each]]
        assert mixed[:count] == fresh[number]
        assert len(mixed) == count + min(count, len(before))  # a half of all, where there are as many
        assert all(before.count(row) >= mixed[count:].count(row) for row in mixed[count:])
        given = facts()["rounds"][number]["train"]
        assert (given["fresh"], given["earlier"]) == (count, len(mixed) - count)


def evaluating(monkeypatch, *scores, lower_is_better=False):
    """Has the held-out scores be these, whatever the systems do."""
    monkeypatch.setattr(Stages, "do_eval", lambda self, number, say: {"score": scores[number]})
    monkeypatch.setattr(Stages, "score_facts", lambda self: {"name": "s", "lower_is_better": lower_is_better})


def test_the_best_round_is_kept_and_rounds_end_early(place, monkeypatch):
    evaluating(monkeypatch, 0.5, 0.7, 0.7, 0.69, 0.9)
    told = rounds(rounds=4, early_stopping_patience=2)
    assert "Ended: no better held-out score in 2 rounds. The best is round 1" in told
    assert [each["round"] for each in facts()["rounds"]] == [0, 1, 2, 3]
    for name, table in tables("out").items():
        assert table.equal(tables("out/round-1")[name])
        assert not table.equal(tables("out/round-3")[name])
    assert facts()["best"] == 1
    told = rounds(rounds=4, early_stopping_patience=3)  # the limits may change
    assert "Ended: 4 rounds are done. The best is round 4" in told
    for name, table in tables("out").items():
        assert table.equal(tables("out/round-4")[name])


def test_a_threshold_is_what_counts_as_better_and_lower_may_be(place, monkeypatch):
    evaluating(monkeypatch, 0.5, 0.45, 0.44, 0.1, lower_is_better=True)
    told = rounds(rounds=3, early_stopping_patience=1, early_stopping_threshold=0.02)
    assert "Ended: no better held-out score in 1 round. The best is round 2" in told


def test_where_no_round_is_better_the_system_is_kept_as_it_started(place, monkeypatch):
    evaluating(monkeypatch, 0.5, 0.4)
    told = rounds(rounds=1)
    assert "The best is the system as it started: no round has a better score; it is in out" in told
    start = load_system(f"{MODULE}.py:system")
    kept = System.from_pretrained("out")
    for name in ("team", "outcome"):
        assert kept[name].component.module["logits"].equal(start[name].component.module["logits"])


def compared(folder, others):
    """Asserts that folders have the files of `folder`, those that say no times byte for byte."""

    def of(place):
        return {str(file.relative_to(place)): file for file in place.rglob("*") if file.is_file()}

    whole = of(folder)
    endings = (".safetensors", ".jsonl", "eval.json", "rounds.json", "system.json", "table.json")
    same = [name for name in whole if name.endswith(endings) and Path(name).name not in ("log.jsonl", "progress.jsonl")]
    assert len(same) > 20
    for other in others:
        there = of(other)
        assert set(there) == set(whole), other.name
        for name in same:
            assert there[name].read_bytes() == whole[name].read_bytes(), f"{other.name}: {name}"


def killed(place, *options):
    write(train={"learning_rate": 0.5}, eval={"runs": 8})
    done = subprocess.run([sys.executable, str(KILLED), str(place), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in place.glob("*/rounds.json") if path.parent.name != "whole"]
    assert facts("whole")["best"]
    compared(place / "whole", folders)
    return {folder.name for folder in folders}


def test_a_process_that_is_killed_in_any_stage_goes_on_to_the_same_files(place):
    assert killed(place) == {
        "start", "sample", "judge", "first-steps", "behind-a-checkpoint", "behind-the-last-step", "saving", "eval",
        "best",
    }  # fmt: skip


@pytest.mark.release("as the test above, at every boundary between files")
def test_a_process_that_is_killed_between_files_goes_on_to_the_same_files(place):
    assert len(killed(place, "--between")) == 15


def test_the_judge_may_be_an_endpoint_which_is_asked_once(place):
    with JudgeServer(lambda text: "VERDICT: A") as server:
        options = {"by": server.url, "model": "m", "pairs_per_prompt": None}
        told = rounds(judge=options, eval={"by": f"{MODULE}.py:good"}, rounds=1, code=1)
        assert "Error: 0 pairs from 0 of 8 prompts." in told  # whichever is shown first wins
        asked = len(server.requests)
        assert asked
        command("rounds", "rounds.yaml", code=1)
        assert len(server.requests) == asked


def test_an_endpoint_gives_a_win_rate_against_the_start(place):
    def prefer(text):
        first, second = (part.count("solved") for part in text.split("----- BEGIN")[-2:])
        return "VERDICT: TIE" if first == second else f"VERDICT: {'A' if first > second else 'B'}"

    with JudgeServer(prefer) as server:
        told = rounds(judge={"by": server.url, "model": "m"}, rounds=1)
    assert "win rate against the start by" in told
    start, first = facts()["rounds"]
    assert start["eval"]["score"] == 0.5
    assert first["eval"]["score"] == json.loads(Path("out/round-1/eval.json").read_text())["win_rate"]["estimate"]
    assert Path("out/round-1/pairs.jsonl.answers.jsonl").is_file()


def test_scores_may_come_as_a_column_that_rounds_wait_for(place):
    told = rounds(judge={"by": "quality"}, eval={"by": f"{MODULE}.py:good"}, rounds=1, code=1)
    assert "Waiting for scores: out/round-1/runs.jsonl has no column 'quality'" in told
    runs = Trace.load("out/round-1/runs.jsonl")
    other = runs.select(range(len(runs) - 1))
    scored = replace(other, columns={**other.columns, "quality": [1.0] * len(other)})
    for trace, message in ((scored, "holds other runs than"), (runs, "has no column 'quality'")):
        trace.save("out/round-1/scored-runs.jsonl")
        assert message in command("rounds", "rounds.yaml", code=1)
    command("judge", "out/round-1/runs.jsonl", "--by", f"{MODULE}.py:good", "--scores", "out/round-1/scored-runs.jsonl",
            "--score-name", "quality")  # fmt: skip
    command("rounds", "rounds.yaml")
    rounds("--output-dir", "by-function", rounds=1)
    assert Path("out/round-1/pairs.jsonl").read_bytes() == Path("by-function/round-1/pairs.jsonl").read_bytes()


def test_columns_of_the_inputs_travel_to_the_judges(place):
    rounds(judge={"by": f"{MODULE}.py:hopeful"}, rounds=1)
    assert set(Trace.load("out/round-1/runs.jsonl").columns["hope"]) == set(range(8))
    assert facts()["rounds"][1]["eval"]["score"] >= 8
    rounds("--output-dir", "column", judge={"by": "hope"}, eval={"by": f"{MODULE}.py:good"}, rounds=1, code=1)


def test_rounds_wait_for_people_and_go_on(place, monkeypatch):
    pytest.importorskip("fastapi")
    server = pytest.importorskip("sysdag.labelling.server")
    database = Path("out/round-1/labels.sqlite")
    labelled = []

    def label():
        with LabelStore(database) as store:
            trace = Trace.load("out/round-1/runs.jsonl")
            while (pair := store.queue("ada").task) is not None:
                value = [int(trace["outcome"][row] == "solved") for row in (pair.left, pair.right)]
                choice = "tie" if value[0] == value[1] else "left" if value[0] > value[1] else "right"
                store.label("ada", pair.pair, choice, f"request {len(labelled)}")
                labelled.append(choice)

    serve, worker = server.serve, threading.Thread(target=label, daemon=True)

    def serving(*given, announce, **options):
        def listening(link):
            announce(link)
            worker.start()

        return serve(*given, announce=listening, **options)

    monkeypatch.setattr(server, "serve", serving)
    write(eval={"by": f"{MODULE}.py:good"}, rounds=1)
    content = json.loads(Path("rounds.yaml").read_text())
    content["judge"] = {"by": "people", "browser": False, "port": 0}
    Path("rounds.yaml").write_text(json.dumps(content))
    told = command("rounds", "rounds.yaml")
    worker.join()
    assert "Waiting for people: 0 of" in told
    assert len(labelled) > 5
    rows = read_rows("out/round-1/pairs.jsonl")
    assert len(rows) == len(labelled) - labelled.count("tie")
    assert all(row["chosen"].value == "solved" for row in rows)
    command("label", "out/round-1/runs.jsonl", "--database", str(database), "--export", "again.jsonl")
    assert Path("again.jsonl").read_bytes() == Path("out/round-1/pairs.jsonl").read_bytes()


def test_a_page_that_is_closed_before_the_last_label_says_how_to_go_on(place, monkeypatch):
    pytest.importorskip("fastapi")
    monkeypatch.setattr("sysdag.labelling.server.serve", lambda *_, **__: False)
    write(rounds=1, eval={"by": f"{MODULE}.py:good"})
    content = json.loads(Path("rounds.yaml").read_text()) | {"judge": {"by": "people"}}
    Path("rounds.yaml").write_text(json.dumps(content))
    told = command("rounds", "rounds.yaml", code=130)
    assert "pairs have a label, which are kept in out/round-1/labels.sqlite; the same command goes on." in told


def test_rounds_in_which_no_preference_is_left_end(place):
    told = rounds(judge={"by": f"{MODULE}.py:never"}, code=1)
    assert "0 pairs from 0 of 8 prompts. 8 without: all runs equally good" in told

    calls = iter(range(9))
    judge = JudgeChoice(by=f"{MODULE}.py:good").judge(None)
    asked = rounds_from("rounds.yaml", output_dir="ends")

    class Tiring:
        name, lower_is_better = "tiring", False

        def scores(self, trace):
            return judge.scores(trace) if len(trace) != 32 or not next(calls) else [1.0] * len(trace)

        def to_dict(self):
            return {"name": "tiring"}

    result = Rounds(**{**vars(asked), "judge": Tiring()}).run(say=lambda _: None)
    assert result.stopped.startswith("round 2 gave no pairs: 0 pairs from 0 of 8 prompts.")
    assert len(result.scores) == 2


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_rounds_on_single_runs_label_them_by_a_threshold(place, loss):
    """Each run of a round is one row; what a loss of pairs would drop as ties is used."""
    options = {"judge": {"threshold": 2, "pairs_per_prompt": None}, "train": TRAIN | {"loss_type": loss}}
    told = rounds("--dry-run", **options)
    assert "2 rounds of 8 inputs, 4 runs each" in told
    rounds(**options)
    rows = read_rows("out/round-1/pairs.jsonl")
    assert len(rows) == 32
    for row in rows:
        good = row["output"].value == "solved" and row["intermediates"]["team"].value == "bank"
        assert row["label"] is good
    assert facts()["rounds"][-1]["train"]["earlier"] == 11  # a quarter
    start, end = tables("out/round-1"), tables("out/round-2")
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert "threshold" in rounds(code=2, **options | {"judge": {"threshold": 1, "pairs_per_prompt": None}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"loss_type": "kto"}, "judge": {"pairs_per_prompt": None}}, "give the score from which on a run is"),
        ({"train": {"loss_type": "kto"}, "judge": {"threshold": 1}}, "pairs_per_prompt is about pairs, and ['kto']"),
        ({"judge": {"threshold": 1}}, "judge: threshold labels single runs, and ['sigmoid'] is trained on pairs"),
    ],
)
def test_rounds_name_what_single_runs_and_pairs_have_no_use_for(place, changes, message):
    told = rounds(code=2, **changes)
    assert message in told, told


def test_people_judge_pairs_in_rounds_and_label_thumbs_elsewhere(place):
    content = {**FILE, "judge": {"by": "people"}, "train": TRAIN | {"loss_type": "bco"},
               "eval": {"by": f"{MODULE}.py:good"}}  # fmt: skip
    Path("rounds.yaml").write_text(json.dumps(content))
    assert "people judge pairs here. Collect thumbs by `sysdag label --collect" in command(
        "rounds", "rounds.yaml", code=2
    )


def test_what_is_judged_may_be_another_node_than_what_is_trained_on(place):
    rounds(judge={"node": "team"}, rounds=1)
    rows = read_rows("out/round-1/pairs.jsonl")
    assert {row["chosen"].value for row in rows} <= {"solved", "open", "lost"}
    assert all(row["chosen_intermediates"]["team"].value != row["rejected_intermediates"]["team"].value for row in rows)


def test_each_round_may_take_other_inputs_until_all_have_had_their_turn(place):
    asked = rounds_from_changed(inputs_per_round=3)
    chosen = [Stages(asked)._chosen(number).inputs["ticket"] for number in range(1, 9)]
    assert all(len(set(tickets)) == 3 for tickets in chosen[:2])
    assert len({ticket for tickets in chosen[:3] for ticket in tickets}) == 8
    assert {ticket for tickets in chosen for ticket in tickets} == {f"t{number}" for number in range(8)}
    assert chosen == [Stages(asked)._chosen(number).inputs["ticket"] for number in range(1, 9)]


def rounds_from_changed(**changes):
    write(**changes)
    return rounds_from("rounds.yaml")


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(place):
    told = rounds("--dry-run")
    assert told == (
        f"2 rounds of 8 inputs, 4 runs each, judged by {MODULE}.py:good; evaluated on 4 held-out inputs by "
        f"{MODULE}.py:good; reference last_round, 25% of the pairs from earlier ones; output to out"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"round": 3}, 2, "rounds.yaml, line 1: round: no such option; did you mean rounds?"),
        ({"judge": {"pairs_per_promt": 3}}, 2, "pairs_per_promt: no such option; did you mean pairs_per_prompt?"),
        ({"train": {"betta": 3}}, 2, "betta: no such option; did you mean beta?"),
        ({"train": {"beta": "high"}}, 2, "beta: invalid float value: 'high'"),
        ({"train": {"dataset": "x"}}, 2, "dataset: has no place here: each round trains on its own pairs."),
        ({"train": {"resume_from_checkpoint": "last"}}, 2, "rounds go on by themselves where they were cut off"),
        ({"train": {"objective": "sampling", "candidates": "beam"}}, 2, "candidates: unknown strategy 'beam'"),
        ({"train": {"eval_strategy": "steps", "eval_steps": 2}}, 2, "there is nothing to evaluate on"),
        ({"train": [1]}, 2, "train: expected a mapping of options to values, got a sequence."),
        ({"rounds": 0}, 2, "rounds must be 1 or more, got 0."),
        ({"rounds": "few"}, 2, "rounds: expected an integer, got 'few'."),
        ({"rename": "a"}, 2, "rename: expected a mapping, got 'a'."),
        ({"earlier_share": 1.0}, 2, "earlier_share must be in [0, 1), got 1.0"),
        ({"reference": "moving"}, 2, "reference must be one of ['last_round', 'fixed'], got 'moving'."),
        ({"reference": "fixed", "train": {"sync_ref_model": True}}, 2, "sync_ref_model moves it"),
        ({"reference": "fixed", "train": {"loss_type": "simpo"}}, 2, "has no use: ['simpo'] is trained without"),
        ({"heldout": None}, 2, "heldout is missing; a file of rounds needs system, inputs, heldout, output_dir"),
        ({"judge": {"by": None}}, 2, "judge: by is missing: a function, an endpoint's URL, a column, or people."),
        ({"judge": {"model": "m"}}, 2, "judge: model belongs to an endpoint: judge: by http://..."),
        ({"judge": {"annotator": "ada"}}, 2, "annotator: belongs to people: by: people."),
        ({"judge": {"by": "people"}}, 2, "pairs_per_prompt: belongs to another judge; people have annotator, port,"),
        ({"judge": {"by": "http://h/v1"}}, 2, "judge: by with an endpoint needs judge: model"),
        ({"judge": {"by": f"{MODULE}.py:goood"}}, 1, f"{MODULE}.py has no 'goood'; its functions are"),
        ({"judge": {"node": "reply"}}, 2, "nodes: the system has no node 'reply'; its nodes are ['team', 'outcome']."),
        ({"eval": {"model": "m"}}, 2, "eval: model is of a judge; name it (by)."),
        ({"eval": {"confidence": 1.5}}, 2, "confidence must be between 0 and 1, got 1.5."),
        ({"inputs": "nowhere.jsonl"}, 1, "There is no file, folder or dataset nowhere.jsonl."),
        ({"heldout": "inputs.jsonl"}, 1, "8 held-out inputs are among those that pairs are sampled on"),
        ({"heldout": "bad.jsonl"}, 1, "heldout bad.jsonl: Row 1 (line 2): "),
        ({"system": f"{MODULE}.py:systen"}, 1, f"{MODULE}.py has no 'systen'"),
        ({"output_dir": "inputs.jsonl"}, 2, "output_dir inputs.jsonl is a file; name a folder."),
        ({"shape": "shq"}, 2, "shape: 'shq' is unknown; those that are known: "),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_message_before_anything_is_written(place, changes, code, message):
    Path("bad.jsonl").write_text('{"ticket": "t9"}\n{"tickett": "t10"}\n')
    told = rounds(code=code, **changes)
    assert message in told, told
    assert "Traceback" not in told
    assert not Path("out").exists()


def test_people_need_another_judge_for_the_held_out_runs(place):
    content = {**FILE, "judge": {"by": "people"}, "eval": {"runs": 2}}
    Path("rounds.yaml").write_text(json.dumps(content))
    assert "name who judges the held-out runs (eval: by)" in command("rounds", "rounds.yaml", code=2)


def test_from_python_on_a_system_and_rows_at_hand(place):
    system = load_system(f"{MODULE}.py:system")
    rows = {name: read_rows(f"{name}.jsonl") for name in ("inputs", "heldout")}
    module = sys.modules[MODULE]
    options = {**TRAIN, "disable_tqdm": True, "seed": 0}
    result = Rounds(
        system=system, **rows, judge=module.good, args=SysDPOConfig("mine", **options), rounds=2, runs=4, batch_size=8,
        pairs_per_prompt=2, eval_runs=4, earlier_share=0.25,
    ).run(say=lambda _: None)  # fmt: skip
    rounds()
    assert (result.folder, result.best) == (Path("mine"), facts()["best"])
    for number in (1, 2):
        for name, table in tables(f"mine/round-{number}").items():
            assert table.equal(tables(f"out/round-{number}")[name])
    with pytest.raises(OptionError, match="load_best_model_at_end: a round's training has no evaluation"):
        Rounds(system=system, **rows, judge=module.good, args=SysDPOConfig(
            "m", **options, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4))  # fmt: skip


def test_a_system_whose_weights_are_objects_is_refused_by_name(place):
    from sysdag import Input, node
    from sysdag.components import Categorical

    ticket = Input("ticket", str)
    choice = node(Categorical(["a", "b"], torch.nn.Linear(1, 2)), name="choice")(lambda ticket: [1.0])
    asked = Rounds(
        system=System(ticket >> choice), inputs=[{"ticket": "a"}], heldout=[{"ticket": "b"}],
        judge=lambda run: 1.0, args=SysDPOConfig("mine", **TRAIN),
    )  # fmt: skip
    with pytest.raises(PlanError, match="Node 'choice': .*weights that it was given as an object"):
        asked.run(say=lambda _: None)


def test_time_left_is_told_once_every_stage_is_known(place):
    record = RoundRecord(Path("times"), {}, {})
    assert record.time_left(1, "sample", 3) == "time left: known after the first round"
    took = ((0, "eval", 100), (1, "sample", 10), (1, "judge", 2), (1, "train", 30), (1, "eval", 8))
    lines = [{"round": number, "stage": stage, "seconds": seconds} for number, stage, seconds in took]
    Path("times").mkdir()
    Path("times/progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"round": 2, "sta')
    assert record.time_left(2, "train", 3) == "about 0:01:28 left"  # 30 + 8, and 50 of the third round
    assert record.time_left(3, "eval", 3) == "about 0:00:08 left"


def test_rounds_run_in_one_process(place, monkeypatch):
    asked = rounds_from_changed()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="2 processes were started, and rounds run in one"):
        asked.run(say=lambda _: None)


WRITERS = """
from pathlib import Path

from peft import LoraConfig

from sysdag import Input, System, node
from sysdag.components import CausalLM

HERE = Path(__file__).parent
question = Input("question")


@node(CausalLM(HERE / "drafter", max_new_tokens=3))
def draft(question):
    return f"q: {question} d:"


@node(CausalLM(HERE / "refiner", max_new_tokens=3, peft_config=LoraConfig(r=2, target_modules="all-linear")))
def answer(question, draft):
    return f"q: {question} d: {draft} a:"


system = System(question >> draft, (question & draft) >> answer)


def late(run):
    # how far back in the alphabet
    return sum(map(ord, run["draft"] + run["answer"]))
"""


@pytest.mark.parametrize("reference", ["last_round", "fixed"])
def test_language_models_with_and_without_an_adapter_go_on_in_the_second_round(place, monkeypatch, reference):
    pytest.importorskip("peft")
    for name, seed in (("drafter", 0), ("refiner", 1)):
        llama(seed).save_pretrained(place / name)
        char_tokenizer().save_pretrained(place / name)
    Path(f"{MODULE}.py").write_text(WRITERS)
    for name, letters in (("inputs", "abcd"), ("heldout", "ef")):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"question": letter}) + "\n" for letter in letters))
    options = {
        "reference": reference, "earlier_share": None,
        "judge": {"by": f"{MODULE}.py:late", "pairs_per_prompt": 1, "node": ["draft", "answer"]},
        "train": {"learning_rate": 0.02, "per_device_train_batch_size": 64, "max_steps": 4, "save_steps": 2,
                  "logging_steps": 1, "beta": 0.5, "empty": "keep"}, "eval": {"runs": 1},
    }  # fmt: skip
    rounds("--output-dir", "whole", **options)
    step = SysDPOTrainer.training_step

    def interrupted(self, *given, **rest):
        if self.state.global_step == 3 and self.args.output_dir.endswith("round-2"):
            raise KeyboardInterrupt
        return step(self, *given, **rest)

    monkeypatch.setattr(SysDPOTrainer, "training_step", interrupted)
    told = rounds(code=130, **options)
    assert "What is done stays; the same command goes on from there." in told
    monkeypatch.setattr(SysDPOTrainer, "training_step", step)
    rounds(**options)
    weights = [file.relative_to("whole") for file in Path("whole").glob("round-?/*/*.safetensors")]
    assert len(weights) == 4
    for file in weights:
        assert (Path("out") / file).read_bytes() == (Path("whole") / file).read_bytes(), file

    start, first = load_system(f"{MODULE}.py:system").fresh(), System.from_pretrained("whole/round-1")
    pairs = read_rows("whole/round-2/pairs.jsonl")
    ratio = {}
    for side in ("chosen", "rejected"):
        cells = {"draft": [row[f"{side}_intermediates"]["draft"] for row in pairs], "answer": [r[side] for r in pairs]}
        trace = Trace({"question": [row["question"] for row in pairs]}, cells)
        with torch.no_grad():
            now, then = (sum(system.compile().log_probs(trace).values()) for system in (first, start))
        ratio[side] = now - then
    expected = 0.5 * (ratio["chosen"] - ratio["rejected"]).mean().item() if reference == "fixed" else 0.0
    logged = next(line["rewards/margins"] for line in read_log("whole/round-2") if "rewards/margins" in line)
    assert logged == pytest.approx(expected, abs=1e-4)
    assert reference == "last_round" or abs(expected) > 1e-2
