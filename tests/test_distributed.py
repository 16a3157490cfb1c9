"""Two processes give the loss curve and the weights of one: DDP, FSDP2 and DeepSpeed by the trainer, over gloo."""

import importlib.util
import json
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
from pathlib import Path

import distributed_worker
import pytest
import test_train_command as command
import torch
from judged_answers import expected
from tiny import llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trained_systems import rows

from sysdag import PlanError, SysDPOConfig, SysDPOTrainer
from sysdag.engine.step import SystemModel
from sysdag.files.run_files import read_log
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.saving.serialization import load_weights

WORKER = Path(distributed_worker.__file__)
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
SAMPLING = command.BASIC | {"objective": "sampling", "report_to": "none"}


@pytest.fixture(scope="module")
def processes():
    """Starts processes with torch and transformers already imported, which takes longer than what they then do."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server looks for what it imports at first
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # they are to work on a CPU
        # A Python process has one such server, and another test's may run with what that test needs.
        multiprocessing.forkserver._forkserver._stop()
        context.set_forkserver_preload(["distributed_worker"])
        multiprocessing.forkserver.ensure_running()
    yield context
    multiprocessing.forkserver._forkserver._stop()


def run_two(processes, folder, how, options):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    two = [
        processes.Process(target=distributed_worker.one_of_two, args=(rank, port, how, str(folder), options))
        for rank in range(2)
    ]
    for process in two:
        process.start()
    ends = time.monotonic() + 120
    while any(process.exitcode is None for process in two) and time.monotonic() < ends:
        if any(process.exitcode for process in two):
            break  # the other would wait for it
        two[0].join(0.1)
        two[1].join(0.1)
    for process in two:
        process.kill()
        process.join()
    printed = "".join((folder / f"printed-{rank}").read_text()[-4000:] for rank in range(2))
    assert [process.exitcode for process in two] == [0, 0], printed
    return torch.load(folder / "result.pt")


def check_gradient_norms(folder, shown):
    """Those of each node in the log of two processes are those of one; DeepSpeed has none to show."""
    one, two = ([line for line in read_log(folder / name) if "loss" in line] for name in ("one", "two"))
    for ours, theirs in zip(one, two, strict=True):
        names = [name for name in ours if name.startswith("nodes/") and name.endswith("/grad_norm")]
        assert len(names) == 2
        for name in names:
            assert (name in theirs) == shown
            assert not shown or theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-6), name


zero = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("train", {"objective": "sampling", "lora": True, "tokens": 40}),
        ("train", {"accumulation": 2, "engine": "one_pass"}),
        ("train", {"engine": "auto", "gradient_checkpointing": True}),
        ("train", {"precompute_ref_log_probs": True}),
        ("train", {"grouped": True, "group_dro": True, "group_dro_step_size": 0.5, "accumulation": 2}),
        ("train", {"unpaired": True, "loss_type": "bco", "objective": "sampling"}),
        ("train", {"unpaired": True, "loss_type": "kto", "precompute_ref_log_probs": True, **SEQUENTIAL}),
        ("train", {"unpaired": True, "loss_type": "kto", "fsdp": "FULL_STATE_DICT", "tokens": 40}),
        ("train", {"fsdp": "FULL_STATE_DICT", "use_weighting": True, "ld_alpha": 0.5, "tokens": 40}),
        ("train", {"fsdp": "FULL_STATE_DICT", "loss_type": "simpo", "tokens": 40}),
        ("train", {"fsdp": "FULL_STATE_DICT", "sync_ref_model": True, "ref_model_sync_steps": 2, "tokens": 40}),
        ("train", {"fsdp": "SHARDED_STATE_DICT", "objective": "sampling", "lora": True, "tokens": 40}),
        ("train", {"fsdp": "FULL_STATE_DICT", "objective": "sampling", "accumulation": 2, "tokens": 40}),
        ("shard", {"lora": True, "checkpointing": True}),
        pytest.param("train", {"deepspeed": True, "objective": "sampling", "lora": True, "tokens": 40}, marks=zero),
        pytest.param("train", {"deepspeed": True, "accumulation": 2}, marks=zero),
    ],
    ids=[
        "ddp-sampling-lora",
        "ddp-accumulation-one-pass",
        "ddp-auto-checkpointing",
        "ddp-precomputed",
        "ddp-worst-group",
        "ddp-bco-sampling",
        "ddp-kto-precomputed",
        "fsdp2-kto",
        "fsdp2-weighted",
        "fsdp2-without-a-reference",
        "fsdp2-synced",
        "fsdp2-sampling-lora",
        "fsdp2-sampling-accumulation",
        "fully-shard-lora",
        "zero2-sampling-lora",
        "zero2-accumulation",
    ],
)
def test_two_processes_give_the_run_of_one(processes, tmp_path, how, options):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    threads = torch.get_num_threads()
    losses, weights, seen = getattr(distributed_worker, how)(str(tmp_path / "one"), batch=4, **options)
    torch.set_num_threads(threads)
    two = run_two(processes, tmp_path / "two", how, {"batch": 2, **options})
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    assert two["weights"].keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    if how == "train":
        check_gradient_norms(tmp_path, shown=not options.get("deepspeed"))
    each = [[question for step in rank for question in step] for rank in two["seen"]]
    everything = sorted(question for step in seen for question in step)
    assert sorted(each[0] + each[1]) == everything  # nothing twice, nothing lost
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("engine", ["two_pass", "one_pass"])
def test_processes_that_take_different_branches_give_the_run_of_one(processes, tmp_path, engine):
    """AdamW moves a weight by momentum also where its gradient is 0, so a branch that rests must have one."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    losses, weights, _ = distributed_worker.branches(str(tmp_path / "one"), batch=4, engine=engine)
    two = run_two(processes, tmp_path / "two", "branches", {"batch": 2, "engine": engine})
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_two_processes_evaluate_as_means_over_pairs(processes, tmp_path, batch):
    """Of 5 pairs one process has fewer than the other, and gets pairs twice to keep up."""
    found = run_two(processes, tmp_path, "evaluate", {"batch": batch})["losses"]
    for name, value in expected().items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    "options",
    [
        {"fsdp": "FULL_STATE_DICT", "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"fsdp": "SHARDED_STATE_DICT", "lora": True},
        pytest.param({"deepspeed": True}, marks=zero),
    ],
    ids=["fsdp2-full", "fsdp2-lora-sharded-state", "zero2"],
)
def test_a_sharded_run_goes_on_from_its_checkpoint_and_saves_what_one_process_loads(processes, tmp_path, options):
    options = {"batch": 2, "optim": "adamw_torch", "tokens": 40, **options}
    whole = run_two(processes, tmp_path, "train", options)["weights"]
    resumed = run_two(processes, tmp_path, "train", {**options, "resume": True})["weights"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    for folder in ("checkpoint-4", "aligned"):
        system = distributed_worker.build(tmp_path, options.get("lora", False))
        before = SystemModel(system.compile(), ObjectiveOptions())
        started = {name: p.detach().clone() for name, p in before.named_parameters()}
        load_weights(system, tmp_path / folder)
        loaded = dict(before.named_parameters())
        assert any(not torch.equal(started[name], p) for name, p in loaded.items())
        assert all(torch.equal(whole[name], p) for name, p in loaded.items())


def launch(processes, folder, *program):
    """Has `accelerate launch` start two processes of a program with its arguments, each with a group of its own."""
    config = str(WORKER.parent.parent / "examples" / "accelerate" / "ddp_cpu.yaml")
    arguments = ["--config_file", config, "--main_process_port", "0", *map(str, program)]
    process = processes.Process(target=distributed_worker.launch, args=(str(folder), *arguments))
    process.start()
    process.join(300)
    process.terminate()
    process.join()
    assert process.exitcode == 0, (folder / "stderr").read_text()[-4000:]


def test_two_processes_of_the_command_train_as_one_and_only_the_main_one_speaks(
    processes, tmp_path, monkeypatch, request
):
    monkeypatch.chdir(tmp_path)
    request.addfinalizer(command.forget)
    command.furnish(tmp_path)
    train = ["train", f"{command.MODULE}.py:system", "pairs.jsonl"]
    two = command.flags(**SAMPLING | {"output_dir": "two", "per_device_train_batch_size": 2})
    launch(processes, tmp_path, "-m", "sysdag.cli", *train, *two)
    command.run(*train[1:], *command.flags(**SAMPLING | {"output_dir": "one"}))
    printed = Path("stdout").read_text()
    assert printed.count("The aligned system is in two") == 1
    assert printed.count("level  node") == 1
    command.same(command.weights("one"), command.weights("two"), tolerance=1e-5)
    start = llama(1).state_dict()
    assert any(not torch.equal(start[name], command.weights("two")[f"answer.{name}"]) for name in start)
    assert [line["step"] for line in read_log("two") if "loss" in line] == [1, 2, 3, 4]


def test_the_example_runs_under_accelerate_launch(processes, tmp_path):
    command.furnish(tmp_path)
    data = [{key: row[key] for key in ("question", "chosen", "rejected")} for row in rows(8)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    options = {"drafter": "drafter", "refiner": "refiner", "data": "questions.jsonl", "max-new-tokens": 4}
    flags = [part for name, value in (options | {"max-steps": 2, "batch": 2}).items() for part in (f"--{name}", value)]
    launch(processes, tmp_path, WORKER.parent.parent / "examples" / "accelerate" / "train.py", *flags, "--use-cpu")
    folder = tmp_path / "aligned"
    assert (folder / "system.json").exists()
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["epoch"] == 1.0  # 2 x 2 x 2
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"draft", "answer"}


def test_one_pass_is_refused_where_weights_are_sharded():
    system = distributed_worker.build(None, False)
    model = SystemModel(system.compile(), ObjectiveOptions(), engine=EngineOptions(engine="one_pass"))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(PlanError, match="one_pass.*sharded"):
            model.rounds()
    finally:
        torch.distributed.destroy_process_group()


def test_fp16_under_deepspeed_is_refused(tmp_path):
    args = SysDPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    args.deepspeed, args.fp16 = {}, True
    with pytest.raises(PlanError, match="fp16.*use bf16"):
        SysDPOTrainer(distributed_worker.build(None, False), args, train_dataset=rows(2))
