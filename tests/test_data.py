import pytest
from tiny import char_tokenizer, llama

from sysdag import DataError, Input, System, Trace, node
from sysdag.components import CausalLM, Tabular
from sysdag.data import collate, encode_pairs

X = Input("question")
LM = CausalLM(llama(), char_tokenizer(), max_new_tokens=4)
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
    assert pair.chosen["draft"].record["token_ids"] == [*LM.tokenizer("ab")["input_ids"], LM.tokenizer.eos_token_id]
    assert [draw.value for draw in pair.chosen["pick"]] == ["s", "t"]
    assert [draw.value for draw in pair.rejected["pick"]] == ["t"]


def test_draws_of_a_trace_keep_their_token_ids():
    trace = PLAN.sample({"question": ["q"]}, seed=0)
    cell = trace.cells["draft"][0]
    ids = cell.record["token_ids"]
    (pair,) = encode_pairs(PLAN, [{**ROW, "chosen_intermediates": {"draft": cell}}], "direct")
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
        ({"chosen": []}, "Row 1, chosen, node 'pick': a plate needs a list"),
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
