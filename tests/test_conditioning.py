"""What a node's function returns, as keyword arguments of the denoiser: against models that are called by hand."""

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_diffusion import (
    Diffusion,
    T,
    dit,
    from_text,
    from_vectors,
    images,
    latents_of,
    pixart,
    plain_unet,
    scheduler_of,
    sd3,
    seed,
    start_noise,
    t5,
    text_unet,
    unmasked_unet,
    vectors,
    word_tokenizer,
)

from sysdag.components.diffusion.forward_process import DiffusionNoise
from sysdag.errors import DataError, PlanError
from sysdag.traces.cells import Draw


def scored_by_hand(component, draws, noise, **arguments):
    """The error of a model that was called directly."""
    scheduler = DDPMScheduler(num_train_timesteps=T)
    noisy = scheduler.add_noise(latents_of(draws), noise.eps, noise.timesteps)
    with torch.no_grad():
        prediction = component.module["denoiser"](noisy, timestep=noise.timesteps, **arguments).sample
    return (noise.eps - prediction[:, : noise.eps.shape[1]]).square().flatten(1).sum(1)


def check(component, inputs, **arguments):
    shape = component.sample_shape
    draws = [Draw(None, {"latents": x.numpy()}) for x in images(len(inputs), shape)]
    noise = component.noise(draws, seed(2))
    errors = component.errors(inputs, draws, noise)
    torch.testing.assert_close(errors, scored_by_hand(component, draws, noise, **arguments), rtol=1e-4, atol=1e-3)
    return errors


def test_text_is_encoded_each_by_itself_at_full_length():
    component = from_text()
    encoder = component.module["text_encoder"]
    ids = torch.tensor([[3, 4, 6, 0, 0, 0, 0, 0], [5] + [0] * 7])
    states = encoder(ids).last_hidden_state
    errors = check(component, ["a dark square", "light"], encoder_hidden_states=states)
    swapped = check(component, ["light", "a dark square"], encoder_hidden_states=states.flip(0))
    assert (errors - swapped).abs().min() > 1e-2


def test_padding_is_masked_where_asked_and_for_encoders_other_than_clip():
    tokenizer = word_tokenizer()
    mask = torch.tensor([[1, 1, 1] + [0] * 5, [1] + [0] * 7])
    ids = torch.tensor([[3, 4, 6, 0, 0, 0, 0, 0], [5] + [0] * 7])
    texts = ["a dark square", "light"]
    masked = from_text(mask_padding=True)
    states = masked.module["text_encoder"](ids, attention_mask=mask).last_hidden_state
    check(masked, texts, encoder_hidden_states=states, encoder_attention_mask=mask)

    model = pixart()
    parts = dict(scheduler=scheduler_of("epsilon"), text_encoder=t5(), tokenizer=tokenizer)
    component = Diffusion(model, **parts)
    states = parts["text_encoder"](ids, attention_mask=mask).last_hidden_state
    errors = check(component, texts, encoder_hidden_states=states, encoder_attention_mask=mask)
    longer = check(Diffusion(model, **parts, max_text_length=5), texts, encoder_hidden_states=states[:, :5],
                   encoder_attention_mask=mask[:, :5])  # fmt: skip
    torch.testing.assert_close(longer, errors, rtol=1e-4, atol=1e-3)
    unmasked = parts["text_encoder"](ids).last_hidden_state
    seen = check(Diffusion(model, **parts, mask_padding=False), texts, encoder_hidden_states=unmasked)
    assert (seen - errors).abs().max() > 1e-3


def test_long_texts_are_cut_and_said_so(caplog):
    component = from_text(max_text_length=2)
    states = component.module["text_encoder"](torch.tensor([[3, 4], [5, 0]])).last_hidden_state
    check(component, ["a dark square circle", "light"], encoder_hidden_states=states)
    assert "Text 0 was cut to 2 tokens" in caplog.text
    assert "Text 1" not in caplog.text


@pytest.mark.parametrize(
    "make",
    [torch.as_tensor, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: tuple(x.double().tolist())],
    ids=["tensor", "array", "list", "tuple"],
)
def test_vectors_in_any_form(make):
    inputs = vectors(3)
    check(from_vectors(), [make(x) for x in inputs], encoder_hidden_states=torch.stack(inputs)[:, None])


def test_sequences_of_vectors_of_different_lengths_are_masked():
    component = from_vectors()
    rows = [torch.randn(length, 8, generator=seed(length)) for length in (2, 4, 1)]
    draws = component.observe(images(3))
    noise = component.noise(draws, seed(0))
    together = component.errors(rows, draws, noise)
    for place, row in enumerate(rows):
        alone = component.errors([row], draws[place : place + 1], noise.select([place]))
        torch.testing.assert_close(together[place], alone[0], rtol=1e-4, atol=1e-3)
    check(component, [rows[0], rows[0] + 1], encoder_hidden_states=torch.stack([rows[0], rows[0] + 1]))
    plain = Diffusion(unmasked_unet(), scheduler=scheduler_of("epsilon"))
    with pytest.raises(DataError, match=r"takes no encoder_attention_mask.*expected 2 .* got 4") as caught:
        plain.score(rows, draws, noise)
    assert caught.value.element == 1


def test_class_labels_for_unets_and_transformers():
    labels = [2, numpy.int64(0), 3]
    tensor = torch.tensor([2, 0, 3])
    check(Diffusion(plain_unet(num_class_embeds=4), scheduler=scheduler_of("epsilon")), labels, class_labels=tensor)
    check(Diffusion(dit(), scheduler=scheduler_of("epsilon")), labels, class_labels=tensor)
    attending = Diffusion(text_unet(num_class_embeds=4), scheduler=scheduler_of("epsilon"))
    check(attending, labels, class_labels=tensor, encoder_hidden_states=torch.zeros(3, 1, 8))
    with_text = from_text(text_unet(num_class_embeds=4), scheduler=scheduler_of("epsilon"))
    empty = with_text.module["text_encoder"](torch.zeros(3, 8, dtype=torch.long)).last_hidden_state
    check(with_text, labels, class_labels=tensor, encoder_hidden_states=empty)


def test_none_is_unconditional():
    nothing = [None, None]
    check(Diffusion(plain_unet(), scheduler=scheduler_of("epsilon")), nothing)
    check(from_vectors(), nothing, encoder_hidden_states=torch.zeros(2, 1, 8))
    text = from_text(scheduler=scheduler_of("epsilon"))
    empty = text.module["text_encoder"](torch.zeros(2, 8, dtype=torch.long)).last_hidden_state
    check(text, nothing, encoder_hidden_states=empty)
    check(Diffusion(dit(), scheduler=scheduler_of("epsilon")), nothing, class_labels=torch.tensor([5, 5]))


def test_guidance_towards_vectors_and_labels_of_a_unet():
    unguided, guided = (from_vectors(num_inference_steps=1, guidance_scale=g) for g in (1.0, 4.0))
    zero = latents_of(unguided.sample([torch.zeros(8)] * 2, generator=seed(0)))
    with_condition = latents_of(unguided.sample(vectors(2), generator=seed(0)))
    drawn = latents_of(guided.sample(vectors(2), generator=seed(0)))
    assert (with_condition - zero).abs().max() > 1e-3
    assert (drawn - with_condition).abs().max() > 1e-3

    model, scheduler = plain_unet(num_class_embeds=4), DDIMScheduler(num_train_timesteps=T, clip_sample=False)
    component = Diffusion(model, scheduler=scheduler, num_inference_steps=1, guidance_scale=3.0, null_class=3)
    drawn = latents_of(component.sample([1], generator=seed(0)))
    start, _ = start_noise(1, (1, 8, 8))
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        one, none = (model(start, t, class_labels=torch.tensor([label])).sample for label in (1, 3))
        expected = scheduler.step(none + 3.0 * (one - none), t, start).prev_sample
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


def test_guidance_without_an_unconditional_form_is_refused():
    labels = Diffusion(plain_unet(num_class_embeds=4), scheduler=scheduler_of("epsilon"), guidance_scale=2.0)
    with pytest.raises(PlanError, match="null_class"):
        labels.sample([1])
    nothing = Diffusion(plain_unet(), scheduler=scheduler_of("epsilon"), guidance_scale=2.0)
    with pytest.raises(PlanError, match="needs conditioning"):
        nothing.sample([None])


def wrong_hook(inputs):
    return {"encoder_hidden_states": torch.zeros(1, 2, 8)}


@pytest.mark.parametrize(
    ("component", "inputs", "element", "message"),
    [
        (from_vectors, [torch.zeros(8), "dark"], 1, "one kind of conditioning .*, vector as in element 0, got text"),
        (from_vectors, [torch.zeros(8), None], 1, "got nothing"),
        (from_vectors, [{"a": 1}, "x"], 0, r"expected text \(str\), a float vector.*got dict"),
        (from_vectors, [torch.zeros(8), True], 1, "got bool True"),
        (from_vectors, [[[1.0, 2.0], [1.0]]], 0, "got list"),
        (from_vectors, [[1, 2, 3]], 0, "got list"),
        (from_vectors, [torch.tensor(1.0)], 0, "got Tensor"),
        (from_vectors, [1.5], 0, "got float 1.5"),
        (from_vectors, [torch.zeros(8), torch.zeros(9)], 1, r"D = 8, got shape \(9,\)"),
        (from_vectors, [torch.zeros(2, 2, 8)], 0, r"D = 8, got shape \(2, 2, 8\)"),
        (from_vectors, [torch.zeros(0, 8)], 0, r"got shape \(0, 8\)"),
        (from_vectors, ["dark"], 0, "without text_encoder and tokenizer"),
        (from_vectors, [3], 0, "has no classes; expected a float vector"),
        (from_text, [3], 0, "expected text or a float vector"),
        (lambda: Diffusion(plain_unet(), scheduler=scheduler_of("epsilon")), ["dark"], 0, "expected None"),
        (lambda: Diffusion(plain_unet(), scheduler=scheduler_of("epsilon")), [1], 0, "UNet2DModel has no classes"),
        (lambda: Diffusion(dit(), scheduler=scheduler_of("epsilon")), ["dark"], 0, r"class label \(int below 5\)"),
        (lambda: Diffusion(dit(), scheduler=scheduler_of("epsilon")), [1, 6], 1, r"class label in 0..4, got 6"),
        (lambda: Diffusion(dit(), scheduler=scheduler_of("epsilon")), [-1], 0, r"got -1"),
        (
            lambda: Diffusion(plain_unet(num_class_embeds=4), scheduler=scheduler_of("epsilon")), [None], 0,
            "takes a class label .*got nothing",
        ),
        (lambda: Diffusion(sd3(), scheduler=scheduler_of("flow")), [torch.zeros(8)], 0, "pass condition="),
    ],
)  # fmt: skip
def test_conditioning_errors_name_the_element(component, inputs, element, message):
    component = component()
    with pytest.raises(DataError, match=message) as caught:
        component.sample(inputs)
    assert caught.value.element == element
    draws = [Draw(None, {"latents": x.numpy()}) for x in images(len(inputs), component.sample_shape)]
    with pytest.raises(DataError, match=message):
        component.score(inputs, draws, component.noise(draws))


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda inputs: torch.zeros(2), "must return a dict"),
        (lambda inputs: {"prompt_embeds": torch.zeros(2, 8)}, r"made \['prompt_embeds'\], which SD3Transformer2DModel"),
        (wrong_hook, r"encoder_hidden_states of shape \(1, 2, 8\); its first axis must be the batch of 2"),
        (lambda inputs: {"joint_attention_kwargs": {"x": torch.zeros(3)}}, r"joint_attention_kwargs\['x'\]"),
    ],
)
def test_hook_errors_say_what_the_model_takes(hook, message):
    component = Diffusion(sd3(), scheduler=scheduler_of("flow"), condition=hook)
    with pytest.raises(PlanError, match=message):
        component.sample([1.0, 2.0])


def test_tokenizer_without_padding_is_refused():
    component = from_text(tokenizer=word_tokenizer(pad_token=None))
    with pytest.raises(PlanError, match=r"no padding token.*pad_token"):
        component.sample(["dark"])


def sdxl_condition(inputs):
    value = torch.tensor(inputs)[:, None]
    return {
        "encoder_hidden_states": value[:, None].expand(-1, 2, 8),
        "added_cond_kwargs": {"text_embeds": value.expand(-1, 4), "time_ids": value.expand(-1, 6)},
    }


def test_a_hook_may_make_nested_arguments_as_sdxl_takes_them():
    unet = text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=4 + 6 * 2
    )
    component = Diffusion(unet, scheduler=scheduler_of("epsilon"), condition=sdxl_condition, num_noise_draws=2)
    draws = component.observe(images(2))
    noise = component.noise(draws, seed(0))
    errors = component.errors([0.5, 2.0], draws, noise)
    for place in range(2):
        single = DiffusionNoise(noise.timesteps[place], noise.eps[place])
        twice = [draws[place]] * 2
        arguments = sdxl_condition([[0.5, 2.0][place]] * 2)
        by_hand = scored_by_hand(component, twice, single, **arguments).mean()
        torch.testing.assert_close(errors[place], by_hand, rtol=1e-4, atol=1e-3)
    with pytest.raises(DataError, match="pass condition="):
        Diffusion(unet, scheduler=scheduler_of("epsilon")).score([torch.zeros(8)] * 2, draws, noise)


def test_a_model_that_predicts_something_else_is_named():
    component = Diffusion(text_unet(in_channels=3), scheduler=scheduler_of("epsilon"))
    with pytest.raises(PlanError, match=r"UNet2DConditionModel made \(1, 1, 8, 8\) of samples \(1, 3, 8, 8\)"):
        component.sample(vectors(1))
