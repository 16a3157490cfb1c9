"""Adapters of the peft library: each method and option is right by plain peft and transformers, or refused by name."""

import json

import diffusers
import families_page as families
import pytest
import torch
from adapter_methods import METHODS, compared, dense, scores
from peft import (
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PeftType,
    VeraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import char_tokenizer
from tiny_diffusion import drift, images, scheduler_of, seed, text_unet, vectors

from sysdag import PlanError
from sysdag.components import CausalLM, Diffusion, adapter, adapter_files, adapter_layers
from sysdag.engine.precompute import weights_hash

ATTENTION = {"target_modules": ["q_proj", "o_proj"]}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_adapter_is_what_plain_peft_makes_of_it_or_is_refused_by_name(method):
    assert compared(method) == (9 if method.refused is None else 1, [])


def test_the_page_has_every_method():
    families.check_page("Adapters")


def test_every_type_of_the_library_is_in_the_table():
    known = {kind for kind in PeftType if kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {method.make().peft_type for method in METHODS} == known


def test_a_refused_start_leaves_the_model_as_it_was_for_another_config():
    model = dense()
    plain = scores(CausalLM(dense(), char_tokenizer()))
    with pytest.raises(PlanError, match="before it has trained"):
        CausalLM(model, char_tokenizer(), peft_config=LoraConfig(init_lora_weights=False, **ATTENTION)).module
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense().named_parameters()]
    lm = CausalLM(model, char_tokenizer(), peft_config=LoraConfig(**ATTENTION))
    assert torch.equal(scores(lm), plain)
    assert adapter.names(lm.module) == ["sysdag"]


def test_dora_on_outputs_without_a_direction_is_refused_and_lora_is_not():
    model = dense()
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.o_proj").weight[0] = 0
    plain = scores(CausalLM(model, char_tokenizer()))
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.o_proj has outputs whose weights are all 0"):
        CausalLM(model, char_tokenizer(), peft_config=LoraConfig(use_dora=True, **ATTENTION)).module
    without = LoraConfig(use_dora=True, exclude_modules=r".*layers\.0\.self_attn\.o_proj", **ATTENTION)
    assert torch.equal(scores(CausalLM(model, char_tokenizer(), peft_config=without)), plain)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (LoraConfig(**ATTENTION), BOFTConfig(boft_block_size=4, **ATTENTION), "BOFT cannot lie beside one of LORA"),
        (VeraConfig(r=2, **ATTENTION), VeraConfig(r=2, **ATTENTION), "VERA stands alone"),
    ],
)
def test_two_adapters_on_one_base_that_peft_cannot_tell_apart_are_refused(first, second, message):
    base = dense()
    CausalLM(base, char_tokenizer(), peft_config=first).module
    with pytest.raises(PlanError, match=rf"^CausalLM.*{message}.*Give it a model of its own"):
        CausalLM(base, char_tokenizer(), peft_config=second).module


# Modes and dropout


@pytest.mark.parametrize("train", [False, True])
def test_an_adapter_comes_in_the_mode_of_the_model(train, tmp_path):
    config = LoraConfig(r=2, lora_dropout=0.5, modules_to_save=["lm_head"], **ATTENTION)
    lm = CausalLM(dense().train(train), char_tokenizer(), peft_config=config)
    assert {module.training for module in lm.module.modules()} == {train}
    given = CausalLM(get_peft_model(dense().train(train), config), char_tokenizer())
    assert {module.training for module in given.module.modules()} == {train}


def test_a_loaded_adapter_scores_the_same_each_time(tmp_path):
    lm = CausalLM(dense(), char_tokenizer(), peft_config=LoraConfig(r=2, lora_dropout=0.5, **ATTENTION))
    drift(lm.module)
    expected = scores(lm)
    loaded = CausalLM.from_pretrained(tmp_path, lm.save_pretrained(tmp_path))
    for component in (loaded, loaded.reference(), loaded):
        assert torch.equal(scores(component), expected)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_dropout=0.5, **ATTENTION),
        BOFTConfig(boft_block_size=4, boft_dropout=0.5, **ATTENTION),
        LoHaConfig(r=4, rank_dropout=0.5, module_dropout=0.5, **ATTENTION),
        LoKrConfig(r=4, rank_dropout=0.5, module_dropout=0.5, **ATTENTION),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_dropout_is_off_for_every_kind_of_it(config):
    lm = CausalLM(dense(), char_tokenizer(), peft_config=config)
    drift(lm.module)
    expected = scores(lm)
    lm.module.train()
    assert len({float(scores(lm).sum()) for _ in range(8)}) > 1
    adapter_layers.disable_dropout(lm.module)
    assert torch.equal(scores(lm), expected)


# Files


def test_the_saved_config_is_in_order_and_the_same_for_the_same_adapter(tmp_path):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lm = CausalLM(dense(), char_tokenizer(), peft_config=LoraConfig(target_modules=names, exclude_modules=["x", "a"]))
    adapter_files.save(lm.module, lm.lm.adapter, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)
    assert written["exclude_modules"] == ["a", "x"]
    assert written["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"
    assert list(written) == sorted(written)


def test_stored_scores_belong_to_one_config_and_projection():
    def hash_of(config):
        torch.manual_seed(0)
        lm = CausalLM(dense(), char_tokenizer(), peft_config=config)
        drift(lm.module)
        return weights_hash(lm)

    assert hash_of(LoraConfig(r=2, **ATTENTION)) == hash_of(LoraConfig(r=2, **ATTENTION))
    assert hash_of(LoraConfig(r=2, **ATTENTION)) != hash_of(LoraConfig(r=2, lora_alpha=9, **ATTENTION))
    keys = [hash_of(VeraConfig(r=2, projection_prng_key=key, **ATTENTION)) for key in (0, 1)]
    assert keys[0] != keys[1]


def test_memory_is_told_where_an_adapter_runs_without_numbers():
    for config, told in (
        (LoraConfig(**ATTENTION), True),
        (VeraConfig(**ATTENTION), True),
        (LoHaConfig(**ATTENTION), False),
    ):
        lm = CausalLM(dense(), char_tokenizer(), peft_config=config)
        found = lm.footprint(tokens=16, labels=4, trains=True, checkpoints=False, device="cpu")
        own = sum(parameter.nbytes for parameter in lm.own_parameters().values())
        assert (found.trained if found else None) == (own if told else None)


# Diffusion

DENOISERS = {
    "LoRA": LoraConfig(r=2, target_modules=["to_q", "conv1"], lora_dropout=0.5),
    "LoRA, use_dora": LoraConfig(r=2, target_modules=["to_q", "conv1"], use_dora=True),
    "LoRA, modules_to_save": LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"]),
    "LoHa": LoHaConfig(r=2, target_modules=["to_q", "conv1"]),
    "LoKr": LoKrConfig(r=2, target_modules=["to_q", "conv1"]),
    "IA3": IA3Config(target_modules=["to_q", "to_v"], feedforward_modules=[]),
    "BOFT": BOFTConfig(boft_block_size=4, target_modules=["to_q"]),
    "OFT": OFTConfig(oft_block_size=4, r=0, target_modules=["to_q"]),
    "VeRA": VeraConfig(r=2, target_modules=["to_q", "to_v"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoisers_adapter_is_what_plain_peft_makes_of_it(name, tmp_path):
    def component(config=None):
        return Diffusion(text_unet(), scheduler=scheduler_of("epsilon"), peft_config=config, num_inference_steps=2)

    def score(one):
        with torch.no_grad():
            return one.score(captions, draws, noise)

    torch.manual_seed(0)
    plain, trained = component(), component(DENOISERS[name])
    draws, captions = plain.observe(images(2)), vectors(2)
    noise = plain.noise(draws, seed(0))
    reference = trained.reference()
    assert {module.training for module in trained.module.modules()} == {False}
    torch.testing.assert_close(score(trained), score(plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(score(reference), score(trained))
    drift(trained.module)
    assert not torch.allclose(score(trained), score(plain), rtol=1e-3)
    torch.testing.assert_close(score(reference), score(plain), rtol=1e-4, atol=1e-4)
    options = trained.save_pretrained(tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    theirs = PeftModel.from_pretrained(unet, tmp_path / "adapter").eval()
    sample, times, context = torch.randn(2, 1, 8, 8), torch.tensor([3, 9]), torch.randn(2, 1, 8)
    with torch.no_grad():
        ours = trained.module["denoiser"](sample, times, context).sample
        torch.testing.assert_close(theirs(sample, times, context).sample, ours, rtol=1e-4, atol=1e-4)
    loaded, fresh = Diffusion.from_pretrained(tmp_path, options), component(DENOISERS[name])
    fresh.load_weights(tmp_path)
    for one in (loaded, fresh, loaded.reference()):
        torch.testing.assert_close(score(one), score(trained), rtol=1e-5, atol=1e-5)
