"""Faults, for real: processes that are killed, disks and memory that run out, numbers that are not finite."""

import json
import multiprocessing
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import fault_runs
import pytest
import torch
from datasets import Dataset
from fault_runs import CASES, STEPS, message_of, run, save_over, trainer_of, two_passes
from safetensors.torch import load_file
from test_two_pass import assert_same
from tiny import char_tokenizer, llama
from trained_systems import rows, two_llms
from transformers.trainer_utils import get_last_checkpoint

from sysdag import Input, SerializationError, SysdagError, SysDPOConfig, System, TrainingError, node
from sysdag.components import CausalLM
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import ObjectiveOptions
from sysdag.training.job import train
from sysdag.training.train_options import TrainJob

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and limits processes as Linux does")
SAMPLING, *_, DIRECT = CASES


@pytest.fixture(scope="module")
def processes():
    """Starts processes with torch and transformers already imported."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the server looks for what it imports at first
        patch.setenv(
            "MALLOC_MMAP_THRESHOLD_", str(1 << 20)
        )  # larger tensors take address space, never what is left over
        context.set_forkserver_preload(["fault_runs"])
        yield context


def ended(processes, function, *args, **kwargs):
    """The exit code of a process that runs the function."""
    process = processes.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join()
    return process.exitcode


def error_of(processes, tmp_path, function, *args, **kwargs):
    """Type and text of the error that the function raises in a process of its own."""
    file = tmp_path / "error.txt"
    assert ended(processes, message_of, file, function, *args, **kwargs) == 0
    return file.read_text()


def content(checkpoint):
    """All that decides how a training goes on, each part in a form that compares bit for bit."""
    state = json.loads((checkpoint / "sysdag_state.json").read_text())
    found = {"engine": state["engine"], "ages": state["candidates"], "means": state["means"], "shift": state["shift"]}
    for file in sorted(checkpoint.rglob("*")):
        name = str(file.relative_to(checkpoint))
        if file.suffix == ".safetensors":
            found |= {f"{name}: {key}": value for key, value in load_file(file).items()}
        elif file.suffix == ".jsonl":
            found[name] = file.read_text()
        elif file.name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            found |= flat(torch.load(file, weights_only=False), name)
    return found


def flat(value, name):
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}[{key}]").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for place, part in enumerate(value) for k, v in flat(part, f"{name}[{place}]").items()}
    return {name: value}


def assert_same_checkpoint(found, expected):
    found, expected = content(found), content(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = (
            torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value))
            if hasattr(value, "dtype")
            else found[name] == value
        )
        assert same, name
    return expected


FAULTS = [
    ("event", "on_pre_optimizer_step", 0),  # nothing is saved yet: the next run starts anew
    ("event", "on_step_end", 2),  # after an update that no checkpoint holds
    ("torch.save", 2),  # the optimizer's file is cut off
    ("os.replace", 4),  # the system is half in its place inside the unfinished checkpoint
    ("os.replace", 7),  # the checkpoint is complete, but not yet known to be
    ("os.replace", 8),  # it is, and the next process has to move it
    ("event", "on_save", 4),
    ("event", "on_pre_optimizer_step", 4),
    ("torch.save", 1),
    ("event", "on_substep_end", 5),
]


@pytest.mark.parametrize("case", CASES)
def test_a_training_killed_again_and_again_ends_like_one_that_was_not(case, processes, tmp_path):
    assert ended(processes, run, tmp_path / "whole" / "out", case) == 0
    expected = tmp_path / "whole" / "out" / f"checkpoint-{STEPS}"
    folder = tmp_path / "killed" / "out"
    died = []
    for fault in FAULTS:
        code = ended(processes, run, folder, case, fault, get_last(folder) is not None)
        died.append(code == -signal.SIGKILL)
        assert code in (-signal.SIGKILL, 0)
    accumulates = CASES[case].get("gradient_accumulation_steps", 1) > 1
    assert died == [True] * (len(FAULTS) - 1) + [accumulates]  # without accumulation there is no substep to die at
    assert ended(processes, run, folder, case, None, True) == 0
    same = assert_same_checkpoint(folder / f"checkpoint-{STEPS}", expected)
    if "sampling" in case:
        assert same["ages"]
        assert "candidates.jsonl" in same
    assert (json.loads((expected / "sysdag_state.json").read_text())["engine"]["keeps_graphs"]) == ("auto" in case)
    assert not list(folder.glob(".sav*"))


def get_last(folder):
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


@pytest.mark.parametrize("number", range(1, 8))
def test_a_kill_at_any_move_of_a_save_leaves_one_of_two_systems(number, processes, tmp_path):
    old = two_llms()
    old.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    code = ended(processes, save_over, tmp_path, number)
    loaded = [System.from_pretrained(tmp_path)[name].component.module.lm_head.weight for name in ("draft", "answer")]
    before = [old[name].component.module.lm_head.weight for name in ("draft", "answer")]
    is_old = [torch.equal(ours, theirs) for ours, theirs in zip(loaded, before, strict=True)]
    is_new = [bool((weight == 0.5).all()) for weight in loaded]
    assert all(is_old) or all(is_new)
    assert all(is_new) == (number > 1)  # from the first move on, the new one counts
    assert code == (-signal.SIGKILL if number < 7 else 0)
    old.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer", "draft", "notes.txt", "system.json"]


def test_save_total_limit_keeps_the_last_until_the_next_is_complete(processes, tmp_path):
    folder = tmp_path / "out"
    assert ended(processes, run, folder, DIRECT, ("torch.save", 11), save_total_limit=1) == -signal.SIGKILL
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (folder / ".saving" / "checkpoint-3").is_dir()
    assert ended(processes, run, folder, DIRECT, None, True, save_total_limit=1) == 0
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [f"checkpoint-{STEPS}"]


def test_the_best_checkpoint_is_remembered_by_its_final_place(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_of(tmp_path / "out", DIRECT, max_steps=2, save_total_limit=1, eval_data=rows(4), **best)
    trainer.train()
    place = str(tmp_path / "out" / "checkpoint-2")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert trainer.state.best_model_checkpoint == state["best_model_checkpoint"] == place


def test_a_checkpoint_that_is_written_again_is_never_gone(processes, tmp_path):
    """A second training into the same folder writes checkpoint-1 anew, and dies between its two moves."""
    folder = tmp_path / "out"
    assert ended(processes, run, folder, DIRECT, max_steps=1) == 0
    moves = count_moves(tmp_path)
    assert ended(processes, run, folder, DIRECT, ("os.replace", moves + 2), max_steps=1) == -signal.SIGKILL
    assert not (folder / "checkpoint-1").exists()
    assert (
        ended(processes, run, folder, DIRECT, None, True, max_steps=1) == 0
    )  # which finishes the move, and has no more to do
    assert (folder / "checkpoint-1" / "trainer_state.json").exists()


def count_moves(tmp_path):
    """Calls of `os.replace` of a training of one step before its checkpoint is committed."""
    calls, original = [], fault_runs.os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda source, target: (calls.append(str(target)), original(source, target)))
        trainer_of(tmp_path / "counted" / "out", DIRECT, max_steps=1).train()
    saves = [target for target in calls if not fault_runs.is_of_the_record(target)]
    return next(place for place, target in enumerate(saves, start=1) if target.endswith("out/.saved"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoint of a step of Sampling."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    trainer_of(folder, SAMPLING, max_steps=1).train()
    return folder


def refuses(trained, tmp_path, message, change=None, **changes):
    """That resuming from a copy of the checkpoint, with changes, is refused and changes no weight."""
    folder = tmp_path / "out"
    shutil.copytree(trained.parent, tmp_path, dirs_exist_ok=True)
    if change is not None:
        change(folder / "checkpoint-1")
    trainer = trainer_of(folder, SAMPLING, **changes)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(SerializationError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters())
    return trainer


def test_a_checkpoint_of_another_objective_is_refused(trained, tmp_path):
    message = r"checkpoint-1 was made by another training. option beta: 0.1 in the checkpoint, 0.2 now. .*check_resume"
    refuses(trained, tmp_path, message, beta=0.2)
    refuses(trained, tmp_path, "option loss_type: .*sigmoid.*in the checkpoint, .*ipo.* now", loss_type="ipo")
    refuses(trained, tmp_path, "node 'answer', option trainable: True in the checkpoint, False now",
            nodes={"answer": {"trainable": False}})  # fmt: skip
    trainer = trainer_of(tmp_path / "out", SAMPLING, beta=0.2, check_resume=False, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    trainer = trainer_of(tmp_path / "out", SAMPLING, beta=0.2, learning_rate=1e-5, engine="two_pass", max_steps=3)
    trainer.train(resume_from_checkpoint=True)  # neither changes the objective


def test_a_checkpoint_of_other_data_is_refused(trained, tmp_path):
    other = rows(12)
    other[7]["chosen_intermediates"] = {"draft": "u"}
    other[7]["rejected"] = "c"
    message = "sha256 of the training pairs: '[0-9a-f]{64}' in the checkpoint, '[0-9a-f]{64}' now"
    refuses(trained, tmp_path, message, data=other)
    refuses(trained, tmp_path, "number of training pairs: 12 in the checkpoint, 13 now", data=rows(13))
    refuses(trained, tmp_path, "seed of the data's order: 42 in the checkpoint, 7 now", data_seed=7)


def test_a_checkpoint_of_other_models_is_refused(trained, tmp_path):
    base = tmp_path / "another" / "base"
    base.parent.mkdir()
    lora = fault_runs.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=16)
    system = two_llms(lora, base).with_components({"draft": CausalLM(llama(5), char_tokenizer(), max_new_tokens=4)})
    refuses(trained, tmp_path, "node 'draft', hash of its reference's weights: .* now", system=system)
    wider = fault_runs.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_alpha=16)
    refuses(trained, tmp_path, r"node 'answer', shape of the trained tensor .*lora_A.*\(4, 32\).*\(8, 32\)",
            system=two_llms(wider, base))  # fmt: skip


def test_a_checkpoint_with_a_damaged_file_is_refused(trained, tmp_path):
    name = "adapter_model.safetensors"
    refuses(trained, tmp_path, f"incomplete: the file answer/{name} of node 'answer' is missing. Resume from another",
            lambda folder: (folder / "answer" / name).unlink())  # fmt: skip
    refuses(trained, tmp_path, r"the file draft/model.safetensors of node 'draft' has 100 bytes, expected \d+",
            lambda folder: (folder / "draft" / "model.safetensors").write_bytes(b"a" * 100))  # fmt: skip
    shutil.copy(trained / "checkpoint-1" / "draft" / "model.safetensors", tmp_path / "out" / "checkpoint-1" / "draft")
    refuses(trained, tmp_path, "the file optimizer.pt of the trainer is missing",
            lambda folder: (folder / "optimizer.pt").unlink())  # fmt: skip
    refuses(trained, tmp_path, "has no sysdag_state.json.*check_resume=False",
            lambda folder: (folder / "sysdag_state.json").unlink())  # fmt: skip
    refuses(trained, tmp_path, "sysdag_state.json is damaged",
            lambda folder: (folder / "sysdag_state.json").write_text("{"))  # fmt: skip


def test_an_adapter_that_cannot_be_read_is_named_also_without_the_check(trained, tmp_path):
    def damage(folder):
        (folder / "answer" / "adapter_model.safetensors").write_bytes(b"no tensors")

    refuses(trained, tmp_path, "Node 'answer': its weights cannot be loaded from .*checkpoint-1/answer", damage,
            check_resume=False)  # fmt: skip


def one_llm(model):
    @node(CausalLM(model, char_tokenizer(), max_new_tokens=4))
    def answer(question):
        return question

    return System(Input("question") >> answer)


PAIRS = [{"question": "ab", "chosen": f"{i}", "rejected": "no"} for i in range(7)]
PAIRS.append({"question": "ab", "chosen": "0qx1", "rejected": "no"})


@pytest.mark.parametrize("side", ["policy", "reference"])
def test_a_score_that_is_not_finite_is_named_down_to_its_token(side, tmp_path):
    """The embedding of `x` is nan, so what follows it is."""
    system = one_llm(llama())
    trainer = trainer_of(tmp_path / "out", DIRECT, system=system, data=PAIRS, per_device_train_batch_size=8)
    component = system["answer"].component if side == "policy" else trainer.model.references["answer"]
    spoiled = component.tokenizer("x")["input_ids"][0]
    with torch.no_grad():
        component.module.model.embed_tokens.weight[spoiled] = float("nan")
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    message = rf"'answer': the {side}'s score of row 7 \(question='ab'\) is nan, from token 4 of 5, '1' \(id \d+\) on"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def not_finite(component, text):
    with torch.no_grad():
        component.module.model.embed_tokens.weight[component.tokenizer(text)["input_ids"][0]] = float("nan")


def test_a_score_that_is_not_finite_is_named_by_its_row_in_the_file(tmp_path, monkeypatch):
    """Rows before it are dropped, so that its number among the pairs is another one."""
    same = {"question": "ab", "chosen": "2", "rejected": "2"}
    lines = [*PAIRS[:2], same, *PAIRS[2:7], same, {"question": "cde" * 40, "chosen": "0qx1", "rejected": "no"}]
    (tmp_path / "pairs.jsonl").write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))
    system = one_llm(llama())
    not_finite(system["answer"].component, "x")
    args = SysDPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], per_device_train_batch_size=8)
    job = TrainJob(system=system, dataset=str(tmp_path / "pairs.jsonl"), args=args)
    with pytest.raises(
        TrainingError, match=r"score of row 9 \(line 11\) \(question='cdecde.{0,70}\) is nan, from token"
    ):
        train(job, lambda text: None)


def test_a_score_that_is_not_finite_is_named_by_its_row_in_columns_and_in_evaluations(tmp_path):
    table = [*PAIRS[:3], {**PAIRS[3], "rejected": PAIRS[3]["chosen"]}, *PAIRS[4:]]
    system = one_llm(llama())
    trainer = trainer_of(tmp_path / "out", DIRECT, system=system, data=PAIRS[:4], eval_data=Dataset.from_list(table))
    not_finite(system["answer"].component, "x")
    with pytest.raises(TrainingError, match=r"score of row 7 \(question='ab'\) is nan"):
        trainer.evaluate()


def test_pairs_that_were_encoded_before_are_named_by_their_place(tmp_path):
    system = one_llm(llama())
    pairs = [replace(pair, row=None) for pair in encode_pairs(system.compile(), PAIRS, "direct")]
    not_finite(system["answer"].component, "x")
    with pytest.raises(TrainingError, match=r"score of row 7 \(question='ab'\) is nan"):
        trainer_of(tmp_path / "out", DIRECT, system=system, data=pairs).train()
    model = SystemModel(system.compile(), ObjectiveOptions())
    with pytest.raises(TrainingError, match=r"score of pair 2 of the batch \(question='ab'\) is nan"):
        model(pairs[5:])


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_reaches_no_weight(max_grad_norm, tmp_path):
    trainer = trainer_of(tmp_path / "out", DIRECT, max_grad_norm=max_grad_norm)
    layer = trainer.model.components["answer"].module.model.layers[1].mlp.up_proj
    layer.weight.register_hook(lambda gradient: gradient * float("inf") if trainer.state.global_step == 1 else gradient)
    kept = {}

    class Keep(fault_runs.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            kept.update({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})

    trainer.add_callback(Keep())
    message = r"Node 'answer': the norm of its gradient is not finite \(tensor 'model.layers.1.mlp.up_proj.weight'\)"
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(kept[name], parameter) for name, parameter in trainer.model.named_parameters())


def test_a_full_disk_ends_in_a_message_and_leaves_the_last_checkpoint(processes, tmp_path):
    """A limit on the size of files, which the operating system enforces at the write."""
    folder = tmp_path / "out"
    assert ended(processes, run, folder, SAMPLING, max_steps=2) == 0
    for limit, case in ((200_000, "optimizer"), (60_000, "weights")):
        text = error_of(processes, tmp_path, run, folder, SAMPLING, ("file size", limit), True)
        assert text.startswith("SerializationError: "), text
        assert f"The checkpoint of step 3 could not be written to {folder}/checkpoint-3: " in text, case
        assert "checkpoint-2 is complete: resume from there" in text
        assert "MiB are free on that disk" in text
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-1", "checkpoint-2"]
        assert json.loads((folder / "run.json").read_text())["status"].startswith("failed: SerializationError: The ch")
    assert ended(processes, run, folder, SAMPLING, None, True, max_steps=3) == 0


def test_memory_that_runs_out_ends_in_a_message_and_leaves_the_last_checkpoint(processes, tmp_path):
    folder = tmp_path / "out"
    text = error_of(processes, tmp_path, run, folder, DIRECT, ("memory", 4 << 20), wide=True, optim="adamw_torch")
    assert text.startswith("TrainingError: Memory ran out after step 2 "), text
    assert "checkpoint-2 is complete: resume from there" in text
    assert ended(processes, run, folder, DIRECT, None, True, wide=True, optim="adamw_torch", max_steps=3) == 0


def test_memory_that_runs_out_in_a_pass_makes_smaller_micro_batches_of_the_same_gradients(processes, tmp_path):
    assert ended(processes, two_passes, tmp_path / "found.pt") == 0
    (free, expected), (tight, found) = torch.load(tmp_path / "found.pt")
    assert_same(found, expected)
    assert tight < free


def test_a_node_named_like_a_folder_does_not_replace_it(tmp_path):
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer" / "thesis.txt").write_text("years of work")
    system = two_llms()
    with pytest.raises(SerializationError, match="Node 'answer': .*answer exists and belongs to no system.*Rename"):
        system.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["answer"]
    assert (tmp_path / "answer" / "thesis.txt").read_text() == "years of work"
    trainer = trainer_of(tmp_path, DIRECT)
    with pytest.raises(SysdagError, match="Node 'answer'"):
        trainer.save_model()
    shutil.rmtree(tmp_path / "answer")
    trainer.save_model()
    trainer.save_model()  # the folder is the system's own now
    assert (tmp_path / "answer" / "model.safetensors").exists()


def test_what_the_engine_has_found_out_goes_on(tmp_path):
    """Smaller micro-batches after memory ran out, and what `auto` has measured or decided."""
    trainer = trainer_of(tmp_path / "out", DIRECT, engine="auto", max_steps=1)
    trainer.train()
    first = trainer.model.engine_state()
    assert first["graph_bytes"]["total"] > 0  # measured at the first step, to be decided on at the second
    trainer.model.budget.max_tokens = 77
    trainer._save_checkpoint(trainer.model, None)
    resumed = trainer_of(tmp_path / "out", DIRECT, engine="auto", max_steps=2)
    seen = []

    class Look(fault_runs.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            seen.append(resumed.model.engine_state())

    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=True)
    assert seen == [{**first, "max_tokens": 77}]
    assert resumed.model.budget.keeps_graphs
    other = trainer_of(tmp_path / "out", DIRECT, engine="auto", micro_batch_tokens=50, max_steps=3)
    other.train(resume_from_checkpoint=True)
    assert other.model.budget.max_tokens == 50  # a new choice of the user's counts


@pytest.mark.parametrize("case", [SAMPLING, DIRECT])
def test_a_training_that_is_resumed_logs_what_one_that_was_never_cut_off_does(case, tmp_path):
    """A log between two checkpoints, and the loss of the whole training, whose parts are those of each step."""
    options = {"logging_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}

    def logged(folder, every, resume=None):
        trainer = trainer_of(tmp_path / folder / "out", case, logging_steps=every, **options)
        output = trainer.train(resume_from_checkpoint=resume)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        times = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
        last = {k: v for k, v in trainer.state.log_history[-1].items() if k not in times}
        assert output.training_loss == output.metrics["train_loss"] == last["train_loss"]
        return lines, last

    by_step, whole = logged("each", 1)
    losses = [line["loss"] for line in by_step]
    assert whole["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-6)
    expected, last = logged("whole", 4)
    (line,) = expected
    for name in ("loss", "rewards/margins", "nodes/answer/rewards/margins"):
        assert line[name] == pytest.approx(sum(each[name] for each in by_step[:4]) / 4, rel=1e-5), name
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    found, resumed = logged("cut", 4, str(tmp_path / "cut" / "out" / "checkpoint-3"))
    assert (found, resumed) == (expected, last)
    _, after_the_last = logged("cut", 4, True)
    assert after_the_last["train_loss"] == last["train_loss"]


def test_an_adapter_starts_from_the_seed_and_from_nothing_else_that_was_drawn(tmp_path):
    """So a training that was killed before its first checkpoint is the same one when it begins anew."""

    def start(name, ambient, **options):
        case = next(case for case in CASES if case.startswith("direct, an adapter"))
        trainer = trainer_of(tmp_path / name / "out", case, ambient=ambient, **options)
        trainer.train()
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}

    first, again, other = start("a", 0), start("b", 1), start("c", 0, seed=7)
    assert any(".lora_A." in name for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)
