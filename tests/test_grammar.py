"""Completions constrained by a grammar, against enumeration of the grammar's texts with the model's plain logits."""

import itertools
import json
import math

import pytest
import torch
from grammars import PIECES, PROMPT, by_enumeration, completions, lm
from peft import LoraConfig
from scipy.stats import chisquare
from tiny import char_tokenizer, llama

from sysdag.components import CausalLM
from sysdag.components.language.grammar import Grammar
from sysdag.components.language.token_grammar import TokenGrammar
from sysdag.errors import DataError, PlanError
from sysdag.traces.cells import Draw

REGEX = "(ab|bc|c){1,2}|abx?"
TEXTS = sorted({"ab", "abx", *("".join(p) for n in (1, 2) for p in itertools.product(["ab", "bc", "c"], repeat=n))})
ALL = completions(TEXTS, PIECES)
JSON_PIECES = list('{}[]":,. ') + list("abcdefghijklmnopqrstuvwxyz0123456789") + ["é", "\n"]
SCHEMA = {
    "type": "object",
    "properties": {"tool": {"enum": ["add", "sub"]}, "x": {"type": "integer"}},
    "required": ["tool", "x"],
}


def drawn(completion):
    return Draw("", {"token_ids": list(completion), "finished": completion[-1] == 1})


def prompt_ids(component):
    return component.prompt_ids([PROMPT])[0]


def test_the_likelihood_is_that_of_the_constrained_model():
    component = lm(REGEX)
    expected = by_enumeration(component.module, prompt_ids(component), ALL)
    found = component.log_prob([PROMPT] * len(ALL), [drawn(each) for each in ALL])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert len(ALL) > len(TEXTS)  # several tokenisations of a text


@pytest.mark.parametrize("pack", [True, False])
def test_gradients_are_those_of_the_enumeration(pack):
    component = lm(REGEX, pack_prefixes=pack)
    weights = torch.linspace(-1, 1, len(ALL))
    model = component.module.train()
    gradients = []
    for scores in (
        by_enumeration(model, prompt_ids(component), ALL),
        component.log_prob([PROMPT] * len(ALL), [drawn(each) for each in ALL]),
    ):
        model.zero_grad()
        (weights * scores).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_one_label_behind_prompts_that_end_elsewhere_has_the_state_of_its_own_completion():
    component = lm("ab|b")
    prompts, ids = ["xa", "x"], [[4, 1], [3, 4, 1]]
    found = component.log_prob(prompts, [drawn(each) for each in ids])
    alone = [component.log_prob([p], [drawn(each)])[0] for p, each in zip(prompts, ids, strict=True)]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)
    every = completions(["ab", "b"], PIECES)
    for prompt, each, value in zip(prompts, ids, found, strict=True):
        expected = by_enumeration(component.module, component.prompt_ids([prompt])[0], every)
        assert value.item() == pytest.approx(expected[every.index(tuple(each))].item(), abs=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 2}, {"temperature": 1.7, "top_k": 1}], ids=lambda o: str(o)
)
def test_draws_follow_the_enumeration(options):
    component = lm(REGEX, **options)
    expected = by_enumeration(component.module, prompt_ids(component), ALL, **options).exp().detach().double()
    draws = component.sample([PROMPT] * 1500, generator=torch.Generator().manual_seed(1))
    counts = torch.zeros(len(ALL))
    for draw in draws:
        place = ALL.index(tuple(draw.record["token_ids"]))
        counts[place] += 1
        assert draw.log_prob == pytest.approx(math.log(expected[place]), abs=1e-4)
        assert draw.value in TEXTS
        assert draw.record["finished"]
    often = expected * len(draws) >= 5
    observed, predicted = [*counts[often].tolist()], [*(expected[often] * len(draws)).tolist()]
    if expected[~often].sum() * len(draws) >= 1:
        observed.append(float(counts[~often].sum()))
        predicted.append(float(expected[~often].sum()) * len(draws))
    if len(observed) > 1:
        total = sum(observed) / sum(predicted)
        assert chisquare(observed, [total * each for each in predicted]).pvalue > 1e-3


def test_a_search_finds_texts_of_the_grammar_best_first():
    component = lm(REGEX)
    expected = by_enumeration(component.module, prompt_ids(component), ALL)
    [found] = component.search([PROMPT], 4, 0.5)
    assert len({tuple(draw.record["token_ids"]) for draw in found}) == 4
    assert {tuple(draw.record["token_ids"]) for draw in found} <= set(ALL)
    greedy = ()
    while greedy not in ALL:
        options = {each[: len(greedy) + 1] for each in ALL if each[: len(greedy)] == greedy}
        mass = {o: sum(expected[n].exp().item() for n, c in enumerate(ALL) if c[: len(o)] == o) for o in options}
        greedy = max(mass, key=mass.get)
    assert greedy in {tuple(draw.record["token_ids"]) for draw in found}
    [few] = lm("ab").search([PROMPT], 8, 0.5)
    assert {tuple(draw.record["token_ids"]) for draw in few} == set(completions(["ab"], PIECES))


def test_an_adapter_is_scored_and_trains_under_the_grammar():
    component = lm(REGEX, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in component.own_parameters().values():
            parameter.normal_(0, 0.3)
    draws, inputs = [drawn(each) for each in ALL], [PROMPT] * len(ALL)
    policy = component.log_prob(inputs, draws)
    torch.testing.assert_close(policy, by_enumeration(component.module, prompt_ids(component), ALL), rtol=0, atol=1e-5)
    reference = component.reference()
    assert reference.grammar == REGEX
    torch.testing.assert_close(reference.log_prob(inputs, draws), policy.detach(), rtol=0, atol=1e-5)
    policy.sum().backward()
    found = {name: p.grad.clone() for name, p in component.own_parameters().items()}
    component.module.zero_grad()
    by_enumeration(component.module, prompt_ids(component), ALL).sum().backward()
    for name, parameter in component.own_parameters().items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_new_adapter_leaves_the_reference_constrained():
    component = lm(REGEX, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    draws, inputs = [drawn(each) for each in ALL], [PROMPT] * len(ALL)
    base = by_enumeration(llama(vocab_size=len(PIECES) + 3), prompt_ids(component), ALL)
    reference = component.reference()
    with torch.no_grad():
        for parameter in component.own_parameters().values():
            parameter.add_(0.3)
    assert (component.log_prob(inputs, draws) - base).abs().max() > 0.1
    torch.testing.assert_close(reference.log_prob(inputs, draws), base, rtol=0, atol=1e-5)


def test_typicality_is_over_the_allowed_tokens():
    component = lm("ab|c")
    ids = (3, 4, 1)
    expected = 0.0
    every = completions(["ab", "c"], PIECES)
    for place, token in enumerate(ids):
        allowed = sorted({e[place] for e in every if len(e) > place and e[:place] == ids[:place]})
        logits = component.module(torch.tensor([[*prompt_ids(component), *ids[:place]]])).logits[0, -1][allowed]
        p = logits.softmax(-1)
        expected += p[allowed.index(token)].log() - (p**2).sum().log()
    assert component.typicality([PROMPT], [drawn(ids)]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_completion_that_is_cut_is_a_beginning_and_scored_as_one():
    component = lm("(abc){2,}x?", max_new_tokens=3)
    every = completions(["abc" * n + end for n in (2, 3) for end in ("", "x")], PIECES)
    draws = component.sample([PROMPT] * 64, generator=torch.Generator().manual_seed(0))
    cut = [draw for draw in draws if not draw.record["finished"]]
    assert cut
    beginnings = sorted({each[:3] for each in every})
    scores = by_enumeration(component.module, prompt_ids(component), [*every, *beginnings])[len(every) :]
    found = component.log_prob([PROMPT] * len(cut), cut)
    for draw, value in zip(cut, found.tolist(), strict=True):
        assert "abcabcabc".startswith(draw.value)
        expected = scores[beginnings.index(tuple(draw.record["token_ids"]))].item()
        assert value == pytest.approx(expected, abs=1e-5)
        assert draw.log_prob == pytest.approx(expected, abs=1e-5)


def test_tokens_that_no_text_goes_on_with_are_not_drawn():
    """`d` is in no token, so an `a` leads nowhere."""
    component = lm("ad|bc")
    draws = component.sample([PROMPT] * 20, generator=torch.Generator().manual_seed(0))
    assert {draw.value for draw in draws} == {"bc"}
    with pytest.raises(PlanError, match="no tokens that write"):
        lm("d+").sample([PROMPT])


def test_an_observed_text_has_the_likelihood_of_its_tokens():
    component = lm(REGEX)
    [draw] = component.in_context([PROMPT], component.observe(["abc"]))
    assert draw.record == {"token_ids": [3, 4, 5, 1], "finished": True}
    expected = by_enumeration(component.module, prompt_ids(component), ALL)[ALL.index((3, 4, 5, 1))]
    assert component.log_prob([PROMPT], [draw]).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "place"), [("abz", "character 3: 'z'"), ("b", "character 2: the text ends too early"), ("", "character 1")]
)
def test_a_text_outside_names_the_character(text, place):
    with pytest.raises(DataError, match=place) as error:
        lm(REGEX).observe(["ab", text])
    assert error.value.element == 1


def test_a_draw_of_another_grammar_names_the_token():
    with pytest.raises(DataError, match=r"token 1 of 2, 'x' \(id 8\), is outside the grammar") as error:
        lm(REGEX).log_prob([PROMPT] * 2, [drawn((3, 4, 1)), drawn((8, 1))])
    assert error.value.element == 1
    with pytest.raises(DataError, match="token 2 of 2"):
        lm(REGEX).check_draws([drawn((3, 1))])


def test_json_values_are_what_the_text_says():
    component = lm(SCHEMA, pieces=JSON_PIECES, max_new_tokens=60)
    assert component.value_type is None
    draws = component.sample(["q"] * 8, generator=torch.Generator().manual_seed(0))
    whole = [draw for draw in draws if draw.record["finished"]]
    assert whole
    for draw in whole:
        assert draw.value == json.loads(draw.record["text"])
        assert draw.value["tool"] in ("add", "sub")
        assert isinstance(draw.value["x"], int)
    component.check_draws(draws)


@pytest.mark.parametrize(
    "value",
    [{"x": 3, "tool": "add"}, '{"tool": "add", "x": 3}', '{"tool":"add","x":3}'],
    ids=["object", "text", "tight"],
)
def test_an_object_or_its_text_is_observed(value):
    component = lm(SCHEMA, pieces=JSON_PIECES, max_new_tokens=60)
    [draw] = component.in_context(["q"], component.observe([value]))
    assert draw.value == {"tool": "add", "x": 3}
    text = value if isinstance(value, str) else '{"tool": "add", "x": 3}'
    assert draw.record["text"] == text
    assert draw.record["token_ids"] == [*(3 + JSON_PIECES.index(char) for char in text), 1]
    assert component.log_prob(["q"], [draw]).isfinite().all()
    assert component.lengths([draw]) == [len(text) + 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"tool": "mul", "x": 3}, "outside the grammar at character 11: 'm'"),
        ({"tool": "add"}, "outside the grammar at character 15: '}'"),
        ({"tool": "add", "x": float("nan")}, "no value of JSON"),
        ('{"tool": "add", "x": 3', "character 23: the text ends too early"),
        ([{"role": "assistant", "content": "a"}], "outside the grammar at character 1"),
    ],
)
def test_an_object_outside_the_schema_names_the_place(value, message):
    with pytest.raises(DataError, match=message):
        lm(SCHEMA, pieces=JSON_PIECES).observe([value])


def test_an_observed_answer_in_a_chat_is_behind_its_template():
    component = CausalLM(llama(), char_tokenizer(chat=True), grammar="[0-9]+", max_new_tokens=6)
    chat = [{"role": "user", "content": "how many"}]
    [draw] = component.in_context([chat], component.observe(["12"]))
    assert component.token_grammar.text(draw.record["token_ids"]) == "12"
    assert draw.record["token_ids"][-1] == 1


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("(a", "gives no automaton"),
        ("^a$", "leave out \\^ and \\$"),
        ("a(?=b)", "look-around"),
        (3, "expected a JSON schema"),
        ({"regex": 3}, "a regular expression is a text"),
        ({"type": "string"}, "type must be 'object' or 'array'"),
        ({"anyOf": [{"type": "integer"}, SCHEMA]}, "type must be 'object' or 'array'"),
        ({"type": "object"}, "#: an object needs `properties`"),
        ({"type": "array"}, "#: an array needs `items`"),
        ({**SCHEMA, "required": ["y"]}, "`required` lists names"),
        ({**SCHEMA, "additionalProperties": True}, "`additionalProperties` must be false"),
        ({"type": "array", "items": {"type": "integer", "minimum": 3}}, "#/items: 'minimum' is not said"),
        ({"type": "array", "uniqueItems": True, "items": {"type": "null"}}, "'uniqueItems' is not said"),
        ({"type": "array", "items": {"allOf": [{"type": "null"}]}}, "#/items"),
        ({"type": "array", "items": {"type": "string", "pattern": ".*"}}, "can write a quotation mark"),
        ({"type": "array", "items": {"type": "string", "pattern": "a", "minLength": 2}}, "only one of them"),
        ({"type": "array", "items": {"type": "string", "format": "time"}}, "known formats"),
        ({"type": "object", "properties": {'a"': {"type": "null"}}}, "without what JSON escapes"),
        ({"type": "array", "items": {"$ref": "#/$defs/no"}}, "must lead to a part"),
        (
            {"$defs": {"t": {"type": "object", "properties": {"n": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"},
            "refers to itself",
        ),
        ({"type": "array", "items": {"type": "integer", "enum": [1, "a"]}}, "not of its type"),
        ({"type": "array", "items": {"type": ["integer"], "enum": [1]}}, "needs one type"),
        ({**SCHEMA, "required": [["x"]]}, "`required` lists names"),
    ],
)
def test_grammars_that_say_something_else_are_refused(grammar, message):
    with pytest.raises(PlanError, match=message):
        lm(grammar)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "array", "items": {"type": "string"}}, ["a b", "é\n", 'quoted "q" \\']),
        ({"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "maxItems": 2}, ["ab", "c"]),
        ({"type": "array", "items": {"type": "number"}}, [1, -2.5, 1e-07, 1e22]),
        (
            {"type": "array", "items": {"enum": ['a"b', "a.b", "é", "a\nb", 1.5, None, True, {"x": 1}]}},
            ['a"b', {"x": 1}],
        ),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}]}, [1, False]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"é": 1, "z": 2}),
        ({"anyOf": [SCHEMA, {"type": "array", "items": {"type": "null"}}]}, [None, None]),
        ({"anyOf": [{"type": "array", "items": {"type": "null"}}, SCHEMA]}, {"x": 1, "tool": "add"}),
        (
            {"type": "object", "properties": {"p": {"$ref": "#/$defs/p"}}, "$defs": {"p": {**SCHEMA, "title": "P"}}},
            {"p": {"tool": "sub", "x": -1}},
        ),
        ({"type": "array", "items": {"type": "string", "format": "date"}}, ["2024-02-03"]),
    ],
)
def test_values_of_a_schema_are_in_its_grammar(schema, value):
    [draw] = lm(schema).observe([value])
    assert draw.value == value
    assert json.loads(draw.record["text"]) == value


def test_what_does_not_know_a_grammar_is_refused():
    with pytest.raises(PlanError, match="stop"):
        lm(REGEX, stop="x")
    with pytest.raises(PlanError, match="stop"):
        lm(REGEX).propose([PROMPT], stop="x")
    with pytest.raises(PlanError, match="only decoder='local' draws"):
        lm(REGEX, decoder="continuous")
    with pytest.raises(PlanError, match="only decoder='local' draws"):
        lm(REGEX).with_decoder("continuous")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(PlanError, match=r"sysdag\[grammar\]"):
        lm(REGEX)


def test_the_reading_and_the_screen_tell_of_the_grammar():
    plain = lm(None)
    assert len({plain.reading(), lm(REGEX).reading(), lm("ab").reading()}) == 3
    assert lm(REGEX).screen() is None


@pytest.mark.parametrize("given", [REGEX, {"regex": REGEX}, SCHEMA])
def test_a_saved_component_has_its_grammar(tmp_path, given):
    component = lm(given, pieces=JSON_PIECES if given is SCHEMA else PIECES)
    options = json.loads(json.dumps(component.save_pretrained(tmp_path)))
    loaded = CausalLM.from_pretrained(tmp_path, options)
    assert loaded.grammar == component.grammar == (SCHEMA if given is SCHEMA else REGEX)
    seeds = {"generator": torch.Generator().manual_seed(0)}
    again = {"generator": torch.Generator().manual_seed(0)}
    assert [d.record for d in loaded.sample(["q"] * 3, **seeds)] == [
        d.record for d in component.sample(["q"] * 3, **again)
    ]


def test_without_a_grammar_nothing_is_saved_of_one(tmp_path):
    assert "grammar" not in lm(None).save_pretrained(tmp_path)


def test_tokenizers_of_words_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    with pytest.raises(PlanError, match="wherever they stand"):
        TokenGrammar("lm", lm("a")._grammar, tokenizer, [0])


@pytest.mark.parametrize(
    "regex",
    [
        "a|ab",
        "x(ab)?",
        "(ab|bc|c){1,2}|abx?",
        "a*?b?",
        "(a|b)*?",
        "((a|ab)(c|bcx))*",
        "[^b]*",
        "(?s:.)*|é",
        "(?i)aB?",
        "a|",
    ],
)
def test_a_regular_expression_has_all_its_texts(regex):
    """As Python's `re.fullmatch` has it; an automaton of leftmost-first matches has fewer."""
    import re

    grammar = Grammar(regex)
    texts = ["".join(chars) for length in range(5) for chars in itertools.product("abcxé", repeat=length)]
    assert [text for text in texts if grammar.leaves(text) is None] == [t for t in texts if re.fullmatch(regex, t)]
