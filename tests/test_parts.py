"""Completions in parts, against one plain forward of transformers over the whole completion."""

import pytest
import tiny_tokenizers
import torch
from reasoning_models import CLOSE, OPEN, thinking_model, thinking_system, token_log_probs
from seq2seq_families import t5
from tiny import char_tokenizer, llama

from sysdag import DataError, GraphError, Input, PlanError, System, Trace, loop, node, split, switch
from sysdag.components import CausalLM, Opaque, Seq2Seq
from sysdag.execution.execute import node_inputs
from sysdag.traces.cells import Draw

THOUGHT, ANSWER = f"{OPEN}\nso 4\n{CLOSE}", "it is 4"
WHOLE = f"{THOUGHT}\n\n{ANSWER}"


def chat_ids(model, question="two?", **kwargs):
    """The prompt as the tokenizer's own template renders it."""
    messages = [{"role": "user", "content": question}]
    return list(model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **kwargs))


def text_ids(model, text):
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def observed(plan, thought=THOUGHT, answer=ANSWER, question="two?"):
    cells = {"reasoning": [Draw(thought)], "answer": [Draw(answer)]}
    return Trace({"question": [question]}, cells)


def scores(plan, trace):
    return {name: value[0].item() for name, value in plan.log_probs(trace).items()}


def test_the_parts_of_drawn_completions_add_up_to_the_whole():
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens={"reasoning": 30, "answer": 8}).compile()
    trace = plan.sample({"question": ["two?"] * 24}, seed=3)
    scored = plan.log_probs(trace)
    close = model.tokenizer.convert_tokens_to_ids(CLOSE)
    closed = 0
    for row in range(24):
        thought, answer = trace.cells["reasoning"][row], trace.cells["answer"][row]
        border = len(thought.record["token_ids"])
        tokens = token_log_probs(model, chat_ids(model), [*thought.record["token_ids"], *answer.record["token_ids"]])
        for name, draw, part in (("reasoning", thought, tokens[:border]), ("answer", answer, tokens[border:])):
            assert scored[name][row].item() == pytest.approx(part.sum().item(), abs=1e-4)
            assert draw.log_prob == pytest.approx(part.sum().item(), abs=1e-4)
        assert close not in thought.record["token_ids"][:-1]
        assert thought.value.endswith(CLOSE) == (thought.record["token_ids"][-1] == close)
        if thought.value.endswith(CLOSE):
            closed += 1
            assert 1 <= len(answer.record["token_ids"]) <= 8
        else:
            assert (answer.value, answer.record["token_ids"], answer.log_prob) == ("", [], 0.0)
    assert 3 < closed < 24


@pytest.mark.parametrize(
    ("template", "chat", "thought", "written"),
    [
        ("plain", True, THOUGHT, THOUGHT),
        ("plain", False, THOUGHT, THOUGHT),
        ("plain", True, CLOSE, CLOSE),
        ("plain", True, f"{OPEN}\n\n{CLOSE}", f"{OPEN}\n\n{CLOSE}"),
        ("opened", True, THOUGHT, THOUGHT.removeprefix(f"{OPEN}\n")),
        ("opened", True, f"so 4\n{CLOSE}", f"so 4\n{CLOSE}"),
        ("switched", True, THOUGHT, THOUGHT),
    ],
)
@pytest.mark.parametrize(("answer", "behind"), [(ANSWER, f"\n\n{ANSWER}"), (f"\n{ANSWER}", f"\n{ANSWER}"), ("", "")])
def test_observed_parts_are_scored_as_the_whole_completion_with_its_gradients(
    template, chat, thought, written, answer, behind
):
    model = thinking_model(template=template)
    model.lm.module.double()
    plan = thinking_system(model, chat=chat, max_new_tokens=32).compile()
    prompt = chat_ids(model) if chat else text_ids(model, "q: two?\na: ")
    ids = [*text_ids(model, written + behind), model.tokenizer.eos_token_id]
    tokens = token_log_probs(model, prompt, ids, grad=True)
    found = plan.log_probs(observed(plan, thought, answer))
    border = len(text_ids(model, written))
    assert found["reasoning"].item() == pytest.approx(tokens[:border].sum().item(), abs=1e-8)
    assert found["answer"].item() == pytest.approx(tokens[border:].sum().item(), abs=1e-8)
    parameters = list(model.lm.module.parameters())
    ours = torch.autograd.grad(found["reasoning"].sum() + found["answer"].sum(), parameters)
    theirs = torch.autograd.grad(tokens.sum(), parameters)
    for got, want in zip(ours, theirs, strict=True):
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_an_observed_answer_follows_the_very_tokens_of_a_drawn_reasoning():
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens=32).compile()
    odd = [*text_ids(model, "a b"), *text_ids(model, "c"), model.tokenizer.convert_tokens_to_ids(CLOSE)]
    drawn = Draw(f"abc{CLOSE}", {"token_ids": odd, "finished": True})
    trace = Trace({"question": ["two?"]}, {"reasoning": [drawn], "answer": [Draw(ANSWER)]})
    behind = [*text_ids(model, f"\n\n{ANSWER}"), model.tokenizer.eos_token_id]
    expected = token_log_probs(model, [*chat_ids(model), *odd], behind).sum().item()
    assert scores(plan, trace)["answer"] == pytest.approx(expected, abs=1e-4)


def test_all_completions_of_a_tiny_vocabulary_have_probability_1_in_parts():
    tokenizer = char_tokenizer("a")
    tokenizer.add_tokens([CLOSE])
    model = CausalLM(llama(1, len(tokenizer)), tokenizer)
    model.lm.module.double()
    plan = thinking_system(model, chat=False, max_new_tokens=2).compile()
    close, end, size = tokenizer.convert_tokens_to_ids(CLOSE), tokenizer.eos_token_id, len(tokenizer)

    def completions(ends):
        """Every draw of at most 2 tokens that ends with the first of these."""
        others = [token for token in range(size) if token not in ends]
        return [[first] for first in ends] + [[first, second] for first in others for second in range(size)]

    thoughts, answers = completions((close, end)), completions((end,))
    pairs = [(t, a) for t in thoughts for a in (answers if t[-1] == close else [[]])]
    cells = {
        "reasoning": [Draw("", {"token_ids": t, "finished": True}) for t, _ in pairs],
        "answer": [Draw("", {"token_ids": a, "finished": True}) for _, a in pairs],
    }
    with torch.no_grad():
        found = plan.log_probs(Trace({"question": ["a"] * len(pairs)}, cells))
    assert (found["reasoning"] + found["answer"]).exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_draws_are_as_frequent_as_their_parts_say():
    tokenizer = char_tokenizer("a")
    tokenizer.add_tokens([CLOSE])
    model = CausalLM(llama(1, len(tokenizer), peaked=1.0), tokenizer)
    plan = thinking_system(model, chat=False, max_new_tokens=1).compile()
    trace = plan.sample({"question": ["a"] * 3000}, seed=0)
    scored = sum(plan.log_probs(trace).values()).exp().tolist()
    keys = [tuple(map(tuple, (t.record["token_ids"], a.record["token_ids"])))
            for t, a in zip(trace.cells["reasoning"], trace.cells["answer"], strict=True)]  # fmt: skip
    assert len(set(keys)) > 3
    for key, probability in dict(zip(keys, scored, strict=True)).items():
        spread = 4.5 * (probability * (1 - probability) / 3000) ** 0.5
        assert abs(keys.count(key) / 3000 - probability) < spread + 1e-3


def test_a_search_ends_each_reasoning_at_its_marker():
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens={"reasoning": 6, "answer": 3}).compile()
    given = plan.system["reasoning"].function(question="two?")
    [found] = model.search([given], 6, 1.0)
    close = model.tokenizer.convert_tokens_to_ids(CLOSE)
    assert len({tuple(draw.record["token_ids"]) for draw in found}) == 6
    assert any(draw.value.endswith(CLOSE) for draw in found)
    assert all(close not in draw.record["token_ids"][:-1] for draw in found)


def test_the_prompt_is_cut_alike_for_all_parts():
    model = thinking_model(max_length=40)
    plan = thinking_system(model, chat=False, max_new_tokens={"reasoning": 14, "answer": 12}).compile()
    prompt = text_ids(model, "q: " + "x" * 50 + "\na: ")[-14:]  # 40 positions less 26
    ids = [*text_ids(model, WHOLE), model.tokenizer.eos_token_id]
    tokens = token_log_probs(model, prompt, ids)
    found = scores(plan, observed(plan, question="x" * 50))
    assert sum(found.values()) == pytest.approx(tokens.sum().item(), abs=1e-4)


def test_a_marker_of_several_tokens_and_stop_strings_of_the_answer():
    tokenizer = char_tokenizer("abcdefgh#\n? :q")
    model = CausalLM(llama(3, len(tokenizer)), tokenizer, stop=["?"])

    @split(model, plan="##", answer=None, separator="", max_new_tokens=20)
    def solve(question):
        return f"q: {question}\n"

    plan = System(Input("question") >> solve).compile()
    trace = Trace({"question": ["a"]}, {"plan": [Draw("ab#cd##")], "answer": [Draw("ef?")]})
    tokens = token_log_probs(model, text_ids(model, "q: a\n"), text_ids(model, "ab#cd##ef?"))
    found = scores(plan, trace)
    assert found["plan"] == pytest.approx(tokens[:7].sum().item(), abs=1e-4)
    assert found["answer"] == pytest.approx(tokens[7:].sum().item(), abs=1e-4)
    drawn = plan.sample({"question": ["a"] * 60}, seed=1)
    assert any("?" in part.value for part in drawn.cells["plan"]) is False
    for thought, answer in zip(drawn.cells["plan"], drawn.cells["answer"], strict=True):
        ended = model.tokenizer.decode(thought.record["token_ids"]).endswith("##")
        assert bool(answer.record["token_ids"]) == ended


def test_three_parts_add_up():
    model = thinking_model()

    @split(model, plan="::", reasoning=CLOSE, answer=None, max_new_tokens=20)
    def solve(question):
        return f"q: {question}\n"

    plan = System(Input("question") >> solve).compile()
    cells = {"plan": [Draw("a::")], "reasoning": [Draw(f"b{CLOSE}")], "answer": [Draw("c")]}
    tokens = token_log_probs(
        model, text_ids(model, "q: x\n"), [*text_ids(model, f"a::\n\nb{CLOSE}\n\nc"), model.tokenizer.eos_token_id]
    )
    assert sum(scores(plan, Trace({"question": ["x"]}, cells)).values()) == pytest.approx(tokens.sum().item(), abs=1e-4)


def test_a_plate_thinks_once_for_each_element():
    model = thinking_model()
    items = Input("items", list)

    @split(model, reasoning=CLOSE, answer=None, max_new_tokens=8)
    def solve(items):
        return [{"role": "user", "content": items}]

    plan = System(items.each() >> solve).compile()
    trace = plan.sample({"items": [["a", "b", "c"]]}, seed=0)
    found = plan.log_probs(trace)
    expected = 0.0
    for item, thought, answer in zip("abc", trace.cells["reasoning"][0], trace.cells["answer"][0], strict=True):
        ids = [*thought.record["token_ids"], *answer.record["token_ids"]]
        expected += token_log_probs(model, chat_ids(model, item), ids).sum().item()
    assert (found["reasoning"] + found["answer"]).item() == pytest.approx(expected, abs=1e-3)


def test_parts_in_a_loop_and_in_a_branch():
    model = thinking_model()
    question, kind = Input("question", str), Input("kind", str)

    @split(model, reasoning=CLOSE, answer=None, max_new_tokens=6)
    def solve(question, hint="none"):
        return f"{question} {hint}: "

    @node
    def short(question):
        return question

    unrolled = System(question >> short, loop(short >> remade(model), carry={"short": remade.last}, times=2)).compile()
    assert [n for n in unrolled.order if "answer" in n] == ["answer[0]", "answer[1]"]
    trace = unrolled.sample({"question": ["a"]}, seed=0)
    assert len(unrolled.log_probs(trace)) == 4
    branched = System(question >> solve, question >> short, switch(kind, {"hard": solve, "easy": short}, name="made"))
    trace = branched.compile().sample({"question": ["a", "b"], "kind": ["hard", "easy"]}, seed=0)
    assert trace["made"][1] == "b"
    assert trace["made"][0] == trace["answer"][0]


def remade(model):
    @split(model, reasoning=CLOSE, answer=None, max_new_tokens=6)
    def again(short):
        return f"{short}: "

    remade.last = again.answer
    return again


def plan_of(**options):
    model = thinking_model(**options)
    return thinking_system(model, max_new_tokens=24).compile()


@pytest.mark.parametrize(
    ("thought", "answer", "message"),
    [
        ("so 4", ANSWER, "'reasoning' does not end with '</think>', so nothing follows it"),
        (THOUGHT, f"4 {CLOSE} 5", "'answer' holds '</think>', which ends a part before it"),
        (f"a{CLOSE}b{CLOSE}", ANSWER, "'reasoning' goes on behind '</think>'"),
        ([{"role": "assistant", "content": "", "reasoning": "x"}], ANSWER, "is a text, got"),
    ],
)
def test_parts_that_are_no_completion_are_refused(thought, answer, message):
    plan = plan_of()
    with pytest.raises(DataError, match="Node '(reasoning|answer)', row 0: .*" + message):
        plan.log_probs(observed(plan, thought, answer))


def test_an_unclosed_reasoning_has_the_empty_answer():
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens=24).compile()
    found = plan.log_probs(observed(plan, "so 4", ""))
    ids = [*text_ids(model, "so 4"), model.tokenizer.eos_token_id]
    assert found["answer"].item() == 0.0
    assert found["reasoning"].item() == pytest.approx(
        token_log_probs(model, chat_ids(model), ids).sum().item(), abs=1e-4
    )
    gradients = torch.autograd.grad(found["answer"].sum(), list(model.own_parameters().values()))
    assert not any(gradient.any() for gradient in gradients)


def test_a_batch_may_hold_answers_that_were_and_were_not_written():
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens=24).compile()
    thoughts, answers = ["so 4", THOUGHT, "hm", f"a{CLOSE}"], ["", "4", "", "b"]
    trace = Trace({"question": ["a"] * 4}, {"reasoning": list(map(Draw, thoughts)), "answer": list(map(Draw, answers))})
    together = plan.log_probs(trace)["answer"]
    alone = [plan.log_probs(trace.select([row]))["answer"].item() for row in range(4)]
    assert together.tolist() == pytest.approx(alone, abs=1e-4)
    assert together[0].item() == together[2].item() == 0.0
    assert together[1].item() < 0
    inputs = node_inputs(plan, trace, "answer").values
    draws = model.in_context(inputs, trace.cells["answer"])
    assert sorted(place for group in model.micro_batches(inputs, draws, 28) for place in group) == [0, 1, 2, 3]
    assert len(model.micro_batches(inputs, draws, 28)) == 2


def test_markers_that_are_special_tokens_are_meant():
    model = thinking_model()
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [OPEN, CLOSE]})
    plan = thinking_system(model, max_new_tokens={"reasoning": 20, "answer": 4}).compile()
    ids = [*text_ids(model, f"{THOUGHT}\n\n4"), tokenizer.eos_token_id]
    assert tokenizer.convert_tokens_to_ids(OPEN) in ids
    tokens = token_log_probs(model, chat_ids(model), ids)
    found = scores(plan, observed(plan, THOUGHT, "4"))
    assert sum(found.values()) == pytest.approx(tokens.sum().item(), abs=1e-4)
    drawn = plan.sample({"question": ["a"] * 8}, seed=0)
    assert any(text.endswith(CLOSE) for text in drawn["reasoning"])
    within = scores(plan, observed(plan, f"{OPEN} a <eos> b{CLOSE}", "4"))  # only spelled there, so it is text
    apart = [*text_ids(model, f"{OPEN} a "), *(tokenizer.convert_tokens_to_ids(char) for char in "<eos>"),
             *text_ids(model, f" b{CLOSE}")]  # fmt: skip
    expected = token_log_probs(model, chat_ids(model), apart).sum().item()
    assert within["reasoning"] == pytest.approx(expected, abs=1e-4)


def test_what_rows_say_to_templates_reaches_every_part():
    model = thinking_model(template="switched")
    plan = thinking_system(model, max_new_tokens=8).compile()
    told = {"question": ["a", "b"], "chat_template_kwargs": [None, {"enable_thinking": False}]}
    with pytest.raises(DataError, match="Node 'reasoning', row 1: .*is written already"):
        plan.sample(told)


def test_a_prompt_that_has_closed_the_reasoning_is_refused():
    model = thinking_model(template="switched", chat_template_kwargs={"enable_thinking": False})
    plan = thinking_system(model, max_new_tokens=8).compile()
    with pytest.raises(DataError, match=r"its prompt ends with .*'</think>' is written already"):
        plan.sample({"question": ["two?"]})
    text = thinking_system(thinking_model(), chat=False, max_new_tokens=8).compile()
    assert text.sample({"question": [f"what is {CLOSE}?"]}, seed=0)[
        "reasoning"
    ]  # the prompt's own mention ends nothing


def test_a_thought_that_the_prompt_opens_otherwise_is_refused():
    plan = plan_of(template="opened")
    with pytest.raises(DataError, match=r"the prompt ends with '<think>\\n', and 'reasoning' begins otherwise"):
        plan.log_probs(observed(plan, f"{OPEN} so{CLOSE}", ANSWER))


def test_draws_behind_other_parts_are_refused():
    plan = plan_of()
    empty = Draw("", {"token_ids": [], "finished": True})
    with pytest.raises(DataError, match="is empty exactly where the parts before it ended without their markers"):
        plan.log_probs(Trace({"question": ["a"]}, {"reasoning": [Draw(THOUGHT)], "answer": [empty]}))


def test_a_marker_inside_a_token_is_refused():
    tokenizer = tiny_tokenizers.qwen2(extra=())
    merged = tokenizer("</w>\n\na cube", add_special_tokens=False)["input_ids"]
    assert merged
    model = CausalLM(llama(0, len(tokenizer), max_position_embeddings=256), tokenizer)

    @split(model, reasoning="cub", answer=None, separator="", max_new_tokens=16)  # of the token "cube"
    def solve(question):
        return f"{question}\n"

    plan = System(Input("question") >> solve).compile()
    trace = Trace({"question": ["a"]}, {"reasoning": [Draw("a cub")], "answer": [Draw("e in")]})
    with pytest.raises(DataError, match="Node 'answer', row 0: .*ends inside a token where 'e in' follows"):
        plan.log_probs(trace)


def options_of(**changed):
    return {"reasoning": CLOSE, "answer": None} | changed


@pytest.mark.parametrize(
    ("component", "options", "message"),
    [
        (thinking_model, {"answer": CLOSE}, "None for the last"),
        (thinking_model, {"reasoning": ""}, "None for the last"),
        (thinking_model, {"separator": "--"}, "separator must be white space"),
        (thinking_model, {"max_new_tokens": {"thought": 3}}, "max_new_tokens has 'thought'"),
        (thinking_model, {"max_new_tokens": 0}, "must be an integer of 1 or more"),
        (thinking_model, {"variables": "x", "answer": None}, "cannot be called 'variables'"),
        (lambda: thinking_model(grammar="[a-z]+"), {}, "it has a grammar"),
        (lambda: thinking_model(stop=["k>\n"]), {}, "the stop string .* may be written by the same characters"),
        (lambda: Opaque(str), {}, "it writes no text whose tokens can be cut"),
        (lambda: Seq2Seq(*t5()), {}, "it writes no text whose tokens can be cut"),
    ],
)
def test_splits_that_mean_nothing_are_refused(component, options, message):
    made = component()
    options = options_of(**options)
    if "variables" in options:
        options = {"variables": options.pop("variables"), **options}
    with pytest.raises(GraphError, match=message):
        split(made, **options)


def test_parts_have_one_component_and_stand_behind_each_other():
    model = thinking_model()
    system = thinking_system(model)
    with pytest.raises(GraphError, match="are parts of one completion, which one component writes"):
        system.with_components({"answer": thinking_model(1)})

    @split(model, reasoning=CLOSE, answer=None)
    def solve(question):
        return question

    @node(model, name="reasoning")
    def other(question):
        return question

    with pytest.raises(GraphError, match="'reasoning' is another variable"):
        System(Input("question") >> other, (Input("question") & other) >> solve.answer)
    with pytest.raises(GraphError, match="its function takes 'answer', which is a part"):
        split(model, reasoning=CLOSE, answer=None)(lambda answer: answer)


def test_budgets_that_leave_no_room_are_refused():
    plan = thinking_system(thinking_model(max_length=40, max_new_tokens=20)).compile()
    with pytest.raises(PlanError, match="max_new_tokens={'reasoning': 20, 'answer': 20} leaves no room in 40"):
        plan.sample({"question": ["a"]})


def test_memory_counts_one_model_for_all_parts():
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens=12).compile()

    @node(model)
    def alone(question):
        return question

    whole = System(Input("question") >> alone).compile().estimate({"alone": (20, 24)}, device="cpu")
    parts = plan.estimate({"reasoning": (20, 12), "answer": (32, 12)}, device="cpu")
    assert parts.resident == whole.resident
    assert len(plan.components) == 1


def test_traces_keep_their_parts(tmp_path):
    model = thinking_model()
    plan = thinking_system(model, max_new_tokens={"reasoning": 8, "answer": 4}).compile()
    trace = plan.sample({"question": ["a"] * 6}, seed=2)
    trace.to_jsonl(tmp_path / "runs.jsonl")
    back = Trace.from_jsonl(tmp_path / "runs.jsonl")
    assert back["answer"] == trace["answer"]
    for name, value in plan.log_probs(trace).items():
        torch.testing.assert_close(plan.log_probs(back)[name], value)
