"""Two processes give the loss curve and the weights of one: DDP by the trainer, FSDP2 by the engine, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from tiny import char_tokenizer, llama
from trained_systems import rows

WORKER = Path(distributed_worker.__file__)


def run_two(folder, how, options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
               str(WORKER), how, str(folder), json.dumps(options)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("train", {"objective": "sampling", "lora": True, "tokens": 40}),
        ("train", {"accumulation": 2, "engine": "one_pass"}),
        ("train", {"engine": "auto", "gradient_checkpointing": True}),
        ("shard", {"objective": "sampling", "tokens": 40}),
        ("shard", {"lora": True, "checkpointing": True}),
    ],
    ids=["ddp-sampling-lora", "ddp-accumulation-one-pass", "ddp-auto-checkpointing", "fsdp2-sampling", "fsdp2-lora"],
)
def test_two_processes_give_the_run_of_one(tmp_path, how, options):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    threads = torch.get_num_threads()
    losses, weights, seen = getattr(distributed_worker, how)(str(tmp_path / "one"), batch=4, **options)
    torch.set_num_threads(threads)
    two = run_two(tmp_path / "two", how, {"batch": 2, **options})
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    assert two["weights"].keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-5)
    each = [[question for step in rank for question in step] for rank in two["seen"]]
    everything = sorted(question for step in seen for question in step)
    assert sorted(each[0] + each[1]) == everything  # nothing twice, nothing lost
    assert len(set(everything)) == len(everything)


def test_the_example_runs_under_accelerate_launch(tmp_path):
    for name, seed in (("drafter", 0), ("refiner", 1)):
        llama(seed).save_pretrained(tmp_path / name)
        char_tokenizer().save_pretrained(tmp_path / name)
    data = [{key: row[key] for key in ("question", "chosen", "rejected")} for row in rows(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    folder = WORKER.parent.parent / "examples" / "accelerate"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "ddp_cpu.yaml"),
               "--main_process_port", "0", str(folder / "train.py"), "--drafter", "drafter", "--refiner", "refiner",
               "--data", "pairs.jsonl", "--max-new-tokens", "4", "--max-steps", "2", "--batch", "2",
               "--use-cpu"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (tmp_path / "aligned" / "system.json").exists()
    assert {path.name for path in (tmp_path / "aligned").iterdir() if path.is_dir()} == {"draft", "answer"}


def test_one_pass_is_refused_where_weights_are_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from sysdag import PlanError
    from sysdag.engine import SystemModel
    from sysdag.options import EngineOptions, ObjectiveOptions

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
