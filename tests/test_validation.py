"""What is said of preference rows before any weights load, from Python and from the command line."""

import bz2
import gzip
import io
import json
import lzma
import random
import tracemalloc
from pathlib import Path

import checked_systems
import numpy
import pytest
from PIL import Image
from tiny import llama
from tokenizer_families import FAMILIES, family
from typer.testing import CliRunner

from sysdag import DataError, Input, System, node
from sysdag.cli import app
from sysdag.components import CausalLM
from sysdag.components.component import Component
from sysdag.data.checks import check_row
from sysdag.data.row_encoding import encode_row
from sysdag.data.screening import Screen
from sysdag.data.validation import validate_rows
from sysdag.traces.cells import Draw
from sysdag.traces.readers import iterate_rows, read_all, read_rows
from sysdag.traces.rows import Row

QUESTIONS = checked_systems.questions.compile()
PICTURES = checked_systems.pictures.compile()
SYSTEMS = str(Path(checked_systems.__file__))
GOOD = {
    "question": "q",
    "chosen": "yes",
    "rejected": "no",
    "chosen_intermediates": {"route": "short", "facts": ""},
    "rejected_intermediates": {"route": "long", "facts": "F"},
}


def changed(**changes):
    return {**GOOD, **changes}


def png(size=(8, 8), mode="RGB", shade=0):
    file = io.BytesIO()
    Image.new(mode, size, shade).save(file, "PNG")
    return file.getvalue()


def kinds_of(rows, plan=QUESTIONS, objective="direct", **options):
    report = validate_rows(plan, rows, objective, **options)
    return {(problem.row, problem.kind, problem.node, problem.side) for problem in report.problems}


def test_a_good_row_is_kept():
    report = validate_rows(QUESTIONS, [GOOD], "direct")
    assert (report.kept, report.counts, report.problems) == ((0,), {}, ())
    assert report.is_usable
    assert str(report) == "1 rows: 1 can be used, 0 are dropped, 0 cannot."


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"chosen": " \n"}, ("empty", "answer", "chosen")),
        ({"chosen": [{"role": "assistant", "content": ""}]}, ("empty", "answer", "chosen")),
        ({"chosen": Draw("", {"token_ids": [1], "finished": True})}, ("empty", "answer", "chosen")),
        ({"rejected": ""}, None),
        # 'long:q' takes 6 of the 24 positions, 17 characters and the end of sequence the rest.
        ({"rejected": "n" * 18}, ("over-long", "answer", "rejected")),
        ({"rejected": Draw("n", {"token_ids": [5] * 19, "finished": False})}, ("over-long", "answer", "rejected")),
        ({"chosen": "no", "chosen_intermediates": GOOD["rejected_intermediates"]}, ("identical", "", "")),
        ({"chosen_intermediates": {"route": "short"}}, ("missing", "", "")),
        ({"chosen": None}, ("invalid value", "answer", "chosen")),
        ({"chosen": 4}, ("invalid value", "answer", "chosen")),
        ({"chosen": "\ud800"}, ("invalid value", "answer", "chosen")),
        ({"chosen": Draw("a", {"token_ids": [46]})}, ("invalid value", "answer", "chosen")),
        ({"chosen": Draw("a", {"token_ids": "ab"})}, ("invalid value", "answer", "chosen")),
        ({"chosen": Draw({}, {"token_ids": [5]})}, ("invalid value", "answer", "chosen")),
        ({"chosen": Draw("a", {"token_ids": []})}, ("invalid value", "answer", "chosen")),
        ({"chosen_intermediates": {"route": "left", "facts": ""}}, ("invalid value", "route", "chosen")),
        ({"chosen_intermediates": {"route": numpy.zeros(2), "facts": ""}}, ("invalid value", "route", "chosen")),
        (
            {"chosen_intermediates": {"route": Draw("long", {"index": 0}), "facts": ""}},
            ("invalid value", "route", "chosen"),
        ),
        ({"chosen_intermediates": {**GOOD["chosen_intermediates"], "x": "a"}}, ("unknown node", "", "")),
        ({"chosen_intermediates": "short"}, ("wrong type", "", "")),
        ({"question": 7}, ("invalid value", "route", "chosen")),  # its function takes the length of a text
        ({"question": []}, None),
    ],
)  # fmt: skip
def test_every_kind_of_problem(changes, found):
    expected = set() if found is None else {(1, *found)}
    rows = [GOOD, changed(**changes), GOOD]
    assert expected <= kinds_of(rows)
    report = validate_rows(QUESTIONS, rows, "direct")
    assert report.kept == ((0, 1, 2) if found is None else (0, 2))


def test_as_many_tokens_as_can_be_scored_are_not_too_many():
    assert kinds_of([changed(rejected="n" * 17)]) == set()
    assert kinds_of([changed(rejected=Draw("n", {"token_ids": [5] * 18, "finished": False}))]) == set()
    assert QUESTIONS.system["answer"].component.longest_draw() == 23
    assert QUESTIONS.system["answer"].component.longest_draw("abc") == 21


def test_an_input_without_a_declared_type_is_the_functions_matter():
    report = validate_rows(QUESTIONS, [changed(question=7)], "direct")
    assert str(report.problems[0]) == (
        "Row 0, chosen, node 'route': its function fails on this row: TypeError: object of type 'int' has no len()"
    )


def test_prompts_that_are_not_known_leave_the_most_room():
    """Under Sampling the route is latent, so the answer's prompt is not known."""
    rows = [
        {"question": "q", "chosen": "n" * 22, "rejected": "a"},
        {"question": "q", "chosen": "n" * 23, "rejected": "a"},
    ]
    assert kinds_of(rows, objective="sampling") == {(1, "over-long", "answer", "chosen")}


def test_identical_is_told_by_all_that_is_observed():
    same = changed(chosen="no")
    assert kinds_of([same]) == set()
    assert kinds_of([same], objective="sampling") == {(0, "identical", "", "")}
    ids = [Draw("no", {"token_ids": ids, "finished": False}) for ids in ([5, 6], [5, 6], [7])]
    row = {"question": "q", "chosen": ids[0]}
    assert kinds_of([{**row, "rejected": ids[1]}], objective="sampling") == {(0, "identical", "", "")}
    assert kinds_of([{**row, "rejected": ids[2]}], objective="sampling") == set()
    (observed,) = QUESTIONS.system["answer"].component.observe(["no"])
    assert kinds_of([{**row, "rejected": "no"}], objective="sampling") == {(0, "identical", "", "")}  # in what it says
    assert kinds_of([{**row, "chosen": observed, "rejected": "no"}], objective="sampling") == {(0, "identical", "", "")}


def test_all_problems_of_a_row_are_told_and_the_row_is_counted_once():
    row = changed(chosen=4, rejected=5, chosen_intermediates={"route": "x"})
    report = validate_rows(QUESTIONS, [row, GOOD], "direct")
    assert [(problem.side, problem.node) for problem in report.problems] == [
        ("", ""), ("chosen", "answer"), ("chosen", "route"), ("rejected", "answer"),
    ]  # fmt: skip
    assert report.counts == {"missing": 1, "invalid value": 1}
    assert (report.rows, report.errors, report.dropped, report.kept) == (2, 1, 0, (1,))
    assert not report.is_usable


def test_the_limit_is_of_each_kind_and_everything_is_counted():
    rows = [*[changed(chosen="")] * 50, changed(chosen=4), GOOD]
    report = validate_rows(QUESTIONS, rows, "direct", limit=3)
    assert [problem.kind for problem in report.problems] == ["empty"] * 3 + ["invalid value"]
    assert report.counts == {"empty": 50, "invalid value": 1}
    assert "empty (dropped): 50 rows\n  Row 0, chosen, node 'answer'" in str(report)
    assert str(report).count("  ...") == 1


def test_strict_makes_errors_of_what_is_dropped():
    rows = [GOOD, changed(chosen="")]
    assert validate_rows(QUESTIONS, rows, "direct").is_usable
    report = validate_rows(QUESTIONS, rows, "direct", strict=True)
    assert (report.errors, report.is_usable) == (1, False)
    assert str(report).startswith("2 rows: 1 can be used, 1 cannot.\n\nempty (error): 1 row\n")
    with pytest.raises(DataError, match=r"p\.jsonl cannot be used\.\n2 rows"):
        report.raise_if_unusable("p.jsonl")


def test_without_a_row_left_nothing_is_usable():
    for rows in ([], [changed(chosen="")]):
        report = validate_rows(QUESTIONS, rows, "direct")
        assert report.errors == 0
        assert not report.is_usable
        with pytest.raises(DataError, match="No row is left|There is no row"):
            report.raise_if_unusable()


def test_images_are_checked_by_the_configs_alone(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    drawn = {"prompt": "a", "chosen_intermediates": {"captions": "a,b"}, "rejected_intermediates": {"captions": "a"}}
    latents = Draw(None, {"latents": numpy.zeros((1, 4, 4), "float32")})

    def row(chosen, rejected=None):
        return Row({**drawn, "chosen": chosen, "rejected": rejected or [png(shade=9)]}, folder=tmp_path, place="line 3")

    good = [Image.new("RGB", (8, 8)), "good.png"]
    assert kinds_of([row(good), row([latents, latents])], PICTURES) == set()
    bad = [
        "bad.png", png((5, 8)), b"GIF89a", 4, latents.record["latents"], numpy.zeros((3, 8, 8), int),
        Draw(None, {"latents": numpy.zeros((2, 4, 4), "float32")}), Draw(None, {"latents": [1.0]}), "\0",
    ]  # fmt: skip
    found = kinds_of([row(["good.png", each]) for each in bad], PICTURES, limit=99)
    assert found == {(number, "invalid value", "image", "chosen") for number in range(len(bad))}
    assert kinds_of([row(good[:1]), row([])], PICTURES) == {
        (0, "invalid value", "image", "chosen"), (1, "empty", "image", "chosen"),
    }  # fmt: skip
    (problem,) = validate_rows(PICTURES, [row(good[:1])], "direct").problems
    assert str(problem) == "Row 0 (line 3), chosen, node 'image': its plate has 2 elements, but 1 values are given."


def test_no_weights_are_loaded():
    """There are none in these systems' folders, and whoever asks for them is refused."""
    for plan in (QUESTIONS, PICTURES):
        for name in ("answer", "image"):
            if name in plan.order:
                with pytest.raises(OSError, match="no file named|Can't load"):
                    plan.system[name].component.module


class Weighty(Component):
    """Observes with its weights alone, which are not there."""

    likelihood = "exact"

    @property
    def module(self):
        raise AssertionError("weights were loaded")

    def observe(self, values):
        return [Draw(value, {"weight": self.module}) for value in values]

    def check(self, values):
        if 0 in values:
            raise DataError("0 cannot be drawn.", element=values.index(0))
        return [Draw(value) for value in values]

    def sample(self, inputs, *, generator=None):
        raise AssertionError

    def save_pretrained(self, folder):
        raise AssertionError

    @classmethod
    def from_pretrained(cls, folder, options):
        raise AssertionError


def test_a_component_is_asked_by_check_and_not_by_observe():
    from sysdag import Input, System, node

    @node(Weighty())
    def y(x):
        return x

    plan = System(Input("x") >> y).compile()
    rows = [{"x": 1, "chosen": 2, "rejected": 3}, {"x": 1, "chosen": 0, "rejected": 3}]
    assert kinds_of(rows, plan) == {(1, "invalid value", "y", "chosen")}
    with pytest.raises(AssertionError, match="weights were loaded"):
        encode_row(plan, rows[0], 0, "direct")


# The command


def validate(*arguments, code=0):
    result = CliRunner().invoke(app, ["validate", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def data(tmp_path):
    """One good row, one malformed line, one that is dropped, one that cannot be used."""
    lines = [
        json.dumps(GOOD),
        '{"question": ',
        "",
        json.dumps(changed(chosen="")),
        json.dumps(changed(chosen=4)),
        "[1]",
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "p.jsonl"


def test_the_command_tells_everything_at_once(data):
    text = validate(f"{SYSTEMS}:questions", data, code=1).stdout
    assert text.startswith("5 rows: 1 can be used, 1 are dropped, 3 cannot.\n")
    assert "malformed (error): 2 rows\n  Line 2: not JSON: " in text
    assert "\n  Line 6: a row is an object, got list [1]." in text
    assert "empty (dropped): 1 row\n  Row 1 (line 4), chosen, node 'answer': the completion is empty." in text
    assert "invalid value (error): 1 row\n  Row 2 (line 5), chosen, node 'answer': CausalLM(" in text


def test_the_command_writes_what_can_be_used(data, tmp_path):
    for ending in ("jsonl", "parquet"):
        validate(f"{SYSTEMS}:questions", data, "--output", tmp_path / f"clean.{ending}", code=1)
        assert read_rows(tmp_path / f"clean.{ending}") == [GOOD]
        validate(f"{SYSTEMS}:questions", tmp_path / f"clean.{ending}")
    validate(f"{SYSTEMS}:questions", data, "--output", "clean.txt", code=2)


def test_paths_are_whole_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "images" / "b.png").write_bytes(png(shade=3))
    row = {"prompt": "a.png", "chosen": ["a.png"], "rejected": ["b.png", "a.png"],
           "chosen_intermediates": {"captions": "a.png"}, "rejected_intermediates": {"captions": "a,b"}}  # fmt: skip
    (tmp_path / "images" / "p.jsonl").write_text(json.dumps(row))
    for folder, start in (("images", ""), ("other", f"{tmp_path}/images/")):
        output = tmp_path / folder / "clean.jsonl"
        validate(f"{SYSTEMS}:pictures", "images/p.jsonl", "--output", output)
        (found,) = read_rows(output)
        assert found == {**row, "chosen": [f"{start}a.png"], "rejected": [f"{start}b.png", f"{start}a.png"]}
        validate(f"{SYSTEMS}:pictures", output)


def test_the_commands_json_and_options(data, tmp_path):
    found = json.loads(validate(f"{SYSTEMS}:questions", data, "--json", "--limit", 1, code=1).stdout)
    assert (found["usable"], found["rows"], found["kept"], found["dropped"], found["errors"]) == (False, 5, 1, 1, 3)
    assert found["counts"] == {"malformed": 2, "empty": 1, "invalid value": 1}
    assert found["problems"][0]["source"] == "line 2"
    assert len(found["problems"]) == 3
    clean = tmp_path / "clean.jsonl"
    clean.write_text(json.dumps(GOOD) + "\n" + json.dumps(changed(chosen="")))
    validate(f"{SYSTEMS}:questions", clean)
    validate(f"{SYSTEMS}:questions", clean, "--strict", code=1)
    clean.write_text(json.dumps({"question": "q", "chosen": "a", "rejected": "b"}))
    validate(f"{SYSTEMS}:questions", clean, "--objective", "sampling")
    assert "has no value of node 'route'" in validate(f"{SYSTEMS}:questions", clean, code=1).stdout


def test_a_file_that_cannot_be_read_is_one_message(tmp_path):
    for name in ("none.jsonl", "p.parquet"):
        if name == "p.parquet":
            (tmp_path / name).write_bytes(b"no")
        result = validate(f"{SYSTEMS}:questions", tmp_path / name, code=1)
        assert result.stderr.startswith("Error: ")
        assert "Traceback" not in result.output


# What is told many at once, held against what is found row by row.


PROMPTS = [
    "What is the sum of 2 and 3, said the judge?", "a b c", " a b c ", "ab", "a", "", " ", "one two", "a\tb\nc d",
    "<|im_start|>user hello there", "hi <|im_", "ünï ☃ snow man", "\u0958 \ufdfa two words", "[1, 2, 3] and then",
    '[{"role": "user", "content": "hi"}]', "question: is it? answer:", "a\u00a0b c d", "x" * 300, "very long " * 30,
]  # fmt: skip
COMPLETIONS = [
    "it is 5, and 42.", "B", " two words ", "", "  ", "ünï ☃", "end|> of it", "<|im_end|>", "</s>", "it is</s>",
    "said <|endoftext|> and more", "long " * 60, "\ufdfa" * 5, "{not json", "hi there",
]  # fmt: skip


def plain_systems(tokenizer, max_length, wraps):
    model = llama(vocab_size=max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1), max_position_embeddings=512)
    question = Input("question")

    @node(CausalLM(model, tokenizer, max_length=max_length, max_new_tokens=40))
    def draft(question):
        return f"Draft it. {question}" if wraps else question

    @node
    def shouted(draft):
        return draft.upper()

    @node(CausalLM(model, tokenizer, max_length=max_length, max_new_tokens=40))
    def answer(question, shouted):
        return f"{question} said {shouted} so" if wraps else question

    single = System(question >> draft)
    return single.compile(), System(question >> draft >> shouted, (question & shouted) >> answer).compile()


@pytest.mark.parametrize("name", [each.name for each in FAMILIES])
def test_a_row_that_passes_at_once_has_no_problem_by_itself(name):
    passed = rows_seen = 0
    tokenizer = family(name).build()
    for max_length, wraps in ((None, True), (120, True), (400, False)):
        single, double = plain_systems(tokenizer, max_length, wraps)
        generator = random.Random(f"{name} {max_length}")
        for plan, objective in ((single, "direct"), (double, "direct"), (double, "sampling")):
            rows = []
            for _ in range(25):
                pick = generator.choice
                row = {"question": pick(PROMPTS), "chosen": pick(COMPLETIONS), "rejected": pick(COMPLETIONS)}
                if objective == "direct" and plan is double:
                    row |= {f"{side}_intermediates": {"draft": pick(COMPLETIONS)} for side in ("chosen", "rejected")}
                rows.append(row)
            for row, passes in zip(rows, Screen(plan, objective).passing(rows), strict=True):
                if passes:
                    assert check_row(plan, row, 0, objective, "drop") == [], row
                passed, rows_seen = passed + passes, rows_seen + 1
    can = Screen(single, "direct")._takes
    assert (passed > rows_seen / 40) == bool(can), (passed, rows_seen)


@pytest.mark.parametrize("change", [
    {"chosen": "no"}, {"chosen": " "}, {"chosen": 3}, {"weight": 2.0}, {"weight": "x"}, {"tools": "[]"},
    {"question": 4}, {"question": None}, {"chosen": [{"role": "assistant", "content": "hi"}]}, {"margin": 1.0},
    {"group": "g"}, {"rejected": "half \ud83d"}, {"other": 1},
    {"chosen": '[{"role": "assistant", "content": "x"}]'},
])  # fmt: skip
def test_a_report_is_the_same_whatever_is_told_at_once(change, monkeypatch, tmp_path):
    plan, _ = plain_systems(family("GPT-2").build(), None, True)
    plain = {"question": "What is the sum of it?", "chosen": "it is 5", "rejected": "no"}
    rows = [plain, {**plain, **change}, plain, {k: v for k, v in plain.items() if k != "rejected"}, plain]
    found = validate_rows(plan, iter(rows), "direct")
    monkeypatch.setattr(Screen, "passing", lambda self, rows: [False] * len(rows))
    assert validate_rows(plan, rows, "direct") == found
    assert 0 in found.kept


def test_a_function_that_fails_on_a_row_is_found_row_by_row():
    model, tokenizer = llama(vocab_size=500, max_position_embeddings=512), family("GPT-2").build()

    @node(CausalLM(model, tokenizer))
    def answer(question):
        return f"number {int(question)} of all there are"

    plan = System(Input("question") >> answer).compile()
    rows = [{"question": question, "chosen": "yes", "rejected": "no"} for question in ("1", "two", "3")]
    report = validate_rows(plan, iter(rows), "direct")
    assert report.kept == (0, 2)
    assert {(problem.row, problem.kind) for problem in report.problems} == {(1, "invalid value")}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "ndjson"])
def test_lines_are_read_as_they_are_asked_for_as_all_at_once_are(ending, tmp_path):
    text = '{"a": 1}\n\n{"a": \n[1]\n{"a": {"__tuple__": [1]}}\r\n{"a": "\u2028"}'
    opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(ending.rpartition(".")[2], open)
    path = tmp_path / f"rows.{ending}"
    with opened(path, "wb") as file:
        file.write(text.encode())
    expected = read_all(path).in_order()
    found = list(iterate_rows(path))
    assert found == expected
    about = ("place", "folder", "damage")
    assert [[getattr(row, name) for name in about] for row in found] == [
        [getattr(row, name) for name in about] for row in expected
    ]
    assert len(found) == 5
    if ending != "jsonl" and ending != "ndjson":
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DataError, match="is no .* file, or is damaged"):
            list(iterate_rows(path))


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_lines_of_another_encoding_are_read_as_a_whole(encoding, ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending]('{"a": "ü"}\n{"a": "b"}\n'.encode(encoding)))
    rows = list(iterate_rows(path))
    assert [row.damage for row in rows] == ["", ""]
    assert [row["a"] for row in rows] == ["ü", "b"]


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
def test_lines_of_a_file_that_is_not_whole_are_what_all_at_once_are(ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    whole = COMPRESS[ending](b'{"a": "b"}\n{"a": "c"}\n')
    flipped = [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in range(len(whole))]
    utf16 = COMPRESS[ending]('{"a": "b"}'.encode("utf-16-le"))
    refused = 0
    for content in [*flipped, *(whole[:at] for at in range(len(whole))), whole + b"behind", whole + b"\0", utf16]:
        path.write_bytes(content)
        at_once = told_rows(path, lambda path: read_all(path).in_order())
        assert told_rows(path, iterate_rows) == at_once
        refused += isinstance(at_once, str)
    assert refused > len(whole)


def told_rows(path, read):
    """Each row with what is wrong with it, or the error about the whole file."""
    try:
        return [(row, row.damage) for row in read(path)]
    except DataError as error:
        return str(error)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Of plain texts: what is kept of a row is its number."""
    plan, _ = plain_systems(family("GPT-2").build(), None, True)
    row = {"question": "What is the sum of it?" * 3, "chosen": "it is 5" * 9, "rejected": "no" * 30}
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for _ in range(20_000))
    size = (tmp_path / "rows.jsonl").stat().st_size
    validate_rows(plan, [row], "direct")
    tracemalloc.start()
    report = validate_rows(plan, iterate_rows(tmp_path / "rows.jsonl"), "direct")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(report.kept) == 20_000
    assert peak < size
