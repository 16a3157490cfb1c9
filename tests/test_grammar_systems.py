"""Systems with a node that a grammar constrains: values that flow on, traces, files, plans, training, images."""

import json

import pytest
import tiny_tokenizers
import torch
from grammars import lm
from test_grammar import JSON_PIECES, SCHEMA
from tiny import ALPHABET
from tiny_vision import FAMILIES, picture, shared

from sysdag import Input, System, node
from sysdag.components import ImageTextToText
from sysdag.components.language.grammar import Grammar
from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.data.validation import validate_rows
from sysdag.errors import PlanError
from sysdag.graph import outline
from sysdag.traces.trace import Trace

QUESTION = {"question": ["one", "two", "three"]}


def system(grammar=SCHEMA, **options):
    caller = lm(grammar, pieces=JSON_PIECES, **{"max_new_tokens": 60} | options)

    @node(caller)
    def call(question):
        return question

    @node
    def result(call):
        return f"{call['tool']}ed {call['x']}" if isinstance(call, dict) else "no call"

    @node(lm(None, seed=1, pieces=list(ALPHABET), max_new_tokens=4))
    def answer(question, result):
        return f"{question} {result}"

    question = Input("question", str)
    return System(question >> call, call >> result, (question & result) >> answer)


def test_the_next_node_gets_the_object_and_the_trace_has_the_text(tmp_path):
    plan = system().compile()
    trace = plan.sample(QUESTION, seed=0)
    cells = trace.cells["call"]
    assert any(cell.record["finished"] for cell in cells)
    for cell, result in zip(cells, trace["result"], strict=True):
        assert cell.value == (json.loads(cell.record["text"]) if cell.record["finished"] else cell.record["text"])
        assert cell.record["token_ids"]
        told = f"{cell.value['tool']}ed {cell.value['x']}" if cell.record["finished"] else "no call"
        assert result == told
    trace.to_jsonl(tmp_path / "runs.jsonl")
    again = Trace.from_jsonl(tmp_path / "runs.jsonl")
    found, wanted = plan.log_probs(again), plan.log_probs(trace)
    torch.testing.assert_close(found["call"], wanted["call"])


def test_a_saved_system_is_constrained_as_before(tmp_path):
    made = system()
    made.save_pretrained(tmp_path / "system")
    loaded = made.load(tmp_path / "system")
    assert loaded["call"].component.grammar == SCHEMA
    found, wanted = (each.compile().sample(QUESTION, seed=3)["call"] for each in (loaded, made))
    assert found == wanted


def test_a_plan_shows_the_grammar():
    plan = system().compile()
    assert "call writes texts of the grammar {" in outline.to_text(plan)
    nodes = {each["name"]: each for each in outline.to_dict(plan)["nodes"]}
    assert nodes["call"]["grammar"] == SCHEMA
    assert "grammar" not in nodes["answer"]


def test_a_row_outside_the_grammar_is_named_with_its_node_and_place():
    plan = system().compile()
    good = {"call": {"x": 3, "tool": "add"}, "result": "added 3"}
    rows = [
        {"question": "q", "chosen": "a", "rejected": "b", "chosen_intermediates": good, "rejected_intermediates": other}
        for other in (good, {"call": {"tool": "mul", "x": 3}, "result": "no"}, {"call": '{"tool": 3}', "result": "no"})
    ]
    report = validate_rows(plan, rows, "direct")
    assert [(problem.row, problem.node, problem.side) for problem in report.problems] == [
        (1, "call", "rejected"),
        (2, "call", "rejected"),
    ]
    assert ["at character 11: 'm'" in str(report.problems[0]), "at character 10: '3'" in str(report.problems[1])] == [
        True,
        True,
    ]


def test_an_estimate_counts_the_logits_of_a_grammar():
    """A log-softmax of each label is kept for the backward pass; the logits of all tokens have a gradient there."""
    tokens, labels = 64, 40
    pieces = [*JSON_PIECES, *map(chr, range(0x4E00, 0x4E00 + 4000))]
    asked = dict(tokens=tokens, labels=labels, trains=True, checkpoints=False, device="cpu")
    plain, constrained = (lm(g, pieces=pieces).footprint(**asked) for g in (None, SCHEMA))
    vocabulary = len(pieces) + 3
    more = constrained.graph + constrained.working - plain.graph - plain.working
    assert more >= 4 * (labels + tokens) * vocabulary
    assert constrained.weights == plain.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_model_writes_the_grammar(family):
    model, processor = shared(family)
    component = ImageTextToText(model, processor, grammar="(red|cube) ?[0-9]", max_new_tokens=12)
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": picture(n)}, {"type": "text", "text": "a red cube"}]}]
        for n in range(2)
    ]
    draws = component.sample(prompts, generator=torch.Generator().manual_seed(0))
    for draw in draws:
        assert draw.value[:3] in ("red", "cub")
    found = component.log_prob(prompts, draws)
    torch.testing.assert_close(found.double(), torch.tensor([d.log_prob for d in draws]).double(), rtol=0, atol=1e-4)


TEXTS = ['{"tool": "add", "x": 3}', " leading", "two  spaces", "é ü 漢 \n\t", "don't , stop .", "▁"]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma", "llama_3", "mistral", "t5"])
def test_tokens_write_what_their_tokenizer_says(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    grammar = TokenGrammar("lm", Grammar("(?s:.)*"), tokenizer, [tokenizer.eos_token_id])
    kept = 0
    for text in TEXTS:
        ids = tokenizer("x" + text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id in ids or tokenizer.decode(ids) != "x" + text:
            continue
        kept += 1
        assert grammar.text(ids).removeprefix(" ") == "x" + text
        own = grammar.token_ids(text)
        assert grammar.text(own) == text
        assert grammar.states([*own, tokenizer.eos_token_id])
    assert kept >= 1


def test_tokens_that_hang_on_their_neighbours_are_refused():
    tokenizer = tiny_tokenizers.bert()
    with pytest.raises(PlanError, match="wherever they stand"):
        TokenGrammar("lm", Grammar("a"), tokenizer, [tokenizer.sep_token_id])
