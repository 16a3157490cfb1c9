"""What a CausalLM can be loaded from, and what of it a saved system keeps: against plain transformers and peft."""

import json
import re

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ALPHABET, char_tokenizer, llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from sysdag import DataError, Input, PlanError, SerializationError, System, node
from sysdag.components import BiEncoder, Categorical, CausalLM, CrossEncoder, Seq2Seq
from sysdag.components.language import model_source

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SMALL = {"d_model": 8, "decoder_layers": 1, "encoder_layers": 1, "vocab_size": 45, "decoder_ffn_dim": 8}


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def randomised(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model


def scores(model, component):
    """By transformers' own forward, of one completion."""
    [(prompt, completion)] = component._sequences(["ab"], component.observe(["cd"]))
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1]))


def own_score(component):
    with torch.no_grad():
        return float(component.log_prob(["ab"], component.observe(["cd"]))[0])


def two_nodes(first, second):
    @node(first)
    def draft(question):
        return question

    @node(second)
    def answer(draft):
        return draft

    return System(Input("question") >> draft >> answer)


# Adapters


@pytest.mark.parametrize("tokenizer", ["beside the adapter", "of the base"])
def test_an_adapters_folder_loads_as_pefts_auto_class_does_and_trains(base, tmp_path, tokenizer):
    folder = tmp_path / "adapter"
    randomised(get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA))).save_pretrained(folder)
    if tokenizer == "beside the adapter":
        char_tokenizer().save_pretrained(folder)
    component = CausalLM(folder)
    assert component.base_model == str(base)
    truth = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)
    assert own_score(component) == pytest.approx(scores(truth, component), abs=1e-4)
    assert own_score(component) != pytest.approx(own_score(CausalLM(base)), abs=0.1)
    trained = sorted(tuple(p.shape) for p in truth.parameters() if p.requires_grad)
    assert sorted(tuple(p.shape) for p in component.module.parameters() if p.requires_grad) == trained
    saved = tmp_path / "saved"
    options = component.save_pretrained(saved)
    assert options["base"] == str(base)
    again = CausalLM.from_pretrained(saved, options)
    assert own_score(again) == own_score(component)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved)
    assert scores(plain, component) == pytest.approx(own_score(component), abs=1e-4)


def test_an_adapter_that_extended_the_vocabulary_brings_its_embeddings(base, tmp_path):
    folder, tokenizer = tmp_path / "adapter", char_tokenizer()
    tokenizer.add_tokens(["ab", "cd"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[-2:].normal_()
        model.get_output_embeddings().weight[-2:].normal_()
    randomised(get_peft_model(model, LoraConfig(**LORA))).save_pretrained(folder, save_embedding_layers=True)
    tokenizer.save_pretrained(folder)
    component, truth = CausalLM(folder), AutoPeftModelForCausalLM.from_pretrained(folder)
    assert component.prompt_ids(["ab"]) == [[45]]
    assert own_score(component) == pytest.approx(scores(truth, component), abs=1e-4)
    saved = tmp_path / "saved"
    again = CausalLM.from_pretrained(saved, component.save_pretrained(saved))
    assert own_score(again) == own_score(component)


def test_an_adapter_that_names_no_base_and_one_with_another_config_are_refused(base, tmp_path):
    folder = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA)).save_pretrained(folder)
    with pytest.raises(PlanError, match="an adapter, which trains as it is; leave peft_config out, or give the base"):
        CausalLM(folder, peft_config=LoraConfig(**LORA))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(PlanError, match=r"adapter_config.json names no base model.*PeftModel.from_pretrained"):
        CausalLM(folder)


def test_an_adapter_that_the_models_own_method_put_on_is_adopted(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(**LORA), "mine")
    randomised(model)
    component = CausalLM(model, char_tokenizer())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert len(component.own_parameters()) == len(trained)
    truth = scores(model, component)
    assert own_score(component) == pytest.approx(truth, abs=1e-4)
    options = component.save_pretrained(tmp_path / "saved")
    assert own_score(CausalLM.from_pretrained(tmp_path / "saved", options)) == pytest.approx(truth, abs=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "base")
    assert scores(PeftModel.from_pretrained(plain, tmp_path / "saved"), component) == pytest.approx(truth, abs=1e-4)
    model.disable_adapters()
    with pytest.raises(PlanError, match="adapters are switched off"):
        CausalLM(model, char_tokenizer()).module


def test_a_system_saves_a_resized_embedding_of_a_named_base(base, tmp_path):
    """And each of two adapters on it finds the same rows again."""
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["xy", "zz"])
    parts = [CausalLM(base, tokenizer, peft_config=LoraConfig(**LORA)) for _ in range(2)]
    two_nodes(*parts)
    model = parts[0].module
    assert parts[1].module is model
    model.resize_token_embeddings(len(tokenizer))
    kept = [part.save_pretrained(tmp_path / f"saved-{number}") for number, part in enumerate(parts)]
    assert kept[0]["base"] is None
    assert kept[1]["base_of"] == "saved-0"
    again = CausalLM.from_pretrained(tmp_path / "saved-0", kept[0])
    assert again.prompt_ids(["xy"]) == [[len(ALPHABET) + 3]]
    assert torch.equal(again.module.get_input_embeddings().weight, model.get_input_embeddings().weight)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved-0" / "base")
    assert plain.get_input_embeddings().weight.shape[0] == len(tokenizer)


# One base for several nodes


def test_two_adapters_on_one_named_model_load_it_once_and_save_no_copy(base, tmp_path):
    system = two_nodes(*(CausalLM(source, peft_config=LoraConfig(**LORA)) for source in (base, str(base))))
    plan = system.compile()
    assert plan.models == (("draft", "answer"),)
    assert all("  0      exact" in line for line in str(plan).splitlines()[2:])
    assert "answer<br/>CausalLM<br/>on the model of draft" in plan.to_mermaid()
    estimate = plan.estimate({"draft": (8, 4), "answer": (8, 4)}, device="cpu")
    first, second = (n.component for n in sorted(system.nodes, key=lambda n: n.name != "draft"))
    assert first.module is second.module
    counted = {id(p): p.numel() * p.element_size() for p in first.module.parameters()}
    held = sum(2 * f.trained + f.optimizer - f.trained for f in estimate.footprints.values())
    assert estimate.resident == sum(counted.values()) + held
    assert "answer is on the base of draft" in str(estimate)
    system.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").rglob("base"))
    assert len(list((tmp_path / "saved").rglob("*.safetensors"))) == 2
    rows = json.loads((tmp_path / "saved" / "system.json").read_text())["components"]
    assert {row["options"]["base"] for row in rows.values()} == {str(base)}
    again = system.load(tmp_path / "saved")
    assert again["draft"].component.module is again["answer"].component.module
    assert again["draft"].component.module is not first.module


@pytest.mark.parametrize("other", ["whole", "another dtype", "another folder"])
def test_what_does_not_load_alike_is_loaded_apart(base, tmp_path, other):
    first, options, source = CausalLM(base, peft_config=LoraConfig(**LORA)), {}, base
    if other == "another folder":
        source = tmp_path / "copy"
        llama().save_pretrained(source)
        char_tokenizer().save_pretrained(source)
    if other != "whole":
        options["peft_config"] = LoraConfig(**LORA)
    if other == "another dtype":
        options["model_kwargs"] = {"dtype": "bf16"}
    second = CausalLM(source, **options)
    plan = two_nodes(first, second).compile()
    assert plan.models == (("draft",), ("answer",))
    assert "on the model of" not in plan.to_mermaid()
    assert first.module is not second.module


# Names that are no causal model


def test_other_kinds_of_folders_are_refused_by_what_they_are(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(PlanError, match=r"a pipeline folder of diffusers; use Diffusion\("):
        CausalLM(tmp_path / "pipeline")
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "system.json").write_text("{}")
    with pytest.raises(PlanError, match=r"a saved system; use System.from_pretrained\("):
        CausalLM(str(tmp_path / "system"))


@pytest.mark.parametrize("as_object", [True, False])
def test_models_that_are_no_causal_ones_are_refused(tmp_path, as_object):
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=45))
    bert = BertLMHeadModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=45)
    )
    decoder = BartForCausalLM(BartConfig(**SMALL, decoder_attention_heads=2))
    for model, message in (
        (t5, r"t5 is an encoder-decoder; use Seq2Seq\("),
        (bert, "bert is an encoder, whose"),
    ):
        model.save_pretrained(tmp_path / type(model).__name__)
        with pytest.raises(PlanError, match=message):
            CausalLM(model if as_object else tmp_path / type(model).__name__, char_tokenizer())
    decoder.save_pretrained(tmp_path / "bart")
    CausalLM(decoder if as_object else tmp_path / "bart", char_tokenizer())


@pytest.mark.parametrize("name", ["./org/typo", "../typo", "/no/such/folder", "a/b/c", "~/model"])
@pytest.mark.parametrize("read", ["config", "tokenizer", "module"])
def test_a_path_that_is_not_there_is_said_to_be_none(name, read):
    with pytest.raises(PlanError, match=r"there is no folder .*Give a model's folder or a Hub id"):
        getattr(CausalLM(name), read)


# Options of loading


def test_options_of_a_repository_find_tokenizer_and_config_too(base, monkeypatch):
    asked = {}
    for auto in (AutoTokenizer, AutoModelForCausalLM):
        load = auto.from_pretrained
        monkeypatch.setattr(
            auto, "from_pretrained", lambda *a, load=load, auto=auto, **o: asked.update({auto: o}) or load(*a, **o)
        )
    component = CausalLM(base, model_kwargs={"revision": "abc", "dtype": "bf16"})
    component.module, component.tokenizer
    untrusted = {"trust_remote_code": False}  # said, since transformers asks at a terminal where nothing is
    assert asked[AutoTokenizer] == {"revision": "abc", **untrusted}
    asked[AutoModelForCausalLM].pop("output_loading_info")
    assert asked[AutoModelForCausalLM] == {"revision": "abc", "dtype": torch.bfloat16, **untrusted}


@pytest.mark.parametrize("ends", [[3, 4], None], ids=["a generation config", "none"])
def test_the_end_tokens_are_of_the_files_that_the_options_find(tmp_path, ends):
    model, named = llama(), {"subfolder": "inner"}
    model.config.eos_token_id = 5
    model.generation_config.eos_token_id = ends
    model.save_pretrained(tmp_path / "whole" / "inner")
    char_tokenizer().save_pretrained(tmp_path / "whole" / "inner")
    if ends is None:
        (tmp_path / "whole" / "inner" / "generation_config.json").unlink()
    component = CausalLM(tmp_path / "whole", model_kwargs=named)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **named).generation_config.eos_token_id
    assert truth == ends or [truth] == [5]
    want = [component.tokenizer.eos_token_id, *(ends or [5])]
    assert component.lm.eos_token_ids == want  # before it is loaded
    assert component.module.generation_config.eos_token_id == truth
    assert component.lm.eos_token_ids == want


@pytest.mark.parametrize("adapted", [True, False])
def test_options_survive_saving(base, tmp_path, adapted):
    kwargs = {"torch_dtype": torch.bfloat16, "attn_implementation": "eager", "revision": "main", "device_map": None}
    options = {"peft_config": LoraConfig(**LORA)} if adapted else {}
    component = CausalLM(base, model_kwargs=kwargs, **options)
    kept = component.save_pretrained(tmp_path / "saved")
    expected = {"dtype": "bfloat16", "attn_implementation": "eager"} | ({"revision": "main"} if adapted else {})
    assert kept["model_kwargs"] == expected
    again = CausalLM.from_pretrained(tmp_path / "saved", json.loads(json.dumps(kept)))
    assert again.module.dtype == torch.bfloat16
    assert again.module.config._attn_implementation == "eager"
    assert own_score(again) == own_score(component)


def test_a_quantisation_survives_as_plain_values():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_type="nf4")
    saved = json.loads(json.dumps(model_source.to_json({"quantization_config": config}, weights_are_saved=False)))
    assert model_source.from_json(saved)["quantization_config"].to_dict() == config.to_dict()


def test_options_that_are_not_saved_are_said(base, tmp_path, caplog):
    component = CausalLM(base, peft_config=LoraConfig(**LORA), model_kwargs={"trust_remote_code": False})
    kept = component.save_pretrained(tmp_path / "saved")
    assert "model_kwargs" not in kept
    assert "the options ['trust_remote_code'] of model_kwargs are not saved" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_remote_code": True}, "may not choose 'trust_remote_code'"),
        ({"code_revision": "x"}, "may not choose 'code_revision'"),
        ({"config": {}}, "may not choose 'config'"),
        ({"device_map": "auto"}, "may not choose 'device_map'"),
        ({"attn_implementation": "org/kernel"}, "would load code from the Hub"),
        ({"attn_implementation": "org/kernel:fn"}, "would load code from the Hub"),
        ({"gguf_file": "../../x.gguf"}, "must be a file's plain name"),
        ({"variant": "../x"}, "must be a file's plain name"),
        ({"subfolder": "../x"}, "leads out of the repository"),
        ({"subfolder": "/etc"}, "leads out of the repository"),
        ({"revision": 3}, "revision must be a text"),
        ({"dtype": "os.system"}, "dtype must be float32"),
        ({"quantization_config": {"quant_method": "torchao", "quant_type": "x"}}, "must be of one of"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "hook": "x"}}, "has no field 'hook'"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": {"a": 1}}}, "hold plain values"),
        ([], "model_kwargs must be of type dict"),
    ],
)
def test_a_saved_system_may_not_choose_what_is_dangerous(base, tmp_path, options, message):
    kept = CausalLM(base, peft_config=LoraConfig(**LORA)).save_pretrained(tmp_path / "saved")
    with pytest.raises(SerializationError, match=message):
        CausalLM.from_pretrained(tmp_path / "saved", {**kept, "model_kwargs": options})


def test_options_for_a_loaded_model_and_two_dtypes_are_refused():
    with pytest.raises(PlanError, match=r"model_kwargs \['dtype'\] choose how a model is loaded, but this one is"):
        CausalLM(llama(), char_tokenizer(), model_kwargs={"dtype": "bf16"})
    with pytest.raises(PlanError, match="dtype='fp32' and torch_dtype='bf16' differ; keep dtype"):
        CausalLM("org/model", model_kwargs={"dtype": "fp32", "torch_dtype": "bf16"})


# Tokens


def test_tokens_beyond_the_embeddings_name_the_row_the_token_and_the_size(base):
    tokenizer = char_tokenizer()
    tokenizer.add_tokens(["xy"])
    component = CausalLM(base, tokenizer)
    where = r"has the token id 45, but the model has 45 \(the token is 'xy'\)"
    with pytest.raises(DataError, match=f"a prompt {where}.*resize_token_embeddings") as error:
        component.prompt_ids(["a", "xy"])
    assert error.value.element == 1
    with pytest.raises(DataError, match=f"a completion {where}") as error:
        component.log_prob(["a", "a", "a"], component.observe(["a", "b", "xy"]))
    assert error.value.element == 2
    component.module.resize_token_embeddings(len(tokenizer))
    assert component.prompt_ids(["xy"]) == [[45]]


def bert(kind):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 8) | {"num_hidden_layers": 1, "num_attention_heads": 2}
    return getattr(transformers, kind)(transformers.BertConfig(vocab_size=60, **sizes))


def t5():
    sizes = {"vocab_size": 60, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


CUT = {  # what is saved, what loads it, and a weight that is taken out
    "CausalLM": (lambda: llama(0, 60), lambda folder: CausalLM(folder), "layers.0.mlp.up_proj"),
    "Seq2Seq": (t5, lambda folder: Seq2Seq(folder), "decoder.block.0.layer.2"),
    "BiEncoder": (lambda: bert("BertModel"), lambda folder: BiEncoder(folder), "attention.self.query"),
    "CrossEncoder": (lambda: bert("BertModel"), lambda folder: CrossEncoder(folder), "attention.self.query"),
    "Categorical": (lambda: bert("BertModel"), lambda folder: Categorical(["a", "b"], folder), "attention.self.query"),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_weight_that_a_checkpoint_lacks_is_not_drawn_at_random(tmp_path, kind):
    build, component, name = CUT[kind]
    build().save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    assert component(tmp_path).module is not None
    file = tmp_path / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if name not in key}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=rf"has no weight '.*{re.escape(name)}"):
        component(tmp_path).module


@pytest.mark.parametrize("adapted", [True, False])
def test_a_compiled_model_trains_and_is_saved_as_the_one_inside(tmp_path, caplog, adapted):
    model, tokenizer = llama(0), char_tokenizer()
    options = {"peft_config": LoraConfig(**LORA)} if adapted else {}
    component = CausalLM(torch.compile(model, backend="eager"), tokenizer, **options)
    randomised(component.module)
    assert "taken out of torch.compile" in caplog.text
    saved = component.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path, json.loads(json.dumps(saved)))
    assert own_score(again) == pytest.approx(own_score(component), abs=1e-5)
    read = PeftModel.from_pretrained(llama(0), tmp_path) if adapted else AutoModelForCausalLM.from_pretrained(tmp_path)
    assert scores(read, component) == pytest.approx(own_score(component), abs=1e-4)


# GGUF


@pytest.mark.parametrize("adapted", [True, False])
def test_a_gguf_file_gives_model_tokenizer_and_template_and_saves_as_an_ordinary_folder(tmp_path, adapted):
    pytest.importorskip("gguf", reason="needs the package gguf (the extra `real`)")
    import gguf_files

    gguf_files.write(tmp_path / "tiny.gguf", llama(vocab_size=48, hidden_size=32))
    kwargs = {"gguf_file": "tiny.gguf"}
    options = {"peft_config": LoraConfig(**LORA)} if adapted else {}
    component = CausalLM(tmp_path, model_kwargs=kwargs, **options)
    assert component.config.hidden_size == 32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    chat = [{"role": "user", "content": "abc"}]
    assert component.prompt_ids([chat]) == component.prompt_ids(["abc"])
    assert own_score(component) == pytest.approx(scores(plain, component), abs=1e-4)
    kept = component.save_pretrained(tmp_path / "saved")
    again = CausalLM.from_pretrained(tmp_path / "saved", json.loads(json.dumps(kept)))
    assert own_score(again) == pytest.approx(own_score(component), abs=1e-5)
    assert again.prompt_ids([chat]) == component.prompt_ids([chat])
    if adapted:
        assert kept["model_kwargs"] == kwargs
    else:
        ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert not getattr(ordinary, "is_quantized", False)
        assert scores(ordinary, component) == pytest.approx(own_score(component), abs=1e-4)
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == component.tokenizer.chat_template


@pytest.mark.slow
def test_a_public_models_gguf_file_loads_whole_and_answers(smollm2_gguf, tmp_path):
    pytest.importorskip("gguf", reason="needs the package gguf (the extra `real`)")
    component = CausalLM(
        smollm2_gguf.parent, model_kwargs={"gguf_file": smollm2_gguf.name}, max_new_tokens=12, temperature=1e-4
    )
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in component.sample([chat])[0].value
    saved = tmp_path / "saved"
    options = component.save_pretrained(saved)
    assert options.get("model_kwargs") is None
    again = CausalLM.from_pretrained(saved, options)
    draws = component.observe(["Paris."])
    assert torch.equal(component.log_prob([chat], draws), again.log_prob([chat], draws))
