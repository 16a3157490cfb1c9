"""A saved system that was damaged loads, or is refused with file and node: nothing else comes of it."""

import re
import shutil

import pytest
import torch
from damaged_systems import SYSTEM, outcomes, picture, refused
from safetensors.torch import load_file, save_file
from tiny_pipelines import PIPELINES

from sysdag import Input, System
from sysdag.components import Diffusion


def test_damaged_systems_load_or_are_refused_with_file_and_node(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = outcomes(40, 20, tmp_path)
    assert found.total() == 40
    assert found["loaded"] >= 2
    assert found["refused"] >= 20
    assert found["loaded"] + found["refused"] == 40, found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SYSTEM.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


WEIGHTS = {
    "draft": "model.safetensors", "answer": "base/model.safetensors", "route": "model.safetensors",
    "choose": "model.safetensors", "picture": "unet/diffusion_pytorch_model.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("node", WEIGHTS)
def test_a_weight_that_is_missing_is_not_drawn_at_random(node, folder):
    """What transformers and diffusers do with a warning."""
    file = folder / node / WEIGHTS[node]
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    refused(folder, name if node != "choose" else "the weight of its classifier has the shape None", node)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_nor_is_one_of_a_pipeline_that_is_loaded_whole(part, tmp_path):
    whole = System(Input("answer", str) >> picture).with_components({"picture": Diffusion(PIPELINES["sd15"]())})
    whole.save_pretrained(tmp_path)
    assert System.from_pretrained(tmp_path)["picture"].component.module is not None
    [file] = (tmp_path / "picture" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors, key=lambda name: tensors[name].numel())
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    refused(tmp_path, f"{part}: the weight ", "picture")


@pytest.mark.parametrize("node", WEIGHTS)
def test_pickled_weights_are_refused(node, folder):
    file = folder / node / WEIGHTS[node]
    pickled = file.with_name(file.name.replace(".safetensors", ".bin").replace("model.bin", "pytorch_model.bin"))
    torch.save(load_file(file), pickled)
    refused(folder, f"{pickled}: weights are read from safetensors only.", node)
    file.unlink()
    refused(folder, f"{pickled}: weights are read from safetensors only.", node)


def test_a_config_that_asks_for_more_than_the_weights_hold_is_refused_at_once(folder):
    config = folder / "draft/config.json"
    text = config.read_text()
    for name in ("num_hidden_layers", "vocab_size", "hidden_size"):
        config.write_text(re.sub(rf'"{name}": \d+', f'"{name}": 1000000007', text))
        refused(folder, f"{config}: {name} is 1000000007, and the weights beside it are", "draft")
