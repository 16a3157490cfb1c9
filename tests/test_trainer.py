import copy
import math

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from tiny import char_tokenizer, llama
from trained_systems import question, rows, two_llms
from transformers import AutoModelForCausalLM, EarlyStoppingCallback

from sysdag import DataError, DiverseBeamSearch, PlanError, SysDPOConfig, SysDPOTrainer, System, TrainingError, node
from sysdag.components import CausalLM


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return SysDPOConfig(**(defaults | options))


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=16)


def weights(system):
    return {
        f"{n.name}.{name}": tensor.clone()
        for n in system.nodes
        for name, tensor in n.component.module.state_dict().items()
    }


def log_of(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("objective", "candidates"), [("direct", None), ("sampling", DiverseBeamSearch(num_candidates=2))]
)
def test_training_raises_the_margin_of_both_models_and_logs_by_node(tmp_path, objective, candidates):
    system = two_llms()
    before = weights(system)
    trainer = SysDPOTrainer(
        system, config(tmp_path, objective=objective, max_steps=12), candidates=candidates, train_dataset=rows(16)
    )
    trainer.train()
    losses = log_of(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0] - 0.05
    assert log_of(trainer, "rewards/margins")[-1] > 0.1
    assert log_of(trainer, "rewards/accuracies")[-1] == 1.0
    after = weights(system)
    for name in ("draft", "answer"):
        assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith(name))
        assert len(log_of(trainer, f"nodes/{name}/rewards/margins")) == 12
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= trainer.state.log_history[
        0
    ].keys()
    sampled = {"candidates/effective_sample_size", "candidates/coverage", "candidates/distinct_2"}
    assert (sampled <= trainer.state.log_history[0].keys()) == (objective == "sampling")


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        system = two_llms(lora(), tmp_path / "base")
        trainer = SysDPOTrainer(
            system,
            config(folder, objective="sampling", save_strategy="steps", save_steps=3, **options),
            candidates=DiverseBeamSearch(num_candidates=2),
            train_dataset=rows(12),
        )
        return system, trainer

    whole, trainer = run(tmp_path / "whole")
    trainer.train()
    _, trainer = run(tmp_path / "parts", max_steps=3)
    trainer.train()
    resumed, trainer = run(tmp_path / "parts")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    expected = weights(whole)
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    system = two_llms()
    reversed_rows = [
        {"question": r["question"], "chosen": r["rejected"], "rejected": r["chosen"],
         "chosen_intermediates": r["rejected_intermediates"], "rejected_intermediates": r["chosen_intermediates"]}
        for r in rows(8)
    ]  # fmt: skip
    trainer = SysDPOTrainer(
        system,
        config(
            tmp_path, max_steps=20, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
            load_best_model_at_end=True, metric_for_best_model="rewards/margins", greater_is_better=True,
        ),
        train_dataset=rows(16),
        eval_dataset=reversed_rows,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    margins = log_of(trainer, "eval_rewards/margins")
    assert len(margins) == 3  # the first is the best, since training opposes the evaluation's preferences
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(margins[0], abs=1e-6)


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_a_trained_system_is_saved_in_folders_its_libraries_load(tmp_path, peft_config):
    system = two_llms(peft_config, tmp_path / "base")
    trainer = SysDPOTrainer(system, config(tmp_path, max_steps=2, hub_token="hf_secret"), train_dataset=rows(8))
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert not any(b"hf_secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert trainer.args.hub_token == "hf_secret"
    loaded = System.from_pretrained(tmp_path / "saved")
    inputs = {"question": ["a1", "b2", "c3"]}
    trace = system.compile().sample(inputs, seed=3)
    assert loaded.compile().sample(inputs, seed=3)["answer"] == trace["answer"]
    for name, log_prob in loaded.compile().log_probs(trace).items():
        torch.testing.assert_close(log_prob, system.compile().log_probs(trace)[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "draft")
    torch.testing.assert_close(model.lm_head.weight, system["draft"].component.module.lm_head.weight)
    assert not list((tmp_path / "saved").rglob("*.bin")) or {p.name for p in (tmp_path / "saved").rglob("*.bin")} == {
        "training_args.bin"
    }


def test_each_node_has_its_learning_rate(tmp_path):
    system = two_llms()
    before = weights(system)
    args = config(tmp_path, max_steps=1, optim="sgd", nodes={"answer": {"learning_rate": 0.0}, "draft": {"beta": 0.2}})
    trainer = SysDPOTrainer(system, args, train_dataset=rows(4))
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0, 1e-3}
    grouped = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert grouped == len([p for p in trainer.model.parameters() if p.requires_grad])
    after = weights(system)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("answer"))
    assert not all(torch.equal(before[key], after[key]) for key in before if key.startswith("draft"))


def test_the_step_0_check_names_the_node_that_disagrees(tmp_path):
    system = two_llms()
    trainer = SysDPOTrainer(system, config(tmp_path), train_dataset=rows(8))
    with torch.no_grad():
        trainer.model.references["answer"].module.lm_head.weight.mul_(1.1)
    before = weights(system)
    with pytest.raises(TrainingError, match="'answer': policy and reference differ by .* nats before the first step"):
        trainer.train()
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(system).items())
    trainer.args.check_reference = False
    trainer.train()


def test_dropout_is_off_unless_asked_for(tmp_path):
    def losses(**options):
        model = llama(attention_dropout=0.0)
        model.model.layers[0].mlp.act_fn = torch.nn.Sequential(model.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.5))
        system = two_llms().with_components({"draft": CausalLM(model, char_tokenizer())})
        trainer = SysDPOTrainer(system, config(tmp_path, max_steps=1, **options), train_dataset=rows(4))
        trainer.train()
        return log_of(trainer, "loss")

    assert losses() == pytest.approx([math.log(2)], abs=1e-4)
    with pytest.raises(TrainingError, match="'draft'.*dropout may be on"):
        losses(disable_dropout=False)


def test_gradient_accumulation_gives_the_step_of_the_whole_batch(tmp_path):
    ends = []
    for batch, accumulation in ((4, 1), (2, 2)):
        system = two_llms()
        args = config(
            tmp_path, max_steps=2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            optim="sgd",
        )  # fmt: skip
        SysDPOTrainer(system, args, train_dataset=rows(8)).train()
        ends.append(weights(system))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


def test_several_evaluation_sets_are_reported_apart(tmp_path):
    trainer = SysDPOTrainer(
        two_llms(), config(tmp_path), train_dataset=rows(8), eval_dataset={"near": rows(4), "far": rows(6)}
    )
    metrics = trainer.evaluate()
    assert {"eval_near_loss", "eval_far_rewards/margins"} <= metrics.keys()
    assert metrics["eval_near_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_dataset_of_the_datasets_library_is_taken(tmp_path):
    trainer = SysDPOTrainer(two_llms(), config(tmp_path, max_steps=1), train_dataset=Dataset.from_list(rows(8)))
    trainer.train()
    assert log_of(trainer, "loss") == pytest.approx([math.log(2)], abs=1e-4)


def test_fp16_is_refused_where_it_would_be_passed_over(tmp_path):
    with pytest.raises(PlanError, match="fp16=True has no effect on a CPU; use bf16=True"):
        SysDPOTrainer(two_llms(), config(tmp_path, fp16=True), train_dataset=rows(2))


def test_mistakes_in_the_configuration_are_named(tmp_path):
    with pytest.raises(PlanError, match="'answer' has the unknown option 'lr'"):
        config(tmp_path, nodes={"answer": {"lr": 1.0}})
    with pytest.raises(PlanError, match="remove_unused_columns must be False"):
        config(tmp_path, remove_unused_columns=True)
    with pytest.raises(PlanError, match="takes a sysdag.System, got LlamaForCausalLM"):
        SysDPOTrainer(llama(), config(tmp_path))
    with pytest.raises(DataError, match="Row 1: chosen has no value of node 'draft'.*chosen_intermediates"):
        SysDPOTrainer(
            two_llms(), config(tmp_path), train_dataset=[rows(1)[0], {"question": "a", "chosen": "b", "rejected": "c"}]
        )
    for empty in ([], Dataset.from_list([])):
        with pytest.raises(DataError, match="train_dataset has no rows"):
            SysDPOTrainer(two_llms(), config(tmp_path), train_dataset=empty)
    splits = DatasetDict(train=Dataset.from_list(rows(2)))
    with pytest.raises(DataError, match=r"must be one dataset, got a dict of \['train'\]"):
        SysDPOTrainer(two_llms(), config(tmp_path), train_dataset=splits)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "label_smoothing_factor",
            0.1,
            "label_smoothing_factor=0.1 has no use here: .* label_smoothing is of preferences",
        ),
        ("bf16_full_eval", True, "bf16_full_eval=True has no use here: an evaluation would round the weights"),
        ("neftune_noise_alpha", 5.0, "neftune_noise_alpha=5.0 has no use here"),
        ("torch_empty_cache_steps", 2, "torch_empty_cache_steps=2 has no use here"),
        ("train_sampling_strategy", "group_by_length", "train_sampling_strategy='group_by_length' has no use here"),
        ("use_liger_kernel", True, "use_liger_kernel=True has no use here"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(tmp_path, name, value, message):
    with pytest.raises(PlanError, match=message):
        config(tmp_path, **{name: value})
    config(tmp_path, train_sampling_strategy="sequential")


@pytest.mark.parametrize(
    "name",
    ["compute_loss_func", "compute_metrics", "data_collator", "model_init", "peft_config",
     "preprocess_logits_for_metrics", "processing_class", "ref_model"],
)  # fmt: skip
def test_arguments_that_would_have_no_effect_are_refused(tmp_path, name):
    with pytest.raises(PlanError, match=f"^SysDPOTrainer takes no {name}: "):
        SysDPOTrainer(two_llms(), config(tmp_path), train_dataset=rows(2), **{name: print})


def test_a_checkpoint_of_another_system_is_refused(tmp_path):
    trainer = SysDPOTrainer(
        two_llms(), config(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=rows(4)
    )
    trainer.train()

    @node(CausalLM(llama(), char_tokenizer()))
    def other(question):
        return question

    args = copy.copy(config(tmp_path, max_steps=2))
    pairs = [{"question": "a", "chosen": "b", "rejected": "c"}]
    other_trainer = SysDPOTrainer(System(question >> other), args, train_dataset=pairs)
    with pytest.raises(ValueError, match="holds another system"):
        other_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
