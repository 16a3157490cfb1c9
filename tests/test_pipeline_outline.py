"""What is known of a pipeline before its weights load."""

import pytest
import torch
from tiny_pipelines import CALL, PIPELINES
from transformers import PreTrainedTokenizerBase

from sysdag.components import Diffusion


@pytest.mark.parametrize("name", ["sd15", "flux-dev", "wan"])
def test_sizes_and_weights_are_known_from_configs(name, tmp_path):
    PIPELINES[name]().save_pretrained(tmp_path)
    component = Diffusion(tmp_path, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}))
    positions = component.tokens_of_any_draw()
    one, two = (
        component.footprint(tokens=count * positions, labels=1, trains=True, checkpoints=False, device="cpu")
        for count in (1, 2)
    )
    assert component._pipeline is None
    draw = component.sample(["a dark square"], generator=torch.Generator().manual_seed(0))
    assert component.token_counts(draw) == [positions]
    assert one.weights == sum(p.numel() * p.element_size() for p in component.module.parameters())
    assert one.trained == sum(p.numel() * p.element_size() for p in component.pipeline.denoiser.parameters())
    # Each draw more saves as much: nearly twice for two, little of it shared.
    assert 1.8 * one.graph < two.graph < 2.05 * one.graph


def test_a_model_that_looks_at_its_numbers_is_not_known_before_it_runs(tmp_path):
    PIPELINES["lumina2"]().save_pretrained(tmp_path)
    component = Diffusion(tmp_path, pipeline_kwargs=CALL.get("lumina2", {}))
    assert component.tokens_of_any_draw() is None
    assert component.footprint(tokens=64, labels=1, trains=True, checkpoints=False, device="cpu") is None


@pytest.mark.parametrize(("name", "most"), [("sd15", 16), ("sd3", 16), ("z-image", 48)])
def test_tokens_of_a_prompt_that_no_text_encoder_sees_are_counted_before_and_after_loading(name, most, tmp_path):
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path)
    component = Diffusion(tmp_path, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}))
    prompt = "a dark square " * 30
    tokenizers = [part for part in pipe.components.values() if isinstance(part, PreTrainedTokenizerBase)]
    text = prompt
    if name == "z-image":  # its prompts go through a chat template
        message = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        text = pipe.tokenizer.apply_chat_template(message, **options)
    lost = min(len(tokenizer(text)["input_ids"]) - most for tokenizer in tokenizers)
    assert component.cut_from("a dark square") == 0
    assert component.cut_from(prompt) == (lost if name != "sd3" else len(pipe.tokenizer(prompt)["input_ids"]) - 16)
    assert component._pipeline is None
    loaded = Diffusion(tmp_path, num_inference_steps=2, pipeline_kwargs=CALL.get(name, {}))
    assert loaded.module is not None
    assert loaded.cut_from(prompt) == component.cut_from(prompt)
