"""What a saved folder from elsewhere cannot do: have code run, options passed on, or files outside of it read or moved.

Every probe is harmless: code that would run writes a file.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys

import pytest
from damaged_systems import SYSTEM, draft, picture, refused
from peft import LoraConfig
from tiny import char_tokenizer, llama
from tiny_pipelines import PIPELINES

from sysdag import Input, SerializationError, System, node
from sysdag.components import CausalLM, Diffusion
from sysdag.files.saved_files import check_component, safetensors_shapes
from sysdag.saving.serialization import load_weights, save_system

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({mark!r}).write_text("run")

class ProbeConfig(LlamaConfig):
    model_type = "probe"

class ProbeModel(LlamaForCausalLM):
    config_class = ProbeConfig

class ProbeTokenizer(PreTrainedTokenizerFast):
    pass

class ProbePipeline:
    pass
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SYSTEM.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Where code of a folder would leave its mark; modules that transformers copies go to a folder of the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "mark"
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def edited(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def with_options(folder, name, **options):
    data = json.loads((folder / "system.json").read_text())
    data["components"][name]["options"] |= options
    (folder / "system.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("draft", {"trust_remote_code": True}, "no saved CausalLM has the option 'trust_remote_code', only ["),
        ("draft", {"decoder": "http://127.0.0.1:9"}, "no saved CausalLM has the option 'decoder'"),
        ("draft", {"tokenizer": "/elsewhere"}, "no saved CausalLM has the option 'tokenizer'"),
        ("draft", {"peft_config": {}}, "no saved CausalLM has the option 'peft_config'"),
        ("draft", {"model_kwargs": {"trust_remote_code": True}},
         "model_kwargs: a saved system may not choose 'trust_remote_code'"),
        ("draft", {"model_kwargs": {"code_revision": "main"}}, "may not choose 'code_revision'"),
        ("draft", {"model_kwargs": {"attn_implementation": "org/kernel"}}, "would load code from the Hub"),
        ("draft", {"temperature": "1"}, "CausalLM: temperature must be of type int or float, got '1'."),
        ("draft", {"max_new_tokens": True}, "CausalLM: max_new_tokens must be of type int or null, got True."),
        ("draft", {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs cannot set ['tokenize']"),
        ("draft", {"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "chat_template_kwargs cannot set"),
        ("answer", {"base_of": ".."}, "base_of must name a component of the saved system, got '..'"),
        ("answer", {"base_of": "../answer"}, "base_of must name a component of the saved system"),
        ("answer", {"base_of": "elsewhere"}, "elsewhere/base of its base model is missing"),
        ("route", {"trust_remote_code": True}, "no saved Categorical has the option 'trust_remote_code'"),
        ("route", {"model": "/elsewhere"}, "no saved Categorical has the option 'model'"),
        ("choose", {"features": 10**12}, "its classifier has the shape (2, 3), not (2, 1000000000000)"),
        ("table", {"dtype": "x"}, "no saved Tabular has the option 'dtype'"),
        ("tool", {"cache": "/elsewhere"}, "no saved Opaque has the option 'cache'"),
        ("picture", {"custom_pipeline": "org/code"}, "['custom_pipeline'] are unknown or missing"),
        ("picture", {"base": {"source": "org/base", "custom_pipeline": "x"}}, "The base of a saved Diffusion has"),
        ("picture", {"base": {"component": "..", "parts": None}}, "The base of a saved Diffusion has"),
        ("picture", {"pipeline_kwargs": [1]}, "pipeline_kwargs must be of type dict or null"),
        ("picture", {"parts": {"unet": {"library": "transformers", "class": "Trainer"}}}, "lacks ['unet']"),
    ],
)  # fmt: skip
def test_an_option_that_is_none_of_the_components_is_not_passed_on(name, options, message, folder):
    if name == "picture" and "lacks" in message:
        shutil.rmtree(folder / "picture/unet")
    with_options(folder, name, **options)
    refused(folder, message, name)


@pytest.mark.parametrize(
    "entry",
    [{"library": "transformers", "class": "AutoModel"}, {"library": "transformers", "class": "Trainer"},
     {"library": "diffusers", "class": "DiffusionPipeline", "code": "x"}, {"library": "os", "class": "system"},
     {"library": "diffusers", "class": "UNet2DConditionModel", "dtype": "load"}],
)  # fmt: skip
def test_a_part_is_a_model_scheduler_or_tokenizer_of_diffusers_or_transformers(entry, folder):
    parts = json.loads((folder / "system.json").read_text())["components"]["picture"]["options"]["parts"]
    with_options(folder, "picture", parts=parts | {"unet": entry})
    with pytest.raises(SerializationError, match="Component 'picture'"):
        System.from_pretrained(folder)


def remote_code(folder, mark, *, config="config.json"):
    """Puts code into a model's folder, that its config names."""
    (folder / "probe.py").write_text(CODE.format(mark=str(mark)))
    if config == "config.json":
        named = {"AutoConfig": "probe.ProbeConfig", "AutoModelForCausalLM": "probe.ProbeModel"}
        edited(folder / config, auto_map=named, model_type="probe", architectures=["ProbeModel"])
    else:
        edited(folder / config, auto_map={"AutoTokenizer": ["probe.ProbeTokenizer", "probe.ProbeTokenizer"]},
               tokenizer_class="ProbeTokenizer")  # fmt: skip


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_code_that_a_model_brings_runs_where_whoever_loads_says_so(config, folder, mark):
    remote_code(folder / "draft", mark, config=config)
    refused(folder, f"{folder}/draft/{config}: auto_map=")
    with pytest.raises(SerializationError, match="trust_remote_code=True"):
        SYSTEM.load(folder)
    assert not mark.exists()
    component = System.from_pretrained(folder, trust_remote_code=True)["draft"].component
    assert type(component.module).__name__ == ("ProbeModel" if config == "config.json" else "LlamaForCausalLM")
    assert component.tokenizer("a")
    assert mark.exists()  # the probe does what it is to show
    given = SYSTEM.with_components({"draft": component})
    assert given.load(folder)["draft"].component.trusts_remote_code
    assert not System.from_pretrained(folder, trust_remote_code=True)["picture"].component.trusts_remote_code


ELSEWHERE = System(Input("prompt", str) >> draft)


def test_a_base_that_the_folder_names_brings_no_code_either(tmp_path, mark, monkeypatch):
    """Not even by the question that transformers asks at a terminal."""
    llama(1).save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    named = CausalLM(tmp_path / "base", peft_config=LoraConfig(r=2, target_modules=["q_proj"]), max_new_tokens=4)
    ELSEWHERE.with_components({"draft": named}).save_pretrained(tmp_path / "saved")
    remote_code(tmp_path / "base", mark)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refused(tmp_path / "saved", "trust_remote_code")
    with pytest.raises(OSError, match="trust_remote_code"):
        _ = CausalLM(tmp_path / "base").config
    assert not mark.exists()
    loaded = System.from_pretrained(tmp_path / "saved", trust_remote_code=True)["draft"].component
    assert type(loaded.module).__name__ == "ProbeModel"


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "custom_generate"])
def test_a_config_names_no_code_on_the_hub(name, folder):
    edited(folder / "draft/config.json", **{name: "org/kernel"})
    refused(folder, f"{folder}/draft/config.json: {name}='org/kernel' asks for code that is not the library's own")


@pytest.mark.parametrize(
    "fields",
    [{"megatron_config": {"a": 1}, "megatron_core": "probe_of_adapters"}, {"loftq_config": {"a": 1}},
     {"tokenizer_kwargs": {"trust_remote_code": True}}, {"target_modules": 3}, {"r": "2"}, {"peft_type": "os"},
     {"base_model_name_or_path": ["x"]}],
)  # fmt: skip
def test_an_adapters_config_names_no_code_and_no_files(fields, folder, mark, monkeypatch):
    (mark.parent / "probe_of_adapters.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(mark.parent)
    for place, name in (("answer", "answer"), ("picture/adapter", "picture")):
        text = (folder / place / "adapter_config.json").read_text()
        edited(folder / place / "adapter_config.json", **fields)
        refused(folder, f"{folder}/{place}/adapter_config.json: ", name)
        (folder / place / "adapter_config.json").write_text(text)
    assert not mark.exists()


@pytest.fixture
def whole(tmp_path):
    """A saved system with a pipeline that diffusers loads as a whole."""
    made = PIPELINES["sd15"]()
    System(Input("answer", str) >> picture).with_components({"picture": Diffusion(made)}).save_pretrained(
        tmp_path / "whole"
    )
    return tmp_path / "whole"


def test_a_pipeline_brings_no_code(whole, mark):
    index = whole / "picture/model_index.json"
    assert System.from_pretrained(whole)["picture"].component.is_whole
    text = index.read_text()
    for name in ("probe.py", "pipeline.py", "unet/diffusers.py", "unet/probe.py"):
        (whole / "picture" / name).write_text(CODE.format(mark=str(mark)))
    for change in (
        {"_class_name": ["probe", "ProbePipeline"]},
        {"custom_pipeline": "probe"},
        {"unet": ["probe", "ProbePipeline"]},
        {"unet": ["diffusers", "ProbePipeline"]},
        {"unet": ["transformers", "AutoModel"]},
    ):
        index.write_text(text)
        edited(index, **change)
        refused(whole, "", "picture")
        with contextlib.suppress(SerializationError):  # diffusers' own code is what a pipeline is made of, in any case
            _ = System.from_pretrained(whole, trust_remote_code=True)["picture"].component.module
    assert not mark.exists()


# Links, and folders that are only read


def content(folder):
    return {str(path): (path.lstat().st_mtime_ns, path.is_symlink()) for path in sorted(folder.rglob("*"))}


def test_loading_writes_nothing(folder):
    """Not even what an interrupted save has left, which the next writer puts in place."""
    (folder / ".saved").mkdir()
    for name in ("answer", "system.json"):
        shutil.move(folder / name, folder / ".saved" / name)
    before = content(folder)
    loaded = System.from_pretrained(folder)
    assert loaded["answer"].component.module is not None
    load_weights(loaded, folder)
    assert content(folder) == before
    save_system(SYSTEM, folder)
    assert not (folder / ".saved").exists()
    assert System.from_pretrained(folder)["answer"].component.module is not None


def test_a_link_to_elsewhere_is_refused_and_what_it_leads_to_stays(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "draft").mkdir()
    (elsewhere / "kept.txt").write_text("mine")
    (folder / ".saved").symlink_to(elsewhere)
    before = content(elsewhere)
    for loading in (System.from_pretrained, SYSTEM.load, lambda place: load_weights(SYSTEM, place)):
        with pytest.raises(SerializationError, match=re.escape(f"{folder}/.saved is a link that leads out of")):
            loading(folder)
    with pytest.raises(SerializationError, match=re.escape(f"{folder}/.saved is a link, which no save leaves")):
        save_system(SYSTEM, folder)
    assert content(elsewhere) == before


@pytest.mark.parametrize(
    "name", ["system.json", "draft", "draft/config.json", "answer/base", "picture/unet/config.json"]
)
def test_a_link_in_a_saved_systems_place_is_refused(name, folder, tmp_path):
    shutil.move(folder / name, tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(SerializationError, match=re.escape(f"{folder}/{name} is a link that leads out of {folder}")):
        System.from_pretrained(folder)
    if name != "system.json":
        with pytest.raises(SerializationError, match=re.escape(f"{folder}/{name} is a link that leads out of")):
            load_weights(SYSTEM, folder)


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_followed(folder, tmp_path):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    for number, path in enumerate([path for path in folder.rglob("*") if path.is_file()]):
        place = snapshot / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        (cache / "blobs").mkdir(exist_ok=True)
        shutil.copy(path, cache / "blobs" / str(number))
        place.symlink_to(os.path.relpath(cache / "blobs" / str(number), place.parent))
    assert System.from_pretrained(snapshot)["draft"].component.module is not None
    (tmp_path / "latest").symlink_to(folder)
    assert System.from_pretrained(tmp_path / "latest")["choose"].component.module is not None


def test_rows_that_name_another_folder_are_refused(folder):
    data = json.loads((folder / "system.json").read_text())
    data["components"][".."] = data["components"]["draft"] | {"folder": ".."}
    (folder / "system.json").write_text(json.dumps(data))
    with pytest.raises(SerializationError, match=re.escape("components['..'] must be in a folder of that name")):
        System.from_pretrained(folder)


def test_weights_in_several_files_are_loaded_and_their_index_names_no_code(folder):
    model = llama(vocab_size=4096)
    (folder / "draft/model.safetensors").unlink()
    model.save_pretrained(folder / "draft", max_shard_size="200KB")
    assert len(list((folder / "draft").glob("model-*.safetensors"))) > 1
    index = folder / "draft/model.safetensors.index.json"
    numbers = sum(each.numel() for each in model.parameters())
    assert json.loads(index.read_text())["metadata"]["total_size"] > max(numbers, 10**6)  # of bytes
    found = System.from_pretrained(folder)["draft"].component.module.state_dict()
    assert all(found[name].equal(value) for name, value in model.state_dict().items())
    edited(index, auto_map={"AutoModel": "org/code--probe.ProbeModel"})
    refused(folder, f"{index}: auto_map=")


def test_a_config_is_looked_through_however_deep_once(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    for inside in ([[{"auto_map": "x"}]], {"a": [{"b": [[[{"auto_map": "x"}]]]}]}):
        config.write_text(json.dumps({"a": inside}))
        with pytest.raises(SerializationError, match="auto_map='x' asks for code"):
            check_component(tmp_path, trust_remote_code=False)
    nested: dict = {}
    for _ in range(40):
        nested = {"a": nested}
    config.write_text(json.dumps(nested))
    visits = itertools.count(1)

    def visited(*_):
        assert next(visits) <= 40

    monkeypatch.setattr("sysdag.files.saved_files._check_no_code", visited)
    check_component(tmp_path, trust_remote_code=False)
    assert next(visits) == 41


def test_the_header_of_a_file_with_weights_is_read_once(folder, monkeypatch):
    llama().save_pretrained(folder / "draft", max_shard_size="20KB")
    (folder / "draft/other_config.json").write_text("{}")
    read = []

    def counted(file):
        read.append(file.name)
        return safetensors_shapes(file)

    monkeypatch.setattr("sysdag.files.saved_files.safetensors_shapes", counted)
    check_component(folder / "draft", trust_remote_code=False)
    assert sorted(read) == sorted(path.name for path in (folder / "draft").glob("*.safetensors"))
    assert len(read) > 1


def test_a_vocabulary_may_hold_any_text(folder):
    """Only configs are looked through for what names code."""
    (folder / "draft/vocab.json").write_text('{"auto_map": 1, "trust_remote_code": 2}')
    check_component(folder / "draft", trust_remote_code=False)


@node(CausalLM(llama(), char_tokenizer(), peft_config=LoraConfig(r=2, target_modules={"q_proj", "v_proj", "k_proj"})))
def told(prompt):
    return prompt


def test_an_adapters_layers_are_saved_in_one_order(tmp_path):
    System(Input("prompt", str) >> told).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "told/adapter_config.json").read_text())["target_modules"] == [
        "k_proj", "q_proj", "v_proj",
    ]  # fmt: skip
