"""What a LoRA node saves is what diffusers' own `load_lora_weights` makes of the base pipeline, and peft's adapter."""

import os
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoHaConfig, LoraConfig
from pipeline_checks import REFUSED, pixels
from safetensors import safe_open
from tiny_diffusion import drift, from_vectors, pooled, scheduler_of, sd3, seed
from tiny_pipelines import CALL, PIPELINES

from sysdag import Input, System, node
from sysdag.components import Diffusion
from sysdag.components.diffusion.lora_file import FILE
from sysdag.saving.model_card import write_card

PROMPT = "a dark square"
TARGETS = ["to_q", "to_v", "to_qkv_mlp_proj", "to_query", "to_value"]  # what families call them
NO_LAYOUT = {"kandinsky3"}  # a UNet of its own, which loads none
NOT_LOADABLE = {"pixart-sigma": "PixArtTransformer2DModel", "hunyuandit": "HunyuanDiT2DModel", "latte": "Latte"}
QUICK = ["sd15", "sdxl", "sd3", "flux-dev", "qwen-image", "z-image", "wan", "latent-diffusion"]


def lora(**options):
    return LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": TARGETS} | options))


def base_of(name, folder):
    PIPELINES[name]().save_pretrained(folder)
    return folder


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn_by(pipe, name):
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)).item()
    generator = [torch.Generator().manual_seed(seed)]
    return pixels(
        pipe(prompt=PROMPT, generator=generator, num_inference_steps=2, output_type="pil", **CALL.get(name, {}))[0][0]
    )


def trained(base, name, config):
    """A component whose adapter has moved, and its image."""
    component = Diffusion(base, peft_config=config, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}))
    drift(component.pipeline.denoiser, size=0.3)  # more, and rounding alone is seen: by kandinsky3 in 3 levels
    draw = component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0]
    return component, pixels(draw.value)


def check_code(name, config, folder):
    """Every way that the card shows leads from the base to the trained model; returns what it says of them."""
    base = base_of(name, folder / "base")
    component, image = trained(base, name, config)
    assert abs(drawn_by(opened(base), name) - image).max() > 4  # of 255 levels
    ways = component.usage(folder / "out", component.save_pretrained(folder / "out"))
    for _, code in ways:
        assert len(code.splitlines()) <= 4
        assert abs(drawn_by(run(code, folder), name) - image).max() <= 1
    return [words for words, _ in ways]


@pytest.mark.parametrize("name", QUICK)
def test_the_base_with_the_file_is_the_trained_model(name, tmp_path):
    assert check_code(name, lora(), tmp_path) == ["With diffusers.", "With peft:"]


@pytest.mark.release("all pipelines of diffusers that can be built tiny: five minutes")
@pytest.mark.parametrize("name", sorted(PIPELINES.keys() - REFUSED.keys() - set(QUICK)))
def test_the_base_of_any_family_with_the_file_is_the_trained_model(name, tmp_path):
    words = check_code(name, lora(), tmp_path)
    if not hasattr(opened(tmp_path / "base"), "load_lora_weights") or name in NO_LAYOUT:
        assert "loads no LoRA" in words[0] or words == ["With diffusers.", "With peft:"]
    else:
        assert words == ["With diffusers.", "With peft:"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_q": 1}},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"target_modules": r".*attn1\.to_[qk]|.*conv1"},
        {"target_modules": "all-linear", "exclude_modules": ["to_k"]},
        {"lora_bias": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_of_the_adapter_survives(options, tmp_path):
    base = base_of("sd15", tmp_path / "base")
    component, image = trained(base, "sd15", lora(**options))
    component.save_pretrained(tmp_path / "out")
    pipe = opened(base)
    pipe.load_lora_weights(tmp_path / "out", weight_name=FILE)
    assert abs(drawn_by(pipe, "sd15") - image).max() <= 1
    own, read = component.pipeline.denoiser.peft_config["sysdag"], next(iter(pipe.unet.peft_config.values()))
    for option in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules"):
        assert getattr(own, option) == getattr(read, option)
    again = Diffusion.from_pretrained(tmp_path / "out", component.save_pretrained(tmp_path / "second"))
    redrawn = again.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].value
    assert abs(pixels(redrawn) - image).max() <= 1


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("sd15", LoHaConfig(r=2, target_modules=["to_q"]), "loads LoRA adapters, and this is LOHA"),
        ("sd15", lora(modules_to_save=["conv_out"]), "also holds 'conv_out.weight'"),
        ("kandinsky3", lora(), "Kandinsky3UNet loads no LoRA"),
        *((name, lora(), f"{kind}.* loads no LoRA") for name, kind in NOT_LOADABLE.items()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_diffusers_cannot_load_is_written_for_peft_alone(name, config, reason, tmp_path):
    base = base_of(name, tmp_path / "base")
    component, image = trained(base, name, config)
    options = component.save_pretrained(tmp_path / "out")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"adapter"}
    ((words, code),) = component.usage(tmp_path / "out", options)
    assert re.search(f"diffusers alone cannot load this adapter: .*{reason}", words)
    assert abs(drawn_by(run(code, tmp_path), name) - image).max() <= 1


def run(code, folder, **names):
    """The pipeline (or denoiser) that a card's code makes, run where the base lies."""
    made = {"folder": "out", **names}
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, made)
    finally:
        os.chdir(before)
    if "pipe" in made:
        made["pipe"].set_progress_bar_config(disable=True)
    return made.get("pipe")


def test_a_file_that_diffusers_reads_otherwise_is_not_left_behind(tmp_path, monkeypatch, caplog):
    base = base_of("sd15", tmp_path / "base")
    component, image = trained(base, "sd15", lora())
    kind = type(component.pipeline.whole)
    own = kind.lora_state_dict.__func__

    def renamed(cls, *args, **kwargs):
        read, *others = own(cls, *args, **kwargs)
        return {key.replace("to_q", "to_k"): tensor for key, tensor in read.items()}, *others

    monkeypatch.setattr(kind, "lora_state_dict", classmethod(renamed))
    options = component.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / FILE).exists()
    assert "diffusers would read another adapter from it" in caplog.text
    ((words, code),) = component.usage(tmp_path / "out", options)
    assert "it would read another adapter from its own layout" in words
    assert abs(drawn_by(run(code, tmp_path), "sd15") - image).max() <= 1


def test_a_text_encoder_that_trains_is_in_the_folders_own_pipeline(tmp_path):
    base = base_of("sd15", tmp_path / "base")
    component = Diffusion(base, peft_config=lora(), num_inference_steps=2, train_text_encoder=True)
    drift(component.module, size=0.5)
    image = pixels(component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].value)
    ways = component.usage(tmp_path / "out", component.save_pretrained(tmp_path / "out"))
    assert "text_encoder trained too" in ways[0][0]
    shutil.rmtree(base)  # nothing of it is needed
    untrained = drawn_by(opened(tmp_path / "out"), "sd15")
    assert abs(untrained - image).max() > 4
    for _, code in ways:
        assert abs(drawn_by(run(code, tmp_path), "sd15") - image).max() <= 1


@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_a_denoiser_that_was_passed_as_an_object_loads_its_file(part, tmp_path):
    if part == "unet":
        component = from_vectors(peft_config=lora())
        arguments = {"encoder_hidden_states": torch.randn(2, 3, 8, generator=seed(3))}
        sample = torch.randn(2, 1, 8, 8, generator=seed(4))
    else:
        component = Diffusion(sd3(), scheduler=scheduler_of("flow"), condition=pooled, peft_config=lora())
        arguments = pooled([1.0, 2.0])
        sample = torch.randn(2, 2, 4, 4, generator=seed(4))
    drift(component.pipeline.denoiser, size=0.3)  # more, and rounding alone is seen: by kandinsky3 in 3 levels
    with torch.no_grad():
        expected = component.pipeline.denoiser(sample, timestep=torch.tensor([3, 7]), **arguments).sample
    ways = component.usage(tmp_path / "out", component.save_pretrained(tmp_path / "out"))
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        assert all(key.startswith(f"{part}.") for key in file.keys())  # noqa: SIM118 - no mapping
    assert [words for words, _ in ways] == ["With diffusers.", "With peft:"]
    for _, code in ways:
        names = {}
        exec(f"folder = {str(tmp_path / 'out')!r}\n{code}", names)
        with torch.no_grad():
            found = names[part](sample, timestep=torch.tensor([3, 7]), **arguments).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_full_nodes_folder_is_opened_in_one_line(tmp_path):
    base = base_of("sd15", tmp_path / "base")
    component = Diffusion(base, num_inference_steps=2)
    drift(component.pipeline.denoiser, size=0.1)
    image = pixels(component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].value)
    ((words, code),) = component.usage(tmp_path / "out", component.save_pretrained(tmp_path / "out"))
    assert (words, code.splitlines()[1]) == ("With diffusers:", "pipe = DiffusionPipeline.from_pretrained(folder)")
    shutil.rmtree(base)
    assert abs(drawn_by(run(code, tmp_path), "sd15") - image).max() <= 1


def test_the_models_lines_stand_in_the_card_of_the_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_of("sd15", tmp_path / "base")
    component = Diffusion("base", peft_config=lora(), num_inference_steps=2)
    drift(component.pipeline.denoiser, size=0.3)  # more, and rounding alone is seen: by kandinsky3 in 3 levels
    image = pixels(component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].value)
    system = System(Input("prompt") >> node(component)(picture))
    system.save_pretrained("card")
    write_card(system, "card")
    text = (tmp_path / "card" / "README.md").read_text()
    _, models = text.split("## The models by themselves")
    codes = re.findall("```python\n(.*?)```", models, re.S)
    assert [code.splitlines()[0] for code in codes] == ["folder = 'card/picture'"] * 2
    for code in codes:
        assert abs(drawn_by(run(code, tmp_path), "sd15") - image).max() <= 1
    write_card(system, "card", loads_from="org/painter")
    text = (tmp_path / "card" / "README.md").read_text()
    assert "folder = snapshot_download('org/painter') + '/picture'" in text


def picture(prompt):
    return prompt
