"""Saved `Diffusion` components: bit by bit, each part by its own library, and no code of the folder's choosing."""

import copy
import functools
import json
import re
import shutil

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_diffusion import (
    HOOKED,
    LORA,
    Diffusion,
    T,
    autoencoder,
    dit,
    drift,
    from_text,
    from_vectors,
    images,
    latents_of,
    pixart,
    plain_unet,
    pooled,
    scheduler_of,
    sd3,
    seed,
    t5,
    text_unet,
    unmasked_unet,
    vectors,
    word_tokenizer,
)
from transformers import CLIPTextModel

from sysdag.errors import PlanError, SerializationError, SysdagError

SAVED = {
    "text": (lambda: from_text(vae=autoencoder(), guidance_scale=2.0), ["dark", "a light circle"]),
    "lora": (lambda: from_text(peft_config=LoraConfig(**LORA), convention="diffusion-dpo"), ["dark", "light"]),
    "lora and text encoder": (
        lambda: from_text(peft_config=LoraConfig(**LORA), train_text_encoder=True, max_text_length=4),
        ["dark", "light"],
    ),
    "labels": (lambda: Diffusion(dit(), scheduler=scheduler_of("v_prediction"), num_noise_draws=2), [1, 4]),
    "pixart": (
        lambda: Diffusion(pixart(), scheduler=scheduler_of("epsilon"), text_encoder=t5(), tokenizer=word_tokenizer()),
        ["dark", "a light circle"],
    ),
    "unconditional": (
        lambda: Diffusion(plain_unet(), scheduler=scheduler_of("sample"), sample_shape=(1, 8, 4), batch_size=3),
        [None] * 2,
    ),
    "hook": (lambda: HOOKED, [0.5, 2.0]),
    "half": (
        lambda: Diffusion(
            text_unet().to(torch.bfloat16), scheduler=scheduler_of("epsilon"), peft_config=LoraConfig(**LORA)
        ),
        vectors(2),
    ),
}  # fmt: skip


def assert_same_tensors(one, other):
    """Both modules hold bit-identical tensors, adapters' names aside."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", SAVED)
def test_saved_component_comes_back_bit_by_bit(name, tmp_path):
    make, inputs = SAVED[name]
    component = make()
    drift(component.module, size=0.02)
    options = json.loads(json.dumps(component.save_pretrained(tmp_path)))
    assert not list(tmp_path.rglob("*.bin"))
    loaded = Diffusion.from_pretrained(tmp_path, options)
    assert loaded._pipeline is None  # nothing is read before it is needed
    assert_same_tensors(component.module, loaded.module)
    for one, other in zip(component.module.parameters(), loaded.module.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    draws = component.sample(inputs, generator=seed(0))
    assert torch.equal(latents_of(draws), latents_of(loaded.sample(inputs, generator=seed(0))))
    noise = component.noise(draws, seed(1))
    assert torch.equal(component.score(inputs, draws, noise), loaded.score(inputs, draws, noise))
    assert loaded.save_pretrained(tmp_path / "again") == options | {"sample_shape": component._sample_shape}


@pytest.mark.parametrize("name", SAVED)
def test_load_weights_puts_every_tensor_back_in_place(name, tmp_path):
    component = SAVED[name][0]()
    drift(component.module, size=0.02)
    before = copy.deepcopy(component.module.state_dict())
    places = {key: tensor.data_ptr() for key, tensor in component.module.state_dict().items()}
    component.save_pretrained(tmp_path)
    with torch.no_grad():
        for tensor in component.module.state_dict().values():
            tensor.add_(1)
    component.load_weights(tmp_path)
    after = component.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert places == {key: tensor.data_ptr() for key, tensor in after.items()}


def test_each_folder_is_loaded_by_its_own_library(tmp_path):
    component = from_text(vae=autoencoder(), peft_config=LoraConfig(**LORA))
    drift(component.module)
    component.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", use_safetensors=True)
    assert_same_tensors(unet, text_unet())
    assert_same_tensors(AutoencoderKL.from_pretrained(tmp_path / "vae"), component.module["vae"])
    assert_same_tensors(CLIPTextModel.from_pretrained(tmp_path / "text_encoder"), component.module["text_encoder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer("a dark square")["input_ids"] == [3, 4, 6]
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.num_train_timesteps == T

    adapted = PeftModel.from_pretrained(unet, tmp_path / "adapter")
    x, t, states = torch.randn(2, 1, 8, 8), torch.tensor([3, 7]), torch.randn(2, 1, 8)
    with torch.no_grad():
        ours = component.module["denoiser"](x, t, states).sample
        torch.testing.assert_close(adapted(x, t, states).sample, ours)
        with adapted.disable_adapter():
            assert (adapted(x, t, states).sample - ours).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("component", "pipeline"),
    [
        (lambda: from_text(vae=autoencoder(shift_factor=None)), "StableDiffusionPipeline"),
        (lambda: Diffusion(plain_unet(), scheduler=scheduler_of("epsilon")), "DDPMPipeline"),
    ],
)
def test_parts_of_a_known_pipeline_load_as_one(component, pipeline, tmp_path):
    component().save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert type(pipe).__name__ == pipeline
    assert_same_tensors(pipe.unet, component().module["denoiser"])


def test_a_pipeline_folder_is_a_model(tmp_path):
    component = from_text(vae=autoencoder())
    component.save_pretrained(tmp_path)
    with_index = Diffusion(str(tmp_path), num_inference_steps=4, guidance_scale=1.0)
    assert repr(with_index) == f"Diffusion('{tmp_path}', steps=4, guidance=1, scale=sysdpo)"
    (copied := tmp_path / "copied").mkdir()
    for part in ("unet", "scheduler", "text_encoder", "tokenizer", "vae"):
        (tmp_path / part).rename(copied / part)
    without_index = Diffusion(copied, num_inference_steps=4, guidance_scale=1.0)
    assert not without_index.is_whole
    (copied / "model_index.json").write_text((tmp_path / "model_index.json").read_text())
    with_index._source = copied
    expected = latents_of(component.sample(["dark"], generator=seed(0)))
    for loaded in (with_index, without_index):
        # Some processors' convolutions round by where in memory their weights lie.
        found = latents_of(loaded.sample(["dark"], generator=seed(0)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert loaded.pipeline.parts.keys() == component.pipeline.parts.keys()
    replaced = Diffusion(copied, scheduler=DDPMScheduler(num_train_timesteps=T), peft_config=LoraConfig(**LORA))
    assert isinstance(replaced.pipeline.parts["scheduler"], DDPMScheduler)
    assert all("lora_" in name for name, p in replaced.module.named_parameters() if p.requires_grad)
    half = Diffusion(copied, dtype=torch.float16)
    assert {p.dtype for p in half.module.parameters()} == {torch.float16}


def test_a_folder_with_an_adapter_continues_it(tmp_path):
    component = from_text(peft_config=LoraConfig(**LORA))
    drift(component.module)
    component.save_pretrained(tmp_path)
    loaded = Diffusion(tmp_path, num_inference_steps=4)
    assert_same_tensors(component.module, loaded.module)
    draws = component.observe(images(1))
    noise = component.noise(draws, seed(0))
    reference = loaded.reference()
    # Some processors' convolutions round by where in memory their weights lie.
    expected = component.score(["dark"], draws, noise)
    torch.testing.assert_close(reference.score(["dark"], draws, noise), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(PlanError, match="holds an adapter; leave peft_config out"):
        Diffusion(tmp_path, peft_config=LoraConfig(**LORA)).module


def test_an_adapter_that_peft_saved_is_trained_further(tmp_path):
    Diffusion(text_unet(), scheduler=scheduler_of("epsilon")).save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    adapted = get_peft_model(text_unet(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["inference_mode"]
    component = Diffusion(tmp_path)
    trained = [name for name, p in component.module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    x, t, states = torch.randn(2, 1, 8, 8), torch.tensor([3, 7]), torch.randn(2, 1, 8)
    with torch.no_grad():
        ours = component.module["denoiser"](x, t, states).sample
        torch.testing.assert_close(ours, adapted(x, t, states).sample)


def test_an_adapter_kept_in_another_dtype_than_its_base_comes_back_in_it(tmp_path):
    def make():
        return from_vectors(peft_config=LoraConfig(**LORA))

    component = make()
    component.module.to(torch.bfloat16)
    for name, parameter in component.module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    drift(component.module)
    options = component.save_pretrained(tmp_path)
    assert_same_tensors(Diffusion.from_pretrained(tmp_path, options).module, component.module)
    other = make()
    other.module.to(torch.bfloat16)
    other.load_weights(tmp_path)
    assert_same_tensors(other.module, component.module)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(PlanError, match=r"is no pipeline folder: expected .*scheduler/.*found \['unet'\]"):
        Diffusion(tmp_path).module


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_weight_that_a_part_lacks_is_not_drawn_at_random(tmp_path, part, whole):
    from_text(vae=autoencoder()).save_pretrained(tmp_path)
    if not whole:
        (tmp_path / "model_index.json").unlink()
    [file] = (tmp_path / part).glob("*.safetensors")
    weights = load_file(file)
    lacking = sorted(name for name in weights if name.endswith(".weight"))[0]
    save_file({name: tensor for name, tensor in weights.items() if name != lacking}, file, metadata={"format": "pt"})
    with pytest.raises(SysdagError, match=rf"weight '{re.escape(lacking)}'"):
        Diffusion(tmp_path, num_inference_steps=4, guidance_scale=1.0).module


@pytest.mark.parametrize("lora", [LoraConfig(**LORA), None], ids=["lora", "full"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_saved_as_the_one_inside(tmp_path, whole, lora):
    from_text(vae=autoencoder()).save_pretrained(tmp_path)
    if whole:
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
        pipe.unet, pipe.vae = (torch.compile(part, backend="eager") for part in (pipe.unet, pipe.vae))
        component = Diffusion(pipe, peft_config=lora)
    else:
        unet = torch.compile(text_unet(), backend="eager")
        component = Diffusion(unet, scheduler=scheduler_of("epsilon"), peft_config=lora)
    drift(component.module)
    kept = component.save_pretrained(tmp_path / "saved")
    assert_same_tensors(Diffusion.from_pretrained(tmp_path / "saved", kept).module, component.module)
    for file in (tmp_path / "saved").rglob("*.safetensors"):
        assert not [name for name in load_file(file) if "_orig_mod" in name]


def test_pickled_weights_are_not_read(tmp_path):
    component = Diffusion(plain_unet(), scheduler=scheduler_of("epsilon"))
    options = component.save_pretrained(tmp_path)
    weights = component.module["denoiser"].state_dict()
    torch.save(weights, tmp_path / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        Diffusion.from_pretrained(tmp_path, options).module


@pytest.mark.parametrize(
    "entry", [{"library": "os", "class": "system"}, {"library": "diffusers", "class": "utils"},
              {"library": "transformers", "class": "NoSuchModel"}],
)  # fmt: skip
def test_classes_come_from_diffusers_and_transformers_only(entry, tmp_path):
    options = dict(Diffusion(plain_unet(), scheduler=scheduler_of("epsilon")).save_pretrained(tmp_path))
    options["parts"] = options["parts"] | {"unet": entry}
    with pytest.raises(SerializationError, match="only classes of diffusers and transformers"):
        Diffusion.from_pretrained(tmp_path, options).module


def test_a_part_of_another_class_is_not_saved(tmp_path):
    component = Diffusion(unmasked_unet(), scheduler=scheduler_of("epsilon"))
    with pytest.raises(SerializationError, match="is 'Unmasked' of 'tiny_diffusion'"):
        component.save_pretrained(tmp_path)


def undeclared(inputs):
    return pooled(inputs)


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda inputs: pooled(inputs), "must be a function at the top level"),
        (functools.partial(pooled), "must be a function at the top level"),
        (undeclared, r"gives no such function to a component\. Make the node, @node\(\.\.\.\(condition=undeclared\)\)"),
    ],
)
def test_a_hook_that_could_not_be_found_again_is_not_saved(hook, message, tmp_path):
    component = Diffusion(sd3(), scheduler=scheduler_of("flow"), condition=hook)
    with pytest.raises(SerializationError, match=message):
        component.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"path": "os:system", "source_sha256": None}, "os gives no such function to a component"),
        ({"path": "subprocess:call", "source_sha256": None}, "subprocess gives no such function"),
        ({"path": "no_such_module:f", "source_sha256": None}, "cannot be imported"),
        ({"path": "tiny_diffusion:nothing", "source_sha256": None}, "gives no such function"),
        ({"path": "tiny_diffusion:pooled", "source_sha256": "0"}, "changed since"),
    ],
)
def test_a_saved_hook_cannot_name_any_function(saved, message, tmp_path):
    options = dict(HOOKED.save_pretrained(tmp_path)) | {"condition": saved}
    with pytest.raises(SerializationError, match=message):
        Diffusion.from_pretrained(tmp_path, options)


def test_folders_and_options_that_do_not_fit_are_named(tmp_path):
    plain = Diffusion(plain_unet(), scheduler=scheduler_of("epsilon"))
    options = dict(plain.save_pretrained(tmp_path / "plain"))
    with pytest.raises(SerializationError, match=r"\['surprise'\] are unknown or missing"):
        Diffusion.from_pretrained(tmp_path / "plain", options | {"surprise": 1})
    with pytest.raises(SerializationError, match=r"\['convention'\] are unknown or missing"):
        Diffusion.from_pretrained(tmp_path / "plain", {k: v for k, v in options.items() if k != "convention"})
    with pytest.raises(SerializationError, match=r"lacks \['unet', 'scheduler'\]|lacks \['scheduler', 'unet'\]"):
        Diffusion.from_pretrained(tmp_path, options)
    with pytest.raises(SerializationError, match=r"lacks \['adapter'\]"):
        Diffusion.from_pretrained(tmp_path / "plain", options | {"adapter": True})
    other = Diffusion(plain_unet(block_out_channels=(8, 16)), scheduler=scheduler_of("epsilon"))
    with pytest.raises(SerializationError, match=r"other weights than this model: \d+ tensors differ"):
        other.load_weights(tmp_path / "plain")
    adapted = Diffusion(
        plain_unet(), scheduler=scheduler_of("epsilon"), peft_config=LoraConfig(r=2, target_modules=["conv1"])
    )
    with pytest.raises(SerializationError, match="holds no adapter, but the component has one"):
        adapted.load_weights(tmp_path / "plain")
    adapted_options = adapted.save_pretrained(tmp_path / "adapted")
    with pytest.raises(SerializationError, match="holds an adapter, but the component has none"):
        plain.load_weights(tmp_path / "adapted")
    shutil.copytree(tmp_path / "adapted", tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "adapter")
    with pytest.raises(SerializationError, match=r"lacks \['adapter'\]"):
        Diffusion.from_pretrained(tmp_path / "torn", adapted_options)
    wider = Diffusion(
        plain_unet(), scheduler=scheduler_of("epsilon"), peft_config=LoraConfig(r=3, target_modules=["conv1"])
    )
    with pytest.raises(SerializationError, match=r"lora_A.weight' \(expected shape \(3, 8, 3, 3\), got \(2, 8, 3, 3\)"):
        wider.load_weights(tmp_path / "adapted")
    with pytest.raises(SerializationError, match="is a reference; save the component"):
        plain.reference().save_pretrained(tmp_path / "reference")
    with pytest.raises(SerializationError, match=r"lacks the subfolder '(text_encoder|unet)'"):
        from_text().load_weights(tmp_path / "nowhere")


def test_an_adapter_that_the_denoisers_own_method_put_on_is_adopted(tmp_path):
    component = from_text()
    unet = component.pipeline.denoiser
    unet.add_adapter(LoraConfig(**LORA), "mine")
    component = from_text(unet)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert len(component.own_parameters()) == len(trained) > 0
    with torch.no_grad():
        for parameter in component.own_parameters().values():
            parameter.normal_(0, 0.3)
    draws = component.observe(images(2))
    noise = component.noise(draws, torch.Generator().manual_seed(0))
    expected = component.score(["dark", "light"], draws, noise)
    loaded = Diffusion.from_pretrained(tmp_path, component.save_pretrained(tmp_path))
    assert torch.equal(loaded.score(["dark", "light"], draws, noise), expected)
    plain = PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), tmp_path / "adapter")
    for name, parameter in component.own_parameters().items():
        key = "base_model.model." + name.removeprefix("denoiser.").replace(".weight", ".default.weight")
        assert torch.equal(plain.get_parameter(key), parameter)


def test_an_adapter_on_another_part_is_refused_by_name():
    component = from_text()
    encoder = component.pipeline.parts["text_encoder"]
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    with pytest.raises(PlanError, match=r"The text_encoder \(CLIPTextModel\) carries the adapters \['mine'\]"):
        component.__class__(
            text_unet(), scheduler=scheduler_of("epsilon"), text_encoder=encoder, tokenizer=word_tokenizer()
        ).module


@pytest.mark.parametrize("half", ["bf16", torch.float16])
def test_an_adapter_on_a_half_precision_denoiser_is_fp32_as_pefts(tmp_path, half):
    from_text().save_pretrained(tmp_path)
    component = Diffusion(tmp_path, dtype=half, peft_config=LoraConfig(**LORA))
    dtype = torch.bfloat16 if half == "bf16" else half
    assert component.pipeline.denoiser.dtype == dtype
    truth = get_peft_model(text_unet().to(dtype), LoraConfig(**LORA))
    expected = {parameter.dtype for parameter in truth.parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in component.own_parameters().values()} == expected == {torch.float32}


def test_a_half_precision_text_encoder_that_trains_is_fp32_unless_asked_for(tmp_path):
    component = from_text()
    component.pipeline.parts["text_encoder"].to(torch.bfloat16)
    component.save_pretrained(tmp_path)
    dtypes = {}
    for dtype, trains in ((None, False), (None, True), ("bf16", True)):
        loaded = Diffusion(tmp_path, dtype=dtype, train_text_encoder=trains)
        estimated = loaded.footprint(tokens=64, labels=0, trains=trains, checkpoints=False, device="cpu")
        if trains:
            loaded.prepare_training()
        dtypes[dtype, trains] = loaded.pipeline.parts["text_encoder"].dtype
        assert estimated.weights == sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    assert list(dtypes.values()) == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_two_adapters_on_one_named_pipeline_load_it_once(tmp_path):
    from_text().save_pretrained(tmp_path)
    parts = [Diffusion(tmp_path, peft_config=LoraConfig(**LORA)) for _ in range(2)]
    parts[1].share_base(parts[:1])
    apart = Diffusion(tmp_path, peft_config=LoraConfig(**LORA), dtype="bf16")
    apart.share_base(parts)
    assert parts[0].base_key == parts[1].base_key != apart.base_key
    assert parts[0].pipeline.denoiser is parts[1].pipeline.denoiser
    assert parts[0].pipeline.adapter != parts[1].pipeline.adapter
    assert apart.pipeline.denoiser is not parts[0].pipeline.denoiser
