import copy
import json
import logging

import datasets
import numpy
import pytest
from tiny import ALPHABET, char_tokenizer, llama

from sysdag import DataError, Input, PlanError, SysDPOConfig, SysDPOTrainer, System, Trace, node
from sysdag.components import CausalLM, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.data.preferences import collate
from sysdag.data.validation import validate_rows
from sysdag.traces.cells import Draw
from sysdag.traces.pairs import preference_row, write_pairs
from sysdag.traces.readers import read_rows
from sysdag.traces.rows import Row

X = Input("question")
SIDES = ("chosen", "rejected")
LM = CausalLM(llama(), char_tokenizer(chat=True), max_new_tokens=4)
TABLE = Tabular({k: {"s": 0.5, "t": 0.5} for k in ("a", "b", "c")})


@node(LM)
def draft(question):
    return question


@node
def parts(draft) -> list:
    return list(draft)


@node(TABLE)
def pick(parts):
    return parts


PLAN = System(X >> draft >> parts, parts.each() >> pick).compile()


@node(Tabular({k: {"s": 0.5, "t": 0.5} for k in ALPHABET}))
def choose(parts):
    return parts


SEED = 0  # of drafts that differ and hold something
SAMPLED = System(X >> draft >> parts, parts.each() >> choose).compile()  # takes whatever is drafted
ROW = {
    "question": "q",
    "chosen": ["s", "t"],
    "rejected": ["t"],
    "chosen_intermediates": {"draft": "ab"},
    "rejected_intermediates": {"draft": "c"},
}


def test_values_become_draws_and_plates_tuples():
    (pair,) = encode_pairs(PLAN, [ROW], "direct")
    assert pair.inputs == {"question": "q"}
    assert (pair.chosen["draft"].value, pair.chosen["draft"].record) == ("ab", {})  # the prompt decides its tokens
    assert [draw.value for draw in pair.chosen["pick"]] == ["s", "t"]
    assert [draw.value for draw in pair.rejected["pick"]] == ["t"]


def test_draws_of_a_trace_keep_their_token_ids():
    trace = SAMPLED.sample({"question": ["q"]}, seed=SEED)
    cell = trace.cells["draft"][0]
    ids = cell.record["token_ids"]
    row = {**ROW, "chosen": ["s"] * len(cell.value), "chosen_intermediates": {"draft": cell}}
    (pair,) = encode_pairs(SAMPLED, [row], "direct")
    assert len(ids) > 1
    assert pair.chosen["draft"].record["token_ids"] is ids


def test_a_single_input_may_be_called_prompt():
    row = {**ROW, "prompt": "p"}
    assert encode_pairs(PLAN, [row], "direct")[0].inputs == {"question": "q"}
    del row["question"]
    assert encode_pairs(PLAN, [row], "direct")[0].inputs == {"question": "p"}


def test_sampling_observes_the_outputs_alone():
    (pair,) = encode_pairs(PLAN, [ROW], "sampling")
    assert pair.chosen.keys() == {"pick"}


def test_several_outputs_are_given_by_name():
    @node(TABLE)
    def other(question):
        return "a"

    plan = System(X >> other, X >> draft).compile()
    row = {"question": "q", "chosen": {"draft": "a", "other": "s"}, "rejected": {"draft": "b", "other": "t"}}
    assert encode_pairs(plan, [row], "direct")[0].chosen["other"].value == "s"
    with pytest.raises(
        DataError, match=r"Row 0: chosen must be a dict with one value for each of \['draft', 'other'\], got str"
    ):
        encode_pairs(plan, [{**row, "chosen": "s"}], "direct")


def test_collate_gives_one_trace_a_side():
    pairs = encode_pairs(PLAN, [ROW, {**ROW, "question": "r"}], "direct")
    chosen, rejected = collate(pairs)
    assert isinstance(chosen, Trace)
    assert chosen["question"] == rejected["question"] == ["q", "r"]
    assert chosen["pick"] == [["s", "t"], ["s", "t"]]
    assert rejected["draft"] == ["c", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "Row 1, chosen, node 'pick': a plate needs a list.*None"),
        ({"rejected": ["s", "w"]}, "Row 1, rejected, node 'pick': .*'w' is none of its values"),
        ({"chosen_intermediates": {}}, "Row 1: chosen has no value of node 'draft'.*Give it in chosen_intermediates"),
        ({"chosen_intermediates": None}, "Row 1: chosen has no value of node 'draft'"),
        ({"chosen_intermediates": "ab"}, "Row 1: chosen_intermediates must be a dict by node, got str"),
        ({"rejected_intermediates": {"draft": 4}}, "Row 1, rejected, node 'draft': .*completion must be a string"),
        (
            {"rejected_intermediates": {"dr": "a"}},
            r"Row 1: rejected_intermediates has 'dr'; the other nodes are \['draft', 'parts'\]",
        ),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(change, message):
    with pytest.raises(DataError, match=message):
        encode_pairs(PLAN, [ROW, {**ROW, **change}], "direct")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "Row 0: expected a dict, got str"),
        ({"chosen": ["s"], "rejected": ["t"]}, "Row 0: input 'question' is missing"),
        ({"question": "q", "rejected": ["t"]}, "Row 0: 'chosen' is missing"),
    ],
)
def test_a_row_without_its_columns_is_named(row, message):
    with pytest.raises(DataError, match=message):
        encode_pairs(PLAN, [row], "direct")


def test_datasets_and_files_are_rows_like_any_others(tmp_path):
    drafts = {f"{side}_intermediates": {"draft": "a"} for side in SIDES}
    rows = [
        {"prompt": "q", "chosen": ["s"], "rejected": ["t"], **drafts},
        {"prompt": "r", "chosen": ["t"], "rejected": ["s"], **drafts},
    ]
    expected = [pair.key for pair in encode_pairs(PLAN, rows, "direct")]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_json(tmp_path / "rows.jsonl")
    for found in (
        data,
        data.to_iterable_dataset(),
        read_rows(tmp_path / "rows.parquet"),
        read_rows(tmp_path / "rows.jsonl"),
    ):
        assert [pair.key for pair in encode_pairs(PLAN, found, "direct")] == expected


def test_the_rows_of_a_dataset_are_what_its_transform_makes_of_them():
    data = datasets.Dataset.from_list([{"text": "q", **{side: ROW[side] for side in SIDES}}])
    changed = data.with_transform(lambda batch: {**batch, "prompt": [text.upper() for text in batch["text"]]})
    (pair,) = encode_pairs(PLAN, changed, "sampling")
    assert pair.inputs == {"question": "Q"}


def test_the_trainer_takes_a_dataset(tmp_path):
    rows = [ROW, {**ROW, "question": "r"}]
    args = SysDPOConfig(output_dir=str(tmp_path), objective="direct", report_to=[], use_cpu=True)
    for given in (rows, datasets.Dataset.from_list(rows)):
        held_out = datasets.DatasetDict(a=datasets.Dataset.from_list(rows[1:]))
        trainer = SysDPOTrainer(PLAN.system, args, train_dataset=given, eval_dataset=held_out)
        assert [pair.inputs["question"] for pair in trainer.train_dataset] == ["q", "r"]
        assert [pair.inputs["question"] for pair in trainer.eval_dataset["a"]] == ["r"]


def test_what_a_dataset_fills_in_is_not_there():
    """Arrow gives every row the keys that any of them has."""
    rows = [ROW, {**ROW, "chosen_intermediates": {"draft": "ab", "parts": ["c", "d"]}}]
    first, second = encode_pairs(PLAN, datasets.Dataset.from_list(rows), "direct")
    assert "parts" not in first.chosen
    assert second.chosen["parts"].value == ["c", "d"]


def test_written_draws_survive_a_dataset(tmp_path):
    trace = SAMPLED.sample({"question": ["q", "q"]}, seed=SEED)
    write_pairs(tmp_path / "pairs.parquet", [preference_row(trace, 0, 1, ["choose"])])
    data = datasets.Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "cache"))
    (pair,) = encode_pairs(SAMPLED, data, "direct")
    assert pair.chosen["draft"].record == trace.cells["draft"][0].record
    assert pair.rejected["draft"].log_prob == trace.cells["draft"][1].log_prob


def test_a_draw_without_a_record_is_its_value():
    row = {**ROW, "chosen": [Draw("s"), "t"], "chosen_intermediates": {"draft": Draw("ab")}}
    assert [pair.key for pair in encode_pairs(PLAN, [row, ROW], "direct")] == [
        encode_pairs(PLAN, [ROW], "direct")[0].key
    ] * 2


def test_an_error_names_the_line_of_a_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "rejected": ["w"]}) + "\n")
    with pytest.raises(DataError, match=r"^Row 1 \(line 3\), rejected, node 'pick': .*'w' is none of its values"):
        encode_pairs(PLAN, read_rows(tmp_path / "rows.jsonl"), "direct")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Draw("a", {"token_ids": [10**6]}), "has the token id 1000000, but the model has 45; another model made it"),
        (Draw("a", {"token_ids": [True]}), r"needs its token_ids, a list of integers, got \[True\]"),
        (Draw(3, {"token_ids": [1]}), "a draw's value is its text, got 3"),
    ],
)
def test_draws_of_another_component_are_refused(value, message):
    with pytest.raises(DataError, match=rf"Row 0, chosen, node 'draft': .*{message}"):
        encode_pairs(PLAN, [{**ROW, "chosen_intermediates": {"draft": value}}], "direct")
    with pytest.raises(
        DataError, match="Row 0, chosen, node 'pick': .*has the index 1; it was made by a component with"
    ):
        encode_pairs(PLAN, [{**ROW, "chosen": [Draw("s", {"index": 1})]}], "direct")


CONVERSATION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", ("a", "b")),
        ({"chosen": "the cat", "rejected": "the dog"}, "the", (" cat", " dog")),
        ({"chosen": "q: a", "rejected": "q: b"}, "q:", (" a", " b")),
        ({"question": "q", "chosen": "the cat", "rejected": "the dog"}, "q", ("the cat", "the dog")),
        ({"prompt": CONVERSATION[:1], "chosen": CONVERSATION[1:], "rejected": "b"}, CONVERSATION[:1], ("a", "b")),
        (
            {"chosen": CONVERSATION, "rejected": [CONVERSATION[0], {"role": "assistant", "content": "b"}]},
            CONVERSATION[:1],
            ("a", "b"),
        ),
        (
            {
                "prompt": "q",
                "chosen": CONVERSATION,
                "rejected": [CONVERSATION[0], {"role": "assistant", "content": "b"}],
            },
            CONVERSATION[:1],
            ("a", "b"),
        ),
    ],
)
def test_trls_formats(row, prompt, completions):
    plan = System(X >> draft).compile()
    (pair,) = encode_pairs(plan, [row], "direct")
    assert pair.inputs == {"question": prompt}
    assert (pair.chosen["draft"].value, pair.rejected["draft"].value) == completions


@pytest.mark.parametrize(
    ("prompt", "first", "expected"),
    [
        ("q", [CONVERSATION[0]], "q"),
        ("q", [{"role": "system", "content": "be kind"}, CONVERSATION[0]], None),
        ("another", [CONVERSATION[0]], None),
    ],
)
def test_an_input_of_text_gets_the_rows_text_where_it_is_the_whole_prompt(prompt, first, expected):
    completions = {side: [*first, {"role": "assistant", "content": side}] for side in SIDES}
    plan = System(Input("question", str) >> draft).compile()
    if expected is None:
        with pytest.raises(DataError, match="input 'question' must be str, got list"):
            encode_pairs(plan, [{"prompt": prompt, **completions}], "direct")
    else:
        (pair,) = encode_pairs(plan, [{"prompt": prompt, **completions}], "direct")
        assert pair.inputs == {"question": expected}
        assert (pair.chosen["draft"].value, pair.rejected["draft"].value) == SIDES


def test_arrays_where_texts_should_be_are_told():
    messages = [{"role": "user", "content": numpy.zeros(2)}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="Row 0: input 'question' is missing"):
        encode_pairs(
            System(X >> draft).compile(), [{"chosen": messages, "rejected": copy.deepcopy(messages)}], "direct"
        )
    with pytest.raises(DataError, match="Row 0: chosen_intermediates must be a dict by node, got ndarray"):
        encode_pairs(PLAN, [{**ROW, "chosen_intermediates": numpy.zeros(2)}], "direct")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "a", "rejected": "b"},
        {"chosen": CONVERSATION[1:], "rejected": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_rows_that_share_no_prompt_lack_one(row):
    with pytest.raises(DataError, match="Row 0: input 'question' is missing"):
        encode_pairs(System(X >> draft).compile(), [row], "direct")


TEXTS = System(Input("question", str) >> node(LM, name="draft")(lambda question: question)).compile()
TEXT = {"question": "q", "chosen": "yes", "rejected": "no"}
DROPPED = {
    "identical": {"rejected": "yes"},
    "empty": {"chosen": " \n"},
    "over-long": {"rejected": "n" * 300},
    "unpaired": None,
}


def rows_of_every_kind():
    rows = [{**TEXT, **(change or {})} for change in DROPPED.values()]
    rows[-1] = Row(rows[-1], unpaired="a tie")
    return [TEXT, *rows, {**TEXT, "rejected": ""}, {**TEXT, "rejected": "maybe"}]


def test_python_trains_on_the_rows_that_the_command_trains_on(caplog):
    """Those that `validate_rows` keeps; what is dropped is said."""
    rows = rows_of_every_kind()
    report = validate_rows(TEXTS, rows, "direct")
    assert report.kept == (0, 5, 6)
    assert report.counts == dict.fromkeys(DROPPED, 1)
    with caplog.at_level(logging.WARNING):
        pairs = encode_pairs(TEXTS, rows, "direct")
    assert [pair.rejected["draft"].value for pair in pairs] == ["no", "", "maybe"]
    assert "4 of 7 rows are dropped. identical (1 of 7): Row 1: chosen and rejected are the same." in caplog.text
    assert "unpaired (1 of 7): Row 4: it holds no preference: a tie." in caplog.text
    with pytest.raises(DataError, match=r"No row is left\. identical \(2 of 2\): Row 0: chosen and rejected"):
        encode_pairs(TEXTS, rows[1:2] * 2, "direct")


def test_an_empty_rejected_or_intermediate_text_is_a_preference():
    """Its score is that of the end of sequence alone."""
    (pair,) = encode_pairs(TEXTS, [{**TEXT, "rejected": ""}], "direct")
    [draw] = LM.in_context(["q"], [pair.rejected["draft"]])
    assert draw.record["token_ids"] == [LM.tokenizer.eos_token_id]
    chained = System(X >> draft, draft >> node(LM, name="last")(lambda draft: draft)).compile()
    row = {**TEXT, "chosen_intermediates": {"draft": ""}, "rejected_intermediates": {"draft": "a"}}
    assert validate_rows(chained, [row], "sampling").kept == (0,)
    row["chosen"] = ""
    assert validate_rows(chained, [row], "sampling").counts == {"empty": 1}


def test_empty_chosen_texts_can_be_kept(tmp_path):
    row = {**TEXT, "chosen": ""}
    assert validate_rows(TEXTS, [row], "direct", empty="keep").kept == (0,)
    (pair,) = encode_pairs(TEXTS, [row], "direct", empty="keep")
    assert pair.chosen["draft"].value == ""
    for empty, count in (("drop", 1), ("keep", 2)):
        args = SysDPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, empty=empty)
        assert len(SysDPOTrainer(TEXTS.system, args, train_dataset=[row, TEXT]).train_dataset) == count
    for make in (
        lambda: SysDPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, empty="no"),
        lambda: encode_pairs(TEXTS, [TEXT], "direct", empty="no"),
        lambda: validate_rows(TEXTS, [TEXT], "direct", empty="no"),
    ):
        with pytest.raises(PlanError, match="empty must be 'drop' or 'keep', got 'no'"):
            make()


def test_columns_that_no_node_reads_are_said_once(caplog):
    rows = [{**TEXT, "score": 1, "": "0"}, {**TEXT, "chosen_intermediates": None, "id": 2}]
    report = validate_rows(TEXTS, rows, "direct")
    assert report.unread == ("score", "", "id")
    assert str(report).endswith("\n\nColumns that no node reads: score, '', id.")
    assert validate_rows(TEXTS, rows, "sampling").unread == ("score", "", "chosen_intermediates", "id")
    with caplog.at_level(logging.WARNING):
        encode_pairs(TEXTS, rows, "direct")
    assert caplog.text.count("Columns that no node reads: score, '', id.") == 1
    assert validate_rows(TEXTS, [{"prompt": "q", **TEXT}], "direct").unread == ("prompt",)
    assert validate_rows(TEXTS, [{**TEXT, "prompt": "q"}, {"prompt": "q", **TEXT}], "direct").unread == ("prompt",)


def test_prompts_that_would_be_cut_are_counted(caplog):
    """128 positions, of which 4 are for the completion: a prompt of 130 characters loses 6 tokens."""
    rows = [{**TEXT, "question": "q" * 124}, {**TEXT, "question": "q" * 130}, TEXT]
    report = validate_rows(TEXTS, rows, "direct")
    assert report.kept == (0, 1, 2)
    assert (report.counts, report.dropped, report.errors) == ({"cut prompt": 1}, 0, 0)
    assert (
        "cut prompt (kept): 1 row\n  Row 1, node 'draft': the prompt loses 6 tokens, for which there is no room "
        "(max_length)." in str(report)
    )
    assert len(LM.prompt_ids(["q" * 130])[0]) == 124
    assert validate_rows(TEXTS, rows, "direct", strict=True).errors == 0
    # Under Sampling the latent node's prompt is known, too.
    chained = System(X >> draft, draft >> node(LM, name="last")(lambda draft: draft)).compile()
    assert validate_rows(chained, rows, "sampling").counts == {"cut prompt": 1}
    with caplog.at_level(logging.WARNING):
        assert len(encode_pairs(TEXTS, rows, "direct")) == 3
    assert "cut prompt (1 of 3): Row 1" in caplog.text


def test_messages_that_are_written_down_as_a_text_are_said():
    text = json.dumps(CONVERSATION[1:])
    report = validate_rows(TEXTS, [{**TEXT, "chosen": text}], "direct")
    assert report.kept == (0,)
    assert str(report.problems[0]) == (
        "Row 0: chosen is a text that is chat messages, written down; it is used as a text. Give the list of messages "
        "itself."
    )


def test_an_input_of_text_says_how_messages_are_taken():
    with pytest.raises(DataError, match=r"must be str, got list .* Declare Input\('question'\) without a type to get"):
        encode_pairs(TEXTS, [{**TEXT, "question": CONVERSATION[:1]}], "direct")
