"""Checkpoints of diffusion nodes hold what trains; what is frozen is had from the base by its name."""

import json
import shutil

import numpy
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from pipeline_checks import pixels
from test_lora_pipelines import base_of, drawn_by, opened
from test_trainer import config, weights
from tiny_diffusion import drift, from_text, from_vectors
from tiny_pipelines import PIPELINES

from sysdag import Input, PlanError, SerializationError, SysDPOTrainer, System, node
from sysdag.components import Diffusion
from sysdag.saving.serialization import load_weights, save_system

PROMPT = "a dark square"
prompt = Input("prompt")


def lora(**options):
    return LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]} | options))


@node(from_vectors(), name="picture")
def pictured(prompt):
    return prompt


@node(from_vectors(), name="second")
def pictured_again(picture):
    return PROMPT


OUTLINE = System(prompt >> pictured)
PAIR = System(prompt >> pictured, pictured >> pictured_again)


def noise_image(number, width=16, height=16):
    return Image.fromarray(numpy.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def rows(count):
    return [
        {"prompt": f"a dark square {i}", "chosen": noise_image(2 * i), "rejected": noise_image(2 * i + 1)}
        for i in range(count)
    ]


def trainer_of(component, folder, **options):
    system = OUTLINE.with_components({"picture": component})
    options = {
        "objective": "direct",
        "beta": 2000.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    } | options
    return SysDPOTrainer(system, config(folder, learning_rate=1e-2, **options), train_dataset=rows(8))


def files_in(folder):
    return {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}


def drawn(component):
    return pixels(component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].value)


def saved_and_loaded(component, folder, **options):
    save_system(OUTLINE.with_components({"picture": component}), folder, **options)
    return System.from_pretrained(folder)["picture"].component


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"peft_config": lora()}, {"adapter", "pytorch_lora_weights.safetensors"}),
        ({}, {"unet"}),
        ({"train_text_encoder": True}, {"unet", "text_encoder"}),
        (
            {"peft_config": lora(), "train_text_encoder": True},
            {"adapter", "pytorch_lora_weights.safetensors", "text_encoder"},
        ),
        ({"scheduler": DDPMScheduler()}, {"unet", "scheduler"}),
    ],
    ids=["lora", "full", "full and text", "lora and text", "given"],
)
def test_training_goes_on_from_a_checkpoint_bit_by_bit(options, written, tmp_path):
    base = base_of("sd15-safety", tmp_path / "base")

    def component():
        return Diffusion(base, num_inference_steps=2, convention="diffusion-dpo", **options)

    whole = trainer_of(component(), tmp_path / "whole")
    start = weights(whole.system)
    whole.train()
    assert files_in(tmp_path / "whole" / "checkpoint-2" / "picture") == written
    resumed = trainer_of(component(), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = weights(whole.system), weights(resumed.system)
    midway = weights(System.from_pretrained(tmp_path / "whole" / "checkpoint-2"))
    for earlier in (start, midway):
        assert not all(tensor.equal(earlier[key]) for key, tensor in expected.items())
    assert expected.keys() == found.keys()
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    # The checkpoint is a system by itself, too.
    loaded = System.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(tensor.equal(expected[key]) for key, tensor in weights(loaded).items())
    assert (drawn(loaded["picture"].component) == drawn(whole.system["picture"].component)).all()
    whole.save_model()
    out = tmp_path / "whole" / "picture"
    if written >= {"adapter"} and "train_text_encoder" not in options:
        assert files_in(out) == written
        return
    opens = DiffusionPipeline.from_pretrained(out)
    assert set(opens.components) == set(PIPELINES["sd15-safety"]().components)
    again = System.from_pretrained(tmp_path / "whole")
    assert all(tensor.equal(expected[key]) for key, tensor in weights(again).items())


def test_a_checkpoint_that_goes_to_the_hub_is_whole(tmp_path, monkeypatch):
    base = base_of("sd15", tmp_path / "base")
    trainer = trainer_of(Diffusion(base, num_inference_steps=2), tmp_path / "out")
    trainer.args.push_to_hub = True
    trainer._staging = tmp_path / "staged"
    trainer._save(str(tmp_path / "staged" / "checkpoint-1"))
    DiffusionPipeline.from_pretrained(tmp_path / "staged" / "checkpoint-1" / "picture")


def test_what_the_base_was_loaded_with_is_kept(tmp_path):
    pipe = PIPELINES["sd15"]().to(torch.float16)
    pipe.save_pretrained(tmp_path / "base", variant="fp16")
    component = Diffusion(tmp_path / "base", peft_config=lora(), dtype="float16", variant="fp16", num_inference_steps=2)
    options = component.save_pretrained(tmp_path / "out")
    assert options["base"] == {"source": str(tmp_path / "base"), "dtype": "float16", "variant": "fp16"}
    again = Diffusion.from_pretrained(tmp_path / "out", json.loads(json.dumps(options)))
    state, expected = again.module.state_dict(), component.module.state_dict()
    assert state.keys() == expected.keys()
    assert all(tensor.equal(expected[key]) and tensor.dtype == expected[key].dtype for key, tensor in state.items())
    (code, _) = [code for _, code in component.usage(tmp_path / "out", options)]
    assert "DiffusionPipeline.from_pretrained('base', variant='fp16', torch_dtype=torch.float16)" in code


def test_the_revision_of_the_base_is_kept(tmp_path, monkeypatch):
    base = base_of("sd15", tmp_path / "base")
    asked = []
    own = DiffusionPipeline.from_pretrained.__func__

    def from_pretrained(cls, source, revision=None, **options):
        asked.append(revision)
        return own(cls, source, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    component = Diffusion(base, peft_config=lora(), revision="v1.5")
    options = component.save_pretrained(tmp_path / "out")
    assert Diffusion.from_pretrained(tmp_path / "out", options).pipeline.adapter is not None
    assert asked == ["v1.5", "v1.5"]


def test_a_base_that_has_gone_is_named(tmp_path):
    base = base_of("sd15", tmp_path / "base")
    loaded = saved_and_loaded(Diffusion(base, peft_config=lora()), tmp_path / "out")
    assert loaded.pipeline.adapter is not None
    unread = System.from_pretrained(tmp_path / "out")["picture"].component
    shutil.rmtree(base)
    with pytest.raises(SerializationError, match=f"trained on the base model '{base}', and there is no such folder"):
        System.from_pretrained(tmp_path / "out")
    told = f"Component 'picture': .*saved without its base model '{base}', which cannot be loaded"
    with pytest.raises(SerializationError, match=told):
        _ = unread.pipeline


@pytest.mark.parametrize(
    "base",
    [{}, {"source": 3}, {"source": "base", "code": "x"}, {"component": "../x", "parts": None}, "base"],
    ids=str,
)
def test_a_base_of_another_form_is_refused(base, tmp_path):
    component = Diffusion(base_of("sd15", tmp_path / "base"), peft_config=lora())
    options = component.save_pretrained(tmp_path / "out")
    message = "base must be of type dict" if base == "base" else "The base of a saved Diffusion has the fields"
    with pytest.raises(SerializationError, match=message):
        Diffusion.from_pretrained(tmp_path / "out", {**options, "base": base})


def two_of(first, second):
    return PAIR.with_components({"picture": first, "second": second})


@pytest.mark.parametrize("kind", ["name", "pipeline", "parts"])
def test_two_adapters_share_their_base_after_loading(kind, tmp_path):
    options = {"num_inference_steps": 2}
    if kind == "parts":
        parts = from_text().pipeline.parts
        source = parts["unet"]
        options |= {name: part for name, part in parts.items() if name != "unet"}
    else:
        base = base_of("sd15", tmp_path / "base")
        source = base if kind == "name" else opened(base)
    system = two_of(*(Diffusion(source, peft_config=lora(r=rank), **options) for rank in (2, 3)))
    first, second = system["picture"].component, system["second"].component
    assert first.pipeline.denoiser is second.pipeline.denoiser
    assert first.base_key == second.base_key
    drift(first.module, size=1.0)
    expected = [drawn(first), drawn(second)]
    assert abs(expected[0] - expected[1]).max() > 4
    system.save_pretrained(tmp_path / "out")
    assert "unet" not in files_in(tmp_path / "out" / "second")
    assert ("unet" in files_in(tmp_path / "out" / "picture")) == (kind != "name")
    loaded = System.from_pretrained(tmp_path / "out")
    again = [loaded[name].component for name in ("picture", "second")]
    assert again[0].pipeline.denoiser is again[1].pipeline.denoiser
    assert again[0].pipeline.adapter != again[1].pipeline.adapter
    for component, image in zip(again, expected, strict=True):
        assert abs(drawn(component) - image).max() <= 1
    loaded.save_pretrained(tmp_path / "third")
    assert "unet" not in files_in(tmp_path / "third" / "second")
    drift(again[0].module, number=3, size=1.0)
    load_weights(loaded, tmp_path / "third")
    for component, image in zip(again, expected, strict=True):
        assert abs(drawn(component) - image).max() <= 1
    ways = second.usage(tmp_path / "out" / "second", saved_options(tmp_path / "out", "second"))
    assert len(ways) == 2
    for _, code in ways if kind == "pipeline" else []:
        names = {}
        exec(f"folder = {str(tmp_path / 'out' / 'second')!r}\n{code}", names)
        assert abs(drawn_by(names["pipe"], "sd15") - expected[1]).max() <= 1


def saved_options(folder, key):
    return json.loads((folder / "system.json").read_text())["components"][key]["options"]


def test_a_pipeline_that_was_passed_as_an_object_is_saved_with_the_node(tmp_path):
    pipe = opened(base_of("sd15", tmp_path / "base"))
    component = Diffusion(pipe, peft_config=lora(), num_inference_steps=2)
    assert repr(component) == "Diffusion(StableDiffusionPipeline, adapter, steps=2, scale=sysdpo)"
    drift(component.pipeline.denoiser, size=1.0)
    image = drawn(component)
    shutil.rmtree(tmp_path / "base")
    loaded = saved_and_loaded(component, tmp_path / "out", checkpoint=True)
    assert abs(drawn(loaded) - image).max() <= 1
    with pytest.raises(PlanError, match="given as an object"):
        component.fresh()
    with pytest.raises(PlanError, match="choose what is loaded, but the model is an object"):
        Diffusion(pipe, dtype="bf16")


def test_a_saved_node_is_trained_on_and_saved_again_in_the_same_place(tmp_path):
    base = base_of("sd15", tmp_path / "base")
    component = Diffusion(base, num_inference_steps=2)
    drift(component.pipeline.denoiser)
    loaded = saved_and_loaded(component, tmp_path / "out")
    drift(loaded.pipeline.denoiser, number=4)
    image = drawn(loaded)
    again = saved_and_loaded(loaded, tmp_path / "out", checkpoint=True)  # over its own base
    assert abs(drawn(again) - image).max() <= 1


def test_folders_of_earlier_versions_load(tmp_path):
    component = from_text(num_inference_steps=3, guidance_scale=2.0)
    options = dict(component.save_pretrained(tmp_path))
    expected = component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].record["latents"]
    first = {
        "parts", "adapter", "condition", "weighting", "sample_shape", "num_inference_steps", "guidance_scale",
        "convention", "num_noise_draws", "train_text_encoder", "mask_padding", "max_text_length", "null_class",
        "batch_size",
    }  # fmt: skip
    options = {name: option for name, option in options.items() if name in first}
    assert options.keys() == first
    again = Diffusion.from_pretrained(tmp_path, options)
    found = again.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].record["latents"]
    numpy.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    del options["adapter"]
    with pytest.raises(SerializationError, match=r"not the options of a saved Diffusion: \['adapter'\] are unknown or"):
        Diffusion.from_pretrained(tmp_path, options)
