"""Inputs that a user may well try, and the sentence that says what to do instead."""

import dataclasses
import math

import pytest
import torch
from judged_answers import judged, rows
from tiny import char_tokenizer, llama
from torch import nn
from transformers import TrainingArguments
from trl import DPOConfig

from sysdag import (
    DataError,
    DiverseBeamSearch,
    Input,
    MonteCarlo,
    PlanError,
    SysDPOConfig,
    SysDPOTrainer,
    System,
    TrainingError,
    node,
)
from sysdag.components import Categorical, CausalLM
from sysdag.components.diffusion.forward_process import ForwardProcess
from sysdag.components.diffusion.reverse_process import denoise
from sysdag.training.config import ELSEWHERE

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
question = Input("question", str)


def trainer_of(folder, system=None, *, data=None, candidates=None, **options):
    args = SysDPOConfig(output_dir=str(folder), **(QUIET | options))
    return SysDPOTrainer(system or judged(), args, candidates=candidates, train_dataset=data or rows())


@pytest.mark.parametrize("kind", [TrainingArguments, DPOConfig])
def test_arguments_of_another_trainer(tmp_path, kind):
    args = kind(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(PlanError, match=rf"takes a SysDPOConfig, got \w+\.{kind.__name__}. Pass SysDPOConfig"):
        SysDPOTrainer(judged(), args, train_dataset=rows())


@pytest.mark.parametrize("candidates", [4, "diverse_beam_search", DiverseBeamSearch])
def test_candidates_that_are_no_strategy(tmp_path, candidates):
    with pytest.raises(PlanError, match=r"takes a strategy, as DiverseBeamSearch\(num_candidates=4\), got"):
        trainer_of(tmp_path, objective="sampling", candidates=candidates)


def test_every_option_of_trl_is_taken_or_told_where_it_belongs():
    own = {option.name for option in dataclasses.fields(SysDPOConfig)}
    for option in dataclasses.fields(DPOConfig):
        if option.name not in own:
            with pytest.raises(PlanError, match=f"has no option '{option.name}': "):
                SysDPOConfig(**{option.name: None})
    assert not own & ELSEWHERE.keys()
    with pytest.raises(PlanError, match=r"'max_length': it belongs to the components, as in CausalLM\(.*max_length"):
        SysDPOConfig(max_length=512)
    with pytest.raises(PlanError, match="no option 'betta'; did you mean 'beta'"):
        SysDPOConfig(betta=0.1)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("beta", "0.1", "beta must be a number, got '0.1'"),
        ("beta", True, "beta must be a number, got True"),
        ("beta", None, "beta must be a number, got None"),
        ("learning_rate", "1e-5", "learning_rate must be a number, got '1e-5'"),
        ("max_steps", "3", "max_steps must be an integer, got '3'"),
        ("micro_batch_tokens", 2.5, "micro_batch_tokens must be an integer, got 2.5"),
        ("loss_weights", ["1"], r"loss_weights must be numbers, got \['1'\]"),
        ("loss_type", math.sqrt, r"must be a function loss\(scores, beta, label_smoothing\); <built-in function sqrt>"),
        (
            "loss_type",
            [math.sqrt],
            r"must be a function loss\(scores, beta, label_smoothing\); <built-in function sqrt>",
        ),
    ],
)
def test_values_of_another_type(tmp_path, option, value, message):
    with pytest.raises(PlanError, match=message):
        SysDPOConfig(output_dir=str(tmp_path), **{option: value})


def test_half_precision_on_a_cpu(tmp_path):
    with pytest.raises(PlanError, match=r"use bf16=True and use_cpu=True"):
        trainer_of(tmp_path, fp16=True)


@node(Categorical(["x", "y"], 2), name="route")
def route_features(question):
    return [float(question), 1.0]


@node(Categorical(["left", "right"], 1), name="answer")
def answer_features(question, route):
    return [1.0]


def routed() -> System:
    outline = System(question >> route_features, (question & route_features) >> answer_features)
    route, answer = Categorical(["x", "y"], 2), Categorical(["left", "right"], 1)
    with torch.no_grad():
        route.module.weight.fill_(1.0)
    return outline.with_components({"route": route, "answer": answer})


def test_logits_of_a_classifier_that_are_not_finite(tmp_path):
    plan = routed().compile()
    with pytest.raises(DataError, match="Node 'route', row 1: Categorical.*features or logits are not finite"):
        plan.sample({"question": ["1", "nan"]})
    for strategy in (DiverseBeamSearch(num_candidates=2), MonteCarlo(num_candidates=2)):
        with pytest.raises(DataError, match="Node 'route', row 1: .*not finite"):
            strategy.draw(plan, {"question": ["1", "inf"]})


def test_an_input_of_another_type():
    with pytest.raises(DataError, match="Row 1: input 'question' must be str, got int 3"):
        routed().compile().sample({"question": ["1", 3]})


def test_token_ids_that_the_model_has_no_embedding_for():
    component = CausalLM(llama(vocab_size=20), char_tokenizer(), max_new_tokens=2)

    @node(component)
    def answer(question):
        return question

    plan = System(question >> answer).compile()
    with pytest.raises(DataError, match=r"Node 'answer', row 1: .*prompt has the token id 28, but the model has 20"):
        plan.sample({"question": ["abc", "z"]})
    trace = plan.sample({"question": ["abc"]}, seed=0).updated({"answer": component.observe(["z"])})
    with pytest.raises(DataError, match=r"Node 'answer', row 0: .*completion has the token id 28.*has 20"):
        plan.log_probs(trace)


def test_what_of_a_config_is_still_random(tmp_path):
    @node(CausalLM(llama(attention_dropout=0.5), char_tokenizer(), max_new_tokens=4))
    def answer(question):
        return question

    data = [{"question": "abc", "chosen": "yes we", "rejected": "no no"}]
    system = System(question >> answer)
    trainer = trainer_of(tmp_path, system, data=data, max_steps=1, disable_dropout=False)
    with pytest.raises(TrainingError, match=r"'answer'.*random in training: set \{'attention_dropout': 0.5\} to 0"):
        trainer.train()


@pytest.mark.parametrize("name", ["DDPMWuerstchenScheduler", "RePaintScheduler", "ScoreSdeVeScheduler"])
def test_schedulers_that_cannot_sample_or_score(name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)()
    with pytest.raises(PlanError, match=f"{name} cannot sample here.*Pass another scheduler"):
        denoise(lambda x, t: x, scheduler, (1, 2, 2), [0], num_inference_steps=2, device=torch.device("cpu"))
    if name != "RePaintScheduler":
        with pytest.raises(PlanError, match=f"{name} cannot score"):
            ForwardProcess.of(scheduler)


def test_a_function_of_the_script_that_runs_is_said_when_saving(tmp_path):
    system = judged()
    function = system["answer"].function
    assert isinstance(system["answer"].component.module, nn.Module)
    before = function.__module__
    function.__module__ = "__main__"
    try:
        with pytest.warns(UserWarning, match=r"nodes \['answer'\] stand in the script.*system.load\(folder\)"):
            system.save_pretrained(tmp_path / "saved")
    finally:
        function.__module__ = before
