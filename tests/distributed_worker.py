"""One process of a training, alone or as one of two.

Of two, rank 0 leaves FOLDER/result.pt: losses, final weights, what every rank scored.
"""

import faulthandler
import gc
import os
import sys
from datetime import datetime
from pathlib import Path
from unittest import mock

import judged_answers
import networkx  # noqa: F401 - a plan needs it, so each process would import it
import switched_systems
import torch
from accelerate import DistributedType
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trained_systems import rows, single_run, two_llms

from sysdag import DiverseBeamSearch, SysDPOConfig, SysDPOTrainer
from sysdag.components import prompt_date
from sysdag.data.encoding import encode_pairs, encode_rows
from sysdag.data.preferences import mismatched
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import EngineOptions, ObjectiveOptions


def build(folder, lora):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    return two_llms(config, Path(folder) / "base" if lora else None)


def train(
    folder, *, batch, objective="direct", lora=False, engine="two_pass", tokens=8192, accumulation=1, fsdp=None,
    deepspeed=False, resume=False, optim="sgd", grouped=False, unpaired=False, **others,
):  # fmt: skip
    """Trains two tiny LLMs by the trainer, with DDP where there are several processes, or what is asked for there."""
    system = build(folder, lora)
    if "RANK" in os.environ:
        if fsdp is not None:
            force_fsdp()
            others |= {"fsdp": "full_shard", "fsdp_config": {
                "fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True,
                "state_dict_type": fsdp, "cpu_ram_efficient_loading": False,
            }}  # fmt: skip
        elif not deepspeed:  # as where torch is built for GPUs, whether or not one is there
            torch._C._get_accelerator = lambda: torch.device("cuda")
        if deepspeed:
            force_deepspeed()
            auto = dict.fromkeys(
                ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
            )
            others["deepspeed"] = {
                **auto, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
            }  # fmt: skip
    args = SysDPOConfig(
        output_dir=folder, objective=objective, beta=0.3, learning_rate=0.05, max_steps=4,
        lr_scheduler_type="constant", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        logging_steps=1, optim=optim, report_to=[], use_cpu=not deepspeed, save_steps=2, disable_tqdm=True, seed=3,
        engine=engine, micro_batch_tokens=tokens, **others,
    )  # fmt: skip
    candidates = DiverseBeamSearch(num_candidates=3) if objective == "sampling" else None
    data = rows(16 * accumulation)
    if grouped:
        data = [row | {"group": "ab"[i % 3 == 0], "weight": 1 + i % 2} for i, row in enumerate(data)]
    if unpaired:
        runs = [single_run(row, "rejected" if i % 2 else "chosen") for i, row in enumerate(data)]
        data = mismatched(encode_rows(system.compile(), runs, objective))
    evaluated = data[:5] if unpaired else None
    prompt_date.settle(datetime(2026, 1, 1 + int(os.environ.get("RANK", 0))))  # as processes around midnight
    trainer = SysDPOTrainer(system, args, candidates=candidates, train_dataset=data, eval_dataset=evaluated)
    assert prompt_date.moment() == datetime(2026, 1, 1)
    seen = []
    compare = SystemModel.compare

    def watched(self, pairs, generator, step):
        if step is not None:  # of training, not of references that are scored beforehand
            seen.append([pair.inputs["question"] for pair in pairs])
        return compare(self, pairs, generator, step)

    checkpoint = f"{folder}/checkpoint-2" if resume else None
    with mock.patch.object(SystemModel, "compare", watched):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(f"{folder}/aligned")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = weights_of(trainer.accelerator.unwrap_model(trainer.model))
    if unpaired:
        loss = torch.tensor(trainer.evaluate()["eval_loss"])
        assert torch.isfinite(loss)
        if args.loss_type != ["kto"]:  # whose KL term is of the batches, in which two processes have rows twice
            found["the evaluation's loss"] = loss
    return losses, found, seen


def evaluate(folder, *, batch):
    """Metrics of an evaluation of judged answers."""
    args = SysDPOConfig(
        output_dir=folder, beta=judged_answers.BETA, per_device_eval_batch_size=batch, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = SysDPOTrainer(judged_answers.judged(), args, eval_dataset=judged_answers.rows())
    judged_answers.learn(trainer.system)
    return trainer.evaluate(), {}, []


def branches(folder, *, batch, engine="two_pass"):
    """Trains a system with a switch; a process of two may see no run of one branch in a step."""
    if "RANK" in os.environ:
        torch._C._get_accelerator = lambda: torch.device("cuda")
    torch.set_num_threads(1)
    between = [{"route": "math"}, {"route": "code", "outline": "o"}]
    data = [
        {"x": "ab"[i % 2], "chosen": "u", "rejected": "v", "chosen_intermediates": between[i % 5 == 0],
         "rejected_intermediates": between[i % 3 == 0]}
        for i in range(16)
    ]  # fmt: skip
    args = SysDPOConfig(
        output_dir=folder, beta=0.3, learning_rate=0.5, max_steps=4, lr_scheduler_type="constant", seed=3,
        per_device_train_batch_size=batch, logging_steps=1, optim="adamw_torch", report_to=[], use_cpu=True,
        engine=engine, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SysDPOTrainer(switched_systems.build(), args, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, weights_of(trainer.accelerator.unwrap_model(trainer.model)), []


def force_fsdp():
    """Has accelerate and torch shard on a CPU, where they would on an accelerator; all else is their own."""
    initialise = AcceleratorState.__init__

    def forced(self, *args, **kwargs):
        if kwargs.get("fsdp_plugin") is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)

    AcceleratorState.__init__ = forced
    torch._C._get_accelerator = lambda: torch.device("cpu")


def force_deepspeed():
    """Has accelerate start DeepSpeed's processes on a CPU, over gloo."""
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}


def shard(folder, *, batch, objective="direct", lora=False, tokens=8192, checkpointing=False):
    """The same by the engine alone, with torch's `fully_shard` where there are several processes."""
    system = build(folder, lora)
    plan = system.compile()
    options = ObjectiveOptions(objective=objective, beta=0.3)
    candidates = DiverseBeamSearch(num_candidates=3) if objective == "sampling" else None
    engine = EngineOptions(engine="two_pass", micro_batch_tokens=tokens)
    model = SystemModel(plan, options, None, candidates, engine)
    if checkpointing:
        model.activation_checkpointing_enable()
    rank, world = 0, 1
    if torch.distributed.is_torchelastic_launched():
        torch.distributed.init_process_group("gloo")
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        mesh = init_device_mesh("cpu", (world,))
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer" and any(p.requires_grad for p in module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.05)
    pairs = encode_pairs(plan, rows(16), objective)
    losses, seen = [], []
    for step in range(4):
        start = (step * world + rank) * batch
        own = pairs[start : start + batch]
        seen.append([pair.inputs["question"] for pair in own])
        model.train()
        output = model(own, None, step)
        accumulate_gradients(model, output)
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.clone()
        if world > 1:
            torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world)
    return losses, weights_of(model), seen


def weights_of(model):
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()
    }


def one_of_two(rank, port, how, folder, options):
    """What a process does that torchrun starts as one of two; what it prints goes to a file."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    for stream in (1, 2):
        print_to(f"{folder}/printed-{rank}", stream)
    faulthandler.enable()  # a library that aborts says where
    gc.freeze()  # what was imported stays: neither looked through at each training nor copied for that
    losses, weights, seen = {"train": train, "shard": shard, "evaluate": evaluate, "branches": branches}[how](
        folder, **options
    )
    every = [None] * 2
    torch.distributed.all_gather_object(every, seen)
    if rank == 0:
        torch.save({"losses": losses, "weights": weights, "seen": every}, Path(folder) / "result.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the ordinary way


def launch(folder, *arguments):
    """`accelerate launch` in a folder, where `stdout` and `stderr` hold what it and its processes print."""
    os.chdir(folder)
    print_to("stdout", 1)
    print_to("stderr", 2)
    launch_command(launch_command_parser().parse_args(arguments))


def print_to(name, stream):
    with open(name, "a") as file:
        os.dup2(file.fileno(), stream)
