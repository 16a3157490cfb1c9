import copy
import json
import logging
import math
from collections import Counter

import pytest
import torch
from peft import LoraConfig
from tiny import ALPHABET, char_tokenizer, llama
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sysdag import DataError, Draw, MonteCarlo, PlanError
from sysdag.components import CausalLM
from sysdag.components.language.stop_strings import StopStrings

PROMPTS = ["ab", "a longer prompt than that", "z?"]


@pytest.fixture
def lm():
    return CausalLM(llama(), char_tokenizer(), max_new_tokens=10)


def log_prob_by_hand(model, prompt_ids, completion_ids):
    """Token by token, one forward each, no padding, no cache."""
    total = 0.0
    for place in range(len(completion_ids)):
        ids = torch.tensor([[*prompt_ids, *completion_ids[:place]]])
        with torch.no_grad():
            total += float(model(ids).logits[0, -1].double().log_softmax(-1)[completion_ids[place]])
    return total


def test_samples_rescore_to_what_they_were_drawn_with(lm):
    draws = lm.sample(PROMPTS * 8, generator=torch.Generator().manual_seed(1))
    assert {draw.record["finished"] for draw in draws} == {True, False}
    scored = lm.log_prob(PROMPTS * 8, draws)
    assert scored.tolist() == pytest.approx([draw.log_prob for draw in draws], abs=1e-4)


def test_log_prob_equals_one_forward_a_token(lm):
    prompts = lm.prompt_ids(PROMPTS)
    draws = lm.in_context(PROMPTS, lm.observe(["x1", "", "some more text"]))
    expected = [log_prob_by_hand(lm.module, p, d.record["token_ids"]) for p, d in zip(prompts, draws, strict=True)]
    assert lm.log_prob(PROMPTS, draws).tolist() == pytest.approx(expected, abs=1e-4)
    alone = [lm.log_prob([p], [d]).item() for p, d in zip(PROMPTS, draws, strict=True)]
    assert alone == pytest.approx(expected, abs=1e-4)


def test_the_end_of_sequence_counts_once_and_an_empty_completion_is_that_token_alone(lm):
    (empty, full) = lm.in_context(["q", "q"], lm.observe(["", "ab"]))
    assert empty.record["token_ids"] == [lm.tokenizer.eos_token_id]
    assert full.record["token_ids"] == [*lm.tokenizer("ab")["input_ids"], lm.tokenizer.eos_token_id]
    assert lm.lengths([empty, full]) == [1, 3]
    assert torch.isfinite(lm.log_prob(["q", "q"], [empty, full])).all()


def test_sampling_frequencies_agree_with_the_model():
    model = llama(3, vocab_size=6)
    lm = CausalLM(model, char_tokenizer("abc"), max_new_tokens=1)
    draws = lm.sample(["ab"] * 4000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([draw.record["token_ids"][0] for draw in draws]), minlength=6)
    expected = model(torch.tensor([lm.prompt_ids(["ab"])[0]])).logits[0, -1].softmax(-1) * len(draws)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # the 0.999 quantile at 5 degrees of freedom


def test_temperature_and_top_p_are_part_of_the_proposal():
    model = llama(3, vocab_size=6)
    lm = CausalLM(model, char_tokenizer("abc"), max_new_tokens=1, temperature=0.5, top_p=0.8)
    logits = model(torch.tensor([lm.prompt_ids(["ab"])[0]])).logits[0, -1].detach() / 0.5
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = int((probs.cumsum(0) < 0.8).sum()) + 1
    assert kept < 6
    expected = dict(zip(order[:kept].tolist(), (probs[:kept] / probs[:kept].sum()).log().tolist(), strict=True))
    draws = lm.sample(["ab"] * 200, generator=torch.Generator().manual_seed(0))
    for draw in draws:
        (token,) = draw.record["token_ids"]
        assert draw.log_prob == pytest.approx(expected[token], abs=1e-5)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_top_k_is_drawn_from_and_scored_as_transformers_truncates(top_p):
    model = llama(3, vocab_size=12)
    lm = CausalLM(model, char_tokenizer("abcdefghi"), max_new_tokens=1, temperature=1.5, top_p=top_p, top_k=4)
    logits = model(torch.tensor([lm.prompt_ids(["ab"])[0]])).logits[:, -1].detach()
    for warper in (TemperatureLogitsWarper(1.5), TopKLogitsWarper(4), TopPLogitsWarper(top_p)):
        logits = warper(None, logits)
    expected = logits[0].softmax(-1)
    draws = lm.sample(["ab"] * 4000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([draw.record["token_ids"][0] for draw in draws])
    kept = expected > 0
    assert 1 < int(kept.sum()) <= 4
    counts = torch.bincount(tokens, minlength=12)
    assert int(counts[~kept].sum()) == 0
    assert chi_square(counts[kept], expected[kept] * 4000) < 16.3  # the 0.999 quantile at 3 degrees of freedom
    assert [d.log_prob for d in draws] == pytest.approx(expected[tokens].log().tolist(), abs=1e-5)


def test_options_of_a_proposal_replace_the_components_own_one_by_one():
    lm = CausalLM(llama(3), char_tokenizer(), max_new_tokens=1, top_k=1, temperature=0.5)
    draws = lm.propose(["ab"] * 20, temperature=3.0, generator=torch.Generator().manual_seed(0))
    assert {d.value for d in draws} == {lm.sample(["ab"])[0].value}
    assert [d.log_prob for d in draws] == [0.0] * 20
    assert len({d.value for d in lm.propose(["ab"] * 20, temperature=3.0, top_k=0)}) > 1
    assert MonteCarlo(num_candidates=2, top_k=3).top_k == 3
    with pytest.raises(PlanError, match="MonteCarlo needs a top_k"):
        MonteCarlo(num_candidates=2, top_k=-3)


def stopped_by_enumeration(model, prompt, limit, is_end):
    """Every completion that can be drawn, and its probability by plain forwards."""
    found, waiting = {}, {(): 0.0}
    while waiting:
        ids, log_prob = waiting.popitem()
        step = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].detach().double().log_softmax(-1).tolist()
        for token, each in enumerate(step):
            new = (*ids, token)
            into = found if is_end(new) or len(new) == limit else waiting
            into[new] = log_prob + each
    return found


def test_draws_end_at_the_token_that_completes_a_stop_string_and_their_probabilities_sum_to_1():
    model = llama(3, vocab_size=6, peaked=1.0)
    (prompt,) = CausalLM(model, char_tokenizer("abc")).prompt_ids(["ab"])
    pairs = stopped_by_enumeration(model, prompt, 2, lambda ids: ids[-1] == 1)
    stop = max((ids for ids in pairs if min(ids) >= 3), key=pairs.__getitem__)  # the likeliest of two letters
    lm = CausalLM(model, char_tokenizer("abc"), max_new_tokens=4, stop="".join("abc"[token - 3] for token in stop))
    possible = stopped_by_enumeration(model, prompt, 4, lambda ids: ids[-1] == 1 or ids[-2:] == stop)
    draws = lm.sample(["ab"] * 6000, generator=torch.Generator().manual_seed(0))
    assert sum(map(math.exp, possible.values())) == pytest.approx(1)
    seen = Counter(tuple(draw.record["token_ids"]) for draw in draws)
    assert seen.keys() <= possible.keys()
    for draw in draws:
        ids = tuple(draw.record["token_ids"])
        assert draw.log_prob == pytest.approx(possible[ids], abs=1e-4)
        assert draw.record["finished"] == (ids[-1] == 1 or ids[-2:] == stop)
        if ids[-2:] == stop:
            assert draw.value == lm.tokenizer.decode(list(ids[:-2]), skip_special_tokens=True)
    likely = [ids for ids in possible if possible[ids] > math.log(20 / 6000)]
    rest = 1 - sum(math.exp(possible[ids]) for ids in likely)
    counts = torch.tensor([*(seen[ids] for ids in likely), 6000 - sum(seen[ids] for ids in likely)]).double()
    expected = torch.tensor([*(math.exp(possible[ids]) for ids in likely), rest]).double() * 6000
    assert any(ids[-2:] == stop for ids in likely)
    degrees = len(expected) - 1
    assert chi_square(counts, expected) < degrees + 3.1 * math.sqrt(2 * degrees) + 8  # near the 0.999 quantile
    assert lm.log_prob(["ab"] * 50, draws[:50]).tolist() == pytest.approx([d.log_prob for d in draws[:50]], abs=1e-4)


def test_stop_strings_end_draws_where_generate_ends_them():
    model, tokenizer = llama(5), char_tokenizer()
    for stop in (["x"], ["9", " "], "<eos>"):
        lm = CausalLM(model, tokenizer, max_new_tokens=40, stop=stop, top_k=1)
        for prompt in ("ab", "hello"):
            ids = torch.tensor(lm.prompt_ids([prompt]))
            wanted = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, stop_strings=stop,
                tokenizer=tokenizer,
            )  # fmt: skip
            (draw,) = lm.sample([prompt])
            assert draw.record["token_ids"] == wanted[0, ids.shape[1] :].tolist()


def test_a_stop_string_that_a_token_overshoots_is_cut_and_special_tokens_have_text():
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["ops:ab"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    stops = StopStrings(["s:", "<|end|>"], tokenizer)
    overshot = tokenizer("xops:ab")["input_ids"]
    assert len(overshot) == 2
    assert stops.first_end([*overshot, 5]) == 2
    assert stops.text_before(overshot) == "xop"
    ended = tokenizer("xy<|end|>", add_special_tokens=False)["input_ids"]
    assert stops.ends(ended)
    assert not stops.ends(ended[:-1])
    assert stops.text_before(ended) == "xy"
    assert stops.first_end(ended[:-1]) is None


def test_candidates_of_a_search_end_at_a_stop_string_too():
    lm = CausalLM(llama(5), char_tokenizer(), max_new_tokens=12)
    texts = [draw.value for draw in lm.search(["ab"], 4, 2.0)[0]]
    stop = max(Counter("".join(texts)).items(), key=lambda item: item[1])[0]
    stopped = CausalLM(lm.module, char_tokenizer(), max_new_tokens=12, stop=[stop])
    (draws,) = stopped.search(["ab"], 4, 2.0)
    assert all(stop not in draw.value for draw in draws)
    ended = [draw for draw in draws if lm.tokenizer.decode(draw.record["token_ids"]).endswith(stop)]
    assert ended
    assert all(draw.record["finished"] for draw in ended)
    assert len({stopped.key(draw) for draw in draws}) == len(draws)


def test_stop_and_top_k_are_saved_with_the_component(tmp_path):
    lm = CausalLM(llama(), char_tokenizer(), max_new_tokens=4, top_k=3, stop=["x", "yy"])
    loaded = CausalLM.from_pretrained(tmp_path, json.loads(json.dumps(lm.save_pretrained(tmp_path))))
    assert (loaded.top_k, loaded.stop) == (3, ["x", "yy"])
    assert CausalLM(llama(), char_tokenizer(), stop="x").stop == ["x"]


def test_the_same_seed_draws_the_same_and_the_global_seed_counts_without_one(lm):
    first, again, other = (lm.sample(PROMPTS, generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert [d.value for d in first] == [d.value for d in again] != [d.value for d in other]
    torch.manual_seed(3)
    first = lm.sample(PROMPTS)
    torch.manual_seed(3)
    assert [d.value for d in lm.sample(PROMPTS)] == [d.value for d in first]


def test_chat_messages_use_the_template():
    chat = CausalLM(llama(), char_tokenizer(chat=True))
    messages = [{"role": "user", "content": "hi"}]
    assert chat.prompt_ids([messages]) == chat.prompt_ids(["user: hi\nassistant: "])
    assert chat.observe([[{"role": "assistant", "content": "yo"}]])[0].value == "yo"


def test_messages_without_a_template_name_the_fix(lm):
    with pytest.raises(DataError, match="no chat template.*Return a string") as error:
        lm.prompt_ids(["ok", [{"role": "user", "content": "hi"}]])
    assert error.value.element == 1


def counted(tokenizer, monkeypatch):
    """The prompts that the tokenizer is asked for."""
    asked, encode = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **o: asked.append(text) or encode(self, text, **o)
    )
    return asked


def test_a_prompt_is_tokenised_once_and_its_ids_are_the_callers_own(monkeypatch):
    lm = CausalLM(llama(), char_tokenizer())
    asked = counted(lm.tokenizer, monkeypatch)
    first = lm.prompt_ids(["ab", "ba", "ab"])
    first[0].append(0)
    assert lm.prompt_ids(["ba", "ab"]) == [first[1], first[2]]
    assert asked == ["ab", "ba"]


def test_only_the_latest_prompts_are_remembered(monkeypatch):
    monkeypatch.setattr("sysdag.components.language.prompts.REMEMBERED", 2)
    lm = CausalLM(llama(), char_tokenizer())
    asked = counted(lm.tokenizer, monkeypatch)
    lm.prompt_ids(["a", "b", "a", "ab", "a", "b"])  # "b", the one longest unused, is forgotten for "ab"
    assert asked == ["a", "b", "ab", "b"]


def test_prompts_are_tokenised_anew_when_the_template_or_the_vocabulary_changes():
    chat = CausalLM(llama(vocab_size=64), char_tokenizer(chat=True))
    prompt = [{"role": "user", "content": "hi"}]
    before, plain = chat.prompt_ids([prompt, "ab"])
    chat.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert chat.prompt_ids([prompt]) == chat.prompt_ids(["hi!"]) != [before]
    chat.tokenizer.add_tokens(["ab"])
    assert chat.prompt_ids(["ab"]) == [[len(chat.tokenizer) - 1]] != [plain]


@pytest.mark.parametrize("bad", [3, None, [], ["x"], ""])
def test_a_prompt_that_is_none_is_a_data_error(lm, bad):
    with pytest.raises(DataError, match="prompt") as error:
        lm.prompt_ids(["ok", bad])
    assert error.value.element == 1


def test_a_completion_that_is_no_text_is_a_data_error(lm):
    with pytest.raises(DataError, match="completion must be a string") as error:
        lm.observe(["ok", 4])
    assert error.value.element == 1


def test_an_over_long_prompt_keeps_its_end_and_is_reported(caplog):
    lm = CausalLM(llama(), char_tokenizer(), max_new_tokens=4, max_length=10)
    with caplog.at_level(logging.WARNING):
        assert lm.prompt_ids(["0123456789"]) == lm.prompt_ids(["456789"])
    assert "cut to its last 6" in caplog.text
    draws = lm.sample(["0123456789"] * 6, generator=torch.Generator().manual_seed(0))
    assert lm.log_prob(["0123456789"] * 6, draws).tolist() == pytest.approx([d.log_prob for d in draws], abs=1e-4)


def test_an_over_long_completion_is_cut_reported_and_never_nan(caplog):
    lm = CausalLM(llama(), char_tokenizer(), max_new_tokens=4, max_length=10)
    (draw,) = lm.in_context(["012"], lm.observe(["abcdefghijklmnop"]))
    with caplog.at_level(logging.WARNING):
        got = lm.log_prob(["012"], [draw])
    assert "cut to 7" in caplog.text
    cut = Draw("", {"token_ids": draw.record["token_ids"][:7]})
    assert float(got) == pytest.approx(float(lm.log_prob(["012"], [cut])))


def test_a_budget_that_holds_nothing_is_refused(lm):
    with pytest.raises(PlanError, match="max_tokens >= 1, or None"):
        lm.micro_batches(PROMPTS, lm.observe(["a", "b", "c"]), 0)


def test_a_limit_without_room_is_refused():
    with pytest.raises(PlanError, match="leaves no room in 128 positions"):
        CausalLM(llama(), char_tokenizer(), max_new_tokens=128).prompt_ids(["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"max_new_tokens": 9, "max_length": 9}, "max_length > max_new_tokens"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "a top_k of 1 or more tokens, or 0 or None for all, got -1"),
        ({"top_k": 2.5}, "a top_k of 1 or more"),
        ({"stop": ["ok", ""]}, "stop strings that are not empty"),
        ({"stop": [3]}, "stop strings that are not empty"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        CausalLM("somewhere", **options)


def test_by_default_a_completion_may_take_half_of_a_short_context():
    assert CausalLM(llama(), char_tokenizer()).max_new_tokens == 64
    assert CausalLM(llama(max_position_embeddings=1024), char_tokenizer()).max_new_tokens == 256


def test_a_loaded_model_needs_its_tokenizer():
    with pytest.raises(PlanError, match="pass its tokenizer"):
        CausalLM(llama())


def test_a_folder_loads_lazily(tmp_path):
    lm = CausalLM(tmp_path / "nowhere")
    assert "nowhere" in repr(lm)
    llama(7).save_pretrained(tmp_path / "model")
    char_tokenizer().save_pretrained(tmp_path / "model")
    loaded, at_hand = CausalLM(tmp_path / "model"), CausalLM(llama(7), char_tokenizer())
    draws = at_hand.observe(["abc"])
    torch.testing.assert_close(loaded.log_prob(["q"], draws), at_hand.log_prob(["q"], draws))


def test_search_gives_distinct_candidates_that_score_by_teacher_forcing(lm):
    found = lm.search(PROMPTS, 4, 20.0)
    assert len(found) == 3
    for prompt, draws in zip(PROMPTS, found, strict=True):
        keys = [lm.key(draw) for draw in draws]
        assert len(set(keys)) == len(keys) > 1
        assert all(draw.log_prob is None for draw in draws)
        assert lm.search([prompt], 4, 20.0)[0][0].value == draws[0].value


def test_ngram_diversity_is_another_search():
    lm = CausalLM(llama(5), char_tokenizer(), max_new_tokens=8)
    hamming, trigrams = (lm.search(["ab cd"], 4, 2.0, ngram_size=n)[0] for n in (1, 3))
    assert [lm.key(draw) for draw in hamming] != [lm.key(draw) for draw in trigrams]


def test_a_frozen_copy_stays_while_the_policy_trains(lm):
    draws = lm.observe(["ab", "c", "d"])
    reference = lm.reference()
    before = reference.log_prob(PROMPTS, draws)
    torch.testing.assert_close(before, lm.log_prob(PROMPTS, draws), rtol=0, atol=0)
    optimizer = torch.optim.SGD(lm.module.parameters(), lr=0.1)
    lm.log_prob(PROMPTS, draws).sum().backward()
    optimizer.step()
    torch.testing.assert_close(reference.log_prob(PROMPTS, draws), before, rtol=0, atol=0)
    assert not torch.allclose(lm.log_prob(PROMPTS, draws), before)
    assert not any(parameter.requires_grad for parameter in reference.module.parameters())


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def test_an_adapter_switched_off_is_the_reference():
    lm = CausalLM(llama(), char_tokenizer(), peft_config=lora())
    draws = lm.observe(["ab", "c", "d"])
    reference = lm.reference()
    assert reference.module is lm.module
    base = CausalLM(llama(), char_tokenizer())
    expected = base.log_prob(PROMPTS, draws)
    optimizer = torch.optim.SGD([p for p in lm.module.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        lm.log_prob(PROMPTS, draws).sum().backward()
        optimizer.step()
    torch.testing.assert_close(reference.log_prob(PROMPTS, draws), expected)
    assert not torch.allclose(lm.log_prob(PROMPTS, draws), expected)


def test_an_adapter_switched_off_packs_as_it_does_switched_on():
    lm = trained(CausalLM(llama(), char_tokenizer(), peft_config=lora()))
    plain = copy.copy(lm)
    plain.pack_prefixes = False
    prompts = ["a prompt that is shared"] * 4
    draws = lm.observe(["ab", "ac", "ad", "abc"])
    for component in (lm, plain):
        component.log_prob(prompts, draws)
    widths = []
    lm.module.register_forward_pre_hook(
        lambda m, a, options: widths.append(options["input_ids"].shape), with_kwargs=True
    )
    found = []
    for off in (False, True):
        lm.lm.adapter_off = plain.lm.adapter_off = off
        found.append(lm.log_prob(prompts, draws))
        torch.testing.assert_close(found[-1], plain.log_prob(prompts, draws), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*found)
    assert [shape[0] for shape in widths] == [1, 4, 1, 4]


def test_the_reference_of_an_adapter_that_was_trained_before_is_what_it_is_now():
    lm = trained(CausalLM(llama(), char_tokenizer(), peft_config=lora()))
    draws = lm.observe(["ab"])
    reference = lm.reference()
    assert reference.module is lm.module
    now = lm.log_prob(["q"], draws)
    torch.testing.assert_close(reference.log_prob(["q"], draws), now, rtol=0, atol=0)
    trained(lm)
    torch.testing.assert_close(reference.log_prob(["q"], draws), now, rtol=0, atol=0)


def trained(lm):
    with torch.no_grad():
        for parameter in lm.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return lm


def test_a_full_model_saves_to_a_folder_transformers_loads(tmp_path, lm):
    lm.pack_prefixes = False
    options = trained(lm).save_pretrained(tmp_path)
    loaded = CausalLM.from_pretrained(tmp_path, options)
    assert loaded.max_new_tokens == 10
    assert not loaded.pack_prefixes
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(tensor, lm.module.state_dict()[name], rtol=0, atol=0)
    draws = lm.observe(["ab"])
    torch.testing.assert_close(loaded.log_prob(["q"], draws), lm.log_prob(["q"], draws), rtol=0, atol=0)
    other = CausalLM(llama(9), char_tokenizer())
    other.load_weights(tmp_path)
    torch.testing.assert_close(other.log_prob(["q"], draws), lm.log_prob(["q"], draws), rtol=0, atol=0)


@pytest.mark.parametrize("by_path", [True, False])
def test_an_adapter_saves_and_loads(tmp_path, by_path):
    source = llama()
    if by_path:
        source.save_pretrained(tmp_path / "base")
        source = tmp_path / "base"
    lm = trained(CausalLM(source, char_tokenizer(), peft_config=lora()))
    (tmp_path / "saved").mkdir()
    options = lm.save_pretrained(tmp_path / "saved")
    draws = lm.observe(["ab"])
    loaded = CausalLM.from_pretrained(tmp_path / "saved", options)
    torch.testing.assert_close(loaded.log_prob(["q"], draws), lm.log_prob(["q"], draws))
    assert [p for p in loaded.module.parameters() if p.requires_grad]
    fresh = CausalLM(llama(), char_tokenizer(), peft_config=lora())
    fresh.load_weights(tmp_path / "saved")
    torch.testing.assert_close(fresh.log_prob(["q"], draws), lm.log_prob(["q"], draws))
    reference = loaded.reference()
    torch.testing.assert_close(reference.log_prob(["q"], draws), loaded.log_prob(["q"], draws))


def test_the_alphabet_of_the_tests_round_trips():
    tokenizer = char_tokenizer()
    assert tokenizer.decode(tokenizer(ALPHABET)["input_ids"]) == ALPHABET
