"""Losses and gradients of one-node systems against TRL's trainers, on one batch, away from step 0."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import char_tokenizer, llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

from sysdag import Input, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM
from sysdag.engine.replay import accumulate_gradients
from sysdag.objectives.options import ObjectiveOptions

PAIRS = [
    {"prompt": "ab c", "chosen": "yes", "rejected": "no no no"},
    {"prompt": "d", "chosen": "f", "rejected": ""},
    {"prompt": "ef", "chosen": "a longer answer", "rejected": "none"},
    {"prompt": "x yz", "chosen": "no", "rejected": "yes it is"},
]
COMMON = {
    "report_to": [], "per_device_train_batch_size": len(PAIRS), "use_cpu": True, "bf16": False,
    "gradient_checkpointing": False, "max_length": None, "beta": 0.3,
}  # fmt: skip
DPO = {
    "sigmoid": {}, "ipo": {}, "hinge": {}, "robust": {"label_smoothing": 0.1}, "sft": {},
    "exo_pair": {"label_smoothing": 1e-3}, "nca_pair": {}, "bco_pair": {}, "sppo_hard": {},
    "aot": {"label_smoothing": 0.1}, "aot_unpaired": {"label_smoothing": 0.1}, "apo_zero": {}, "apo_down": {},
    "discopop": {"discopop_tau": 0.2}, "sigmoid_norm": {},
}  # fmt: skip
MIXES = [
    (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {}),
    (["aot", "apo_zero", "sigmoid_norm"], [1.0, 0.5, 2.0], {"label_smoothing": 0.2}),
]
DPO_CASES = [
    *(([name], None, options) for name, options in DPO.items()),
    *MIXES,
    *((["sigmoid"], None, {"ld_alpha": alpha}) for alpha in (0.0, 0.4, 1.0)),
    (["ipo", "apo_down"], None, {"ld_alpha": 0.4}),
    (["sigmoid"], None, {"use_weighting": True}),
    (["apo_zero", "nca_pair"], [0.5, 2.0], {"use_weighting": True, "ld_alpha": 0.5}),
]


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=16)


def ours_beside(theirs, peft_config, folder, rows=PAIRS, **options):
    """Our trainer on the same rows, and their trained parameters with ours, all moved away from the start."""

    @node(CausalLM(llama(), char_tokenizer(), peft_config=peft_config))
    def answer(question):
        return question

    return moved_beside(theirs, System(Input("question") >> answer), rows, folder, **options)


def moved_beside(theirs, system, pairs, folder, **options):
    """As `ours_beside`, for a system of one node `answer`."""
    args = SysDPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, beta=COMMON["beta"], check_reference=False,
        disable_tqdm=True, **options,
    )  # fmt: skip
    ours = SysDPOTrainer(system, args, train_dataset=pairs)
    own = dict(ours.model.named_parameters())
    moved = {}
    for name, parameter in theirs.named_parameters():
        same = own[f"policies.answer.{name.removeprefix('base_model.model.').replace('.default.', '.sysdag.')}"]
        assert same.requires_grad == parameter.requires_grad
        if parameter.requires_grad:
            torch.manual_seed(len(moved))
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
                same.copy_(parameter)
            moved[name] = (parameter, same)
    ours.model.train()
    return ours, moved


def compare_gradients(loss, ours, moved):
    """Of their loss and ours, to 1e-5 of the largest entry."""
    for parameter, same in moved.values():
        parameter.grad = same.grad = None
    loss.backward()
    output = ours.model(ours.data_collator(ours.train_dataset)["pairs"])
    torch.testing.assert_close(output.loss.detach(), loss.detach(), rtol=1e-5, atol=1e-5)
    accumulate_gradients(ours.model, output)
    found = {name: pair for name, pair in moved.items() if pair[0].grad is not None}
    assert len(found) >= 4
    for name, (parameter, same) in found.items():
        error = float((same.grad - parameter.grad).abs().max())
        assert error <= 1e-5 * float(parameter.grad.abs().max()), name
    return output


@pytest.fixture(scope="module", params=["full", "lora"])
def dpo(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    peft_config = lora() if request.param == "lora" else None
    llama().save_pretrained(folder / "model")
    theirs = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=DPOConfig(output_dir=str(folder), use_weighting=True, **COMMON),  # switched off by case
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=char_tokenizer(),
        peft_config=peft_config,
    )
    ours, moved = ours_beside(theirs.model, peft_config, folder)
    theirs.model.train()
    return theirs, ours, moved


@pytest.mark.parametrize(("losses", "weights", "options"), DPO_CASES, ids=str)
def test_a_one_node_system_equals_trls_dpo_trainer(dpo, losses, weights, options):
    theirs, ours, moved = dpo
    theirs.loss_types, theirs.loss_weights = losses, weights or [1.0] * len(losses)
    theirs.label_smoothing = options.get("label_smoothing", 0.0)
    theirs.ld_alpha, theirs.use_weighting = options.get("ld_alpha"), options.get("use_weighting", False)
    theirs.args.discopop_tau = options.get("discopop_tau", 0.05)
    theirs._metrics["train"].clear()
    ours.model.options = ObjectiveOptions(
        beta=COMMON["beta"], loss_type=tuple(losses), loss_weights=weights and tuple(weights), **options
    )
    batch = theirs._prepare_inputs(theirs.data_collator([theirs.train_dataset[i] for i in range(len(PAIRS))]))
    output = compare_gradients(theirs.compute_loss(theirs.model, batch), ours, moved)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"):
        found = [float(output.metrics[name].mean())]
        assert found == pytest.approx(theirs._metrics["train"][name], rel=1e-5, abs=1e-5), name


def padded(ours, side):
    """A side of our pairs as CPOTrainer's batch has it."""
    component = ours.system["answer"].component
    prompts = [pair.inputs["question"] for pair in ours.train_dataset]
    draws = component.in_context(prompts, [getattr(pair, side)["answer"] for pair in ours.train_dataset])
    rows = [
        (prompt, list(draw.record["token_ids"]))
        for prompt, draw in zip(component.prompt_ids(prompts), draws, strict=True)
    ]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, labels, attention = [], [], []
    for prompt, completion in rows:
        pad = longest - len(prompt) - len(completion)
        ids.append([*prompt, *completion, *[0] * pad])
        labels.append([*[-100] * len(prompt), *completion, *[-100] * pad])
        attention.append([1] * (longest - pad) + [0] * pad)
    names = ("input_ids", "labels", "attention_mask")
    return {f"{side}_{n}": torch.tensor(v) for n, v in zip(names, (ids, labels, attention), strict=True)}


@pytest.fixture(scope="module", params=["full", "lora"])
def cpo(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpo")
    peft_config = lora() if request.param == "lora" else None
    llama().save_pretrained(folder / "model")
    theirs = CPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=CPOConfig(output_dir=str(folder), **COMMON),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=char_tokenizer(),
        peft_config=peft_config,
    )
    ours, moved = ours_beside(theirs.model, peft_config, folder)
    theirs.model.train()
    return theirs, ours, moved


@pytest.mark.parametrize("e", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss_type", "options", "name", "alpha"),
    [
        ("cpo", {}, "sigmoid", 1.0),
        ("cpo", {"cpo_alpha": 0.3}, "sigmoid", 0.3),
        ("simpo", {}, "simpo", 0.0),
        ("simpo", {"simpo_gamma": 1.2}, "simpo", 0.0),
    ],
)
def test_a_one_node_system_equals_trls_cpo_trainer(cpo, loss_type, options, name, alpha, e):
    theirs, ours, moved = cpo
    theirs.loss_type, theirs.cpo_alpha, theirs.label_smoothing = name, alpha, e
    theirs.simpo_gamma = options.get("simpo_gamma", 0.5)
    ours.model.options = ObjectiveOptions(beta=COMMON["beta"], loss_type=(loss_type,), label_smoothing=e, **options)
    loss, metrics = theirs.get_batch_loss_metrics(theirs.model, padded(ours, "chosen") | padded(ours, "rejected"))
    output = compare_gradients(loss, ours, moved)
    for key in ("rewards/margins", "rewards/chosen", "rewards/rejected", "rewards/accuracies"):
        assert float(output.metrics[key].mean()) == pytest.approx(metrics[key], rel=1e-5, abs=1e-5), key
