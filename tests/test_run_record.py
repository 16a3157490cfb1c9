"""The record of a training on disk, the gradient norms by node in its log, and trackers that get the same numbers."""

import json
import logging
import math
import random
import sys
import types

import numpy
import pytest
import torch
from fault_runs import TrainerCallback
from test_trainer import config, log_of, lora, weights
from trained_systems import rows, two_llms

from sysdag import DiverseBeamSearch, MonteCarlo, PlanError, SysDPOConfig, SysDPOTrainer, System, Trace, TrainingError
from sysdag.components import CausalLM
from sysdag.data.encoding import encode_pairs
from sysdag.data.preferences import PreferencePair
from sysdag.engine.replay import accumulate_gradients
from sysdag.files import run_files
from sysdag.files.run_files import read_log, read_run
from sysdag.saving.serialization import system_to_dict
from sysdag.traces.cells import Draw
from sysdag.training.resume import pairs_hash


def trainer_of(folder, *, system=None, train=None, evaluation=None, callbacks=None, candidates=None, **options):
    return SysDPOTrainer(
        system or two_llms(), config(folder, **options), candidates=candidates, train_dataset=train or rows(8),
        eval_dataset=evaluation, callbacks=callbacks,
    )  # fmt: skip


class StopAt(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


def test_a_run_leaves_what_it_was_made_of_and_how_it_ended(tmp_path):
    trainer = trainer_of(
        tmp_path, objective="sampling", candidates=MonteCarlo(num_candidates=3, temperature=1.5), evaluation=rows(4),
        eval_strategy="steps", eval_steps=3, max_steps=3, hub_token="hf_verysecret", beta=0.2,
        accelerator_config={"split_batches": False}, nodes={"answer": {"learning_rate": 1e-4}},
    )  # fmt: skip
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.append(json.loads((tmp_path / "run.json").read_text())["status"])

    trainer.add_callback(Look())
    trainer.train()
    text = (tmp_path / "run.json").read_text()
    run = json.loads(text)
    assert seen == ["running"] * 3
    assert run["status"] == "finished"
    assert run["started"] <= run["finished"]
    assert run["format_version"] == 1
    assert run["system"] == system_to_dict(trainer.system)
    assert run["mermaid"] == trainer.system.compile().to_mermaid()
    assert run["config"]["beta"] == 0.2
    assert run["config"]["nodes"] == {"answer": {"learning_rate": 1e-4}}
    assert "hf_verysecret" not in text
    assert "hub_token" not in run["config"]
    assert "micro_batch_tokens" in run["config"]  # tokens that are no secret
    assert run["candidates"] == {
        "strategy": "monte_carlo", "num_candidates": 3, "temperature": 1.5, "top_p": None, "top_k": None,
        "distinct": True,
    }  # fmt: skip
    assert run["versions"]["torch"] == torch.__version__
    pairs = encode_pairs(trainer.system.compile(), rows(8), "sampling")
    assert run["data"]["train"] == {"pairs": 8, "sha256": pairs_hash(pairs)}
    assert run["data"]["eval"]["pairs"] == 4
    assert run["data"]["eval"]["sha256"] != run["data"]["train"]["sha256"]


def test_the_hash_of_the_data_is_that_of_its_content_in_order():
    plan = two_llms().compile()
    pairs = encode_pairs(plan, rows(4), "direct")
    again = encode_pairs(plan, rows(4), "direct")
    assert pairs_hash(pairs) == pairs_hash(again)
    assert len({pairs_hash(pairs), pairs_hash(pairs[::-1]), pairs_hash(pairs[:3])}) == 3


def test_the_hash_of_the_data_tells_records_apart():
    ids = ([1, 23], [12, 3], [123], [1, -23], [1], [True], [1.0], ["1"], [[1]], [], "1 23", [1, 23, None])
    pairs = [PreferencePair({}, {"a": Draw("", {"token_ids": each})}, {}) for each in ids]
    assert len({pairs_hash([pair]) for pair in pairs}) == len(ids)
    assert pairs_hash([pairs[0]]) == pairs_hash([PreferencePair({}, {"a": Draw("", {"token_ids": (1, 23)})}, {})])


def test_every_log_of_the_trainer_is_a_line(tmp_path):
    trainer = trainer_of(tmp_path, evaluation=rows(4), eval_strategy="steps", eval_steps=2, max_steps=4)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate(metric_key_prefix="last")
    lines = read_log(tmp_path)
    # `train` starts a history of its own, so the evaluation before it is in the record alone
    assert "eval_rewards/margins" in lines[0]
    assert lines[0]["step"] == 0
    expected = [{"step": entry.pop("step"), **entry} for entry in (dict(e) for e in trainer.state.log_history)]
    assert lines[1:] == expected
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert {
        "learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "nodes/draft/rewards/margins", "nodes/draft/grad_norm", "nodes/answer/grad_norm", "epoch",
    } <= steps[0].keys()  # fmt: skip
    assert "last_nodes/answer/rewards/margins" in lines[-1]


def test_a_number_that_is_not_finite_is_null(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    trainer.log({"a": float("inf"), "b": torch.tensor(2.5), "c": numpy.float32(float("nan")), "d": "text"})
    assert (
        (tmp_path / "log.jsonl")
        .read_text()
        .splitlines()[-1]
        .endswith('"a": null, "b": 2.5, "c": null, "d": "text", "epoch": 0.5}')
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingError("node 'draft' exploded\nmore"), "failed: TrainingError: node 'draft' exploded"),
        (KeyboardInterrupt(), "failed: interrupted"),
        (ZeroDivisionError("division"), "failed: ZeroDivisionError: division"),
    ],
)
def test_a_run_that_fails_says_why_and_its_error_comes_through(tmp_path, error, status):
    trainer = trainer_of(tmp_path, callbacks=[StopAt(2, error)], log_traces=1)
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    run = read_run(tmp_path)
    assert run["status"] == status
    assert run["finished"] >= run["started"]
    assert not (tmp_path / "traces" / "after.jsonl").exists()


def test_a_resumed_run_keeps_its_start_and_one_line_for_each_step(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "log_traces": 2}
    whole = trainer_of(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "parts", callbacks=[StopAt(5, KeyboardInterrupt())], **options).train()
    folder = tmp_path / "parts"
    assert [line["step"] for line in read_log(folder)] == [1, 2, 3, 4]
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + '\n{"step": 6, "lo')  # what a killed process leaves
    run = read_run(folder) | {"started": "2001-01-01T00:00:00+00:00"}
    (folder / "run.json").write_text(json.dumps(run))
    before = (folder / "traces" / "before.jsonl").read_bytes()
    trainer_of(folder, **options).train(resume_from_checkpoint=True)
    run = read_run(folder)
    assert run["started"] == "2001-01-01T00:00:00+00:00"
    assert [entry["step"] for entry in run["resumed"]] == [4]
    assert run["status"] == "finished"
    assert (folder / "traces" / "before.jsonl").read_bytes() == before

    def losses(folder):
        return [(line["step"], line["loss"]) for line in read_log(folder) if "loss" in line]

    assert losses(folder) == losses(tmp_path / "whole")
    trainer_of(folder, **options).train()  # anew: nothing of the old run is left
    run = read_run(folder)
    assert run["started"] > "2001-01-01T00:00:00+00:00"
    assert run["resumed"] == []
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_refused_checkpoint_leaves_the_record_of_the_run_that_made_it(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, **options).train()
    before = (tmp_path / "run.json").read_bytes(), (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another training"):
        trainer_of(tmp_path, beta=0.7, **options).train(resume_from_checkpoint=True)
    assert ((tmp_path / "run.json").read_bytes(), (tmp_path / "log.jsonl").read_bytes()) == before


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_training_with_traces_is_bit_for_bit_the_one_without(tmp_path, objective, monkeypatch):
    ends, logs, drawn = [], [], []
    sample = CausalLM.sample

    def careless(self, *args, **kwargs):
        torch.rand(1), random.random(), numpy.random.rand()
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "sample", careless)
    for count in (0, 3):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        system = two_llms(lora(), tmp_path / "base")
        candidates = MonteCarlo(num_candidates=3) if objective == "sampling" else None
        folder = tmp_path / str(count)
        trainer = trainer_of(
            folder, system=system, objective=objective, candidates=candidates, log_traces=count, evaluation=rows(6),
            learning_rate=0.05, disable_dropout=False,
        )  # fmt: skip
        trainer.train()
        ends.append(weights(system))
        logs.append(log_of(trainer, "loss") + log_of(trainer, "rewards/margins"))
        drawn.append((torch.rand(2).tolist(), random.random(), numpy.random.rand()))
        assert (folder / "traces").exists() == bool(count)
    assert logs[0] == logs[1]
    assert drawn[0] == drawn[1]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    before, after = (Trace.from_jsonl(tmp_path / "3" / "traces" / f"{name}.jsonl") for name in ("before", "after"))
    assert before["question"] == after["question"] == [row["question"] for row in rows(3)]
    assert before["answer"] == two_llms(lora(), tmp_path / "base").compile().sample(
        {"question": before["question"]}, seed=42
    )["answer"]  # fmt: skip
    assert [before["draft"], before["answer"]] != [after["draft"], after["answer"]]


def test_traces_are_of_distinct_prompts_and_of_no_more_than_there_are(tmp_path):
    train = [*rows(1), *rows(3)]
    for evaluation, expected in (({"near": rows(1), "far": rows(2)}, rows(2)), (None, rows(3))):
        trainer_of(tmp_path, train=train, max_steps=1, log_traces=5, evaluation=evaluation).train()
        trace = Trace.from_jsonl(tmp_path / "traces" / "before.jsonl")
        assert trace["question"] == [row["question"] for row in expected]


def test_a_system_that_fails_after_training_does_not_lose_it(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=1, log_traces=1)

    class Break(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            trainer.system["draft"].component.sample = lambda *args, **kwargs: 1 / 0

    trainer.add_callback(Break())
    trainer.train()
    assert read_run(tmp_path)["status"] == "finished"
    assert "traces/after.jsonl is not: ZeroDivisionError: division by zero" in caplog.text


@pytest.mark.parametrize("broken", ["log", "run"])
def test_a_disk_that_fails_under_the_record_is_reported_once_and_training_ends_well(
    tmp_path, caplog, monkeypatch, broken
):
    def fail(*args):
        raise OSError(28, "No space left on device")

    trainer = trainer_of(tmp_path)
    if broken == "log":
        monkeypatch.setattr(run_files.atomic, "append_whole", fail)
    else:
        monkeypatch.setattr(run_files.atomic, "write_text", fail)
    with caplog.at_level(logging.WARNING, "sysdag"):
        trainer.train()
    assert trainer.state.global_step == 6
    messages = [record.getMessage() for record in caplog.records if record.name == "sysdag.training.run_record"]
    assert len(messages) == 1
    assert f"The record of this run in {tmp_path} is incomplete: OSError: No space left on device" in messages[0]


@pytest.mark.parametrize(("batch", "accumulation", "engine"), [(4, 1, "one_pass"), (2, 2, "two_pass")])
def test_the_gradient_norms_are_those_of_the_accumulated_gradient_before_clipping(
    tmp_path, batch, accumulation, engine
):
    trainer = trainer_of(
        tmp_path, train=rows(4), max_steps=2, per_device_train_batch_size=batch, max_grad_norm=1e-3,
        gradient_accumulation_steps=accumulation, engine=engine, optim="sgd",
    )  # fmt: skip
    trainer.train()
    by_hand = trainer_of(tmp_path / "hand", train=rows(4), engine="one_pass")
    by_hand.model.train()
    accumulate_gradients(by_hand.model, by_hand.model(by_hand.train_dataset, None, 0))
    total = 0.0
    for name in ("draft", "answer"):
        module = by_hand.model.components[name].module
        squares = sum(float(p.grad.double().pow(2).sum()) for p in module.parameters() if p.grad is not None)
        assert log_of(trainer, f"nodes/{name}/grad_norm")[0] == pytest.approx(math.sqrt(squares), rel=1e-4)
        total += squares
    assert log_of(trainer, "grad_norm")[0] == pytest.approx(math.sqrt(total), rel=1e-4)
    assert len(log_of(trainer, "nodes/draft/grad_norm")) == 2


def test_a_node_that_does_not_train_and_an_adapters_base_have_no_part_in_the_norms(tmp_path):
    system = two_llms(lora(), tmp_path / "base")
    trainer = trainer_of(tmp_path, system=system, nodes={"draft": {"trainable": False}}, max_steps=3, logging_steps=3)
    trainer.train()
    assert log_of(trainer, "nodes/draft/grad_norm") == []
    assert log_of(trainer, "nodes/answer/grad_norm") == pytest.approx(log_of(trainer, "grad_norm"), rel=1e-6)


def test_traces_of_sharded_models_are_refused(tmp_path, monkeypatch):
    create = SysDPOTrainer.create_accelerator_and_postprocess

    def sharded(self):
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(SysDPOTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(PlanError, match=r"log_traces does not serve sharded models \(FSDP\)"):
        trainer_of(tmp_path, log_traces=1)
    trainer_of(tmp_path)
    with pytest.raises(PlanError, match="log_traces must be 0 or more, got -1"):
        SysDPOConfig(output_dir=str(tmp_path), log_traces=-1)


def test_the_record_of_a_saved_and_loaded_system_is_the_same(tmp_path):
    first = two_llms()
    first.save_pretrained(tmp_path / "saved")
    trainer_of(tmp_path / "a", system=System.from_pretrained(tmp_path / "saved"), max_steps=1).train()
    assert read_run(tmp_path / "a")["system"] == system_to_dict(first)


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(
        tmp_path, report_to=["tensorboard"], objective="sampling", candidates=DiverseBeamSearch(num_candidates=2),
        evaluation=rows(4), eval_strategy="steps", eval_steps=2, max_steps=4,
    )  # fmt: skip
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    compared = 0
    for line in read_log(tmp_path):
        for name, value in line.items():
            if name in ("step", "epoch") or not isinstance(value, float):
                continue
            shown = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            found = [event.value for event in events.Scalars(shown) if event.step == line["step"]]
            assert any(each == pytest.approx(value, rel=1e-5, abs=1e-6) for each in found), name
            compared += 1
    assert compared > 50
    assert {"train/nodes/draft/grad_norm", "train/candidates/coverage", "eval/nodes/answer/rewards/margins"} <= set(
        events.Tags()["scalars"]
    )


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_get_them_too(tmp_path, monkeypatch, tracker):
    """A stand-in with the functions of the tracker that transformers' callback calls."""
    logged = []
    module = types.ModuleType(tracker)
    module.__spec__ = types.SimpleNamespace(name=tracker)
    module.__version__ = "1.0"
    module.run = types.SimpleNamespace(_label=lambda **given: None, summary={})
    module.config = types.SimpleNamespace(update=lambda *given, **options: None)
    module.context_vars = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=lambda: None))
    module.init = module.finish = lambda *given, **options: None
    module.log = lambda values, **options: logged.append(values)
    errors = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = type("ConfigError", (Exception,), {})
    for name, each in {
        tracker: module, "wandb.sdk": types.ModuleType("wandb.sdk"), "wandb.sdk.lib": types.ModuleType("wandb.sdk.lib"),
        "wandb.sdk.lib.config_util": errors,
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, each)
    trainer = trainer_of(
        tmp_path, report_to=[tracker], evaluation=rows(4), eval_strategy="steps", eval_steps=3, max_steps=3
    )
    trainer.train()
    steps = [line for line in read_log(tmp_path) if "loss" in line]
    sent = [values for values in logged if "train/loss" in values]
    assert len(sent) == 3
    for line, values in zip(steps, sent, strict=True):
        for name, value in line.items():
            if name != "step":
                assert values[f"train/{name}"] == value
    assert any("eval/rewards/margins" in values for values in logged)
