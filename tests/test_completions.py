"""Observed completions behind texts and messages: where they begin, how they end, and which of their tokens count."""

import logging
import math

import pytest
import torch
from tiny import char_tokenizer, llama
from tokenizer_families import HEADERS, IM, TOOLS, assistant, bytes_with, family, llama_2, user
from transformers import GenerationConfig

from sysdag import DataError, Draw, Input, System, Trace, node
from sysdag.components import CausalLM
from sysdag.data import encode_pairs, validate_rows
from sysdag.engine.step import SystemModel
from sysdag.objectives.comparison import term_lengths
from sysdag.objectives.options import ObjectiveOptions
from sysdag.objectives.strategies import MonteCarlo
from sysdag.traces import read_rows, write_pairs

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ghent"}}}
RAIN = [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "rain, 9 C"}, assistant("It rains.")]


def language_model(tokenizer, ends=None, **options):
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=512, hidden_size=16, intermediate_size=16)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ends or [tokenizer.eos_token]))
    return CausalLM(model, tokenizer, **{"max_new_tokens": 64, **options})


def tokens(lm, prompt, value):
    """The pieces of the completion."""
    [draw] = lm.in_context([prompt], lm.observe([value]))
    return lm.tokenizer.convert_ids_to_tokens(draw.record["token_ids"])


@pytest.mark.parametrize("name", ["Llama 2 base", "Mistral base: SentencePiece (Metaspace, always)",
                                  "Mistral base: SentencePiece (Metaspace, first)"])  # fmt: skip
def test_sentencepiece_puts_no_space_before_an_answer(name):
    lm = language_model(family(name).tokenizer)
    assert "".join(tokens(lm, "A:\n", "hi")) == "hi</s>"
    assert "".join(tokens(lm, "A:\n", " hi")) == "▁hi</s>"
    assert tokens(lm, "A:\n", "B") == ["<0x42>", "</s>"]


def test_text_that_ends_in_an_end_token_gets_no_second_one():
    """`<|im_end|>` is an end by the generation config alone, `<|endoftext|>` by the tokenizer."""
    lm = language_model(family("ChatML on a base").tokenizer, ends=IM[:1] + IM[2:])
    assert tokens(lm, "A:\n", "hi<|im_end|>") == ["hi", "<|im_end|>"]
    assert tokens(lm, "A:\n", "hi<|endoftext|>") == ["hi", "<|endoftext|>"]
    assert tokens(lm, "A:\n", "hi") == ["hi", "<|endoftext|>"]
    assert tokens(lm, [user("q")], "hi<|im_end|>") == tokens(lm, [user("q")], "hi")
    assert tokens(lm, [user("q")], [assistant("hi<|im_end|>")]) == ["hi", "<|im_end|>"]


def test_an_end_that_nobody_declares_is_scored_and_said_once(caplog):
    lm = language_model(family("ChatML on a base").tokenizer)
    for _ in range(2):
        assert tokens(lm, [user("q")], "hi")[-1] == "<|im_end|>"
    assert caplog.text.count("Add it to model.generation_config.eos_token_id") == 1


def test_the_ends_of_a_named_model_are_read_without_its_weights(tmp_path):
    tokenizer = family("Llama 3: headers").tokenizer
    tokenizer.save_pretrained(tmp_path)
    llama(vocab_size=len(tokenizer)).config.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids([HEADERS[1], HEADERS[4]])).save_pretrained(tmp_path)
    lm = CausalLM(tmp_path)  # the folder has no weights
    assert lm.lm.eos_token_ids == tokenizer.convert_tokens_to_ids([HEADERS[1], HEADERS[4]])
    assert tokens(lm, "A:\n", "hi<|eot_id|>")[-1] == "<|eot_id|>"


def test_a_token_that_straddles_the_border_takes_the_prompts_place_and_is_said_once(caplog):
    lm = language_model(family("GPT-2").tokenizer)
    [draw] = lm.in_context(["say "], lm.observe(["there"]))
    whole = lm.tokenizer("say there")["input_ids"] + [lm.tokenizer.eos_token_id]
    kept = len(lm.tokenizer("say")["input_ids"])
    assert draw.record == {"token_ids": whole[kept:], "finished": True, "prompt_overlap": 1}
    assert lm._sequences(["say "], [draw]) == [(whole[:kept], whole[kept:])]
    with torch.no_grad():
        log_probs = lm.module(torch.tensor([whole])).logits[0].log_softmax(-1)
    by_hand = sum(float(log_probs[place - 1, whole[place]]) for place in range(kept, len(whole)))
    assert lm.log_prob(["say "], [draw]).item() == pytest.approx(by_hand, abs=1e-4)
    assert lm.lengths([draw]) == [len(whole) - kept]
    lm.in_context(["say "], lm.observe(["there"]))
    assert caplog.text.count("are others than without it") == 1


def test_a_prompt_of_which_nothing_is_left_is_refused():
    lm = language_model(family("GPT-2").tokenizer)
    with pytest.raises(DataError, match="leaves no token of its prompt as it was") as error:
        lm.in_context(["say", " "], lm.observe(["x", "there"]))
    assert error.value.element == 1


@pytest.mark.parametrize("stop", [["x"], ["9", " "], ["\n", "f"]])
def test_a_text_that_holds_a_stop_string_is_the_completion_that_generate_writes(stop, caplog):
    """Its tokens end where those of transformers do, whatever stands behind the string, and no end token follows."""
    model, tokenizer = llama(5), char_tokenizer()
    lm = CausalLM(model, tokenizer, max_new_tokens=40, stop=stop, top_k=1)
    for prompt in ("ab", "hello", "x9f"):
        ids = torch.tensor(lm.prompt_ids([prompt]))
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, stop_strings=stop,
            tokenizer=tokenizer,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        text = tokenizer.decode(generated, skip_special_tokens=True)
        if (
            not any(each in text for each in stop)
            or tokenizer(text, add_special_tokens=False)["input_ids"] != generated
        ):
            continue  # the model did not stop, or wrote an unknown character
        [drawn] = lm.sample([prompt])
        for observed in (text, text + " and more"):
            [draw] = lm.in_context([prompt], lm.observe([observed]))
            assert draw.record == {"token_ids": generated, "finished": True} == drawn.record
        assert lm.log_prob([prompt], [draw]).item() == pytest.approx(lm.log_prob([prompt], [drawn]).item(), abs=1e-5)
    assert caplog.text.count("goes on behind a stop string") == 1


def test_a_text_without_a_stop_string_has_its_end_token():
    plain, stopped = (language_model(family("Qwen2").tokenizer, stop=stop) for stop in (None, ["###", "<|endoftext|>"]))
    for prompt in ("A:", [user("q")]):
        assert tokens(stopped, prompt, "hi") == ["hi", "<|im_end|>"] == tokens(plain, prompt, "hi")
        assert tokens(stopped, prompt, "hi###") == ["hi", "#", "#", "#"]
        assert tokens(stopped, prompt, "hi### there") == ["hi", "#", "#", "#"]
    assert tokens(stopped, "A:", "hi<|endoftext|>there") == ["hi", "<|endoftext|>"]
    assert plain.reading() != stopped.reading()


@pytest.mark.parametrize("name", ["Llama 2 base", "Llama 3 base"])
def test_a_rendered_chat_gets_one_bos_and_it_is_said_once(name, caplog):
    lm = language_model(family(name).tokenizer)
    bos = lm.tokenizer.bos_token
    for _ in range(2):
        [ids] = lm.prompt_ids([f"{bos}say hi there"])
        assert ids == lm.tokenizer("say hi there")["input_ids"]
        assert ids.count(lm.tokenizer.bos_token_id) == 1
    assert caplog.text.count("puts no second one before it") == 1


def test_an_eos_that_the_tokenizer_adds_does_not_end_a_prompt(caplog):
    lm = language_model(family("T5").tokenizer)
    assert lm.tokenizer("say")["input_ids"][-1] == lm.tokenizer.eos_token_id
    for _ in range(2):
        assert lm.prompt_ids(["say"]) == [lm.tokenizer("say", add_special_tokens=False)["input_ids"]]
    assert caplog.text.count("'</s>'; prompts go without") == 1


def test_a_rendering_that_ends_in_other_ids_than_its_generation_prompt_begins_where_they_part(caplog):
    """The template opens a thought in the generation prompt that the rendered answer does not have."""
    lm = language_model(family("DeepSeek").tokenizer)
    [draw] = lm.in_context([[user("q")]], lm.observe(["hi"]))
    whole = lm.tokenizer.apply_chat_template([user("q"), assistant("hi")], return_dict=False)
    assert draw.record["prompt_overlap"] == len(lm.tokenizer("<think>\n")["input_ids"])
    [(prompt, completion)] = lm._sequences([[user("q")]], [draw])
    assert prompt + completion == whole
    assert "<think>" in caplog.text


def test_a_template_that_writes_the_question_anew_once_it_is_answered_is_refused():
    role = "(m.role if messages | length > 1 else 'only')"
    template = "{% for m in messages %}{{ " + role + " + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="writes the messages before it otherwise than without"):
        language_model(tokenizer).in_context([[user("q")]], [Draw("hi")])


# Several messages


def tools_model(**options):
    return language_model(bytes_with(TOOLS, IM, IM[2]), [IM[2], IM[0]], **options)


def test_results_of_tools_and_user_turns_are_read_and_not_scored():
    lm = tools_model()
    prompt, value = [user("the weather?")], [*RAIN, user("thanks"), assistant("Bye.")]
    [draw] = lm.in_context([prompt], lm.observe([value]))
    ids, mask = draw.record["token_ids"], draw.record["completion_mask"]
    header = lm.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = lm.tokenizer.apply_chat_template([*prompt, *value], return_dict=False)
    assert header + ids == whole[: len(header) + len(ids)]
    scored = lm.tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
    assert scored == ('<tool_call>weather{"city": "Ghent"}</tool_call><|im_end|>It rains.<|im_end|>Bye.<|im_end|>')
    assert lm.lengths([draw]) == [sum(mask)]
    with torch.no_grad():
        log_probs = lm.module(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = [len(header) + place for place, counts in enumerate(mask) if counts]
    by_hand = sum(float(log_probs[place - 1, whole[place]]) for place in places)
    assert lm.log_prob([prompt], [draw]).item() == pytest.approx(by_hand, abs=1e-3)
    others = lm.observe(["It rains.", [*RAIN[:2], assistant("It pours.")]])
    together = lm.log_prob([prompt] * 3, [draw, *others])
    alone = torch.cat([lm.log_prob([prompt], [each]) for each in (draw, *others)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_reasoning_is_scored_where_the_template_writes_it_and_refused_where_it_does_not():
    thinker = language_model(family("Qwen3").tokenizer)
    thought = [assistant("5", reasoning_content="2 and 3")]
    assert "".join(tokens(thinker, [user("sum?")], thought)) == "<think>Ċ2ĠandĠ3Ċ</think>ĊĊ5<|im_end|>"
    with pytest.raises(DataError, match="leaves out 'reasoning_content' of message 1"):
        tokens(language_model(family("Qwen2").tokenizer), [user("sum?")], thought)
    history = [user("sum?"), *thought, user("and 1?")]  # which the template leaves out, as its author meant
    assert thinker.prompt_ids([history]) == thinker.prompt_ids([[user("sum?"), assistant("5"), user("and 1?")]])


def test_calls_that_the_template_does_not_know_are_refused():
    lm = language_model(family("Zephyr: eos").tokenizer)
    with pytest.raises(DataError, match="leaves out 'tool_calls' of message 1"):
        tokens(lm, [user("q")], [assistant("it is", tool_calls=[CALL])])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([user("q")], "needs a message of the assistant"),
        ([{"role": "assistant"}], "no content and no tool_calls"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "no content and no tool_calls"),
        ([assistant("x", images=["p.png"])], "takes no images"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "parts of text alone, got a part of type 'image'"),
        ([{"from": "gpt", "value": "x"}], "Rename 'from' to 'role'"),
        ([assistant("x", tool_calls="weather")], "tool_calls must be a list of dicts"),
        ([assistant("x", extra=object())], "which is no text"),
        ([], "must be a string or a list of messages"),
    ],
)
def test_what_is_no_completion_is_refused(value, message):
    with pytest.raises(DataError, match=message) as error:
        tools_model().observe(["x", value])
    assert error.value.element == 1


def test_messages_behind_a_text_are_refused():
    with pytest.raises(DataError, match="its prompt is a text"):
        tokens(tools_model(), "the weather?", RAIN)
    assert tokens(tools_model(), "q\n", [assistant("x")]) == tokens(tools_model(), "q\n", "x")


def test_a_prompt_that_ends_in_the_middle_of_an_answer_is_gone_on_with():
    lm = language_model(family("Qwen2").tokenizer)
    begun = [user("q"), assistant("it is")]
    [ids] = lm.prompt_ids([begun])
    apply = lm.tokenizer.apply_chat_template
    assert ids == apply(begun, continue_final_message=True, return_dict=False)
    for value in (" 5", [assistant(" 5")]):
        [draw] = lm.in_context([begun], lm.observe([value]))
        whole = apply([user("q"), assistant("it is 5")], return_dict=False)
        assert ids + draw.record["token_ids"] == whole[:-1]  # all but the line break
    with pytest.raises(DataError, match="begins with a message of the role 'user'"):
        lm.in_context([begun], lm.observe([[user("and?"), assistant("x")]]))


# Draws and files


def test_sampled_draws_stay_what_they_were():
    lm = language_model(family("Gemma: no").tokenizer, ["<eos>", "<end_of_turn>"])
    draws = lm.sample([[user("q")]] * 3, generator=torch.Generator().manual_seed(0))
    assert all(one is other for one, other in zip(lm.in_context([[user("q")]] * 3, draws), draws, strict=True))
    assert all(set(draw.record) == {"token_ids", "finished"} for draw in draws)


def two_nodes():
    question = Input("question", str)
    lm = tools_model()

    @node(lm)
    def draft(question):
        return [user(question)]

    @node(lm)
    def answer(question, draft):
        return [user(f"{question} {draft}")]

    return System(question >> draft, (question & draft) >> answer).compile()


PLAN = two_nodes()
ROW = {"question": "rain?", "chosen": RAIN, "rejected": [RAIN[0], RAIN[1], assistant("No.")]}


def test_pairs_and_traces_with_messages_are_saved_and_loaded_whole(tmp_path):
    for ending in ("jsonl", "parquet"):
        write_pairs(tmp_path / f"pairs.{ending}", [ROW, {**ROW, "chosen": "It does."}])
        again = encode_pairs(PLAN, read_rows(tmp_path / f"pairs.{ending}"), "sampling")
        assert [pair.key for pair in again] == [
            pair.key for pair in encode_pairs(PLAN, [ROW, {**ROW, "chosen": "It does."}], "sampling")
        ]
        cells = {
            "draft": PLAN.system["draft"].component.observe(["x"] * 2),
            "answer": [again[0].chosen["answer"], Draw("It does.")],
        }
        trace = Trace({"question": ["rain?"] * 2}, cells)
        trace.save(tmp_path / f"runs.{ending}")
        loaded = Trace.load(tmp_path / f"runs.{ending}")
        assert loaded["answer"] == trace["answer"] == [RAIN, "It does."]
        scores, expected = PLAN.log_probs(loaded), PLAN.log_probs(trace)
        torch.testing.assert_close(scores["answer"], expected["answer"], rtol=0, atol=0)


def test_a_resolved_draw_is_checked_as_a_sampled_one():
    lm = PLAN.system["answer"].component
    [draw] = lm.in_context([[user("q")]], lm.observe([RAIN]))
    lm.check_draws([draw])
    for change in ({"completion_mask": [1]}, {"prompt_overlap": -1}, {"token_ids": [10**6]}):
        with pytest.raises(DataError, match=next(iter(change)).split("_")[0]):
            lm.check_draws([Draw(draw.value, {**draw.record, **change})])


def test_pairs_that_differ_in_their_calls_alone_are_a_preference():
    other = [assistant("", tool_calls=[{"type": "function", "function": {"name": "rain", "arguments": {}}}])]
    row = {"question": "q", "chosen": RAIN[:1], "rejected": other}
    assert validate_rows(PLAN, [row], "sampling").kept == (0,)
    report = validate_rows(PLAN, [{**row, "rejected": RAIN[:1]}], "sampling")
    assert report.counts == {"identical": 1}


def test_under_sampling_a_completion_has_the_tokens_of_each_candidates_prompt():
    """Behind "say " the answer "there" takes the place of the space, behind "say\n" it does not."""
    lm = language_model(family("GPT-2").tokenizer)
    question = Input("question", str)

    @node(lm)
    def draft(question):
        return question

    @node(lm)
    def answer(draft):
        return draft

    plan = System(question >> draft, draft >> answer).compile()
    trace = Trace(
        {"question": ["q", "q"]},
        {"draft": plan.system["draft"].component.observe(["say ", "say\n"]), "answer": [Draw("there")] * 2},
    )
    scores = plan.log_probs(trace)["answer"]
    eos = lm.tokenizer.eos_token_id
    for score, prompt in zip(scores.tolist(), ("say ", "say\n"), strict=True):
        whole = lm.tokenizer(prompt + "there")["input_ids"] + [eos]
        start = len(lm.tokenizer(prompt.rstrip(" "))["input_ids"])
        log_probs = lm.module(torch.tensor([whole])).logits[0].log_softmax(-1)
        assert score == pytest.approx(
            sum(float(log_probs[p - 1, whole[p]]) for p in range(start, len(whole))), abs=1e-4
        )


def test_beam_candidates_carry_the_end_that_the_model_wrote():
    tokenizer = family("Gemma: no").tokenizer
    lm = language_model(tokenizer, ["<eos>", "<end_of_turn>"], max_new_tokens=3)
    end, other = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    with torch.no_grad():
        lm.module.lm_head.weight.zero_()
        bias = torch.zeros(len(tokenizer))
        bias[end], bias[other] = 4.0, -4.0
        lm.module.lm_head.bias = torch.nn.Parameter(bias)
    [found] = lm.search([[user("q")]], 2, 1.0)
    first = found[0].record["token_ids"]
    assert first == [end]
    log_prob = bias.log_softmax(0)[end].item()
    assert lm.log_prob([[user("q")]], found[:1]).item() == pytest.approx(log_prob, abs=1e-4)


def test_the_tokenizer_of_a_reference_scores_file_is_part_of_what_it_depends_on():
    lm, other = tools_model(), tools_model(chat_template_kwargs={})
    assert lm.reading() == other.reading()
    lm.tokenizer("a long text that is cut", max_length=3, truncation=True)  # of one call
    assert lm.reading() == other.reading()
    other.tokenizer.chat_template += "!"
    assert lm.reading() != other.reading() != language_model(llama_2()).reading()


def test_what_is_logged_names_the_component(caplog):
    caplog.set_level(logging.WARNING)
    tokens(language_model(family("WordLevel").tokenizer), [user("say")], "hi there")
    assert "CausalLM('LlamaForCausalLM'): the chat template ends a turn without an end token" in caplog.text


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_rows_with_messages_and_tools_train_under_both_objectives(objective):
    tool = {"type": "function", "function": {"name": "weather"}}
    chosen, rejected = (
        {f"{side}_intermediates": {"draft": text}} for side, text in (("chosen", "a"), ("rejected", "b"))
    )
    rows = [{**ROW, **chosen, **rejected, "tools": [tool]}, {**ROW, **chosen, **rejected, "rejected": "It does not."}]
    plan = two_nodes()
    candidates = MonteCarlo(num_candidates=2) if objective == "sampling" else None
    model = SystemModel(plan, ObjectiveOptions(objective=objective), candidates=candidates)
    pairs = encode_pairs(plan, rows, objective)
    output = model(pairs, torch.Generator().manual_seed(0))
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-5)
    lengths = term_lengths(plan, model.compare(pairs, None, None).terms[-1].trace, "answer")
    lm = plan.system["answer"].component
    prompt = lm.with_row_options([user("rain? a")], {"tools": [tool]})
    [draw] = lm.in_context([prompt], lm.observe([RAIN]))
    assert lengths[0] == sum(draw.record["completion_mask"])
