"""What `pipeline_kwargs` do to a call of the pipeline, held against that call; and what they may not."""

import pytest
import torch
from diffusers import DiffusionPipeline
from pipeline_checks import PROMPTS, pixels
from tiny_pipelines import CALL, PIPELINES

from sysdag.components import Diffusion
from sysdag.errors import PlanError

NEGATIVE = {"negative_prompt": "two red words", "guidance_scale": 4.0}
CASES = {
    "sd15": NEGATIVE,
    "sdxl": {**NEGATIVE, "prompt_2": "an old friend", "negative_prompt_2": "ugly"},
    "flux-dev": {"prompt_2": "an old friend", "negative_prompt": "two red words", "true_cfg_scale": 4.0},
    "qwen-image": {"negative_prompt": "two red words", "true_cfg_scale": 4.0},
    "z-image": NEGATIVE,
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_of_the_call_is_that_of_every_prompt(name, tmp_path):
    PIPELINES[name]().save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    own = CALL.get(name, {})
    call = {"num_inference_steps": 2, **own, **CASES[name]}
    drawn, plain = (
        Diffusion(tmp_path, num_inference_steps=2, pipeline_kwargs=options).sample(
            PROMPTS, generator=torch.Generator().manual_seed(3)
        )
        for options in ({**own, **CASES[name]}, own)
    )
    seeds = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(3)).tolist()
    for prompt, seed, draw, other in zip(PROMPTS, seeds, drawn, plain, strict=True):
        image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)[0][0]
        assert abs(pixels(draw.value) - pixels(image)).max() <= 2  # of 255 levels
        assert abs(pixels(draw.value) - pixels(other.value)).max() > 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "a dog"}, "'prompt'.*what the node's function returns"),
        ({"generator": torch.Generator()}, "'generator'.*seed"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "'latents'.*seed"),
        ({"output_type": "np"}, "'output_type'.*PIL"),
        ({"num_images_per_prompt": 2}, "'num_images_per_prompt'.*one"),
        ({"num_videos_per_prompt": 2}, "'num_videos_per_prompt'.*one"),
    ],
)
def test_what_the_component_gives_the_call_itself_is_refused(options, words):
    with pytest.raises(PlanError, match=f"pipeline_kwargs.*{words}"):
        Diffusion("a-folder", pipeline_kwargs=options)


@pytest.mark.parametrize("option", ["guidance_scale", "num_inference_steps"])
def test_an_option_that_is_given_twice_is_refused(option):
    with pytest.raises(PlanError, match=f"{option}=2 and pipeline_kwargs=.*'{option}': 3.*once"):
        Diffusion("a-folder", pipeline_kwargs={option: 3}, **{option: 2})
    Diffusion("a-folder", pipeline_kwargs={option: 3, "output_type": "pil"})


@pytest.mark.parametrize("scheduler", ["ddim", type("Loader", (), {})])
def test_a_scheduler_that_is_none_is_refused(scheduler):
    with pytest.raises(PlanError, match="scheduler.*of diffusers.*DDIMScheduler.*got"):
        Diffusion("a-folder", scheduler=scheduler)


@pytest.mark.parametrize("place", ["/no/such/pipeline", "./pipeline", "~/no/such"])
def test_a_folder_that_is_not_there_is_named(place):
    with pytest.raises(PlanError, match=rf"Diffusion\('{place}'.*there is no folder .*Hub id"):
        _ = Diffusion(place).module
