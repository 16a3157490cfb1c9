"""Rows of known public preference sets as pairs: each against values that are written by hand."""

import json

import families_page as families
import pandas
import pytest
from tiny import char_tokenizer, llama
from typer.testing import CliRunner

from sysdag import DataError, Input, System, node
from sysdag.cli import app
from sysdag.components import CausalLM
from sysdag.data import encode_pairs, validate_rows
from sysdag.traces.readers import read_all, read_rows
from sysdag.traces.reshaping import advice
from sysdag.traces.shapes import SHAPES


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be kind"}
# For each shape: rows as the set has them, and what has to become of each; a text instead of sides is why it is none.
CASES = {
    "orca_dpo_pairs": [
        (
            {"system": "be kind", "question": "q", "chosen": "a", "rejected": "b"},
            ([SYSTEM, user("q")], "a", "b"),
        ),
        ({"system": "", "question": "r", "chosen": "c", "rejected": ""}, ([user("r")], "c", "")),
        ({"question": "s", "chosen": "c", "rejected": "d"}, ([user("s")], "c", "d")),
    ],
    "ultrafeedback": [
        (
            {
                "instruction": "q",
                "completions": [
                    {"response": "good", "overall_score": 7.5, "fine-grained_score": 3.0},
                    {"response": "best", "overall_score": 6.0, "fine-grained_score": 4.5},
                    {"response": "best too", "overall_score": 9.0, "fine-grained_score": 4.5},
                    {"response": "worst", "overall_score": 8.0, "fine-grained_score": 1.25},
                    {"response": "unrated", "overall_score": None},
                ],
            },
            ("q", "best", "worst"),
        ),
        (
            {
                "instruction": "r",
                "completions": [
                    {"response": "bad", "overall_score": 2},
                    {"response": "good", "overall_score": "8"},
                    {"response": "bad too", "overall_score": 2},
                ],
            },
            ("r", "good", "bad too"),
        ),
        (
            {"instruction": "s", "completions": [{"response": each, "overall_score": 5.0} for each in "ab"]},
            ("s", "all of its scores are equal"),
        ),
        (
            {"instruction": "t", "completions": [{"response": "a", "overall_score": 5.0}]},
            ("t", "it has fewer than two scores"),
        ),
    ],
    "helpsteer3": [
        (
            {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": -2, "domain": "code"},
            ([user("q")], "a", "b"),
        ),
        (
            {
                "context": [user("q"), assistant("x"), user("r")],
                "response1": "a",
                "response2": "b",
                "overall_preference": 1,
            },
            ([user("q"), assistant("x"), user("r")], "b", "a"),
        ),
        (
            {"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
            ([user("q")], "overall_preference is 0, a tie"),
        ),
    ],
    "nectar": [
        (
            {
                "prompt": "\n\nHuman: q\n\nAssistant: ",
                "answers": [
                    {"answer": "second", "model": "m", "rank": 2.0},
                    {"answer": "best", "model": "n", "rank": 1.0},
                    {"answer": "worst", "model": "o", "rank": 3.0},
                ],
                "turns": 1,
            },
            ("\n\nHuman: q\n\nAssistant: ", "best", "worst"),
        ),
        (
            {"prompt": "r", "answers": [{"answer": each, "rank": 1.0} for each in "ab"]},
            ("r", "all of its ranks are equal"),
        ),
    ],
    "shp": [
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 5}, ("q", "a", "b")),
        ({"history": "r", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 1}, ("r", "b", "a")),
    ],
    "llamafactory_alpaca": [
        ({"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"}, ("q\nx", "a", "b")),
        ({"instruction": "r", "input": "", "chosen": "c", "rejected": "d"}, ("r", "c", "d")),
    ],
    "llamafactory_sharegpt": [
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "x"},
                    {"from": "human", "value": "r"},
                ],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
                "system": "be kind",
            },
            ([SYSTEM, user("q"), assistant("x"), user("r")], [assistant("a")], [assistant("b")]),
        ),
        (
            {
                "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            ([SYSTEM, user("q")], [assistant("a")], [assistant("b")]),
        ),
    ],
    "pickapic": [
        ({"caption": "q", "jpg_0": b"0", "jpg_1": b"1", "label_0": 1.0, "label_1": 0.0}, ("q", b"0", b"1")),
        ({"caption": "r", "jpg_0": b"0", "jpg_1": b"1", "label_0": 0.0, "has_label": True}, ("r", b"1", b"0")),
        ({"caption": "s", "jpg_0": b"0", "jpg_1": b"1", "label_0": 0.5}, ("s", "label_0 is 0.5, a tie")),
        (
            {"caption": "t", "jpg_0": b"0", "jpg_1": b"1", "label_0": 1.0, "has_label": False},
            ("t", "has_label is false, so nobody said which is better"),
        ),
    ],
}


def write(path, rows):
    if path.suffix == ".parquet":
        columns = dict.fromkeys(key for row in rows for key in row)
        frame = {name: pandas.Series([row.get(name) for row in rows], dtype=object) for name in columns}
        pandas.DataFrame(frame).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_pairs(folder, name, ending):
    """Reads a set's rows from a file and holds them to what `CASES` says; returns how many there are."""
    rows = [row for row, _ in CASES[name]]
    if ending == "parquet" and name == "ultrafeedback":  # a column of Parquet has one type
        rows = [
            {**row, "completions": [{**each, "overall_score": float(each["overall_score"] or "nan")} for each in
             row["completions"]]} for row in rows
        ]  # fmt: skip
    found = read_rows(write(folder / f"rows.{ending}", rows), shape=name)
    assert len(found) == len(rows)
    for row, (given, expected) in zip(found, CASES[name], strict=True):
        assert row["prompt"] == expected[0]
        if len(expected) == 2:
            assert row.unpaired == expected[1]
            assert "chosen" not in row
        else:
            assert (row["chosen"], row["rejected"]) == expected[1:]
            assert row.unpaired == ""
        others = given.keys() - SHAPES[name].columns - SHAPES[name].others
        assert {key: row[key] for key in others} == {key: given[key] for key in others}
    if ending == "jsonl":
        assert [row.place for row in found] == [f"line {number}" for number in range(1, len(rows) + 1)]
    return len(rows)


def endings_of(name):
    """JSON has no bytes."""
    return ["parquet"] if name == "pickapic" else ["jsonl", "parquet"]


@pytest.mark.parametrize(("name", "ending"), [(name, ending) for name in CASES for ending in endings_of(name)])
def test_each_set_becomes_the_pairs_that_it_means(tmp_path, name, ending):
    assert check_pairs(tmp_path, name, ending) == len(CASES[name])


def test_the_page_has_every_set():
    families.check_page("Preference files")


def test_every_shape_is_tried():
    assert CASES.keys() == SHAPES.keys()


def test_earlier_turns_make_messages_of_every_prompt(tmp_path):
    rows = [
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b", "history": [["x", "y"]], "system": "be kind"},
        {"instruction": "r", "input": "z", "chosen": "a", "rejected": "b", "history": []},
    ]
    found = read_rows(write(tmp_path / "rows.jsonl", rows), shape="llamafactory_alpaca")
    assert [row["prompt"] for row in found] == [
        [SYSTEM, user("x"), assistant("y"), user("q")],
        [user("r\nz")],
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("orca_dpo_pairs", {"question": 3}, "'question' must be a text, got 3"),
        ("ultrafeedback", {"completions": "no"}, "'completions' must be a list of objects, got 'no'"),
        ("helpsteer3", {"overall_preference": "much"}, "'overall_preference' must be a number, got 'much'"),
        ("nectar", {"answers": [{"answer": "a"}]}, "'answers' must be a number, got None"),
        ("shp", {"labels": 2}, r"'labels' must be 1 \(A is preferred\) or 0, got 2"),
        ("llamafactory_alpaca", {"input": ["x"]}, r"'input' must be a text, got \['x'\]"),
        ("llamafactory_sharegpt", {"conversations": [{"from": "function_call", "value": "f"}]}, "from 'function_call'"),
        ("llamafactory_sharegpt", {"chosen": {"from": "human", "value": "f"}}, "'chosen' must be a message from the"),
        ("llamafactory_sharegpt", {"rejected": "a"}, "'rejected' must hold messages with 'from' and 'value', got 'a'"),
    ],
)
def test_a_row_that_is_not_so_is_named(tmp_path, name, change, message):
    good = CASES[name][0][0]
    path = write(tmp_path / "rows.jsonl", [good, {**good, **change}, good])
    with pytest.raises(DataError, match=f"rows.jsonl, line 2: not of the shape '{name}': .*{message}"):
        read_rows(path, shape=name)
    found = read_all(path, shape=name)
    assert [place for place, _ in found.damaged] == ["line 2"]
    assert [row.place for row in found.rows] == ["line 1", "line 3"]


def test_a_shape_that_the_file_has_not_is_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [CASES["shp"][0][0]])
    with pytest.raises(DataError, match=r"has not the shape 'nectar', .*\['answers', 'prompt'\]: .* those of 'shp'\."):
        read_rows(path, shape="nectar")
    with pytest.raises(DataError, match="shape 'shq' is unknown; those that are known: orca_dpo_pairs, "):
        read_rows(path, shape="shq")
    write(path, [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="have a prompt, chosen and rejected as they are; leave the shape out"):
        read_rows(path, shape="ultrafeedback")


def test_columns_get_other_names(tmp_path):
    rows = [{"question": "q", "good": "a", "bad": "b"}, {"question": "r", "good": "c", "bad": "d", "n": 1}]
    path = write(tmp_path / "rows.jsonl", rows)
    found = read_rows(path, rename={"question": "prompt", "good": "chosen", "bad": "rejected"})
    assert found == [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "r", "chosen": "c", "rejected": "d", "n": 1},
    ]
    assert [row.place for row in found] == ["line 1", "line 2"]
    assert read_rows(path, rename={"good": "bad", "bad": "good"})[0] == {"question": "q", "good": "b", "bad": "a"}
    for rename, message in (
        ({"prompt": "question"}, r"no column 'prompt' to be renamed .*OLD=NEW\. Did you mean question=prompt\?"),
        ({"query": "prompt"}, r"no column 'query' .*; it has \['bad', 'good', 'n', 'question'\]"),
        ({"good": "bad"}, "has a column 'bad' already, so 'good' cannot be renamed to it"),
        ({"good": "x", "bad": "x"}, "two columns cannot be renamed to one"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(path, rename=rename)
    renamed = read_rows(write(path, [CASES["shp"][0][0]]), shape="shp", rename={"prompt": "question"})
    assert renamed[0]["question"] == "q"


@node(CausalLM(llama(), char_tokenizer(chat=True), max_new_tokens=8))
def answer(prompt):
    return prompt


CHAT_SYSTEM = """
from tiny import char_tokenizer, llama
from sysdag import Input, System, node
from sysdag.components import CausalLM

@node(CausalLM(llama(), char_tokenizer(chat=True), max_new_tokens=8))
def answer(prompt):
    return prompt

system = System(Input("prompt") >> answer)
"""
PLAN = System(Input("prompt") >> answer).compile()


def test_ties_are_dropped_with_their_reason(tmp_path):
    rows = read_rows(write(tmp_path / "r.jsonl", [row for row, _ in CASES["helpsteer3"]]), shape="helpsteer3")
    report = validate_rows(PLAN, rows, "direct")
    assert (report.kept, report.counts) == ((0, 1), {"unpaired": 1})
    assert str(report.problems[0]) == "Row 2 (line 3): it holds no preference: overall_preference is 0, a tie."
    assert [pair.chosen["answer"].value for pair in encode_pairs(PLAN, rows, "direct")] == ["a", "b"]


@pytest.mark.parametrize("name", CASES)
def test_an_error_names_the_option_that_reads_the_set(tmp_path, name):
    if name == "pickapic":
        pytest.skip("its pairs are images")
    path = write(tmp_path / "rows.jsonl", [row for row, _ in CASES[name]])
    (tmp_path / f"chat_{name}.py").write_text(CHAT_SYSTEM)
    system = f"{tmp_path}/chat_{name}.py:system"
    shown = CliRunner().invoke(app, ["validate", system, str(path)])
    assert shown.exit_code == 1
    assert f"--shape {name} " in shown.stdout
    with pytest.raises(DataError, match=f"--shape {name} "):
        encode_pairs(PLAN, read_rows(path), "direct")
    shown = CliRunner().invoke(app, ["validate", system, str(path), "--shape", name])
    assert shown.exit_code == 0, shown.output


def test_renaming_is_named_where_it_is_enough():
    assert "Or --rename question=prompt, whose prompt is the question as a text" in advice(
        ["question", "chosen", "rejected"]
    )
    assert advice(["query", "good"]).startswith("--rename OLD=NEW gives a column the name")
