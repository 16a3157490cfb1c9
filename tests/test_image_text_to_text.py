"""`ImageTextToText` against transformers' own forwards and `generate`, on tiny models of four families."""

import copy

import pytest
import tiny_tokenizers
import torch
from peft import LoraConfig
from PIL import Image
from tiny import char_tokenizer, llama
from tiny_vision import FAMILIES, FURTHER, build, picture, shared

from sysdag.components import CausalLM, ImageTextToText
from sysdag.components.language.vision.prompt_images import ImageProcessing
from sysdag.errors import DataError, PlanError

TEXT = "a red cube on the white room"


def asked(*images, text=TEXT, key="image"):
    parts = [{"type": "image", key: image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# Of several sizes, and several numbers of images a row; two share all but the end, two share an image, one has none.
PROMPTS = [
    asked(picture(0), picture(1, 20, 50)),
    asked(picture(2, 16, 16)),
    asked(),
    asked(picture(0), picture(1, 20, 50), text="a dark friend"),
    asked(picture(0)),
    asked(picture(0), picture(1, 20, 50)),
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def component(family, **options):
    return ImageTextToText(*shared(family), max_new_tokens=6, **options)


def of_processor(family, prompt, completion=()):
    """What transformers makes of a prompt, with the ids of a completion behind it."""
    made = shared(family)[1].apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = torch.tensor([list(completion)], dtype=torch.long)
    found = dict(made)
    found["input_ids"] = torch.cat([made["input_ids"], ids], 1)
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    for name in {"token_type_ids", "mm_token_type_ids"} & found.keys():
        found[name] = torch.cat([made[name], torch.zeros_like(ids)], 1)
    return found


def by_hand(family, prompt, completion):
    """The log-probability of a completion's ids, by a forward of transformers on it alone."""
    logits = shared(family)[0](**of_processor(family, prompt, completion)).logits[0, -len(completion) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


def test_prompts_have_the_processors_ids(family):
    node = component(family)
    for prompt, ids in zip(PROMPTS, node.prompt_ids(PROMPTS), strict=True):
        assert node.lm.processing.plain(ids) == of_processor(family, prompt)["input_ids"][0].tolist()


def test_prompts_have_the_room_of_the_language_model(family):
    node = component(family)
    assert node.max_length == 512
    turns = [*asked(picture(0), text="two words"), {"role": "assistant", "content": "a"}, *asked(text="a cube")]
    [whole], [rest] = node.prompt_ids([turns]), node.prompt_ids([turns[-1:]])
    short = component(family, max_length=len(whole) + node.max_new_tokens - 1)
    assert short.prompt_ids([turns]) == [rest]  # without the turn that its image is in
    with pytest.raises(DataError, match="too long"):
        component(family, max_length=16).prompt_ids([asked(picture(0), text="two words")])


def test_an_answer_that_is_begun_is_gone_on_with(family):
    node = component(family)
    begun = [*PROMPTS[0], {"role": "assistant", "content": "a dark"}]
    parts = [*PROMPTS[0], {"role": "assistant", "content": [{"type": "text", "text": "a dark"}]}]
    want = shared(family)[1].apply_chat_template(parts, continue_final_message=True, tokenize=True)[0]
    assert node.lm.processing.plain(node.prompt_ids([begun])[0]) == list(want)


def test_a_tokenizers_beginning_stands_in_front_as_processors_have_it():
    model, processor = shared("llava")
    processor = copy.deepcopy(processor)
    processor.tokenizer = tiny_tokenizers.llama(extra_special_tokens=["<image>"])
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model = copy.deepcopy(model)
    model.config.image_token_index = processor.image_token_id
    for template in (processor.chat_template, "{{ bos_token }}" + processor.chat_template):
        processor.chat_template = template
        node = ImageTextToText(model, processor)
        for prompt in PROMPTS[1:3]:
            want = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)[0]
            [ids] = node._encoder()([prompt])
            assert node.lm.processing.plain(ids.ids) == list(want)
            assert ids.ids.count(processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *FURTHER])
def test_scores_are_those_of_the_models_own_forward(family, packs):
    node = component(family, pack_prefixes=packs)
    draws = node.in_context(PROMPTS, node.observe(["a red cube", "dark", "two words", "", "friend", "old friend"]))
    got = node.log_prob(PROMPTS, draws)
    want = torch.stack(
        [by_hand(family, prompt, draw.record["token_ids"]) for prompt, draw in zip(PROMPTS, draws, strict=True)]
    )
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    assert node._scorer._packs == (packs and family != "gemma3")
    # Its vision tower is reached by the same gradient.
    weight = next(each for name, each in shared(family)[0].named_parameters() if "vision" in name or "visual" in name)
    wanted, found = (torch.autograd.grad(value.sum(), weight)[0] for value in (want, got))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("begin", [None, " ".join([TEXT] * 3)], ids=["apart", "alike"])
def test_greedy_decoding_is_generates(family, begin):
    """Also behind a text that all prompts begin with, which is read once, before their images."""
    node = component(family, top_k=1)
    model = shared(family)[0]
    before = [] if begin is None else [{"role": "system", "content": [{"type": "text", "text": begin}]}]
    prompts = [[*before, *prompt] for prompt in PROMPTS]
    for prompt, draw in zip(prompts, node.sample(prompts), strict=True):
        inputs = of_processor(family, prompt)
        want = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert draw.record["token_ids"] == want.tolist()


def test_rows_are_decoded_side_by_side_with_a_cache_and_what_is_not_shared_is_said_once(family, caplog):
    model, processor = build(family, seed=1)
    for _ in range(2):
        node = ImageTextToText(model, processor, max_new_tokens=3)
        with torch.no_grad():
            node.log_prob(PROMPTS, node.sample(PROMPTS, generator=range(6)))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sysdag")]
    assert len(said) == (family == "gemma3"), said
    assert all("computes shared prefixes for each sequence anew" in text for text in said)


def test_a_search_of_one_beam_is_greedy_and_its_candidates_are_scored_as_they_are(family):
    node = component(family)
    greedy = component(family, top_k=1).sample(PROMPTS)
    found = node.search(PROMPTS, 1, 0.0)
    assert [one.record["token_ids"] for [one] in found] == [draw.record["token_ids"] for draw in greedy]
    several = node.search(PROMPTS[:2], 3, 1.0)
    for prompt, draws in zip(PROMPTS, several, strict=False):
        assert len({tuple(draw.record["token_ids"]) for draw in draws}) == 3
        got = node.log_prob([prompt] * 3, draws)
        want = torch.stack([by_hand(family, prompt, draw.record["token_ids"]) for draw in draws])
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_a_draws_log_prob_is_its_score_and_depends_on_no_other_row(family):
    node = component(family)
    seeds = list(range(len(PROMPTS)))
    draws = node.sample(PROMPTS, generator=seeds)
    drawn = torch.tensor([draw.log_prob for draw in draws])
    torch.testing.assert_close(node.log_prob(PROMPTS, draws).detach(), drawn, rtol=2e-5, atol=2e-5)
    [alone] = node.sample(PROMPTS[4:5], generator=seeds[4:5])
    assert alone.record == draws[4].record


@pytest.mark.parametrize("packs", [False, True])
def test_a_placeholder_that_the_model_wrote_is_a_token_like_others(family, packs):
    """Scored as decoding has it: fed back by its embedding, with no image of its own."""
    model = shared(family)[0]
    node = component(family, pack_prefixes=packs)
    placeholder = node.lm.processing.image_token
    ids = [40, placeholder, 41, placeholder, 42]
    draws = [node._completer().draw(ids, None)] * 3
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    inputs = of_processor(family, PROMPTS[0])
    output = model(**inputs, use_cache=True)
    total = torch.zeros(())
    for place, token in enumerate(ids):
        total = total + output.logits[0, -1].log_softmax(-1)[token]
        length = inputs["input_ids"].shape[1] + place + 1
        position = length - 1 + int(getattr(model.model, "rope_deltas", 0))
        output = model(
            input_ids=torch.tensor([[token]]),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            position_ids=torch.full((3, 1, 1) if family == "qwen2_vl" else (1, 1), position),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(node.log_prob(prompts, draws)[:2], total.expand(2), rtol=2e-5, atol=2e-5)


def test_what_a_message_spells_is_text(family):
    node = component(family)
    placeholder = node.tokenizer.convert_ids_to_tokens(node.lm.processing.image_token)
    boi = getattr(node.tokenizer, "boi_token", placeholder)
    end = node.tokenizer.eos_token
    text = f"say {end} and {placeholder} or {boi} and 3"
    [ids] = node.prompt_ids([asked(picture(0), text=text)])
    [plain] = node.prompt_ids([asked(picture(0), text="say and or and 3")])
    assert text in node.tokenizer.decode(node.lm.processing.plain(ids))
    for token in (node.tokenizer.eos_token_id, *{each for each in ids if each >= 1 << 61}):
        assert ids.count(token) == plain.count(token) or token >= 1 << 61
    assert sum(each >= 1 << 61 for each in ids) == sum(each >= 1 << 61 for each in plain)
    with torch.no_grad():
        assert node.log_prob([asked(picture(0), text=text)], node.observe(["cube"])).isfinite().all()


@torch.no_grad()
def test_images_are_read_once_beside_what_a_message_spells(family, monkeypatch):
    node = component(family)
    draws = node.observe(["cube"])
    node.log_prob([asked(picture(3))], draws)  # what is found out of a model is
    calls, processed = [], ImageProcessing._processed
    monkeypatch.setattr(ImageProcessing, "_processed", lambda self, *a: calls.append(a[0]) or processed(self, *a))
    placeholder = node.tokenizer.convert_ids_to_tokens(node.lm.processing.image_token)
    (message,) = asked(picture(5), text=f"a {placeholder} {node.tokenizer.eos_token}")
    node.log_prob([[message | {"content": message["content"][::-1]}]], draws)  # the text before its image
    assert calls
    assert len(calls) == len(set(calls))


def test_images_are_told_apart_by_their_pixels(tmp_path):
    image = picture(3)
    path = tmp_path / "image.png"
    image.save(path)
    node = component("smolvlm")
    forms = [image, image.copy(), path, str(path), path.read_bytes()]
    prompts = [*map(asked, forms), asked(str(path), key="path"), asked(picture(4))]
    with torch.no_grad():
        *same, other = node.log_prob(prompts, node.observe(["cube"] * len(prompts))).tolist()
    assert same == pytest.approx([same[0]] * len(same), abs=1e-5)
    assert abs(other - same[0]) > 1e-3
    picture(4).save(path)  # read anew, as it is now
    with torch.no_grad():
        [changed] = node.log_prob([asked(path)], node.observe(["cube"])).tolist()
    assert changed == pytest.approx(other, abs=1e-5)


@torch.no_grad()
def test_images_that_are_no_longer_held_are_read_again(monkeypatch):
    held = component("smolvlm")
    draws = held.sample(PROMPTS, generator=range(6))
    scores = held.log_prob(PROMPTS, draws)
    vision = "sysdag.components.language.vision"
    monkeypatch.setattr(f"{vision}.image_text_to_text._REMEMBERED", 1)
    monkeypatch.setattr(f"{vision}.prompt_images.HELD_BYTES", 0)
    monkeypatch.setattr(f"{vision}.prompt_images._LATEST", 1)
    node = component("smolvlm")
    torch.testing.assert_close(node.log_prob(PROMPTS, draws), scores)
    assert [draw.record for draw in node.sample(PROMPTS, generator=range(6))] == [draw.record for draw in draws]


def test_gray_and_turned_images_are_read_as_they_are_seen(tmp_path):
    node = component("llava")
    gray = picture(5).convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    picture(5).save(tmp_path / "turned.png", exif=turned)
    prompts = [
        asked(gray), asked(gray.convert("RGB")),
        asked(tmp_path / "turned.png"), asked(picture(5).transpose(Image.Transpose.ROTATE_270)),
    ]  # fmt: skip
    with torch.no_grad():
        found = node.log_prob(prompts, node.observe(["cube"] * 4))
    torch.testing.assert_close(found[::2], found[1::2])


WRONG = [
    ({"type": "video", "video": "film.mp4"}, "type 'video'"),
    ({"type": "audio", "audio": "sound.wav"}, "type 'audio'"),
    ({"type": "image", "url": "https://example.org/a.png"}, "not read from afar"),
    ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "not read from afar"),
    ({"type": "image"}, "holds one image"),
    ({"type": "image", "image": 3}, "expected a PIL image, a path or the bytes"),
    ({"type": "image", "image": "no-such-file.png"}, "no-such-file.png"),
    ({"type": "image", "image": b"no image"}, "cannot decode"),
    ({"type": "image", "image": Image.new("RGBA", (8, 8))}, "opaque"),
]


@pytest.mark.parametrize(("part", "says"), WRONG)
def test_what_is_no_image_is_refused_with_its_row(part, says):
    node = component("llava")
    wrong = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    with pytest.raises(DataError, match=says) as caught:
        node.prompt_ids([PROMPTS[1], wrong])
    assert caught.value.element == 1
    assert "ImageTextToText" in str(caught.value)


def test_a_template_that_leaves_an_image_or_a_text_out_is_refused():
    model, processor = shared("llava")
    processor = copy.deepcopy(processor)
    processor.chat_template = "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}"
    with pytest.raises(DataError, match="its processor refuses|none is left"):
        ImageTextToText(model, processor).prompt_ids([asked(picture(0))])
    processor.chat_template = "{% for m in messages %}<image>{{ m.content[-1].text }}{% endfor %}"
    two = [{"role": "user", "content": [{"type": "text", "text": "one"}, *asked(picture(0))[0]["content"]]}]
    with pytest.raises(DataError, match="leaves out 'content'"):
        ImageTextToText(model, processor).prompt_ids([two])


def test_a_text_prompt_may_not_spell_a_placeholder():
    node = component("llava")
    assert node.prompt_ids(["a red cube"])
    with pytest.raises(DataError, match="'<image>', which stands for an image, and no image"):
        node.prompt_ids(["<image> a red cube"])


def test_what_cannot_be_served_is_refused_by_name(tmp_path):
    model, processor = shared("qwen2_vl")
    with pytest.raises(PlanError, match="use ImageTextToText"):
        CausalLM(model, processor.tokenizer)
    with pytest.raises(PlanError, match="use CausalLM"):
        ImageTextToText(llama(), char_tokenizer())
    with pytest.raises(PlanError, match="pass its processor too"):
        ImageTextToText(model)
    with pytest.raises(PlanError, match="no tokenizer and image processor"):
        ImageTextToText(model, processor.tokenizer).prompt_ids(PROMPTS[:1])
    bare = copy.deepcopy(processor)
    bare.chat_template = bare.tokenizer.chat_template = None
    with pytest.raises(PlanError, match="has no chat template"):
        ImageTextToText(model, bare).prompt_ids(PROMPTS[:1])
    drawn = [{"role": "assistant", "content": [{"type": "image", "image": picture(0)}]}]
    with pytest.raises(DataError, match="parts of text alone"):
        component("llava").observe([drawn])


def test_a_processor_that_returns_more_is_refused_by_name():
    model, processor = shared("llava")

    class WithMask(type(processor)):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            found["cross_attention_mask"] = found["input_ids"]
            return found

    processor = copy.copy(processor)
    processor.__class__ = WithMask
    with pytest.raises(PlanError, match="returns 'cross_attention_mask', which is not served"):
        ImageTextToText(model, processor).prompt_ids(PROMPTS[:1])


def test_a_model_that_is_not_called_as_its_processor_has_it_is_refused(family, monkeypatch):
    """As one would be whose forward needs something that is not handed on."""
    model, processor = build(family)
    together = ImageProcessing.together
    monkeypatch.setattr(
        ImageProcessing, "together",
        lambda self, rows: {n: v * 0.5 if n == "pixel_values" else v for n, v in together(self, rows).items()},
    )  # fmt: skip
    node = ImageTextToText(model, processor)
    with pytest.raises(PlanError, match="needs more than is served.*differed"):
        node.log_prob(PROMPTS, node.observe(["cube"] * len(PROMPTS)))


def test_saved_it_opens_in_transformers_and_again(family, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    node = component(family, temperature=0.7)
    options = node.save_pretrained(tmp_path / "answer")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "answer")
    draws = node.observe(["a red cube"] * 2)
    with torch.no_grad():
        want = node.log_prob(PROMPTS[:2], draws)
        torch.testing.assert_close(ImageTextToText(plain, node.processor).log_prob(PROMPTS[:2], draws), want)
    if family == "qwen2_vl":
        return  # its processor's own class asks for torchvision to load
    processor = AutoProcessor.from_pretrained(tmp_path / "answer")
    again = ImageTextToText.from_pretrained(tmp_path / "answer", options)
    assert again.temperature == 0.7
    with torch.no_grad():
        torch.testing.assert_close(again.log_prob(PROMPTS[:2], draws), want)
        torch.testing.assert_close(ImageTextToText(plain, processor).log_prob(PROMPTS[:2], draws), want)
    assert again.reading() == node.reading()


def test_an_adapter_of_its_own_trains_and_is_saved(tmp_path):
    model, processor = build("smolvlm")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=r".*text_model.*(q_proj|v_proj)")
    node = ImageTextToText(str(tmp_path / "base"), peft_config=config, max_new_tokens=4)
    draws = node.observe(["a red cube"] * 2)
    reference = node.reference()
    node.log_prob(PROMPTS[:2], draws).sum().backward()
    with torch.no_grad():
        for name, parameter in node.own_parameters().items():
            assert "text_model" in name
            assert "lora_A" in name or parameter.grad.abs().max() > 0
            parameter.add_(0.1)
        moved = node.log_prob(PROMPTS[:2], draws)
        assert (reference.log_prob(PROMPTS[:2], draws) - moved).abs().min() > 1e-3
        again = ImageTextToText.from_pretrained(tmp_path / "saved", node.save_pretrained(tmp_path / "saved"))
        torch.testing.assert_close(again.log_prob(PROMPTS[:2], draws), moved)


@torch.no_grad()
@pytest.mark.parametrize("view", ["reference", "fresh"])
def test_a_view_that_is_made_before_any_image_is_read_leaves_its_component_its_own(view, tmp_path):
    model, processor = build("smolvlm")
    for each in (model, processor):
        each.save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=r".*text_model.*(q_proj|v_proj)")
    node = ImageTextToText(str(tmp_path), peft_config=config, max_new_tokens=4)
    made = node.reference() if view == "reference" else node.fresh()
    if view == "fresh":
        made.share_base([node])
    draws = node.in_context([PROMPTS[1]], node.observe(["a red cube"]))
    for reader, seed in ((made, 1), (node, 2), (made, 2), (node, 1)):
        prompt = asked(picture(seed, 16, 16))
        want = by_hand("smolvlm", prompt, draws[0].record["token_ids"])
        torch.testing.assert_close(reader.log_prob([prompt], draws)[0], want, rtol=2e-5, atol=2e-5)
