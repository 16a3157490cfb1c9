"""Trainings that die: each function runs in a process of its own, started from a server that has the imports done."""

import ctypes
import gc
import os
import resource
import signal
from pathlib import Path

import networkx  # noqa: F401 - a plan needs it, so each process would import it
import torch
from peft import LoraConfig
from tiny import char_tokenizer, llama
from trained_systems import rows, single_run, two_llms
from transformers import TrainerCallback

from sysdag import DiverseBeamSearch, Input, SysdagError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM
from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.files.run_files import LOG_FILE, RUN_FILE
from sysdag.objectives.options import EngineOptions, ObjectiveOptions

STEPS = 6
CASES = {
    "sampling, an adapter and a full model, auto": {
        "objective": "sampling", "candidates_refresh_steps": 3, "engine": "auto", "lora": True,
    },
    "sampling, full models, two passes, accumulation": {
        "objective": "sampling", "candidates_refresh_steps": 2, "engine": "two_pass", "micro_batch_tokens": 60,
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    },
    "direct, an adapter and a full model, auto, accumulation": {
        "engine": "auto", "lora": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    },
    "single runs, a KL term and a running shift, accumulation": {
        "engine": "two_pass", "loss_type": ["kto", "bco"], "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "direct, full models, two passes": {"engine": "two_pass"},
}  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(TrainerCallback):
    """Kills the process when the event of the given step comes."""

    def __init__(self, event, step):
        def called(args, state, control, **kwargs):
            if state.global_step == step:
                die()

        setattr(self, event, called)


def is_of_the_record(file):
    """Whether a file that moves is one of the run's record, which is no part of any checkpoint."""
    return Path(file).name in (RUN_FILE, LOG_FILE)


def die_at_call(owner, name, number):
    """Kills the process at the `number`th call of a function, from 1, after it has done half of what it does."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        if name == "replace" and is_of_the_record(args[1]):
            return original(*args, **kwargs)
        calls.append(args)
        if len(calls) == number:
            target = args[1] if name == "save" else args[0]
            if name == "save":  # a file that is cut off
                original(*args, **kwargs)
                os.truncate(target, Path(target).stat().st_size // 2)
            die()
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def rows_of(args):
    if not args.objective_options().is_unpaired:
        return rows(12)
    return [single_run(row, side) for row in rows(6) for side in ("chosen", "rejected")]


def trainer_of(folder, case, *, system=None, data=None, eval_data=None, ambient=0, **changes):
    options = dict(CASES[case]) | changes
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=16) if options.pop("lora", False) else None
    torch.manual_seed(ambient)
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "save_strategy": "steps", "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "linear", "warmup_steps": 2, "logging_strategy": "no",
    }  # fmt: skip
    args = SysDPOConfig(**(defaults | options))
    return SysDPOTrainer(
        system or two_llms(lora, Path(folder).parent / "base"),
        args,
        candidates=DiverseBeamSearch(num_candidates=2) if args.objective == "sampling" else None,
        train_dataset=(rows_of(args) if data is None else data),
        eval_dataset=eval_data,
    )


def run(folder, case, fault=None, resume=False, *, wide=False, **changes):
    """Trains, resuming if asked to, until the fault; `wide` models have tensors of several MiB."""
    gc.freeze()  # what was imported stays: neither looked through at each training nor copied for that
    torch.set_num_threads(1)
    if wide:
        model = llama(0, hidden_size=256, intermediate_size=8192)
        changes["system"] = two_llms().with_components({"draft": CausalLM(model, char_tokenizer(), max_new_tokens=4)})
    trainer = trainer_of(folder, case, **changes)
    match fault:
        case ("event", event, step):
            trainer.add_callback(DieAt(event, step))
        case ("torch.save", number):
            die_at_call(torch, "save", number)
        case ("os.replace", number):
            die_at_call(os, "replace", number)
        case ("file size", limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        case ("memory", spare):
            trainer.add_callback(LimitMemory(spare))
    trainer.train(resume_from_checkpoint=resume or None)


class LimitMemory(TrainerCallback):
    """From the third update on, lets the process have only so many bytes more of address space."""

    def __init__(self, spare):
        self.spare = spare

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            limit_memory(self.spare)


def limit_memory(spare):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.getrlimit(resource.RLIMIT_AS)[1]))


def two_passes(file):
    """Leaves the tokens of a micro-batch and the gradients: of a step with all memory, and of one with 64 MiB more."""
    gc.freeze()
    torch.set_num_threads(1)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: freed memory is no reserve
        assert ctypes.CDLL(None).mallopt(option, 65536) == 1
    data = [{"question": f"{chr(97 + i)}{i % 10}" * 20, "chosen": "y" * 60, "rejected": "no" * 30} for i in range(24)]

    @node(CausalLM(llama(0, hidden_size=128, intermediate_size=1024, max_position_embeddings=256), char_tokenizer()))
    def answer(question):
        return question

    plan = System(Input("question") >> answer).compile()
    model = SystemModel(plan, ObjectiveOptions(), engine=EngineOptions(engine="two_pass"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pairs = encode_pairs(plan, data, "direct")
    found = []
    for spare in (None, 64 << 20):
        if spare is not None:
            limit_memory(spare)
        model.zero_grad()
        accumulate_gradients(model, model(pairs))
        found.append((model.budget.max_tokens, {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.save(found, file)


def save_over(folder, number):
    """Saves another system over the one in `folder`, and dies at a call of `os.replace`."""
    torch.set_num_threads(1)
    system = two_llms()
    with torch.no_grad():
        for node in system.nodes:
            for parameter in node.component.module.parameters():
                parameter.fill_(0.5)
    die_at_call(os, "replace", number)
    system.save_pretrained(folder)


def message_of(file, function, *args, **kwargs):
    """Runs a function that must raise, and writes the error's type and text to the file."""
    try:
        function(*args, **kwargs)
    except SysdagError as error:
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
            resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
        file.write_text(f"{type(error).__name__}: {error}")
