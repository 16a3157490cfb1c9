"""Whole trainings beside TRL's DPOTrainer: what both log at every step and find in their evaluations."""

import copy

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import LoraConfig, get_peft_model
from test_router_loss import made as mixture
from test_trl_losses import lora
from tiny import CHAT_TEMPLATE, char_tokenizer, llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from sysdag import DataError, Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM

TEXTS = [
    {"prompt": "ab c", "chosen": "yes", "rejected": "no no no"},
    {"prompt": "d", "chosen": "f", "rejected": ""},
    {"prompt": "ef", "chosen": "a longer answer", "rejected": "none"},
    {"prompt": "x yz", "chosen": "no", "rejected": "yes it is"},
    {"prompt": "q", "chosen": "rs t", "rejected": "u"},
    {"prompt": "w", "chosen": "0", "rejected": "1 2"},
]
IMPLICIT = [{side: f"{row['prompt']} {row[side] or '?'}" for side in ("chosen", "rejected")} for row in TEXTS]
CHATS = [
    {
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"] or "?"}],
    }
    for row in TEXTS
]
IMPLICIT_CHATS = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS]
TEMPLATE = (
    "{{ 'tools: ' + (tools | length | string) + '\n' if tools }}{{ mood | default('') }}"
    + CHAT_TEMPLATE.replace("\n{% endfor %}", "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}")
)
WITH_VARIABLES = [row | {"chat_template_kwargs": {"mood": "ok:" * (1 + place % 2)}} for place, row in enumerate(CHATS)]
TOOL = {"type": "function", "function": {"name": "f", "description": "g", "parameters": {"type": "object"}}}
WITH_TOOLS = [row | {"tools": [TOOL] * (1 + place % 2)} for place, row in enumerate(CHATS)]
SHARED = {
    "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "beta": 0.3, "learning_rate": 1e-3,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "train_sampling_strategy": "sequential",
    "num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "no",
    "gradient_checkpointing": False,
}  # fmt: skip
SAME = [
    *("loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/chosen", "rewards/rejected"),
    *("rewards/accuracies", "logps/chosen", "logps/rejected"),
]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def trained_before(model, config):
    """A PeftModel whose adapter is no longer where it began."""
    torch.manual_seed(5)
    made = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def logs_of(trainer):
    trainer.train()
    return [{key.removeprefix("eval_"): value for key, value in entry.items()} for entry in trainer.state.log_history]


def take_start(ours, theirs):
    """What trains in ours begins where it does in theirs: new adapters have a random half."""
    own = dict(ours.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        if parameter.requires_grad and "lora_" in name and "ref" not in name.split("."):
            bare = name.removeprefix("base_model.model.")
            names = [f"policies.answer.{bare.replace('.default.', f'.{each}.')}" for each in ("sysdag", "default")]
            same = next(own[each] for each in names if each in own)
            with torch.no_grad():
                same.copy_(parameter)


def check_same_training(tmp_path, model, rows=TEXTS, *, tokenizer=None, peft_config=None, **options):
    """One epoch of both, from the same weights.

    Args:
        model: makes it anew.
        options: of both configs, beside those of SHARED.
    """
    tokenizer = tokenizer or char_tokenizer()
    start = model()
    if not hasattr(start, "peft_config"):  # TRL reads the reference of a model from the folder that it came from
        start.save_pretrained(tmp_path / "model")
        start = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    data = Dataset.from_list(rows)
    args = DPOConfig(output_dir=str(tmp_path / "theirs"), **SHARED | {"max_length": None} | options)
    theirs = DPOTrainer(
        start, args=args, train_dataset=data, eval_dataset=data, processing_class=copy.deepcopy(tokenizer),
        peft_config=peft_config,
    )  # fmt: skip

    @node(CausalLM(model(), tokenizer, peft_config=peft_config))
    def answer(question):
        return question

    system = System(Input("question") >> answer)
    ours_args = SysDPOConfig(output_dir=str(tmp_path / "ours"), **SHARED | options)
    ours = SysDPOTrainer(system, ours_args, train_dataset=data, eval_dataset=data)
    take_start(ours, theirs)
    wanted, found = logs_of(theirs), logs_of(ours)
    assert [sorted(each.keys() & {*SAME}) for each in wanted] == [sorted(each.keys() & {*SAME}) for each in found]
    for step, (their, our) in enumerate(zip(wanted, found, strict=True)):
        for name in their.keys() & {*SAME}:
            assert our[name] == pytest.approx(their[name], rel=2e-4, abs=2e-4), (step, name)
    assert abs(wanted[-2]["rewards/margins"]) > 1e-3  # of the evaluation: something was learned


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"precompute_ref_log_probs": True},
        {"weight_decay": 0.1, "max_grad_norm": 0.05, "warmup_steps": 1, "lr_scheduler_type": "cosine"},
    ],
    ids=str,
)
def test_a_training_is_trls(tmp_path, peft_config, options):
    check_same_training(tmp_path, llama, peft_config=peft_config, **options)


def test_a_reference_that_follows_is_trls(tmp_path):
    check_same_training(
        tmp_path, llama, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5, num_train_epochs=2
    )


@pytest.mark.parametrize(
    ("rows", "template"),
    [
        (IMPLICIT, None),
        (CHATS, TEMPLATE),
        (IMPLICIT_CHATS, TEMPLATE),
        (WITH_VARIABLES, TEMPLATE),
        (WITH_TOOLS, TEMPLATE),
    ],
    ids=["implicit", "chats", "implicit chats", "template variables", "tools"],
)
def test_rows_of_every_form_train_as_trls(tmp_path, rows, template):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    check_same_training(tmp_path, llama, rows, tokenizer=tokenizer)


def test_a_tokenizer_without_a_padding_token_trains_as_trls(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.pad_token = None
    check_same_training(tmp_path, lambda: llama(pad_token_id=None), tokenizer=tokenizer)
    assert tokenizer.pad_token is None


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_mixture_of_experts_trains_with_trls_balance(tmp_path, kind):
    check_same_training(tmp_path, lambda: mixture(kind))


@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_an_adapter_that_was_trained_before_has_trls_reference(tmp_path, kind):
    experts = LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS)
    check_same_training(
        tmp_path,
        lambda: trained_before(llama(), lora()) if kind == "attention" else trained_before(mixture("mixtral"), experts),
    )


def whole():
    return Dataset.from_list(TEXTS)


def streamed():
    return whole().to_iterable_dataset()


FORMS = {
    "dataset": whole,
    "stream": streamed,
    "generator": lambda: (row for row in TEXTS),
    "datasets by name": lambda: DatasetDict(one=whole(), two=whole()),
    "streams by name": lambda: IterableDatasetDict(one=streamed(), two=streamed()),
    "dict of streams": lambda: {"one": streamed(), "two": streamed()},
}
NAMED = [form for form in FORMS if "by name" in form or "dict" in form]


def trainer_on(folder, **given):
    @node(CausalLM(llama(), char_tokenizer()))
    def answer(question):
        return question

    args = SysDPOConfig(
        output_dir=str(folder), max_steps=1, **SHARED | {"eval_strategy": "no"} | given.pop("options", {})
    )
    return SysDPOTrainer(System(Input("question") >> answer), args, **{"train_dataset": TEXTS} | given)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_data_to_evaluate_on_come_in_every_form(form, precompute, tmp_path):
    options = {"precompute_ref_log_probs": precompute}
    trainer = trainer_on(tmp_path, eval_dataset=FORMS[form](), options=options)
    later = trainer.evaluate(FORMS[form]())
    wanted = trainer_on(tmp_path / "again").evaluate(TEXTS)["eval_logps/chosen"]
    names = ("one_", "two_") if form in NAMED else ("",)
    assert [later[f"eval_{name}logps/chosen"] for name in names] == pytest.approx([wanted] * len(names))
    trainer.train()
    after = trainer.evaluate()
    assert all(after[f"eval_{name}loss"] != later[f"eval_{name}loss"] for name in names)


@pytest.mark.parametrize("form", FORMS)
def test_data_to_train_on_are_one_dataset_of_any_form(form, tmp_path):
    if form in NAMED:
        with pytest.raises(DataError, match=r"train_dataset must be one dataset, got a dict of \['one', 'two'\]"):
            trainer_on(tmp_path, train_dataset=FORMS[form]())
        return
    found = trainer_on(tmp_path, train_dataset=FORMS[form]()).train().training_loss
    assert found == trainer_on(tmp_path / "again").train().training_loss
