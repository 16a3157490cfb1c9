"""Encoder-decoders as components, against transformers: forwards with labels, `generate`, and its logits processors."""

import copy
import functools
import itertools
import logging

import pytest
import seq2seq_families
import torch
import transformers
from seq2seq_families import FAMILIES, GERMAN, T5, randomised
from tiny import char_tokenizer, llama

import sysdag
from sysdag import DataError, PlanError
from sysdag.components import CausalLM, Seq2Seq
from sysdag.traces.cells import Draw

SOURCES = ["a red cube", "two words and a dark square on the white room", "a red cube"]
TARGETS = ["old friend of mine", "a cube", "light circle in the room"]
GERMAN_TARGETS = ["ein alter Freund", "zwei schwarze Worte", "der weiße Raum"]
SERVED = [name for name in FAMILIES if name != "prophetnet"]


@functools.cache
def family(name):
    return FAMILIES[name]()


def component(name, **options):
    return Seq2Seq(*family(name), **({"max_new_tokens": 24} | options))


def targets_of(name):
    return GERMAN_TARGETS if name.startswith("marian") else TARGETS


def by_processors(model, tokenizer, source, ids, **settings):
    """Of each label under what `generate` would allow: its own processors, on the logits of a plain forward."""
    rules = copy.deepcopy(model.generation_config)
    rules.update(**settings)
    starts = (rules.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), rules.bos_token_id)
    start = next(token for token in starts if token is not None)
    rules._eos_token_tensor = torch.tensor([rules.eos_token_id]).flatten()
    source_ids = torch.tensor([tokenizer(source)["input_ids"]])
    processors = model._get_logits_processor(rules, 1, source_ids, device="cpu", model_kwargs={})
    decoder = torch.tensor([[start, *ids[:-1]]])
    logits = model(input_ids=source_ids, decoder_input_ids=decoder, use_cache=False).logits[0]
    found = []
    for place, token in enumerate(ids):
        before = torch.tensor([[start, *ids[:place]]])
        found.append(processors(before, logits[place][None].clone())[0].log_softmax(-1)[token])
    return torch.stack(found)


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_scores_are_those_of_plain_forwards_under_the_generation_config(name):
    (model, tokenizer), made = family(name), component(name)
    draws = made.in_context(SOURCES, made.observe(targets_of(name)))
    drawn = made.sample(SOURCES, generator=[1, 2, 3])
    for some in (draws, drawn, [*draws[:1], *drawn[1:]]):
        found = made.log_prob(SOURCES, some)
        for source, draw, ours in zip(SOURCES, some, found, strict=True):
            forced = {"forced_bos_token_id": made.rules.forced_first, "max_length": 25}
            theirs = by_processors(model, tokenizer, source, draw.record["token_ids"], **forced)
            assert ours == pytest.approx(float(theirs.sum()), abs=1e-4)
            if draw.log_prob is not None:
                assert draw.log_prob == pytest.approx(float(ours), abs=1e-4)
    for target, draw in zip(targets_of(name), draws, strict=True):
        labels = tokenizer(text_target=target)["input_ids"]
        assert draw.record["token_ids"] == labels[: labels.index(tokenizer.eos_token_id) + 1]


@pytest.mark.parametrize("name", ["t5", "t5_v1_1", "bart", "marian", "marian_separate", "pegasus", "mbart", "t5gemma"])
@torch.no_grad()
def test_without_rules_the_score_is_the_loss_that_a_model_makes_of_labels(name):
    model, tokenizer = family(name)
    off = {"forced_bos_token_id": None, "forced_eos_token_id": None, "bad_words_ids": None}
    made = component(name, generation_config=off)
    found = made.log_prob(SOURCES, made.observe(targets_of(name)))
    for source, target, ours in zip(SOURCES, targets_of(name), found, strict=True):
        inputs = tokenizer(source, text_target=target, return_tensors="pt")
        output = model(**{key: inputs[key] for key in ("input_ids", "labels")})
        end = inputs["labels"][0].tolist().index(tokenizer.eos_token_id) + 1  # a language's code behind it is none
        each = output.logits[0].log_softmax(-1).gather(1, inputs["labels"][0][:, None])[:end]
        assert ours == pytest.approx(float(each.sum()), abs=1e-4)
        if end == inputs["labels"].shape[1]:
            assert ours == pytest.approx(-float(output.loss) * end, abs=1e-4)


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_greedy_draws_are_those_of_generate(name):
    (model, tokenizer), made = family(name), component(name)
    found = made.propose(SOURCES, top_k=1, generator=[1, 2, 3])
    forced = {"forced_bos_token_id": made.rules.forced_first} if made.rules.forced_first is not None else {}
    for source, draw in zip(SOURCES, found, strict=True):
        ids = tokenizer(source, return_tensors="pt")["input_ids"]
        [theirs] = model.generate(ids, max_new_tokens=24, do_sample=False, num_beams=1, **forced).tolist()
        ours = draw.record["token_ids"]
        assert theirs[1 : len(ours) + 1] == ours
        assert draw.value == tokenizer.decode(theirs, skip_special_tokens=True)
        assert draw.record["finished"] == (ours[-1] == tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "t5gemma", "fsmt", "led"])
def test_a_draw_depends_on_its_seed_and_source_alone(name):
    made = component(name)
    seeds, sources = [11, 12, 13, 14], [*SOURCES, SOURCES[0]]
    together = made.sample(sources, generator=seeds)
    for place, (source, seed) in enumerate(zip(sources, seeds, strict=True)):
        assert made.sample([source], generator=[seed])[0].record == together[place].record
    narrow = component(name, batch_size=1).sample(sources, generator=seeds)
    assert [draw.record for draw in narrow] == [draw.record for draw in together]


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "nllb", "t5gemma", "fsmt"])
@torch.no_grad()
def test_candidates_of_a_search_are_distinct_and_score_by_teacher_forcing(name):
    made = component(name, max_new_tokens=6)
    found = made.search(SOURCES, 3, 2.0)
    alone = made.search(SOURCES[1:2], 3, 2.0)
    assert [draw.record for draw in found[1]] == [draw.record for draw in alone[0]]
    for source, candidates in zip(SOURCES, found, strict=True):
        assert len({tuple(draw.record["token_ids"]) for draw in candidates}) == 3
        assert made.log_prob([source] * 3, candidates).isfinite().all()
    [[best, *_]] = made.search(SOURCES[:1], 1, 0.0)
    greedy = made.propose(SOURCES[:1], top_k=1, generator=[0])[0]
    assert best.record == greedy.record


SETTINGS = {
    "forced tokens": {"forced_bos_token_id": 3, "forced_eos_token_id": 1},
    "n-grams of the target": {"no_repeat_ngram_size": 2, "forced_eos_token_id": 1},
    "n-grams of the source": {"encoder_no_repeat_ngram_size": 2, "forced_eos_token_id": 1},
    "single tokens once": {"no_repeat_ngram_size": 1},
    "lengths": {"min_length": 3, "forced_eos_token_id": 1},
    "new tokens": {"min_new_tokens": 2},
    "suppressed": {"suppress_tokens": [2, 0], "begin_suppress_tokens": [4], "forced_bos_token_id": 3},
    "first ones": {"begin_suppress_tokens": [4, 1]},
    "bad words": {"bad_words_ids": [[0], [3, 4], [1]], "forced_eos_token_id": 1},
}


@functools.cache
def of_five_tokens():
    tokenizer = char_tokenizer("ab")
    options = T5 | {"d_model": 16, "num_layers": 1, "num_heads": 2}
    return randomised(
        transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=5, **options))
    ), tokenizer


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_the_probabilities_of_all_targets_sum_to_1_and_are_drawn_from(settings):
    model, tokenizer = of_five_tokens()
    made = Seq2Seq(model, tokenizer, max_new_tokens=3, generation_config=settings)
    source, wanted = "abba", {}
    for ids in map(list, itertools.product(range(5), repeat=3)):
        ids = ids[: ids.index(1) + 1] if 1 in ids else ids
        each = by_processors(model, tokenizer, source, ids, max_length=4, **settings)
        wanted[tuple(ids)] = float(each.sum().exp())
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-5)
    possible = {ids: p for ids, p in wanted.items() if p > 0}
    draws = [Draw("", {"token_ids": list(ids), "finished": True}) for ids in possible]
    found = made.log_prob([source] * len(draws), draws).exp()
    assert found.tolist() == pytest.approx(list(possible.values()), abs=1e-5)
    for ids in wanted.keys() - possible.keys():
        with pytest.raises(DataError, match="generation config's .* forbids token"):
            made.log_prob([source], [Draw("", {"token_ids": list(ids), "finished": True})])
    count = 3000
    sampled = [tuple(d.record["token_ids"]) for d in made.sample([source] * count, generator=list(range(count)))]
    assert set(sampled) <= possible.keys()
    seen = [(sampled.count(ids), count * p) for ids, p in possible.items() if count * p >= 5]
    freedom = max(1, len(seen) - 1)
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in seen)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    candidates = {tuple(draw.record["token_ids"]) for draw in made.search([source], 4, 1.0)[0]}
    assert candidates <= possible.keys()


@pytest.mark.parametrize("settings", [{}, {"no_repeat_ngram_size": 2, "min_length": 3, "forced_bos_token_id": 3}])
@torch.no_grad()
def test_typicality_and_weights_are_sums_over_the_same_tokens(settings):
    model, tokenizer = of_five_tokens()
    made = Seq2Seq(model, tokenizer, max_new_tokens=8, generation_config=settings)
    targets, heads = [[3, 4, 0, 1], [3, 0, 4, 2]], [2, 1]
    draws = [Draw("", {"token_ids": ids, "finished": True}) for ids in targets]
    sources = ["ab", "abba"]
    typical, weighted = made.typicality(sources, draws), made.weighted_score(sources, draws, heads, 0.25)
    for place, (source, ids) in enumerate(zip(sources, targets, strict=True)):
        each = by_processors(model, tokenizer, source, ids, **settings)
        parts = torch.tensor([1.0 if number < heads[place] else 0.25 for number in range(len(ids))])
        assert weighted[place] == pytest.approx(float((each * parts).sum()), abs=1e-4)
        agree = [
            sum(float(by_processors(model, tokenizer, source, [*ids[:at], token], **settings)[-1].exp()) ** 2
                for token in range(5))
            for at in range(len(ids))
        ]  # fmt: skip
        assert typical[place] == pytest.approx(float((each - torch.tensor(agree).log()).sum()), abs=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_source_is_encoded_once_for_all_that_follows_it(name):
    (model, _), made = family(name), component(name)
    rows = []
    handle = model.get_encoder().register_forward_hook(lambda m, a, output: rows.append(len(output[0])))
    made.sample(["a red cube"] * 5, generator=list(range(5)))  # a model is probed first
    made.log_prob(["a red cube"], made.observe(["a cube"]))
    try:
        rows.clear()
        made.sample(["a red cube"] * 5, generator=list(range(5)))
        assert rows == [1]
        rows.clear()
        made.search(["a red cube", "two words"], 4, 1.0)
        assert sum(rows) % 2 == 0
        assert sum(rows) <= 6  # again with 2, then 4 beams a group where candidates are equal
        rows.clear()
        hidden = []
        encoder_output = model.get_encoder().register_forward_hook(lambda m, a, output: hidden.append(output[0].shape))
        made.log_prob(["a red cube"] * 4, made.observe(["a cube", "old friend", "mine", "a room"]))
        encoder_output.remove()
        assert len(hidden) == 1
        embedded = []
        inside = next(module for module in model.get_encoder().modules() if "Norm" in type(module).__name__)
        each = inside.register_forward_hook(lambda m, a, output: embedded.append(output.shape[0]))
        made.log_prob(["a red cube"] * 4, made.observe(["a cube", "old friend", "mine", "a room"]))
        each.remove()
        assert embedded == [1]
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "t5gemma"])
def test_gradients_are_those_of_plain_forwards_whatever_the_micro_batches(name):
    model, tokenizer = FAMILIES[name]()
    made = Seq2Seq(model, tokenizer, max_new_tokens=24)
    draws = made.in_context(SOURCES, made.observe(targets_of(name)))
    weights = torch.tensor([0.7, -1.3, 0.4])
    total = sum(
        weight * by_processors(model, tokenizer, source, draw.record["token_ids"], max_length=25,
                               forced_bos_token_id=made.rules.forced_first).sum()
        for weight, source, draw in zip(weights, SOURCES, draws, strict=True)
    )  # fmt: skip
    total.backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for budget in (None, 40, 1):
        model.zero_grad()
        groups = made.micro_batches(SOURCES, draws, budget)
        assert sorted(itertools.chain(*groups)) == [0, 1, 2]
        assert len(groups) == {None: 1, 1: 3}.get(budget, len(groups))
        for group in groups:
            found = made.score([SOURCES[n] for n in group], [draws[n] for n in group])
            (found * weights[group]).sum().backward()
        for key, grad in wanted.items():
            scale = float(grad.abs().max())
            assert torch.allclose(dict(model.named_parameters())[key].grad, grad, atol=1e-4 * scale + 1e-6), key


def test_forced_tokens_alone_have_probability_1():
    made = component("bart")
    draw = Draw("", {"token_ids": [0], "finished": False})
    assert made.log_prob(["a red cube"], [draw]).tolist() == [0.0]


def test_a_target_is_read_by_the_targets_own_pieces():
    _, tokenizer = family("marian")
    made = component("marian", max_new_tokens=200)
    [draw] = made.in_context(["a red cube"], made.observe([GERMAN]))
    assert draw.record["token_ids"] == tokenizer(text_target=GERMAN)["input_ids"] != tokenizer(GERMAN)["input_ids"]
    assert tokenizer.decode(draw.record["token_ids"], skip_special_tokens=True) == GERMAN
    assert made.prompt_ids(["a red cube"]) == [tokenizer("a red cube")["input_ids"]]
    assert tokenizer.current_spm is tokenizer.spm_source


def test_languages_are_written_forced_and_told_by_code():
    model, _ = family("nllb")
    given = seq2seq_families.nllb_tokenizer()
    french, german = (
        Seq2Seq(model, given, src_lang="eng_Latn", tgt_lang=lang, max_new_tokens=8) for lang in ("fra_Latn", "deu_Latn")
    )
    for made, lang in ((french, "fra_Latn"), (german, "deu_Latn")):
        code = given.convert_tokens_to_ids(lang)
        assert made.rules.forced_first == code
        [draw] = made.in_context(["a cube"], made.observe(["a circle"]))
        assert draw.record["token_ids"][0] == code
        assert {draw.record["token_ids"][0] for draw in made.sample(["a cube"] * 3, generator=[0, 1, 2])} == {code}
    assert given.tgt_lang is None
    with pytest.raises(DataError, match="row 0|forced_bos_token_id"):
        german.log_prob(["a cube"], french.in_context(["a cube"], french.observe(["a circle"])))
    with pytest.raises(PlanError, match="no target language is said: give src_lang and tgt_lang"):
        Seq2Seq(model, given).sample(["a cube"])
    with pytest.raises(PlanError, match="no language 'klingon'"):
        Seq2Seq(model, given, src_lang="eng_Latn", tgt_lang="klingon").sample(["a cube"])
    with pytest.raises(PlanError, match="writes no language codes"):
        component("t5", tgt_lang="de").sample(["a cube"])


def test_the_first_release_of_mbart_begins_with_the_language_and_is_not_scored_behind_its_end():
    model, _ = family("mbart")
    given = seq2seq_families.mbart_tokenizer()
    made = Seq2Seq(model, given, src_lang="en_XX", tgt_lang="de_DE", max_new_tokens=24)
    assert made.rules.start == given.convert_tokens_to_ids("de_DE")
    assert made.rules.forced_first is None
    [draw] = made.in_context(["a cube"], made.observe(["a circle"]))
    assert draw.record["token_ids"][-1] == given.eos_token_id
    assert made.prompt_ids(["a cube"])[0][-1] == given.convert_tokens_to_ids("en_XX")


REFUSED = {
    "repetition_penalty": 1.2, "encoder_repetition_penalty": 1.5, "sequence_bias": [[[3], -1.0]],
    "exponential_decay_length_penalty": (3, 1.1), "guidance_scale": 1.5, "stop_strings": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_change_probabilities_in_other_ways_are_refused_by_name(setting):
    model, tokenizer = FAMILIES["t5"]()
    setattr(model.generation_config, setting, REFUSED[setting])
    made = Seq2Seq(model, tokenizer)
    for use in (lambda: made.sample(["a cube"]), lambda: made.log_prob(["a cube"], made.observe(["a"]))):
        with pytest.raises(PlanError, match=rf"sets {setting}=.*generation_config=\{{'{setting}'"):
            use()
    assert Seq2Seq(model, tokenizer, max_new_tokens=2, generation_config={setting: None}).sample(["a cube"])


def test_what_is_no_rule_is_not_taken_for_one():
    with pytest.raises(PlanError, match="generation_config={'top_k': ...} is no setting of what may be written"):
        component("t5", generation_config={"top_k": 3})


def test_a_target_that_the_limit_would_have_ended_names_the_limit():
    made = component("marian", max_new_tokens=8)
    with pytest.raises(DataError, match=r"forced_eos_token_id forbids token 8 .* Raise max_new_tokens=8") as caught:
        made.log_prob(["a cube", "a circle"], made.observe(["ein", GERMAN]))
    assert caught.value.element == 1
    off = component("marian", max_new_tokens=8, generation_config={"forced_eos_token_id": None})
    assert off.log_prob(["a cube"], off.observe([GERMAN])).isfinite().all()


def test_a_target_that_repeats_itself_is_refused_with_its_row():
    made = component("bart", generation_config={"no_repeat_ngram_size": 2})
    with pytest.raises(DataError, match="no_repeat_ngram_size forbids token .* of a completion") as caught:
        made.in_context(["a cube"] * 2, made.observe(["a cube", "red circle red circle red circle"]))
    assert caught.value.element == 1


def test_each_kind_of_model_is_sent_to_its_component(tmp_path):
    model, tokenizer = family("t5")
    with pytest.raises(PlanError, match=r"t5 is an encoder-decoder; use Seq2Seq\('T5ForConditionalGeneration'\)"):
        CausalLM(model, tokenizer)
    with pytest.raises(PlanError, match=r"llama has no encoder beside its decoder; use CausalLM\('LlamaForCausalLM'\)"):
        Seq2Seq(llama(), char_tokenizer())
    model.save_pretrained(tmp_path / "t5")
    llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(PlanError, match="use Seq2Seq"):
        CausalLM(tmp_path / "t5")
    with pytest.raises(PlanError, match="use CausalLM"):
        Seq2Seq(tmp_path / "llama")
    with pytest.raises(PlanError, match=r"Seq2Seq\(.*there is no folder"):
        Seq2Seq("./org/typo").module
    with pytest.raises(PlanError, match=r"Seq2Seq\(model\) was given a loaded model; pass its tokenizer too"):
        Seq2Seq(model)


def test_models_without_a_likelihood_of_a_row_are_refused_by_name():
    with pytest.raises(PlanError, match="prophetnet has no likelihood of its own"):
        component("prophetnet")
    _, tokenizer = family("t5")
    switch = transformers.SwitchTransformersConfig(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_heads=2,
                                                   num_layers=1, num_decoder_layers=1, num_experts=2)  # fmt: skip
    with pytest.raises(PlanError, match="switch_transformers .*experts drop the tokens of a batch"):
        Seq2Seq(transformers.SwitchTransformersForConditionalGeneration(switch), tokenizer)
    whisper = transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                         decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                                         vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                         decoder_start_token_id=1, num_mel_bins=8)  # fmt: skip
    with pytest.raises(PlanError, match="whisper is no encoder-decoder of texts"):
        Seq2Seq(transformers.WhisperForConditionalGeneration(whisper), tokenizer)


class LooksAhead(torch.nn.Module):
    """Adds to each of the decoder's states the last one's."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, states):
        return self.norm(states) + states[:, -1:]


def test_a_decoder_that_looks_ahead_is_refused_by_what_a_probe_finds():
    model, tokenizer = FAMILIES["t5"]()
    model.decoder.final_layer_norm = LooksAhead(model.decoder.final_layer_norm)
    made = Seq2Seq(model, tokenizer, max_new_tokens=4)
    for use in (lambda: made.sample(["a cube"]), lambda: made.log_prob(["a cube"], made.observe(["a"]))):
        with pytest.raises(PlanError, match="T5ForConditionalGeneration has no likelihood: .* tokens behind"):
            use()


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "nllb", "pegasus", "t5gemma"])
def test_the_usual_models_decode_padded_sources_with_a_cache_and_score_through_their_head(name, caplog):
    made = Seq2Seq(*FAMILIES[name](), max_new_tokens=8)
    with caplog.at_level(logging.WARNING, "sysdag"):
        made.log_prob(SOURCES, made.sample(SOURCES, generator=[1, 2, 3]))
    assert not [record.getMessage() for record in caplog.records]


class CountsRows(torch.nn.Module):
    """Shifts hidden states by a share of what is padding: padded rows are read otherwise than bare ones."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, states):
        return self.norm(states) + 0.05 * states.shape[1]


def test_an_encoder_that_padding_changes_is_served_in_rows_of_one_shape(caplog):
    model, tokenizer = FAMILIES["t5"]()
    model.encoder.final_layer_norm = CountsRows(model.encoder.final_layer_norm)
    made = Seq2Seq(model, tokenizer, max_new_tokens=24)
    with caplog.at_level(logging.WARNING, "sysdag"), torch.no_grad():
        drawn = made.sample(SOURCES, generator=[1, 2, 3])
        found = made.log_prob(SOURCES, drawn)
        made.log_prob(SOURCES, drawn)
    for source, draw, ours in zip(SOURCES, drawn, found, strict=True):
        theirs = by_processors(model, tokenizer, source, draw.record["token_ids"]).sum()
        assert float(ours) == pytest.approx(float(theirs), abs=1e-4)
        assert draw.log_prob == pytest.approx(float(theirs), abs=1e-4)
    said = [record.getMessage() for record in caplog.records]
    assert sum("decodes a batch for each length of source" in text for text in said) == 1
    assert sum("is scored in rows of one shape" in text for text in said) == 1


def test_a_long_source_keeps_its_end_token_and_a_long_target_is_cut_and_reported(caplog):
    made = component("t5", max_source_length=5, max_target_length=3)
    with caplog.at_level(logging.WARNING, "sysdag"):
        [ids] = made.prompt_ids([SOURCES[1]])
        made.log_prob(SOURCES[:1], made.observe([SOURCES[1]]))
    whole = made.tokenizer(SOURCES[1])["input_ids"]
    assert ids == [*whole[:4], made.tokenizer.eos_token_id]
    assert made.cut_from(SOURCES[1]) == len(whole) - 5
    text = caplog.text
    assert "cut to its first 5" in text
    assert "was cut to 3 (max_target_length)" in text


def test_what_spells_a_control_token_is_text():
    made = component("bart")
    [draw] = made.in_context(["a cube"], made.observe(["a </s> cube"]))
    assert draw.record["token_ids"].count(2) == 1
    assert draw.record["token_ids"][-1] == 2
    assert made.tokenizer.decode(draw.record["token_ids"], skip_special_tokens=True) == "a </s> cube"
    [ended] = made.in_context(["a cube"], made.observe(["a cube</s>"]))
    assert ended.record["token_ids"] == made.tokenizer(text_target="a cube")["input_ids"]


def test_draws_and_observed_targets_end_at_a_stop_string():
    made = component("t5", stop="cube")
    [draw] = made.in_context(["a room"], made.observe(["a cube of mine"]))
    assert made.tokenizer.decode(draw.record["token_ids"]) == "a cube"
    drawn = made.sample(["a room"] * 40, generator=list(range(40)))
    assert all("cube" not in each.value for each in drawn)


def test_messages_are_a_target_where_they_are_one_text():
    made = component("t5")
    said = made.in_context(["a"], made.observe([[{"role": "assistant", "content": "a cube"}]]))
    assert said[0].record == made.in_context(["a"], made.observe(["a cube"]))[0].record
    two = [{"role": role, "content": role} for role in ("assistant", "user", "assistant")]
    with pytest.raises(DataError, match="an encoder-decoder writes one text"):
        made.in_context(["a"], made.observe([two]))
    with pytest.raises(DataError, match="no chat template"):
        made.sample([[{"role": "user", "content": "a"}]])


def test_a_token_that_is_not_finite_is_located():
    model, tokenizer = FAMILIES["t5"]()
    with torch.no_grad():
        model.shared.weight[tokenizer("cube", add_special_tokens=False)["input_ids"][0]] = float("nan")
    made = Seq2Seq(model, tokenizer, max_new_tokens=24)
    where = made.locate_non_finite("a room", made.in_context(["a room"], made.observe(["a cube of"]))[0])
    assert "of 4" in where


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_source_length": 0}, "max_source_length must be an integer of 1 or more"),
        ({"max_target_length": -1}, "max_target_length must"),
        ({"max_new_tokens": 0}, "max_new_tokens must"),
        ({"temperature": 0.0}, "Seq2Seq needs temperature > 0"),
        ({"batch_size": 0}, "Seq2Seq: batch_size must"),
        ({"stop": ""}, "stop strings that are not empty"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        component("t5", **options)


def test_the_package_hands_the_component_on():
    assert sysdag.components.Seq2Seq is Seq2Seq
