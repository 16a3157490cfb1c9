"""Unpaired rows: one run with a label, TRL's format for KTO; which losses take them, and every mistake by its row."""

import json
from pathlib import Path

import checked_systems
import pytest
from datasets import Dataset
from trained_systems import rows as pair_rows
from trained_systems import single_run, two_llms
from typer.testing import CliRunner

from sysdag import DataError, Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.cli import app
from sysdag.components import Tabular
from sysdag.data.encoding import encode_pairs, encode_rows
from sysdag.data.inputs import columns_beside
from sysdag.data.preferences import UnpairedRun
from sysdag.data.row_paths import with_whole_paths
from sysdag.data.screening import AT_ONCE
from sysdag.data.validation import validate_rows
from sysdag.traces.cells import Draw
from sysdag.traces.pairs import write_pairs
from sysdag.traces.readers import read_rows
from sysdag.traces.rows import Row
from sysdag.traces.trace import Trace
from sysdag.traces.unpaired import unpaired_row
from sysdag.training.resume import pairs_hash

QUESTIONS = checked_systems.questions.compile()
SYSTEMS = str(Path(checked_systems.__file__))
GOOD = {"question": "q", "output": "yes", "label": True, "intermediates": {"route": "short", "facts": ""}}
PAIR = {
    "question": "q", "chosen": "yes", "rejected": "no", "chosen_intermediates": {"route": "short", "facts": ""},
    "rejected_intermediates": {"route": "long", "facts": "F"},
}  # fmt: skip


def changed(**changes):
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}


def unpaired(count):
    return [single_run(row, side, "completion") for row in pair_rows(count) for side in ("chosen", "rejected")]


def test_a_row_becomes_a_run_with_its_label():
    (run,) = encode_rows(QUESTIONS, [changed(weight=0.5, group="g")], "direct")
    assert isinstance(run, UnpairedRun)
    assert dict(run.inputs) == {"question": "q"}
    assert {name: cell.value for name, cell in run.run.items()} == {"answer": "yes", "route": "short", "facts": ""}
    assert (run.label, run.weight, run.group, run.mismatched) == (True, 0.5, "g", None)
    (other,) = encode_rows(QUESTIONS, [{"prompt": "q", "completion": "yes", "label": 0}], "sampling")
    assert (sorted(other.run), other.label) == (["answer"], False)


@pytest.mark.parametrize(
    ("written", "label"), [(True, True), (False, False), (1, True), (0, False), ("true", True), ("False", False)]
)
def test_labels_are_truth_values_as_files_hold_them(written, label):
    (run,) = encode_rows(QUESTIONS, [changed(label=written)], "direct")
    assert run.label is label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ...}, "Row 1: 'label' is missing, which says whether the run is desirable"),
        ({"label": None}, "Row 1: 'label' is missing"),
        ({"label": "up"}, "Row 1: label must be true or false, .* got 'up'.* `sysdag judge --rows unpaired`"),
        ({"label": 0.5}, "Row 1: label must be true or false, .* got 0.5"),
        ({"label": -1}, "Row 1: label must be true or false"),
        ({"label": [True]}, "Row 1: label must be true or false"),
        ({"output": ...}, "Row 1: 'output' is missing"),
        ({"completion": "no"}, "Row 1: it has both output and completion"),
        ({"output": 3}, "Row 1, node 'answer': "),
        ({"intermediates": ...}, "Row 1: the row has no value of node '.*', which direct needs. Give it in interm"),
        ({"intermediates": "x"}, "Row 1: intermediates must be a dict by node, got str"),
        ({"intermediates": {"route": "short", "facts": "", "way": 1}}, "Row 1: intermediates has 'way'; the other nod"),
        ({"intermediates": {"route": "sideways", "facts": ""}}, "Row 1, node 'route': "),
        ({"question": ...}, "Row 1: input 'question' is missing"),
        ({"margin": 0.5}, "Row 1: margin is by how much one run is better than another; this row has one"),
        ({"weight": -1}, "Row 1: weight must be finite and 0 or more"),
        ({"output": ..., "intermediates": ..., "label": ...}, r"Row 1: 'output' \(or 'completion'\) and 'label'"),
        ({"chosen": "a", "rejected": "b"}, "Row 1: it is a pair .* expected an unpaired row .*Row 0 is an unpaired"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_with_its_row(changes, message):
    data = [GOOD, changed(**changes)]
    with pytest.raises(DataError, match=message):
        encode_rows(QUESTIONS, data, "direct")
    report = validate_rows(QUESTIONS, data, "direct")
    assert (report.errors, report.kept) == (1, (0,))


def test_a_desirable_empty_output_is_dropped_and_an_undesirable_one_is_kept(caplog):
    data = [GOOD, changed(output=" "), changed(output=" ", label=False)]
    assert len(encode_rows(QUESTIONS, data, "direct")) == 2
    assert "1 of 3 rows are dropped. empty (1 of 3): Row 1, node 'answer': the completion is empty." in caplog.text
    assert len(encode_rows(QUESTIONS, data, "direct", empty="keep")) == 3


def test_one_file_holds_rows_of_one_kind():
    report = validate_rows(QUESTIONS, [PAIR, GOOD, PAIR], "direct")
    assert report.kept == (0, 2)
    assert "other kind (error): 1 row\n  Row 1: it is an unpaired row (output and label), expected a pair" in str(
        report
    )
    with pytest.raises(DataError, match=r"Row 0: it is an unpaired row .* encode_rows takes rows of both kinds"):
        encode_pairs(QUESTIONS, [GOOD], "direct")


@pytest.mark.parametrize("before", [[], [{"question": "q"}], [{"question": "q"}] * AT_ONCE])
def test_the_row_that_says_the_kind_is_numbered_as_all_are(before):
    damaged = Row(place="line 1", damage="not JSON.")
    report = validate_rows(QUESTIONS, iter([damaged, *before, damaged, PAIR, damaged, GOOD]), "direct")
    assert report.kept == (len(before),)
    (told,) = [problem for problem in report.problems if problem.kind == "other kind"]
    assert told.row == len(before) + 1
    assert f"Row {len(before)} is a pair (chosen and rejected), and a training takes rows of one kind." in told.text


def test_several_outputs_plates_and_draws():
    @node(Tabular({"a": {"u": 0.5, "v": 0.5}}))
    def first(x):
        return x

    @node
    def parts(first) -> list:
        return [first, first]

    @node(Tabular({"u": {"p": 0.5, "q": 0.5}, "v": {"p": 0.5, "q": 0.5}}))
    def second(parts):
        return parts

    plan = System(Input("x") >> first >> parts, parts.each() >> second, outputs=["first", "second"]).compile()
    trace = plan.sample({"x": ["a", "a"]}, seed=0)
    written = [unpaired_row(trace, run, run == 0, ("first", "second")) for run in range(2)]
    runs = encode_rows(plan, written, "direct")
    assert [run.run["second"] for run in runs] == list(trace.cells["second"])
    with pytest.raises(DataError, match=r"Row 0: output must be a dict with one value for each of \['first', 'second'"):
        encode_rows(plan, [{"x": "a", "output": "u", "label": True}], "direct")
    with pytest.raises(DataError, match="Row 0, node 'second': a plate needs a list with one value an element"):
        encode_rows(plan, [{"x": "a", "output": {"first": "u", "second": "p"}, "label": True}], "direct")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_token_ids_travel_from_a_trace_through_a_file(tmp_path, ending):
    plan = two_llms().compile()
    trace = plan.sample({"question": ["a", "b"]}, seed=0)
    write_pairs(tmp_path / f"rows.{ending}", [unpaired_row(trace, run, bool(run), ["answer"]) for run in range(2)])
    runs = encode_rows(plan, read_rows(tmp_path / f"rows.{ending}"), "direct", empty="keep")
    for place, run in enumerate(runs):
        assert run.run["answer"].record["token_ids"] == trace.cells["answer"][place].record["token_ids"]
    assert [run.label for run in runs] == [False, True]


def test_csv_and_datasets_are_read(tmp_path):
    plan = two_llms().compile()
    (tmp_path / "rows.csv").write_text("question,completion,label,intermediates.draft\na,b,True,c\nd,e,false,f\n")
    runs = encode_rows(plan, read_rows(tmp_path / "rows.csv"), "direct")
    assert [(run.run["answer"].value, run.run["draft"].value, run.label) for run in runs] == [
        ("b", "c", True), ("e", "f", False)
    ]  # fmt: skip
    (again,) = encode_rows(plan, Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}]), "sampling")
    assert again.run["answer"].value == "b"
    chat = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    (said,) = encode_rows(plan, [{"question": "a", "completion": chat[1], "label": True}], "sampling")
    assert said.run["answer"].value == "b"


def test_an_input_of_such_a_name_stays_an_input():
    @node(Tabular({"a": {"u": 0.5, "v": 0.5}}))
    def n(label):
        return label

    plan = System(Input("label") >> n).compile()
    (pair,) = encode_pairs(plan, [{"label": "a", "chosen": "u", "rejected": "v"}], "direct")
    assert dict(pair.inputs) == {"label": "a"}
    with pytest.raises(DataError, match="Row 0: 'chosen' is missing"):
        encode_rows(plan, [{"label": "a"}], "direct")


def test_paths_of_images_are_those_of_the_rows_file(tmp_path):
    plan = checked_systems.pictures.compile()
    row = dict(zip(("output", "label"), ("a.png", True), strict=True))
    (tmp_path / "rows.jsonl").write_text(json.dumps({plan.system.inputs[0].name: "x", **row}) + "\n")
    (read,) = read_rows(tmp_path / "rows.jsonl")
    name = plan.system.outputs[0]
    whole = with_whole_paths(plan, read)["output"]
    assert str(whole).endswith("a.png")
    assert (whole == str(tmp_path / "a.png")) == plan.system[name].component.reads_files


def test_the_hash_of_the_data_and_the_key_of_a_run_say_what_they_should():
    def made(**changes):
        return encode_rows(QUESTIONS, [changed(**changes)], "direct")

    hashes = {pairs_hash(made(**c)) for c in ({}, {"label": False}, {"output": "no"}, {"weight": 2.0}, {"group": "a"})}
    assert len(hashes) == 5
    keys = [made(**c)[0].key for c in ({}, {"label": False}, {"weight": 2.0})]
    assert len(set(keys)) == 1  # what the reference scores
    assert made(output="no")[0].key != keys[0]


# Which losses take them


def config(folder, **options):
    return SysDPOConfig(output_dir=str(folder), report_to=[], use_cpu=True, **options)


def test_a_loss_of_pairs_names_those_that_need_none(tmp_path):
    with pytest.raises(DataError, match=r"Row 0: it is an unpaired row .* loss_type 'sigmoid' compares two runs; those "
                       r"that need no pairs are \['apo_zero_unpaired', 'bco', 'kto'\]"):  # fmt: skip
        SysDPOTrainer(two_llms(), config(tmp_path), train_dataset=unpaired(4))
    runs = encode_rows(two_llms().compile(), unpaired(4), "direct")
    with pytest.raises(DataError, match="Row 0 is an unpaired run. Loss_type 'sigmoid' compares two runs"):
        SysDPOTrainer(two_llms(), config(tmp_path), train_dataset=runs)


def test_a_loss_of_single_runs_names_those_of_pairs(tmp_path):
    with pytest.raises(DataError, match=r"Row 0: it is a pair .*, expected an unpaired row .* loss_type 'kto' takes "
                       r"single runs; those of pairs are \['aot', .*'sigmoid'"):  # fmt: skip
        SysDPOTrainer(two_llms(), config(tmp_path, loss_type="kto"), train_dataset=pair_rows(4))
    with pytest.raises(DataError, match="Row 2: it is a pair"):
        SysDPOTrainer(
            two_llms(), config(tmp_path, loss_type="kto"), train_dataset=[*unpaired(1), *pair_rows(1)],
        )  # fmt: skip
    with pytest.raises(DataError, match="Row 0: it is a pair"):
        SysDPOTrainer(
            two_llms(), config(tmp_path, loss_type="bco"), train_dataset=unpaired(2), eval_dataset=pair_rows(2)
        )  # fmt: skip


def validated(tmp_path, rows, *more):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CliRunner().invoke(app, ["validate", f"{SYSTEMS}:questions", str(tmp_path / "rows.jsonl"), *more])


def test_the_command_validates_them_and_writes_those_that_can_be_used(tmp_path):
    shown = validated(tmp_path, [GOOD, changed(label="maybe"), changed(output="")], "--output", f"{tmp_path}/u.jsonl")
    assert shown.exit_code == 1
    assert "3 rows: 1 can be used, 1 are dropped, 1 cannot." in shown.output
    assert "Row 1 (line 2): label must be true or false" in shown.output
    assert read_rows(tmp_path / "u.jsonl") == [GOOD]
    assert validated(tmp_path, [GOOD]).exit_code == 0
    assert "no node reads: note" in validated(tmp_path, [{**GOOD, "note": 1}]).output


def test_what_a_trace_writes_is_what_validation_takes():
    given = {"route": [Draw("short")], "facts": [Draw("")], "answer": [Draw("yes")]}
    row = unpaired_row(Trace({"question": ["q"]}, given), 0, True, ["answer"])
    assert validate_rows(QUESTIONS, [row], "direct").kept == (0,)


def test_new_runs_of_such_rows_do_not_have_the_old_ones_label():
    plan = two_llms().compile()
    assert sorted(columns_beside(plan, [changed(gold="g")])) == ["gold"]
    assert sorted(columns_beside(plan, [{"question": "q", "label": "of a class"}])) == ["label"]
