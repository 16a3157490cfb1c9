"""Prompts that are implicit: where they end, and rows in which that cannot be told."""

import copy
import logging

import pytest
from tiny import char_tokenizer, llama
from trl.data_utils import extract_prompt

from sysdag import DataError, Input, System, node
from sysdag.components import CausalLM
from sysdag.data import encode_pairs, validate_rows
from sysdag.data.trl_prompts import explicit_prompt

LM = CausalLM(llama(), char_tokenizer(chat=True), max_new_tokens=8)


@node(LM)
def answer(question):
    return question


PLAN = System(Input("question") >> answer).compile()


def split(chosen, rejected):
    row = explicit_prompt(PLAN, {"chosen": chosen, "rejected": rejected}).row
    return row.get("question"), row["chosen"], row["rejected"]


HH = "\n\nHuman: hello\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant:"
CHATML = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
GEMMA = "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
PHI = "<|user|>\nWhy?<|end|>\n<|assistant|>\n"
ALPACA = "### Instruction:\nWhy?\n\n### Response:\n"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        # A word, a number and a name that go on differently; a whole sentence that both begin with.
        (HH, " Because it is.", " Being blue."),
        (HH, " 1200 years", " 1250 years"),
        (HH, " I think it is Paris.", " I think it is Lyon."),
        (HH, " yes", " no"),
        (CHATML, "Because it is.<|im_end|>", "Be it.<|im_end|>"),
        (CHATML, "<think>a", "<thought>b"),
        (CHATML, "It is.<|im_end|>", "It is<|im_end|>"),
        (GEMMA, "Because", "Be it"),
        (LLAMA3, "Because", "Be it"),
        (PHI, "Because", "Be it"),
        (ALPACA, "Because", "Be it"),
        ("[INST] Why? [/INST]", " Because </s>", " Be it </s>"),
        ("<s>[INST] hi [/INST] yo </s>[INST] Why? [/INST]", " Because", " Be it"),
        ("A chat. USER: Why? ASSISTANT:", " Because", " Be it"),
        ("<\uff5cUser\uff5c>Why?<\uff5cAssistant\uff5c>", "Because", "Be it"),
        # They part in a person's turn: the turn before it is over.
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: c\n\nAssistant: d", "\n\nHuman: e\n\nAssistant: f"),
        ("<|im_start|>assistant\nb<|im_end|>\n", "<|im_start|>user\nc", "<|im_start|>user\nd"),
        # No turns: a word.
        ("the", " cat sat", " cow sat"),
        ("the", " cat", " dog"),
        ("say it's", " done", " fine"),
        ("she", " don't", " done"),
        ("so", " well-known", " well-read"),
        ("Question\nAnswer:\n", "Because", "Be it"),
        ("q:", "because", "be it"),
        ("q:", " a", " b"),
        ("go", " <|x|>", " <|y|>"),
        ("go(", "<|x|>", "<|y|>"),
    ],
)
def test_a_text_is_cut_at_a_boundary(prompt, chosen, rejected):
    assert split(prompt + chosen, prompt + rejected) == (prompt, chosen, rejected)
    assert split(prompt + rejected, prompt + chosen) == (prompt, rejected, chosen)


@pytest.mark.parametrize(("chosen", "rejected"), [("cat", "cow"), ("a", "b"), (" a", " b")])
def test_what_shares_no_word_has_no_prompt(chosen, rejected):
    assert split(chosen, rejected) == (None, chosen, rejected)
    with pytest.raises(DataError, match="Row 0: input 'question' is missing"):
        encode_pairs(PLAN, [{"chosen": chosen, "rejected": rejected}], "direct")


def message(role, content, **others):
    return {"role": role, "content": content, **others}


Q, R = message("user", "Why?"), message("user", "And?")
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}


@pytest.mark.parametrize(
    ("shared", "chosen", "rejected"),
    [
        ([Q], [message("assistant", "Because")], [message("assistant", "Be it")]),
        ([message("system", "s"), Q], [message("assistant", "a b")], [message("assistant", "a c")]),
        ([Q, message("assistant", "a"), R], [message("assistant", "b")], [message("assistant", "c")]),
        ([Q, CALL, message("tool", "3")], [message("assistant", "b")], [message("assistant", "c")]),
        ([Q], [message("assistant", "b"), R, message("assistant", "d")], [message("assistant", "c")]),
    ],
)
def test_messages_are_parted_as_trl_does(shared, chosen, rejected):
    row = {"chosen": shared + chosen, "rejected": shared + rejected}
    trls = extract_prompt(copy.deepcopy(row))
    assert split(**row) == (trls["prompt"], trls["chosen"], trls["rejected"]) == (shared, chosen, rejected)


ROWS = [
    {"chosen": HH + " yes", "rejected": HH + " no"},
    {"chosen": HH + " yes", "rejected": HH + " yes. it is."},
    {"chosen": HH + " yes it is", "rejected": HH + " yes"},
    {"chosen": HH + " yes", "rejected": HH + " yes"},
    {"chosen": [Q, message("assistant", "a")], "rejected": [Q]},
    {"chosen": [Q, message("assistant", "a")], "rejected": [Q, message("assistant", "a")]},
    {"prompt": "Why?", "chosen": [Q, message("assistant", "a")], "rejected": [Q, message("assistant", "a")]},
]


def test_rows_whose_prompt_cannot_be_told_are_dropped(caplog):
    report = validate_rows(PLAN, ROWS, "direct")
    assert report.is_usable
    assert report.kept == (0,)
    assert report.counts == {"beginning": 3, "identical": 3}
    assert (report.errors, report.dropped) == (0, 6)
    assert str(report.problems[0]) == (
        "Row 1: chosen is the beginning of rejected, so where their prompt ends cannot be told. Give the prompt in a "
        "column of its own."
    )
    assert str(report.problems[1]).startswith("Row 2: rejected is the beginning of chosen, ")
    with caplog.at_level(logging.WARNING):
        (pair,) = encode_pairs(PLAN, ROWS, "direct")
    assert pair.inputs == {"question": HH}
    assert "6 of 7 rows are dropped. beginning (3 of 7): Row 1: chosen is the beginning" in caplog.text
    assert validate_rows(PLAN, ROWS, "direct", strict=True).errors == 6


def test_evaluation_leaves_them_out(caplog):
    from sysdag.evaluation.evaluation_runs import held_out

    with caplog.at_level(logging.WARNING):
        given = held_out(PLAN, ROWS[:4], distinct=False)
    assert given.inputs == {"question": [HH]}
    assert "3 of 4 rows are left out" in caplog.text
