"""Estimates of memory against what was measured, and against the parameters themselves."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import choice_memory
import diffusion_memory
import peak_memory
import pytest
import torch
import vision_memory
from peft import LoraConfig, get_peft_model
from test_residence import is_present
from test_two_pass import gradients_of, make
from tiny import char_tokenizer, llama
from tiny_diffusion import clip, from_text, pooled, scheduler_of, sd3, text_unet, word_tokenizer
from tiny_sentences import bert
from tiny_vision import shared
from transformers import AutoModelForSequenceClassification, MistralConfig, MistralForCausalLM

from sysdag import Input, PlanError, System, node
from sysdag.components import BiEncoder, CausalLM, Choice, CrossEncoder, Diffusion, ImageTextToText, Tabular
from sysdag.components.component import Component
from sysdag.components.memory import PeakBytes, SavedBytes
from sysdag.data.encoding import encode_pairs
from sysdag.engine import kept_work
from sysdag.engine.kept_work import KeptGradient
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.ops import _dispatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import step, step_systems

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = {"node0": (256, 64), "node1": (320, 64, 256)}


measures = pytest.mark.skipif(
    sys.platform != "linux", reason="reads the high-water mark of resident memory as Linux keeps it"
)


@functools.cache
def plan_of(case):
    return step_systems.build(case)[0].compile()


@pytest.fixture(scope="module")
def measured(request):
    """The peak of each step that `peak_memory` takes, in bytes."""
    environment = os.environ | peak_memory.ENVIRONMENT
    command = [sys.executable, peak_memory.__file__]
    command += ["--by-the-benchmark"] * request.config.getoption("release")
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert ended.returncode == 0
    return json.loads(ended.stdout.splitlines()[-1])


@measures
@pytest.mark.skipif(_dispatch.why_absent("cpp") is not None, reason="the extension, whose tiles count, is not built")
@pytest.mark.slow
@pytest.mark.parametrize("key", peak_memory.LLMS)
def test_the_estimate_of_a_step_is_within_15_percent_of_the_measured_peak(measured, key):
    case, name = peak_memory.LLMS[key]
    found = plan_of(case).estimate(
        LENGTHS, objective="sampling", num_candidates=case.candidates, engine=step.NAMES[name],
        micro_batch_tokens=step_systems.SIZES["small"].micro_batch, device="cpu",
    )  # fmt: skip
    assert found.step == pytest.approx(measured[key], rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [True, False])
def test_the_estimate_of_a_gpus_step_is_within_15_percent_of_the_measured_peak(lora):
    case = step_systems.Case("two LLMs", candidates=4, lora=lora, size="0.5B")
    size = step_systems.SIZES[case.size]
    lengths = {
        "node0": (size.prompt, size.completion),
        "node1": (size.prompt + size.completion, size.completion, size.prompt),
    }
    made = step_systems.Step(case, "cuda")
    made.cast(torch.bfloat16)
    for name in ("sysdag", "one pass"):
        measured = step.peak_of(made, name, "cuda") * 2**20
        found = made.model.plan.estimate(
            lengths, objective="sampling", num_candidates=4, engine=step.NAMES[name],
            micro_batch_tokens=size.micro_batch, device="cuda",
        )  # fmt: skip
        assert found.step == pytest.approx(measured, rel=0.15), f"{name}: {found}"


@measures
@pytest.mark.parametrize("case", vision_memory.CASES)
def test_a_vision_language_models_estimate_is_within_15_percent_of_the_measured_peak(measured, case):
    assert vision_memory.estimated(case).step == pytest.approx(measured[f"vision, {case}"], rel=0.15)


def seeing():
    model, processor = shared("llava")

    @node(ImageTextToText(model, processor, max_new_tokens=8))
    def answer(picture):
        return [{"role": "user", "content": [{"type": "image", "image": picture}]}]

    return System(Input("picture") >> answer).compile()


def test_images_are_counted_by_the_number_of_prompts_that_they_are_in():
    plan = seeing()
    plain, one, three = (
        plan.estimate({"answer": (120, 8)}, images={"answer": sizes}, device="cpu").graphs["answer"]
        for sizes in ([], [(40, 30)], [(40, 30)] * 3)
    )
    assert one > plain
    assert three - plain == pytest.approx(3 * (one - plain), rel=0.05)


def test_sizes_of_images_that_are_missing_or_do_not_fit_are_named():
    plan = seeing()
    lengths = {"answer": (120, 8)}
    with pytest.raises(PlanError, match=r"images has no entry for node 'answer' .*\[\(width, height\)\], or \[\]"):
        plan.estimate(lengths, device="cpu")
    for wrong in ((0, 3), (4,), (2.5, 3)):
        with pytest.raises(PlanError, match=r"images\['answer'\] must be sizes in pixels"):
            plan.estimate(lengths, images={"answer": [wrong]}, device="cpu")
    with pytest.raises(PlanError, match="has 20 tokens by lengths, and its images alone take 3"):
        plan.estimate({"answer": (20, 8)}, images={"answer": [(40, 30)] * 2}, device="cpu")
    with pytest.raises(PlanError, match="images names 'nobody'"):
        plan.estimate(lengths, images={"answer": [], "nobody": []}, device="cpu")
    text = plan_of(step_systems.Case("two LLMs", candidates=2, lora=True))
    with pytest.raises(PlanError, match=r"images names 'node0' .*whose prompts hold none"):
        text.estimate(LENGTHS, images={"node0": [(4, 4)]}, device="cpu")


@pytest.mark.parametrize(("packs", "window"), [(True, None), (False, None), (True, 20), (True, 80)])
def test_prefixes_are_counted_as_often_as_they_are_computed(packs, window):
    sizes = llama(0, hidden_size=64, intermediate_size=128).config.to_dict()
    model = MistralForCausalLM(MistralConfig(**sizes | {"model_type": "mistral", "sliding_window": window}))
    component = CausalLM(model, char_tokenizer(), pack_prefixes=packs)

    @node(component)
    def answer(question):
        return question

    plan = System(Input("question") >> answer).compile()
    rows = [{"question": letter * 60, "chosen": "y" * 9, "rejected": "z" * 9} for letter in "ab"]
    model = SystemModel(plan, ObjectiveOptions(), engine=EngineOptions(engine="one_pass"))
    pairs = encode_pairs(plan, rows, "direct")
    [prompt] = component.prompt_ids(["a" * 60])
    saved = SavedBytes()
    with saved, torch.enable_grad():
        model(pairs)
    told = plan.estimate({"answer": (len(prompt), 10)}, engine="one_pass", pairs=2, device="cpu")
    assert told.graphs["answer"] == pytest.approx(saved.total, rel=0.15)


@measures
@pytest.mark.parametrize("case", choice_memory.CASES)
def test_a_choices_estimate_is_within_15_percent_of_the_measured_peak(measured, case):
    assert choice_memory.estimated(case).step == pytest.approx(measured[f"choice, {case}"], rel=0.15)


def test_the_weights_of_a_choice_are_counted_from_its_config():
    plan = choice_memory.build(kind="bi", adapter=True)
    found = plan.estimate({"found": (100, 1)}, device="cpu").footprints["found"]
    model = plan.system["found"].component.module
    every = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert (found.weights, found.trained, found.base) == (every, trained, every - trained)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_new_head_of_a_reranker_is_counted_with_its_one_logit(tmp_path, adapter):
    bert().save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    ours, pefts = (LoraConfig(r=4, target_modules=["query"], task_type=task) for task in (None, "SEQ_CLS"))
    component = Choice(CrossEncoder(tmp_path, peft_config=ours if adapter else None))
    found = component.footprint(tokens=20, labels=1, trains=True, checkpoints=False, device="cpu")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    base = sum(p.numel() * p.element_size() for p in loaded.parameters())
    model = get_peft_model(loaded, pefts) if adapter else loaded
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert (found.weights, found.trained) == (weights, trained)
    assert found.base == (base if adapter else 0)


def test_two_towers_need_what_each_of_them_needs():
    def plan_of(documents):
        tokenizer = char_tokenizer()
        scorer = BiEncoder(bert(), tokenizer, document_model=documents, document_tokenizer=tokenizer)
        question, passages = Input("question", str), Input("passages", list)
        found = node(Choice(scorer), name="found")(lambda question, passages: (question, passages))
        return System((question & passages) >> found).compile()

    equal = plan_of(bert())
    longest = equal.system["found"].component.scorer.query.max_length
    lengths = (4 * longest - 1, 1)
    whole, split = (equal.estimate({"found": given}, device="cpu") for given in (lengths, (*lengths, 3 * longest)))
    assert whole.graphs["found"] == pytest.approx(split.graphs["found"], rel=0.01)
    every = sum(p.numel() * p.element_size() for p in equal.system["found"].component.module.parameters())
    assert (split.footprints["found"].weights, split.footprints["found"].trained) == (every, every)
    other = plan_of(bert(num_hidden_layers=5))
    few, many = (other.estimate({"found": (100, 1, n)}, device="cpu").graphs["found"] for n in (10, 80))
    assert many > 1.2 * few
    with pytest.raises(PlanError, match="different models that both train. Give the options' tokens as the third"):
        other.estimate({"found": (100, 1)}, device="cpu")


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_resident_is_counted_from_the_config_alone(tmp_path, adapter):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    llama(0).save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    component = CausalLM(tmp_path, peft_config=lora)

    @node(component)
    def answer(question):
        return question

    plan = System(Input("question") >> answer).compile()
    found = plan.estimate({"answer": (20, 10)}).footprints["answer"]
    assert component.lm._model is None
    parameters = list(component.module.parameters())
    trained = component.own_parameters().values()
    assert found.weights == sum(4 * p.numel() for p in parameters)
    assert found.trained == sum(4 * p.numel() for p in trained)
    assert found.reference == (0 if adapter else found.weights)
    resident = plan.estimate({"answer": (20, 10)}).resident
    assert resident == found.weights + found.reference + 3 * found.trained
    frozen = plan.estimate({"answer": (20, 10)}, frozen=["answer"]).footprints["answer"]
    assert (frozen.trained, frozen.graph, frozen.reference) == (0, 0, 0)


def test_checkpointing_and_smaller_micro_batches_need_less():
    plan = plan_of(step_systems.Case("two LLMs", candidates=2, lora=True))
    plain, checkpointed, small = (
        plan.estimate(LENGTHS, objective="sampling", device="cpu", **options).step
        for options in ({}, {"gradient_checkpointing": True}, {"micro_batch_tokens": 400})
    )
    assert checkpointed < 0.6 * plain
    assert small < 0.6 * plain


def test_gradients_that_wait_for_the_second_pass_are_counted(monkeypatch):
    lengths = {"draft": (10, 4), "answer": (20, 4, 10)}
    options = {"objective": "sampling", "num_candidates": 3, "pairs": 2, "micro_batch_tokens": 1}
    for share in (16, 1 / 16):  # a tiny model's adapters are no small part of it
        monkeypatch.setattr(kept_work, "_SHARE_OF_WEIGHTS", share)
        model, pairs = make("adapters", engine="two_pass", micro_batch_tokens=1)
        kept = [turn.batch.kept for turn in model(pairs).turns]
        held = sum(4 * g.numel() for each in kept if isinstance(each, KeptGradient) for g in each._gradients)
        trained = sum(4 * p.numel() for p in model.trained_parameters())
        found = model.plan.estimate(lengths, **options)
        assert held <= trained + found.waiting <= 1.5 * held
        assert (found.waiting > 0) == (share < 1)
        assert found.step == found.waiting + max(found.graphs[n] + f.working for n, f in found.footprints.items())
        assert model.plan.estimate(lengths, **options | {"engine": "one_pass"}).waiting == 0
        assert model.plan.estimate(lengths, **options | {"micro_batch_tokens": 1000}).waiting == 0


def test_what_may_be_kept_of_prompts_is_said():
    parts = {"scheduler": scheduler_of("epsilon"), "text_encoder": clip(), "tokenizer": word_tokenizer()}
    for options, most in (({}, 2**30), ({"cache_bytes": 2**20}, 2**20), ({"cache": False}, 0)):
        made = node(Diffusion(text_unet(), **parts, **options))

        @made
        def image(caption):
            return caption

        found = System(Input("caption") >> image).compile().estimate({})
        assert found.host_cache == most
        assert ("of encoded prompts" in str(found)) == (most > 0)
        assert found.total == found.resident + found.step


def test_what_cannot_be_estimated_is_named():
    @node(Tabular({"a": {"y": 0.5, "n": 0.5}}))
    def answer(question):
        return question

    plan = System(Input("question") >> answer).compile()
    with pytest.raises(PlanError, match="no entry for node 'answer'"):
        plan.estimate({})
    with pytest.raises(PlanError, match=r"memory of node 'answer' \(Tabular.*not known"):
        plan.estimate({"answer": (1, 1)})


def test_the_table_names_every_node():
    plan = plan_of(step_systems.Case("two LLMs", candidates=2, lora=True))
    shown = str(plan.estimate(LENGTHS, objective="sampling", num_candidates=2, device="cpu"))
    assert [line.split()[0] for line in shown.splitlines()] == ["node", "node0", "node1", "resident"]
    assert torch.get_default_device() == torch.device("cpu")


@measures
@pytest.mark.parametrize("case", diffusion_memory.CASES)
def test_a_diffusion_models_estimate_is_within_15_percent_of_the_measured_peak(measured, case):
    assert diffusion_memory.estimated(case).step == pytest.approx(measured[f"diffusion, {case}"], rel=0.15)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("from_folder", [False, True])
def test_what_is_resident_of_a_diffusion_model_is_counted_from_its_configs(tmp_path, adapter, from_folder):
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"]) if adapter else None
    unet = text_unet(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )
    component = from_text(unet, peft_config=None if from_folder else lora)
    if from_folder:
        component.save_pretrained(tmp_path)
        component = Diffusion(tmp_path, peft_config=lora)

    @node(component)
    def image(caption):
        return caption

    plan = System(Input("caption") >> image).compile()
    found = plan.estimate({}).footprints["image"]
    assert component._pipeline is None
    trained = [p for p in component.own_parameters().values() if p.requires_grad]
    assert found.weights == sum(4 * p.numel() for p in component.module.parameters())
    assert found.trained == sum(4 * p.numel() for p in trained)
    denoiser = sum(4 * p.numel() for p in component.pipeline.denoiser.parameters())
    assert found.reference == (0 if adapter else denoiser)
    assert plan.estimate({}, pairs=3).graphs["image"] == plan.estimate({"image": (0, 3 * 64)}).graphs["image"]
    frozen = plan.estimate({}, frozen=["image"]).footprints["image"]
    assert (frozen.trained, frozen.graph, frozen.reference) == (0, 0, 0)


def test_a_trained_text_encoder_has_a_reference_and_a_graph_too():
    encoder = clip()
    options = {"scheduler": scheduler_of("epsilon"), "text_encoder": encoder, "tokenizer": word_tokenizer()}
    footprints = {}
    for trains in (False, True):
        node_of = node(Diffusion(text_unet(), train_text_encoder=trains, **options))

        @node_of
        def image(caption):
            return caption

        footprints[trains] = System(Input("caption") >> image).compile().estimate({}).footprints["image"]
    own = sum(4 * p.numel() for p in encoder.parameters())
    assert footprints[True].reference - footprints[False].reference == own
    assert footprints[True].trained - footprints[False].trained == own
    assert footprints[True].graph > footprints[False].graph


def test_conditioning_of_ones_own_has_no_estimate():
    @node(Diffusion(sd3(), scheduler=scheduler_of("flow"), condition=pooled))
    def image(number):
        return number

    with pytest.raises(PlanError, match=r"memory of node 'image' \(Diffusion.*not known"):
        System(Input("number") >> image).compile().estimate({})


@pytest.mark.parametrize("case", ["sampling", "adapters"])
def test_offloaded_weights_are_not_resident(case):
    model, pairs = make(case, engine="two_pass", offload_idle=True)
    gradients_of(model, pairs)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    present = []
    for key, policy in model.components.items():
        reference = model.references[key]
        model.residence.admit(policy, *([reference] if isinstance(reference, Component) else []))
        present.append(sum(4 * p.numel() for p in model.residence._hosted if is_present(model, p)))
    frozen = max(present)
    lengths = {name: (20, 10) for name in model.plan.factors("sampling")}
    options = {"objective": "sampling", "num_candidates": 3}
    assert model.plan.estimate(lengths, offload_idle=True, **options).resident == 4 * trained + frozen
    assert model.plan.estimate(lengths, **options).resident > 4 * trained + frozen
    with pytest.raises(PlanError, match="offload_idle=True needs engine='two_pass'"):
        model.plan.estimate(lengths, offload_idle=True, engine="one_pass")


@pytest.mark.release("the page is written anew for one")
def test_the_page_of_sizes_is_what_its_script_finds():
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "docs" / "sizes.py")
    sizes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizes)
    page = sizes.PAGE.read_text(encoding="utf-8")
    assert "\n".join(sizes.table("draft → refine, two Qwen2.5-0.5B")) in page
    assert next(sizes.lines()) in page
    assert all(f"## {title}\n" in page for title in sizes.SYSTEMS)


@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 1000}, {"batch_size": 5}])
def test_what_decoding_takes_is_estimated_from_the_budget_of_tokens(limits):
    lm = CausalLM(llama(vocab_size=3000, num_hidden_layers=6), char_tokenizer(), max_new_tokens=60, **limits)
    prompts = ["a longer prompt, " * 3 + letter for letter in "abcdefghijklmnopqrst"]
    lm.sample(prompts[:1], generator=[0])
    estimated = lm.decoding_bytes(rows=20, tokens=len(lm.prompt_ids(prompts)[0]) + 60, device="cpu")
    with PeakBytes(lm.module) as peak:
        draws = lm.sample(prompts, generator=range(20))
    assert sum(not draw.record["finished"] for draw in draws) > 10, "too few rows get long"
    assert 0.6 * estimated < peak.bytes < 1.05 * estimated


def test_decoding_counts_where_it_is_the_most_and_not_before():
    plan = plan_of(step_systems.Case("two LLMs", candidates=4, lora=True))
    options = dict(objective="sampling", num_candidates=4, device="cpu")
    found = plan.estimate(LENGTHS, micro_batch_tokens=400, pairs=16, **options)
    [drawn] = found.decoding.values()
    config = plan.system[next(iter(found.decoding))].component.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    kept = 51 * 320 * 2 * config.num_hidden_layers * heads * width * 4  # 16384 tokens hold 51 rows of keys and values
    assert kept < drawn < 2 * kept
    assert found.total == found.resident + max(found.step, drawn)
    assert found.to_dict()["nodes"][next(iter(found.decoding))]["decoding"] == drawn
    direct = plan.estimate(LENGTHS, device="cpu")
    assert not direct.decoding
    assert direct.total == direct.resident + direct.step
