"""GGUF files: what transformers takes over is right, and what it leaves out is refused by name."""

import numpy
import pytest
import torch
from gguf_files import finish, gguf, head, write
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sysdag import Draw, PlanError
from sysdag.components import CausalLM
from sysdag.errors import SysdagError

FILE = "tiny.gguf"
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
TOKENS = [3, 9, 7, 11, 5, 4, 20, 13, 1]


def made(kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config}[kind](**(SIZES | options))
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
    return model


def score(component):
    """Of tokens behind a prompt of one."""
    draw = Draw("x", {"token_ids": TOKENS, "finished": True})
    with torch.no_grad():
        return float(component.log_prob(["a"], [draw]))


def expected(model):
    ids = torch.tensor([[3, *TOKENS]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        (LlamaForCausalLM, "llama", {}),
        (LlamaForCausalLM, "llama", {"tie_word_embeddings": True}),
        (LlamaForCausalLM, "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        (Qwen2ForCausalLM, "qwen2", {}),
    ],
)
def test_a_file_that_says_all_of_its_model_scores_as_the_original(tmp_path, kind, architecture, options):
    model = made(kind, **options)
    write(tmp_path / FILE, model, architecture)
    assert score(CausalLM(tmp_path, model_kwargs={"gguf_file": FILE})) == pytest.approx(expected(model), abs=1e-4)


def scaled(kind, factor, original=None):
    def entries(writer):
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    return entries


def llama3_factors(model):
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    return {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}


def factors_of_llama_3(path):
    model = made(rope_parameters=LLAMA3)
    write(path, model, tensors=llama3_factors(model))
    return model


def yarn(path):
    given = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    model = made(Qwen2ForCausalLM, rope_parameters=given)
    write(path, model, "qwen2", entries=scaled(gguf.RopeScalingType.YARN, 4.0, 1024))
    return model


def linear(path):
    model = made(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0})
    write(path, model, entries=scaled(gguf.RopeScalingType.LINEAR, 8.0))
    return model


def biases(path):
    model = made(attention_bias=True)
    write(path, model)
    return model


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (factors_of_llama_3, "tensor rope_freqs.weight"),
        (yarn, r"qwen2\.rope\.scaling of type 'yarn' by 4"),
        (linear, r"llama\.rope\.scaling of type 'linear' by 8"),
        (biases, "numbers, and the model has"),
    ],
)
def test_what_transformers_leaves_out_of_a_file_is_refused_and_the_remedy_is_right(tmp_path, file, named):
    model = file(tmp_path / FILE)
    silent = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32)
    assert abs(expected(silent) - expected(model)) > 0.01  # transformers' own reading is another model
    with pytest.raises(PlanError, match=named):
        score(CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}))
    right = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, config=model.config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert score(CausalLM(right, tokenizer)) == pytest.approx(expected(model), abs=1e-4)


def test_factors_of_one_change_nothing(tmp_path):
    model = made()
    write(tmp_path / FILE, model, tensors={"rope_freqs.weight": numpy.ones(4, dtype=numpy.float32)})
    assert score(CausalLM(tmp_path, model_kwargs={"gguf_file": FILE})) == pytest.approx(expected(model), abs=1e-4)


def test_a_tensor_that_is_not_there_is_not_drawn_at_random(tmp_path):
    write(tmp_path / FILE, made(), without="ffn_up")
    with pytest.raises(SysdagError, match="up_proj"):
        score(CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}))


def test_experts_of_a_llama_are_refused(tmp_path):
    def entries(writer):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)

    write(tmp_path / FILE, made(), entries=entries)
    with pytest.raises(PlanError, match=r"llama\.expert_used_count = 2 \(the config has None\)"):
        CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).config


def test_an_entry_that_nobody_knows_is_taken_as_one_that_matters(tmp_path):
    write(tmp_path / FILE, made(), entries=lambda writer: writer.add_float32("llama.logit_scale", 0.5))
    with pytest.raises(PlanError, match=r"llama\.logit_scale = 0\.5"):
        CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).config


OF_A_MODEL = {"layers": 2, "positions": 4096, "width": 64, "inner": 128, "heads": 4, "kv": 2, "epsilon": 1e-6,
              "base": 10000.0, "vocabulary": 48}  # fmt: skip


def gemma(writer, length, window=512):
    writer.add_key_length(length)
    writer.add_value_length(length)
    writer.add_sliding_window(window)


# Architecture, lengths, further entries, and what is lost; the right values are those of the published configs.
CONFIGS = {
    "Gemma 2 27B scales its queries by 144": (
        "gemma2", {"layers": 46, "width": 4608, "heads": 32, "kv": 16}, lambda w: gemma(w, 128, 4096),
        r"scaled by 1 / sqrt\(144\) \(the config has 256\)",
    ),
    "Gemma 3 27B scales its queries by 168": (
        "gemma3", {"layers": 62, "width": 5376, "heads": 32, "kv": 16, "base": 1e6}, lambda w: gemma(w, 128, 1024),
        r"scaled by 1 / sqrt\(168\) \(the config has 256\)",
    ),
    "StarCoder2's rotary base": (
        "starcoder2", {"base": 999999.0}, lambda _: None,
        r"starcoder2\.rope\.freq_base = 999999\.0 \(the config has 10000\)",
    ),
    "the share of a head that StableLM turns": (
        "stablelm", {}, lambda w: w.add_rope_dimension_count(16), r"stablelm\.rope\.dimension_count = 16",
    ),
    "the window of Phi-3": (
        "phi3", {}, lambda w: w.add_sliding_window(2047),
        r"phi3\.attention\.sliding_window = 2047 \(the config has None\)",
    ),
    "the length of Qwen3's heads": (
        "qwen3", {}, lambda w: w.add_key_length(16), r"qwen3\.attention\.key_length = 16 \(the config has 128\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_an_entry_that_no_config_is_made_of_is_refused(tmp_path, case):
    architecture, sizes, entries, named = CONFIGS[case]
    writer = head(tmp_path / FILE, architecture, OF_A_MODEL | sizes)
    entries(writer)
    finish(writer)
    with pytest.raises(PlanError, match=named):
        CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).config


def test_the_long_factors_of_phi_are_refused(tmp_path):
    writer = head(tmp_path / FILE, "phi3", OF_A_MODEL | {"positions": 131072})
    writer.add_rope_dimension_count(16)
    writer.add_rope_scaling_orig_ctx_len(4096)
    for name in ("long", "short"):
        writer.add_tensor(f"rope_factors_{name}.weight", numpy.full(8, 1.5, dtype=numpy.float32))
    finish(writer)
    with pytest.raises(PlanError, match=r"rope_factors_long\.weight"):
        CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).config


def experts(writer, length, inner):
    writer.add_key_length(length)
    writer.add_value_length(length)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(inner)


def gemma4(writer):
    gemma(writer, 512)
    writer.add_key_length_swa(256)
    writer.add_value_length_swa(256)
    writer.add_rope_dimension_count(512)


def qwen35(writer):
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(4)
    writer.add_rope_dimension_sections([1, 1, 0, 0])
    writer.add_uint32("qwen35.full_attention_interval", 4)
    sizes = {"conv_kernel": 4, "state_size": 8, "group_count": 2, "time_step_rank": 4, "inner_size": 32}
    for name, value in sizes.items():
        writer.add_uint32(f"qwen35.ssm.{name}", value)


@pytest.mark.parametrize(
    ("architecture", "sizes", "entries"),
    [
        ("gemma2", {"layers": 26, "width": 2304, "heads": 8, "kv": 4}, lambda w: gemma(w, 256, 4096)),
        ("gemma3", {"layers": 18, "width": 640, "heads": 4, "kv": 1, "base": 1e6}, lambda w: gemma(w, 256)),
        ("qwen3", {"width": 1024, "heads": 16, "kv": 8, "base": 1e6}, lambda w: w.add_key_length(128)),
        ("qwen2", {"base": 1e6}, lambda _: None),
        ("phi3", {"width": 96}, lambda w: w.add_rope_dimension_count(24)),
        ("stablelm", {}, lambda w: w.add_rope_dimension_count(4)),
        ("qwen3moe", {}, lambda w: experts(w, 16, 768)),
        ("gemma4", {"base": 1e6}, gemma4),
        ("qwen35", {}, qwen35),
    ],
)
def test_files_of_public_models_shapes_pass(tmp_path, architecture, sizes, entries):
    writer = head(tmp_path / FILE, architecture, OF_A_MODEL | sizes)
    entries(writer)
    finish(writer)
    plain = AutoConfig.from_pretrained(tmp_path, gguf_file=FILE)
    assert CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).config.to_dict() == plain.to_dict()


# How texts are split


def test_digits_are_taken_by_themselves_where_the_file_says_so(tmp_path):
    write(tmp_path / FILE, made(), splits="smollm")
    tokenizer = CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).tokenizer
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    right = pre_tokenizers.Sequence(steps)
    for text in ("a\n\n1. b", "x =   12", "in 2024"):
        found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert found == right.pre_tokenize_str(text)
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE).backend_tokenizer.pre_tokenizer
    assert plain.pre_tokenize_str("a\n\n1. b") != right.pre_tokenize_str("a\n\n1. b")


def test_a_way_of_splitting_that_transformers_does_not_know_wants_a_tokenizer(tmp_path):
    write(tmp_path / FILE, made(), splits="deepseek-coder")
    with pytest.raises(PlanError, match=r"the way 'deepseek-coder' \(tokenizer\.ggml\.pre\)"):
        CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).prompt_ids(["a"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert CausalLM(tmp_path, tokenizer, model_kwargs={"gguf_file": FILE}).prompt_ids(["a"]) == [[3]]


def test_a_file_that_does_not_say_how_it_splits_is_told_of(tmp_path, caplog):
    write(tmp_path / FILE, made(), splits=None)
    assert CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).prompt_ids(["a"]) == [[3]]
    assert "tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize("splits", ["gpt-2", "llama-bpe", "qwen2"])
def test_ways_of_splitting_that_transformers_knows_are_left_as_they_are(tmp_path, caplog, splits):
    write(tmp_path / FILE, made(), splits=splits)
    found = CausalLM(tmp_path, model_kwargs={"gguf_file": FILE}).tokenizer
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert found.backend_tokenizer.to_str() == plain.backend_tokenizer.to_str()
    assert not caplog.text


@pytest.mark.slow
def test_a_public_file_splits_as_its_model_was_trained(smollm2_gguf):
    component = CausalLM(smollm2_gguf.parent, model_kwargs={"gguf_file": smollm2_gguf.name})
    [ids] = component.prompt_ids(["Two things:\n\n1. one"])
    pieces = [component.tokenizer.decode([token]) for token in ids]
    assert pieces == ["Two", " things", ":", "\n\n", "1", ".", " one"]
