"""What a LoRA node saves is what diffusers' own `load_lora_weights` makes of the base pipeline, and peft's adapter."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from test_pipelines import REFUSED, pixels
from tiny_diffusion import drift
from tiny_pipelines import CALL, PIPELINES

from sysdag.components import Diffusion
from sysdag.components.diffusion.lora_file import FILE

PROMPT = "a dark square"
TARGETS = ["to_q", "to_v", "to_qkv_mlp_proj"]
LOADABLE = [name for name in PIPELINES if name not in REFUSED and hasattr(type(PIPELINES[name]()), "load_lora_weights")]
NOT_LOADABLE = ["pixart-sigma", "hunyuandit", "latte", "latent-diffusion"]
DENOISER_LOADS_NONE = ["kandinsky3"]


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
    drift(component.pipeline.denoiser, size=1.0)
    draw = component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0]
    return component, pixels(draw.value)


@pytest.mark.parametrize("name", [name for name in LOADABLE if name not in DENOISER_LOADS_NONE])
def test_the_base_with_the_file_is_the_trained_model(name, tmp_path):
    base = base_of(name, tmp_path / "base")
    component, image = trained(base, name, lora())
    component.save_pretrained(tmp_path / "out")
    pipe = opened(base)
    untrained = drawn_by(pipe, name)
    assert abs(untrained - image).max() > 4  # of 255 levels
    pipe.load_lora_weights(tmp_path / "out", weight_name=FILE)
    assert abs(drawn_by(pipe, name) - image).max() <= 1
