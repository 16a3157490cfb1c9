"""References: adapters trained before, several adapters on one base, scores on file, references that move."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from test_mixed_system import ROW, captioner_and_painter
from test_trainer import config, log_of, weights
from test_two_pass import gradients_of
from tiny import char_tokenizer, llama
from tiny_diffusion import LORA, drift, from_text, images, text_unet
from trained_systems import answer_prompt, draft_prompt, question, rows, two_llms
from transformers import AutoModelForCausalLM

from sysdag import DiverseBeamSearch, Exhaustive, Input, PlanError, SerializationError, SysDPOTrainer, System, node
from sysdag.components import Categorical, CausalLM, adapter, adapter_layers
from sysdag.data.encoding import encode_pairs
from sysdag.engine.precompute import weights_hash
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, NodeOptions, ObjectiveOptions, ReferenceOptions
from sysdag.training.references import precompute

PROMPTS = ["ab", "a longer prompt than that", "z?"]
TEXTS = ["x1", "", "some more"]
ONE_PASS = EngineOptions(engine="one_pass")


def lora(**options):
    defaults = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**(defaults | options))


def adapted(model=None, **options):
    return CausalLM(model or llama(), char_tokenizer(), peft_config=lora(**options), max_new_tokens=4)


def move(component, seed, size=0.1):
    """Adds the same noise to a component's own parameters, whatever the names of its adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(component.own_parameters().items()):
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return component


def scores(component):
    return component.log_prob(PROMPTS, component.observe(TEXTS))


def merged_by_hand(component, scale):
    """A plain model with W + scale B A in place of each adapted W."""
    model = llama()
    own = dict(component.own_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            if f"{name}.lora_A.weight" in own:
                module.weight += scale * own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
    return CausalLM(model, char_tokenizer())


def test_the_reference_of_a_trained_adapter_is_a_frozen_copy_of_it_on_the_same_base():
    lm = move(adapted(), 1)
    reference, by_hand = lm.reference(), merged_by_hand(lm, 16 / 4)
    expected = scores(by_hand)
    assert reference.module is lm.module
    assert not torch.allclose(expected, scores(CausalLM(llama(), char_tokenizer())), atol=0.1)
    torch.testing.assert_close(scores(reference), expected, rtol=1e-5, atol=1e-4)
    trained = {id(p) for p in lm.module.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lm.own_parameters().values()}
    assert not any(p.requires_grad for p in reference.own_parameters().values())
    scores(lm).sum().backward()
    assert all(p.grad is None for p in reference.own_parameters().values())
    move(lm, 2)
    torch.testing.assert_close(scores(reference), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores(lm), scores(merged_by_hand(lm, 16 / 4)), rtol=1e-5, atol=1e-4)


def test_a_trained_adapters_reference_is_neither_trained_nor_saved(tmp_path):
    system = two_llms(lora(), tmp_path / "base")
    move(system["answer"].component, 1)
    trainer = SysDPOTrainer(system, config(tmp_path, max_steps=2), train_dataset=rows(8))
    frozen = {n: p.clone() for n, p in trainer.model.references["answer"].own_parameters().items()}
    trainer.train()
    assert log_of(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.references["answer"].own_parameters().items():
        assert torch.equal(parameter, frozen[name])
        assert id(parameter) not in optimized
    trainer.save_model(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "answer" / "adapter_model.safetensors", "pt") as opened:
        assert len(list(opened.keys())) == len(frozen)
    loaded = System.from_pretrained(tmp_path / "saved")["answer"].component
    torch.testing.assert_close(scores(loaded), scores(system["answer"].component))
    assert adapter.names(loaded.module) == ["sysdag"]


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 4, 5, 20]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("trained_before", [False, True])
def test_whole_modules_and_tokens_that_train_are_off_in_the_reference(tmp_path, options, trained_before):
    lm = adapted(**options)
    assert adapter_layers.is_identity(lm.module, lm.lm.adapter)
    if trained_before:
        move(lm, 1)
    before, plain = scores(lm).detach(), scores(CausalLM(llama(), char_tokenizer()))
    reference = lm.reference()
    assert bool(reference.own_parameters()) == trained_before
    move(lm, 2)
    torch.testing.assert_close(scores(reference), before, rtol=1e-5, atol=1e-5)
    assert torch.allclose(before, plain, atol=1e-4) != trained_before
    assert not torch.allclose(scores(lm), before, atol=0.1)
    lm.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(scores(CausalLM(theirs, char_tokenizer())), scores(lm), rtol=1e-5, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(scores(CausalLM(base, char_tokenizer())), plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(bias="all"), r"bias='all'.*biases of the base model.*Use bias='none'"),
        (lambda: lora(init_lora_weights="pissa"), r"'pissa', which changes the base.*Use init_lora_weights=True"),
        (lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING.*Use LoraConfig"),
    ],
)
def test_adapters_that_cannot_be_switched_off_are_refused_by_name(make, message):
    with pytest.raises(PlanError, match=message):
        CausalLM(llama(), char_tokenizer(), peft_config=make()).module


def test_a_peft_model_is_taken_as_it_is(tmp_path):
    theirs = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    lm = CausalLM(theirs, char_tokenizer())
    reference, plain = lm.reference(), scores(CausalLM(llama(), char_tokenizer()))
    move(lm, 1)
    torch.testing.assert_close(scores(reference), plain, rtol=1e-5, atol=1e-4)
    ids = torch.tensor([lm.prompt_ids(["ab"])[0] + [1]])
    (draw,) = lm.observe([""])
    expected = theirs(ids).logits[0, -2].log_softmax(-1)[1]
    torch.testing.assert_close(lm.log_prob(["ab"], [draw])[0], expected, rtol=1e-5, atol=1e-5)
    options = lm.save_pretrained(tmp_path)
    torch.testing.assert_close(scores(CausalLM.from_pretrained(tmp_path, options)), scores(lm), rtol=1e-5, atol=1e-4)


def test_a_peft_model_that_trains_biases_or_is_merged_is_refused():
    biased = CausalLM(get_peft_model(llama(attention_bias=True), lora(bias="lora_only")), char_tokenizer())
    with pytest.raises(PlanError, match="bias='lora_only'"):
        biased.module
    merged = get_peft_model(llama(), lora())
    merged.merge_adapter()
    with pytest.raises(PlanError, match="unmerge_adapter"):
        CausalLM(merged, char_tokenizer()).module


def test_a_quantised_base_lets_gradients_through_its_inputs_and_cannot_train_itself():
    """The flag stands in for bitsandbytes, which needs a GPU: what it does to the weights has not run."""
    model = llama()
    model.is_loaded_in_4bit = True
    with pytest.raises(PlanError, match="quantised weights cannot train"):
        CausalLM(model, char_tokenizer()).reference()
    torch.manual_seed(0)
    lm = adapted(model)
    embedded = [c.module.get_input_embeddings()(torch.tensor([[5]])) for c in (lm, adapted())]
    assert [x.requires_grad for x in embedded] == [True, False]
    lm.module.gradient_checkpointing_enable({"use_reentrant": True})
    lm.module.train()
    assert lm.module.is_gradient_checkpointing
    scores(lm).sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in lm.own_parameters().values())
    torch.manual_seed(0)
    plain = adapted(llama())
    scores(plain).sum().backward()
    assert any(parameter.grad.any() for parameter in plain.own_parameters().values())
    for name, parameter in plain.own_parameters().items():
        torch.testing.assert_close(lm.own_parameters()[name].grad, parameter.grad, rtol=1e-4, atol=1e-4)


# Two adapters on one base


def pair_of_adapters(shared, trained_before=False, **options):
    """draft -> answer, each with an adapter, on one base or on two equal ones."""
    base = llama(0)
    torch.manual_seed(3)
    components = {}
    for name in ("draft", "answer"):
        config_of = lora(target_modules=["q_proj"] if name == "draft" else ["q_proj", "o_proj"], **options)
        model = base if shared else llama(0)
        components[name] = CausalLM(model, char_tokenizer(), peft_config=config_of, max_new_tokens=4)
        components[name].module
    if trained_before:
        for seed, component in enumerate(components.values()):
            move(component, seed)
    return System(question >> draft_prompt, (question & draft_prompt) >> answer_prompt).with_components(components)


def step_of(system, objective="direct", engine=ONE_PASS, steps=1, **nodes):
    plan = system.compile()
    candidates = DiverseBeamSearch(num_candidates=3) if objective == "sampling" else None
    model = SystemModel(plan, ObjectiveOptions(objective=objective, beta=0.5), nodes, candidates, engine)
    for seed, component in enumerate(model.components.values(), start=7):
        move(component, seed)
    for _ in range(steps):
        output, _ = gradients_of(model, encode_pairs(plan, rows(5), objective))
    return model, output, {
        f"{key}.{name}": None if p.grad is None else p.grad.clone()
        for key, component in model.components.items()
        for name, p in component.own_parameters().items()
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("trained_before", [False, True])
def test_two_adapters_on_one_base_equal_two_models(objective, engine, trained_before):
    options = EngineOptions(engine=engine)
    separate, expected, gradients = step_of(pair_of_adapters(False, trained_before), objective, options)
    together, output, found = step_of(pair_of_adapters(True, trained_before), objective, options)
    assert together.components["draft"].module is together.components["answer"].module
    assert separate.components["draft"].module is not separate.components["answer"].module
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert abs(float(output.loss) - math.log(2)) > 1e-3
    for name, ratio in expected.log_ratios.items():
        assert float(ratio.abs().max()) > 0.05
        torch.testing.assert_close(output.log_ratios[name], ratio, rtol=1e-4, atol=1e-4)
    assert found.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        assert gradient.any()
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * largest, name


def test_a_module_that_only_one_of_two_adapters_trains_is_the_others_original():
    expected, found = [], []
    for shared, kept in ((False, expected), (True, found)):
        base = llama()
        torch.manual_seed(0)
        first = adapted(base, modules_to_save=["embed_tokens"])
        first.module
        second = adapted(base if shared else llama(), trainable_token_indices={"lm_head": [3]})
        second.module
        for component in (first, second):
            move(component, 1)
        for component in (second, first, second):
            kept.append(scores(component))
            kept.append(torch.tensor([len(d.value) for d in component.search(PROMPTS, 2, 1.0)[0]]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_each_of_two_adapters_samples_and_searches_as_if_alone():
    separate, together = pair_of_adapters(False, True), pair_of_adapters(True, True)
    for name in ("draft", "answer", "draft"):
        alone, one = separate[name].component, together[name].component
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        assert [d.value for d in one.sample(PROMPTS * 4, generator=generators[0])] == [
            d.value for d in alone.sample(PROMPTS * 4, generator=generators[1])
        ]
        searched = [[[d.value for d in f] for f in c.search(PROMPTS, 3, 5.0)] for c in (one, alone)]
        assert searched[0] == searched[1]
        torch.testing.assert_close(scores(one), scores(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["one_pass", "auto"])
def test_checkpointed_gradients_run_again_under_their_own_adapter(engine):
    _, _, expected = step_of(pair_of_adapters(False, True))
    system = pair_of_adapters(True, True)
    model = system["draft"].component.module
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, _, found = step_of(system, engine=EngineOptions(engine=engine), steps=2)
    assert model.is_gradient_checkpointing
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * largest, name


def test_an_untrained_nodes_adapter_stays_and_the_others_trains():
    model, output, found = step_of(pair_of_adapters(True, True), draft=NodeOptions(trainable=False))
    assert set(model.references) == {"answer"}
    assert not output.log_ratios["draft"].any()
    assert all((gradient is None) == name.startswith("draft.") for name, gradient in found.items())


def test_each_of_two_adapters_on_one_base_has_its_learning_rate(tmp_path):
    system = pair_of_adapters(True)
    args = config(tmp_path, max_steps=1, optim="sgd", nodes={"answer": {"learning_rate": 0.0}})
    before = {n.name: {k: p.clone() for k, p in n.component.own_parameters().items()} for n in system.nodes}
    SysDPOTrainer(system, args, train_dataset=rows(4)).train()
    for name, moved in (("answer", False), ("draft", True)):
        own = system[name].component.own_parameters()
        assert any(not torch.equal(before[name][key], p) for key, p in own.items()) == moved


def test_a_full_model_under_anothers_adapter_is_refused():
    base = llama()
    plain, other = CausalLM(base, char_tokenizer()), adapted(base)
    outline = System(question >> draft_prompt, (question & draft_prompt) >> answer_prompt)
    for components in ({"draft": plain, "answer": other}, {"draft": other, "answer": plain}):
        plan = outline.with_components(components).compile()
        with pytest.raises(PlanError, match=r"model of its own"):
            SystemModel(plan, ObjectiveOptions())
        base = llama()
        plain, other = CausalLM(base, char_tokenizer()), adapted(base)
    expected = scores(CausalLM(llama(), char_tokenizer()))
    move(other, 1)
    torch.testing.assert_close(scores(plain), expected, rtol=1e-5, atol=1e-5)


def test_two_adapters_are_saved_with_one_base_and_share_it_again(tmp_path):
    system = pair_of_adapters(True, True)
    system.save_pretrained(tmp_path)
    found = [path for path in tmp_path.rglob("*.safetensors") if "adapter" not in path.name]
    (owner,) = {path.parent for path in found}
    assert owner.name == "base" and owner.parent.name in ("draft", "answer")  # noqa: PT018
    loaded = System.from_pretrained(tmp_path)
    assert loaded["draft"].component.module is loaded["answer"].component.module
    for name in ("draft", "answer"):
        expected = scores(system[name].component)
        torch.testing.assert_close(scores(loaded[name].component), expected, rtol=1e-5, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(owner)
        theirs = CausalLM(PeftModel.from_pretrained(base, tmp_path / name), char_tokenizer())
        torch.testing.assert_close(scores(theirs), expected, rtol=1e-5, atol=1e-5)
        options = json.loads((tmp_path / "system.json").read_text())["components"][name]["options"]
        alone = CausalLM.from_pretrained(tmp_path / name, options)
        torch.testing.assert_close(scores(alone), expected, rtol=1e-5, atol=1e-5)
    for name in ("draft", "answer"):
        move(loaded[name].component, 9)
    loaded.save_pretrained(tmp_path)  # over the folder that its own base was read from
    again = System.from_pretrained(tmp_path)
    for name in ("draft", "answer"):
        torch.testing.assert_close(scores(again[name].component), scores(loaded[name].component))


def test_two_adapters_on_one_base_resume_from_a_checkpoint(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        system = pair_of_adapters(True)
        return system, SysDPOTrainer(
            system, config(folder, save_strategy="steps", save_steps=2, **options), train_dataset=rows(8)
        )

    whole, trainer = run(tmp_path / "whole", max_steps=4)
    trainer.train()
    run(tmp_path / "parts", max_steps=2)[1].train()
    resumed, trainer = run(tmp_path / "parts", max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


# Scores on file


def trained_llms(tmp_path, name, peft_config=None, **options):
    torch.manual_seed(0)
    system = two_llms(peft_config, (tmp_path / "base") if peft_config else None)
    args = config(tmp_path / name, max_steps=5, **options)
    trainer = SysDPOTrainer(system, args, train_dataset=rows(12), eval_dataset=rows(14)[10:])
    return system, trainer


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_stored_reference_scores_train_as_a_reference_does(tmp_path, peft_config, monkeypatch):
    expected, trainer = trained_llms(tmp_path, "plain", peft_config)
    trainer.train()
    losses, evaluated = log_of(trainer, "loss"), trainer.evaluate()
    system, trainer = trained_llms(tmp_path, "stored", peft_config, precompute_ref_log_probs=True)
    by_hand = {
        name: [
            float(trainer.model.references[name].log_prob([prompt(row, side)], [observed(system, name, row, side)]))
            for row in rows(14)
            for side in ("chosen", "rejected")
        ]
        for name, prompt in (
            ("draft", lambda row, side: f"q: {row['question']} d:"),
            ("answer", lambda row, side: f"q: {row['question']} d: {row[f'{side}_intermediates']['draft']} a:"),
        )
    }
    trainer.train()
    stored = trainer.model.stored
    pairs = encode_pairs(system.compile(), rows(14), "direct")
    for name, values in by_hand.items():
        kept = torch.cat([stored.scores[name][pair.key] for pair in pairs]).tolist()
        assert kept == pytest.approx(values, abs=1e-4)
    assert len(stored.seeds) == 14
    assert all(reference.module is None for reference in trainer.model.references.values())
    assert log_of(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], abs=1e-5)
    before = weights(expected)
    for name, tensor in weights(system).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match=r"row 0 \(question=.*\) was not among the datasets"):
        trainer.evaluate(encode_pairs(system.compile(), rows(20)[16:], "direct"))


def observed(system, name, row, side):
    value = row[side] if name == "answer" else row[f"{side}_intermediates"]["draft"]
    return system[name].component.observe([value])[0]


def test_the_reference_never_runs_in_training_once_its_scores_are_stored(tmp_path, monkeypatch):
    _, trainer = trained_llms(tmp_path, "stored", precompute_ref_log_probs=True)
    trainer.evaluate()
    from sysdag.engine import scoring

    def never(batch, reference):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(scoring, "reference_score", never)
    trainer.train()
    trainer.evaluate()


def test_stored_scores_are_reused_and_those_of_something_else_are_refused(tmp_path, monkeypatch):
    options = {"precompute_ref_log_probs": True}
    _, trainer = trained_llms(tmp_path, "run", **options)
    trainer.train()
    _, trainer = trained_llms(tmp_path, "run", **options)
    with monkeypatch.context() as patched:
        patched.setattr("sysdag.training.references.compute", None)
        trainer.evaluate()

    def refused(match, change=lambda system: None, count=12):
        torch.manual_seed(0)
        system = two_llms()
        change(system)
        args = config(tmp_path / "run", **options)
        made = SysDPOTrainer(system, args, train_dataset=rows(count), eval_dataset=rows(14)[10:])
        with pytest.raises(SerializationError, match=match):
            made.train()

    refused(r"something else: the pairs differ.*Delete the file", count=9)
    refused(r"else: the weights of 'answer' differ", lambda system: move(system["answer"].component, 1))
    refused(r"else: node 'draft' differ", lambda system: setattr(system["draft"].component, "_max_length", 90))
    (tmp_path / "run" / "reference_scores.safetensors").write_bytes(b"nothing")
    refused("holds no reference scores")


def test_resuming_needs_the_stored_scores(tmp_path):
    saving = {"precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 2}
    whole, trainer = trained_llms(tmp_path, "run", lora(), **saving)
    trainer.train()
    resumed, trainer = trained_llms(tmp_path, "run", lora(), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(whole)[name]), name
    (tmp_path / "run" / "reference_scores.safetensors").unlink()
    _, trainer = trained_llms(tmp_path, "run", lora(), **saving)
    with pytest.raises(PlanError, match=r"reference_scores.safetensors is missing, and training has started"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def other_row():
    shorter = {"chosen": ROW["rejected"][:1], "rejected": ROW["chosen"]}
    inner = {"chosen_intermediates": {"text": "dark"}, "rejected_intermediates": {"text": "a circle|a square"}}
    return {"prompt": "paint", **shorter, **inner}


def test_a_pairs_stored_noise_is_the_policys_whatever_its_batch(tmp_path):
    plan = captioner_and_painter().compile()
    pairs = encode_pairs(plan, [ROW, other_row()], "direct")
    model = SystemModel(plan, ObjectiveOptions(beta=0.2), {"image": NodeOptions(beta=500.0)}, engine=ONE_PASS)
    precompute(model, pairs, tmp_path / "scores.safetensors")
    stored, model.stored = model.stored, None
    for component in model.components.values():
        drift(component.module, size=0.02)
    for batch in (pairs, pairs[::-1], pairs[1:], pairs[:1]):
        model.stored = None
        expected, wanted = gradients_of(model, batch, stored.generators(batch))
        model.stored = stored
        output, found = gradients_of(model, batch)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert abs(float(output.loss) - math.log(2)) > 1e-3
        for name, ratio in expected.log_ratios.items():
            torch.testing.assert_close(output.log_ratios[name], ratio, rtol=1e-4, atol=1e-3)
        largest = max(float(g.abs().max()) for g in wanted.values() if g is not None)
        for name, gradient in wanted.items():
            assert gradient is None or float((found[name] - gradient).abs().max()) <= 1e-4 * largest, name
    painter = model.components["image"]
    (alone,) = [term for term in model.compare(pairs[:1], stored.generators(pairs[:1]), None).terms if term.noise]
    generator = torch.Generator().manual_seed(stored.seeds[pairs[0].key])
    by_hand = painter.noise(painter.observe(images(3)), generator)  # the longer plate has three places
    assert torch.equal(alone.noise.eps, by_hand.select([0, 1, 0, 1, 2]).eps)
    assert torch.equal(alone.noise.timesteps, by_hand.select([0, 1, 0, 1, 2]).timesteps)


def classifiers():
    def table(outputs, seed):
        torch.manual_seed(seed)
        return torch.nn.Linear(2, outputs, bias=False, dtype=torch.float64)

    @node(Categorical(["u", "v"], table(2, 0)))
    def draft(question):
        return [1.0, 0.0] if question == "a" else [0.0, 1.0]

    @node(Categorical(["p", "q", "r"], table(3, 1)))
    def answer(draft):
        return [1.0, 0.0] if draft == "u" else [0.5, 1.0]

    return System(question >> draft >> answer)


def test_scores_of_an_exhaustive_sampling_are_stored_too(tmp_path):
    plan = classifiers().compile()
    data = [
        {"question": "a", "chosen": "p", "rejected": "q"},
        {"question": "b", "chosen": "r", "rejected": "p"},
        {"question": "b", "chosen": "q", "rejected": "r"},
    ]
    options = ObjectiveOptions(objective="sampling", beta=0.5)
    pairs = encode_pairs(plan, data, "sampling")
    model = SystemModel(plan, options, None, Exhaustive(), ONE_PASS)
    precompute(model, pairs, tmp_path / "scores.safetensors")
    stored, model.stored = model.stored, None
    for seed, component in enumerate(model.components.values()):
        move(component, seed, size=0.5)
    expected, gradients = gradients_of(model, pairs)
    model.stored = stored
    model.drop_references()
    output, found = gradients_of(model, pairs[::-1])
    torch.testing.assert_close(output.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)


def test_candidates_that_change_cannot_be_scored_beforehand(tmp_path):
    args = config(tmp_path, objective="sampling", precompute_ref_log_probs=True)
    with pytest.raises(PlanError, match="DiverseBeamSearch draws candidates during training.*Only Exhaustive"):
        SysDPOTrainer(two_llms(), args, candidates=DiverseBeamSearch(num_candidates=2), train_dataset=rows(4))


# References that move


@pytest.mark.parametrize("trained_adapter", [False, True])
def test_references_move_towards_the_policy_by_the_formula(tmp_path, trained_adapter):
    system = pair_of_adapters(True, True) if trained_adapter else two_llms()
    args = config(
        tmp_path, max_steps=5, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.3, optim="sgd"
    )
    trainer = SysDPOTrainer(system, args, train_dataset=rows(8))
    policies, references = trainer.model.components, trainer.model.references
    snapshots = []

    class Recorder(type(trainer.callback_handler.callbacks[0])):
        def on_step_end(self, args, state, control, **kwargs):
            snapshots.append({
                key: {n: p.detach().clone() for n, p in component.own_parameters().items() if p.requires_grad}
                for key, component in policies.items()
            })  # fmt: skip

    trainer.add_callback(Recorder())
    expected = {key: {n: p.detach().clone() for n, p in r.own_parameters().items()} for key, r in references.items()}
    trainer.train()
    for step in (2, 4):
        for key, tensors in snapshots[step - 1].items():
            for name, policy in tensors.items():
                expected[key][name] = 0.3 * policy + 0.7 * expected[key][name]
    changed = 0
    for key, reference in references.items():
        for name, parameter in reference.own_parameters().items():
            torch.testing.assert_close(parameter.detach(), expected[key][name], rtol=1e-6, atol=1e-7)
            changed += not torch.equal(parameter, snapshots[0][key][name])
    assert changed > 4


def test_moved_references_survive_resuming(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        system = two_llms()
        syncing = {"sync_ref_model": True, "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 3}
        return system, SysDPOTrainer(system, config(folder, **syncing, **options), train_dataset=rows(12))

    whole, trainer = run(tmp_path / "whole")
    trainer.train()
    expected = trainer.model.references
    run(tmp_path / "parts", max_steps=3)[1].train()
    resumed, trainer = run(tmp_path / "parts")
    trainer.train(resume_from_checkpoint=True)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(whole)[name]), name
    for key, reference in trainer.model.references.items():
        for name, parameter in reference.own_parameters().items():
            assert torch.equal(parameter, expected[key].own_parameters()[name]), name
    trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / "references.safetensors").exists()
    (tmp_path / "parts" / "checkpoint-3" / "references.safetensors").unlink()
    with pytest.raises(SerializationError, match=r"references.safetensors"):
        run(tmp_path / "parts")[1].train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))


def test_a_reference_without_weights_of_its_own_cannot_move(tmp_path):
    class Shared(Categorical):
        def reference(self):
            return self

    @node(Shared(["a", "b"], 1))
    def choice(question):
        return [1.0]

    system = System(Input("question", str) >> choice)
    data = [{"question": "q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(PlanError, match="reference of node 'choice' has no weights of its own.*moving_reference"):
        SysDPOTrainer(system, config(tmp_path, sync_ref_model=True), train_dataset=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "cannot be computed beforehand"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must be in \(0, 1\]"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps must be 1 or more"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha has no effect without sync_ref_model"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(PlanError, match=message):
        config(tmp_path, **options)


def test_the_defaults_are_trls():
    from trl import DPOConfig

    theirs = {name: DPOConfig.__dataclass_fields__[name].default for name in ReferenceOptions.__dataclass_fields__}
    assert vars(ReferenceOptions()) == theirs


def test_pairs_with_equal_content_have_equal_keys():
    plan = two_llms().compile()
    first, again, other = (encode_pairs(plan, rows(n), "direct")[-1] for n in (3, 3, 4))
    assert first.key == again.key != other.key
    data = copy.deepcopy(rows(3))
    data[-1]["rejected_intermediates"]["draft"] = "q"
    assert encode_pairs(plan, data, "direct")[-1].key != first.key
    painter = from_text()
    assert painter.own_parameters().keys() == dict(painter.module.named_parameters()).keys()


@pytest.mark.parametrize(
    "make",
    [lambda seed: adapted(llama(seed)), lambda seed: from_text(text_unet(seed=seed), peft_config=LoraConfig(**LORA))],
)
def test_the_hash_of_a_reference_is_of_what_it_scores_with(make):
    def fresh(number, seed=0):
        torch.manual_seed(number)  # of the adapter's random half
        component = make(seed)
        component.module
        return component

    first, second = fresh(1), fresh(2)
    expected = weights_hash(first.reference())
    assert weights_hash(second.reference()) == expected
    assert weights_hash(fresh(1, seed=5).reference()) != expected
    assert weights_hash(move(fresh(1), 1).reference()) != expected
    reference = first.reference()
    move(first, 1)
    assert weights_hash(reference) == expected != weights_hash(first)


def test_reference_scores_are_computed_without_dropout(tmp_path):
    found = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        lm = move(adapted(lora_dropout=dropout), 1)
        plan = System(question >> node(lm, name="answer")(lambda question: question)).compile()
        model = SystemModel(plan, ObjectiveOptions()).train()
        pairs = encode_pairs(plan, [{"question": "ab", "chosen": "c", "rejected": "de"}], "direct")
        precompute(model, pairs, tmp_path / f"{dropout}")
        assert model.training
        found.append(model.stored.scores["answer"][pairs[0].key])
    torch.testing.assert_close(*found)


def test_a_base_with_tied_embeddings_is_saved_and_read_back(tmp_path):
    lm = move(adapted(llama(tie_word_embeddings=True)), 1)
    loaded = CausalLM.from_pretrained(tmp_path, lm.save_pretrained(tmp_path))
    torch.testing.assert_close(scores(loaded), scores(lm), rtol=1e-5, atol=1e-5)
    assert loaded.module.lm_head.weight is loaded.module.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4, 5, 20]}])
def test_an_adapter_whose_layers_are_new_but_whose_modules_are_trained_is_no_identity(options):
    lm = adapted(**options)
    with torch.no_grad():
        for name, parameter in lm.own_parameters().items():
            if "lora" not in name:
                parameter.mul_(1.5)
    expected = scores(lm).detach()
    reference = lm.reference()
    torch.testing.assert_close(scores(reference), expected)
    assert not torch.allclose(expected, scores(CausalLM(llama(), char_tokenizer())), atol=0.1)


def test_a_frozen_copy_leaves_a_checkpointed_policy_its_adapter():
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        lm = move(adapted(), 1)
        reference = lm.reference()
        if checkpoints:
            lm.module.gradient_checkpointing_enable({"use_reentrant": False})
            lm.module.train()
        move(lm, 2)
        policy = scores(lm)
        scores(reference)
        policy.sum().backward()
        found.append({name: parameter.grad for name, parameter in lm.own_parameters().items()})
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)
