"""What users of diffusers do with LoRA before they hand a pipeline over: its own images, and those of its folder."""

import pytest
import torch
from peft import LoraConfig
from pipeline_checks import Model, handed_to_scheduler, pixels, target_of, unguided
from test_lora_pipelines import PROMPT, base_of, drawn_by, lora, opened
from tiny_pipelines import CALL

from sysdag import PlanError
from sysdag.components import Diffusion
from sysdag.components.diffusion.forward_process import ForwardProcess

FAMILIES = ("sd15", "flux-dev")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {name: base_of(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def with_lora(folder, names=("a",), *, text=False, **options):
    """A pipeline whose adapters, by these names, have been trained."""
    pipe = opened(folder)
    torch.manual_seed(3)
    for name in names:
        denoiser_of(pipe).add_adapter(lora(**options), adapter_name=name)
        if text:
            pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name=name)
    with torch.no_grad():
        for part in (denoiser_of(pipe), pipe.text_encoder):
            for name, parameter in part.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return pipe


def then(folder, *calls, names=("a",), **options):
    """The pipeline after these calls of it, each (method, arguments, options)."""
    pipe = with_lora(folder, names, **options)
    for method, *rest in calls:
        getattr(pipe, method)(*rest[0] if rest else (), **rest[1] if len(rest) > 1 else {})
    return pipe


FUSED = [("fuse_lora",), ("unload_lora_weights",)]
GIVEN = {
    "one": [],
    "one of two": [("set_adapters", ("b",))],
    "one of two deleted": [("delete_adapters", ("a",))],
    "fused": FUSED,
    "fused at a scale": [("fuse_lora", (), {"lora_scale": 0.4}), ("unload_lora_weights",)],
    "two fused at weights": [("set_adapters", (["a", "b"], [0.7, 0.3])), *FUSED],
    "fused and back": [("fuse_lora",), ("unfuse_lora",)],
    "unloaded": [("unload_lora_weights",)],
    "off and on": [("disable_lora",), ("enable_lora",)],
}


def names_of(case):
    return ("a", "b") if "two" in case else ("a",)


def image_of(component):
    return pixels(component.sample([PROMPT], generator=torch.Generator().manual_seed(5))[0].value)


@pytest.mark.parametrize(
    ("family", "case"),
    [*(("sd15", case) for case in GIVEN), ("flux-dev", "one of two"), ("flux-dev", "fused at a scale")],
)
def test_a_pipeline_is_taken_as_it_is_given(family, case, bases, tmp_path):
    pipe = then(bases[family], *GIVEN[case], names=names_of(case))
    check(pipe, family, tmp_path)


def check(pipe, family, folder):
    """Sampled, as its own reference, and from the folder it was saved to, it draws what it drew before."""
    wanted = drawn_by(pipe, family)
    component = Diffusion(pipe, num_inference_steps=2, pipeline_kwargs=CALL.get(family, {}))
    again = Diffusion.from_pretrained(folder, component.save_pretrained(folder))
    for each in (component, component.reference(), again):
        assert abs(image_of(each) - wanted).max() <= 1  # of 255 levels
    return component


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {
            "target_modules": ["to_k", "conv1", "time_emb_proj"],
            "rank_pattern": {"to_k": 1},
            "alpha_pattern": {"to_k": 1},
        },
    ],
    ids=["DoRA", "convolutions, patterns"],
)
def test_adapters_of_other_layers_are_taken_as_they_are(options, bases, tmp_path):
    check(with_lora(bases["sd15"], **options), "sd15", tmp_path)


def test_text_encoders_adapters_that_are_in_the_weights_are_of_the_pipeline(bases, tmp_path):
    check(then(bases["sd15"], *FUSED, text=True), "sd15", tmp_path)


def test_a_fused_pipeline_gets_an_adapter_of_its_own_and_is_saved_with_what_was_fused(bases, tmp_path):
    pipe = then(bases["flux-dev"], *FUSED)
    wanted = drawn_by(pipe, "flux-dev")
    component = Diffusion(pipe, peft_config=lora(), num_inference_steps=2, pipeline_kwargs=CALL["flux-dev"])
    again = Diffusion.from_pretrained(tmp_path, component.save_pretrained(tmp_path))
    for each in (component, again):
        assert abs(image_of(each) - wanted).max() <= 1
    assert all("lora_" in name for name in component.own_parameters())


BLOCKS = {"unet": {"down": 0.2, "mid": 0.5, "up": {"block_1": 0.1}}}
SCALED = "scale of the adapter 'a' was changed.*fuse_lora"
REFUSED = {
    "a weight": ([("set_adapters", ("a", 0.3))], SCALED),
    "weights of blocks": ([("set_adapters", ("a", BLOCKS))], SCALED),
    "two at once": ([("set_adapters", (["a", "b"], [0.7, 0.3]))], r"active adapters \['a', 'b'\]"),
    "switched off": ([("disable_lora",)], "are switched off"),
    "fused, not unloaded": ([("fuse_lora",)], "is merged into its weights"),
    "all deleted": ([("delete_adapters", ("a",))], "adapters were deleted.*unload_lora_weights"),
}


@pytest.mark.parametrize(
    ("family", "case"), [*(("sd15", case) for case in REFUSED), ("flux-dev", "a weight"), ("flux-dev", "all deleted")]
)
def test_a_pipeline_whose_folder_would_be_another_one_is_refused_by_name(family, case, bases):
    calls, message = REFUSED[case]
    pipe = then(bases[family], *calls, names=names_of(case))
    with pytest.raises(PlanError, match=message):
        Diffusion(pipe).sample([PROMPT])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "text_encoder.*carries the adapters"),
        ([("fuse_lora", (), {"components": ["text_encoder"]})], "text_encoder.*carries the adapters"),
        ([("delete_adapters", ("a",))], "adapters were deleted"),
    ],
    ids=["on it", "fused, not unloaded", "deleted"],
)
def test_adapters_of_a_text_encoder_that_would_be_lost_are_refused(calls, message, bases):
    with pytest.raises(PlanError, match=message):
        Diffusion(then(bases["sd15"], *calls, text=True)).sample([PROMPT])


def test_another_adapter_beside_one_that_was_brought_is_refused(bases):
    with pytest.raises(PlanError, match=r"already carries adapters \['a'\].*fuse_lora"):
        Diffusion(with_lora(bases["sd15"]), peft_config=lora()).sample([PROMPT])


def test_a_scale_of_the_call_draws_and_scores_at_that_scale(bases):
    options = {"cross_attention_kwargs": {"scale": 0.3}}
    pipe = with_lora(bases["sd15"])
    call = CALL.get("sd15", {}) | options
    component = Diffusion(with_lora(bases["sd15"]), num_inference_steps=2, pipeline_kwargs=call, convention="diffusers")
    seed = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(5)).item()
    own = Model("sd15", bases["sd15"], pipe, component).call(pipe, PROMPT, seed, **options)
    assert abs(pixels(own) - image_of(component)).max() <= 1
    draws = component.sample([PROMPT], generator=torch.Generator().manual_seed(5))
    noise = component.noise(draws, torch.Generator().manual_seed(4))
    process = ForwardProcess.of(pipe.scheduler)
    clean, eps, t = torch.from_numpy(draws[0].record["latents"]), noise.eps[0], noise.timesteps[0]
    alpha, sigma = process.alphas[t], process.sigmas[t]

    def error(**given):
        handed = handed_to_scheduler(
            pipe, PROMPT, alpha * clean + sigma * eps, process.model_times[t], None,
            **{"num_inference_steps": 2, **unguided("sd15")} | given,
        )  # fmt: skip
        return (target_of(process, clean, eps, alpha, sigma) - handed[: len(clean)]).square().mean()

    with torch.no_grad():
        found = component.score([PROMPT], draws, noise)[0]
        torch.testing.assert_close(found, -error(**options), rtol=2e-4, atol=1e-6)
        assert abs(found + error()) > 1e-3
