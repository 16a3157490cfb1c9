"""What transformers' generation can be told, and how it is tried there: beside plain forwards and `generate`."""

import pytest
import torch
from seq2seq_families import FAMILIES as SEQ2SEQ
from tiny import char_tokenizer, llama
from transformers import GenerationConfig

from sysdag import PlanError
from sysdag.components import CausalLM, Seq2Seq
from sysdag.components.selection.encoder_model import EncoderModel

PROMPTS = ["ab c", "d", "hello wor", "x"]
COMPLETIONS = ["yes it is", "no", "a much longer answer than others", "q"]


def component(model, **options):
    return CausalLM(model, char_tokenizer(), **{"max_new_tokens": 12} | options)


@torch.no_grad()
def alone(model, prompt, ids):
    """The completion's log-probability by one plain forward of its row."""
    start = char_tokenizer()(prompt)["input_ids"]
    log_probs = model(input_ids=torch.tensor([start + ids])).logits[0].log_softmax(-1)
    return float(log_probs[torch.arange(len(start) - 1, len(start) + len(ids) - 1), torch.tensor(ids)].sum())


def check_scores_and_draws(lm):
    """Of rows of several lengths beside each other: scores of texts and of draws are those of single rows."""
    tokenizer = char_tokenizer()
    room = [lm.max_length - len(prompt) for prompt in PROMPTS]
    cut = [[*tokenizer(text)["input_ids"], 1][:most] for text, most in zip(COMPLETIONS, room, strict=True)]
    wanted = [alone(lm.module, *each) for each in zip(PROMPTS, cut, strict=True)]
    with torch.no_grad():
        assert lm.log_prob(PROMPTS, lm.observe(COMPLETIONS)).tolist() == pytest.approx(wanted, abs=2e-4)
    draws = lm.sample(PROMPTS, generator=torch.Generator().manual_seed(1))
    wanted = [
        alone(lm.module, prompt, list(draw.record["token_ids"])) for prompt, draw in zip(PROMPTS, draws, strict=True)
    ]
    assert [draw.log_prob for draw in draws] == pytest.approx(wanted, abs=2e-4)
    with torch.no_grad():
        assert lm.log_prob(PROMPTS, draws).tolist() == pytest.approx(wanted, abs=2e-4)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 24}
CHANGING = {
    "longrope": {"rope_type": "longrope", "factor": 4.0, **LONG},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}
FIXED = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}  # fmt: skip


def turned(scheme, positions):
    parameters = {"rope_theta": 1e4} | {**CHANGING, **FIXED}[scheme]
    return llama(max_position_embeddings=positions, rope_parameters=parameters)


@pytest.mark.parametrize("scheme", FIXED)
def test_rotary_schemes_of_fixed_frequencies_score_rows_as_they_score_alone(scheme):
    check_scores_and_draws(component(turned(scheme, 64)))


@pytest.mark.parametrize(("scheme", "positions"), [("longrope", 64), ("dynamic", 24)])
def test_frequencies_that_follow_the_longest_row_end_the_room_of_a_model(scheme, positions):
    lm = component(turned(scheme, positions))
    assert lm.max_length == 24
    check_scores_and_draws(lm)
    with pytest.raises(PlanError, match=rf"max_length=25 is beyond the 24 positions.*rope_type='{scheme}'"):
        component(turned(scheme, positions), max_length=25).sample(PROMPTS)
    # Where they are not kept apart, transformers scores a short row otherwise beside a long one.
    model = turned(scheme, positions)
    rows = torch.arange(3, 33).repeat(2, 1)
    with torch.no_grad():
        beside = model(input_ids=rows).logits[0, :8]
        assert abs(beside - model(input_ids=rows[:, :8]).logits[0]).max() > 1e-2


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_each_side_of_an_encoder_decoder_has_its_own_room(side):
    model, tokenizer = SEQ2SEQ["t5gemma"]()
    own = getattr(model.config, side)
    own.max_position_embeddings, own.rope_parameters = 24, {"rope_theta": 1e4} | CHANGING["dynamic"]
    option = {"encoder": "max_source_length", "decoder": "max_target_length"}[side]
    made = Seq2Seq(model, tokenizer)
    assert {"encoder": made._room, "decoder": made.max_length}[side] == 24
    with pytest.raises(PlanError, match=f"{option}=25 is beyond the 24 positions"):
        Seq2Seq(model, tokenizer, **{option: 25}).sample(["a cube"])


def test_an_encoder_has_the_room_of_its_fixed_frequencies(tmp_path):
    turned("longrope", 64).model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    assert EncoderModel(tmp_path, None).longest_text == 24
    with pytest.raises(PlanError, match="max_length=25 is beyond the 24 positions.*longrope"):
        EncoderModel(tmp_path, None).check_length(25)


SETTINGS = {
    "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 8,
    "min_length": 30, "forced_bos_token_id": 4, "forced_eos_token_id": 1, "suppress_tokens": [5, 6, 7],
    "begin_suppress_tokens": [8, 9], "sequence_bias": [[[5], -10.0]], "exponential_decay_length_penalty": (2, 1.5),
    "guidance_scale": 2.0, "temperature": 0.1, "top_k": 2, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3,
    "max_length": 5, "stop_strings": ["a"], "cache_implementation": "static", "use_cache": False,
    "renormalize_logits": True, "penalty_alpha": 0.5, "prompt_lookup_num_tokens": 3, "length_penalty": 2.0,
    "watermarking_config": {"greenlist_ratio": 0.3, "bias": 5.0}, "max_time": 1e-4, "token_healing": True,
    "pad_token_id": 5, "bos_token_id": 7,
}  # fmt: skip


def written(lm):
    """The tokens that it draws and finds."""
    draws = lm.sample(PROMPTS, generator=torch.Generator().manual_seed(3))
    found = [] if lm.decoder != "local" else [draw for row in lm.search(PROMPTS, 3, 1.0) for draw in row]
    return [tuple(draw.record["token_ids"]) for draw in [*draws, *found]]


@pytest.mark.parametrize("decoder", ["local", "continuous"])
def test_a_generation_config_changes_no_draw_of_a_causal_model(decoder):
    model = llama()
    options = {"decoder": decoder, "max_new_tokens": 6}
    wanted = written(component(model, **options))
    for name, value in SETTINGS.items():
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        setattr(model.generation_config, name, value)
        assert written(component(model, **options)) == wanted, name


@pytest.mark.parametrize(
    ("ends", "known"),
    [([1, 5], [1, 5]), ([5], [1, 5]), (5, [1, 5]), ([1, 1, 5], [1, 5]), ([], [1]), (None, [1])],
    ids=str,
)
def test_each_of_several_ends_ends_draws_as_generate_does(ends, known):
    model = llama()
    model.generation_config.eos_token_id = ends
    lm = component(model, temperature=1e-4, max_new_tokens=30)
    greedy = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=known, pad_token_id=0)
    draws = lm.sample(PROMPTS, generator=torch.Generator().manual_seed(1))
    for prompt, draw in zip(PROMPTS, draws, strict=True):
        ids = torch.tensor([char_tokenizer()(prompt)["input_ids"]])
        wanted = model.generate(ids, generation_config=greedy)[0, ids.shape[1] :].tolist()
        assert list(draw.record["token_ids"]) == wanted
        assert draw.record["finished"] == (wanted[-1] in known)
