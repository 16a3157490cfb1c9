"""What trains is fp32, or 16 bits with fp32 copies in the optimizer: held against torch, peft and transformers."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import char_tokenizer, llama
from transformers import AutoModelForCausalLM

from sysdag import Input, PlanError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM
from sysdag.components.precision import dtype_named, keep_fp32_copies, trained_values

ROWS = [
    {"prompt": "ab", "chosen": "cd", "rejected": "ef"},
    {"prompt": "aba", "chosen": "cdd", "rejected": "xef"},
] * 4
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as nearly every one on the Hub is: bf16."""
    folder = tmp_path_factory.mktemp("bf16")
    llama().to(torch.bfloat16).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return folder


def trainer_of(component, folder, **options):
    @node(component)
    def answer(prompt):
        return prompt

    defaults = dict(
        output_dir=str(folder), max_steps=8, report_to=[], use_cpu=True, per_device_train_batch_size=2,
        learning_rate=1e-6, save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    return SysDPOTrainer(
        model=System(Input("prompt") >> answer), args=SysDPOConfig(**(defaults | options)), train_dataset=ROWS
    )


def moved(component, trainer):
    """The share of the elements that 8 steps change."""
    own = component.own_parameters()
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    trainer.train()
    changed = sum(int((own[name] != old).sum()) for name, old in before.items())
    return changed / sum(old.numel() for old in before.values())


@pytest.mark.parametrize("loaded_first", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"dtype": "auto"}, {"dtype": None}])
def test_a_bf16_checkpoint_that_trains_is_fp32(checkpoint, tmp_path, kwargs, loaded_first, caplog):
    caplog.set_level(logging.INFO, "sysdag")
    component = CausalLM(checkpoint, model_kwargs=kwargs)
    if loaded_first:
        assert component.module.dtype == torch.bfloat16  # frozen models stay in their checkpoint's
    trainer = trainer_of(component, tmp_path)
    truth = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    assert all(torch.equal(truth[name], tensor) for name, tensor in component.module.state_dict().items())
    share = moved(component, trainer)
    assert share > 0.9
    assert (
        f"Node 'answer': {100 * share:.2f} % of the trained elements moved in the first 8 optimizer steps."
        in caplog.text
    )


def test_a_frozen_node_keeps_its_checkpoints_dtype(checkpoint, tmp_path):
    draft, answer = CausalLM(checkpoint), CausalLM(checkpoint)

    @node(draft)
    def drafted(prompt):
        return prompt

    @node(answer)
    def answered(drafted):
        return drafted

    args = SysDPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, nodes={"drafted": {"trainable": False}})
    rows = [
        {
            "prompt": "ab", "chosen": "cd", "rejected": "ef", "chosen_intermediates": {"drafted": "a"},
            "rejected_intermediates": {"drafted": "b"},
        }
    ]  # fmt: skip
    SysDPOTrainer(model=System(Input("prompt") >> drafted >> answered), args=args, train_dataset=rows)
    assert (draft.module.dtype, answer.module.dtype) == (torch.bfloat16, torch.float32)
    assert draft.module is not answer.module


@pytest.mark.parametrize("given", ["an object", "bf16", torch.bfloat16])
def test_bf16_on_purpose_trains_fp32_copies_and_says_so(checkpoint, tmp_path, given, caplog):
    if given == "an object":
        component = CausalLM(AutoModelForCausalLM.from_pretrained(checkpoint), char_tokenizer())
    else:
        component = CausalLM(checkpoint, model_kwargs={"torch_dtype": given})
    trainer = trainer_of(component, tmp_path)
    assert "Node 'answer' trains 21472 numbers in bfloat16: the optimizer works on fp32 copies" in caplog.text
    before = {name: parameter.detach().clone() for name, parameter in component.module.named_parameters()}
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    changed = count = 0
    for name, parameter in component.module.named_parameters():
        copy = trained_values(optimizer, parameter)
        assert (parameter.dtype, copy.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(copy.to(torch.bfloat16), parameter)
        changed, count = changed + int((copy != before[name].float()).sum()), count + copy.numel()
    assert changed / count > 0.9


def test_weights_that_hardly_move_are_warned_of(checkpoint, tmp_path, caplog):
    trainer_of(CausalLM(checkpoint), tmp_path, learning_rate=1e-16).train()
    assert "Node 'answer': 0.00 % of the trained elements moved in the first 8 optimizer steps, of which" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "object"])
def test_fp16_weights_do_not_train(checkpoint, tmp_path, kind):
    if kind == "folder":
        component = CausalLM(checkpoint, model_kwargs={"dtype": "fp16"})
    else:
        component = CausalLM(llama().half(), char_tokenizer())
    with pytest.raises(PlanError, match="Node 'answer': .* would train weights in float16.*float32.*fp16=True"):
        trainer_of(component, tmp_path)


def test_the_optimizer_does_on_bf16_weights_what_it_does_on_fp32_ones():
    """The oracle: the same gradients on fp32 parameters that start alike."""
    torch.manual_seed(0)
    half = [torch.nn.Parameter(torch.randn(5, 3).bfloat16()), torch.nn.Parameter(torch.randn(4).bfloat16())]
    whole = [torch.nn.Parameter(parameter.detach().float()) for parameter in half]
    optimizers = [torch.optim.AdamW(p, lr=1e-5, weight_decay=0.1) for p in (half, whole)]
    keep_fp32_copies(optimizers[0])
    keep_fp32_copies(optimizers[0])  # twice is once
    for step in range(6):
        for one, other in zip(half, whole, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        if step == 3:  # a checkpoint in between
            state = optimizers[0].state_dict()
            optimizers[0] = torch.optim.AdamW(half, lr=1e-5, weight_decay=0.1)
            keep_fp32_copies(optimizers[0])
            optimizers[0].load_state_dict(state)
    for one, other in zip(half, whole, strict=True):
        assert torch.equal(trained_values(optimizers[0], one), other)
        assert torch.equal(one, other.bfloat16())
        assert optimizers[0].state[one]["exp_avg"].dtype == torch.float32
    assert optimizers[0].param_groups[0]["params"][0] is half[0]
    with torch.no_grad():
        half[0].fill_(2.0)  # loaded weights replace the copy
    half[0].grad, half[1].grad = torch.zeros_like(half[0]), None
    optimizers[0].step()
    assert torch.allclose(trained_values(optimizers[0], half[0]), torch.tensor(2.0), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_adapters_dtype_is_pefts(dtype):
    component = CausalLM(llama().to(dtype), char_tokenizer(), peft_config=LoraConfig(**LORA))
    truth = get_peft_model(llama().to(dtype), LoraConfig(**LORA))
    expected = {parameter.dtype for parameter in truth.parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in component.own_parameters().values()} == expected
    assert component.module.dtype == dtype
    reference = component.reference()
    inputs, draws = ["ab"], component.observe(["cd"])
    assert torch.equal(component.log_prob(inputs, draws), reference.log_prob(inputs, draws))


def test_every_element_of_an_adapter_on_a_bf16_base_moves(checkpoint, tmp_path):
    component = CausalLM(checkpoint, peft_config=LoraConfig(**LORA))
    assert moved(component, trainer_of(component, tmp_path)) == 1.0
    assert component.module.dtype == torch.bfloat16


def test_a_saved_adapter_loses_nothing_on_a_bf16_base(checkpoint, tmp_path):
    component = CausalLM(checkpoint, peft_config=LoraConfig(**LORA))
    with torch.no_grad():
        for parameter in component.own_parameters().values():
            parameter.normal_()
    loaded = CausalLM.from_pretrained(tmp_path, component.save_pretrained(tmp_path))
    for name, parameter in component.own_parameters().items():
        assert torch.equal(parameter, loaded.own_parameters()[name])
        assert loaded.own_parameters()[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", torch.bfloat16), ("torch.float16", torch.float16), ("fp32", torch.float32), ("half", torch.float16)],
)
def test_names_of_dtypes(name, dtype):
    assert dtype_named(name, "it") == dtype


@pytest.mark.parametrize("name", ["bfloat", "int8", torch.int8, 16])
def test_what_is_no_dtype_is_refused_by_name(name):
    with pytest.raises(PlanError, match="dtype must be float32, bfloat16, float16 or float64, got"):
        CausalLM("org/model", model_kwargs={"dtype": name})


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"dtype": "auto"}, {"dtype": "bf16"}, {"torch_dtype": "float32"}])
def test_the_estimate_follows(checkpoint, kwargs, trains):
    component = CausalLM(checkpoint, model_kwargs=kwargs)

    @node(component)
    def answer(prompt):
        return prompt

    plan = System(Input("prompt") >> answer).compile()
    estimate = plan.estimate({"answer": (20, 10)}, device="cpu", frozen=() if trains else ["answer"])
    found = estimate.footprints["answer"]
    if trains:
        component.prepare_training()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in component.module.parameters())
    assert found.weights == weights
    count = sum(parameter.numel() for parameter in component.module.parameters())
    half = component.module.dtype == torch.bfloat16
    assert found.optimizer == (0 if not trains else 12 * count if half else 8 * count)


def test_autocast_is_estimated():
    component = CausalLM(llama(), char_tokenizer())

    @node(component)
    def answer(prompt):
        return prompt

    plan = System(Input("prompt") >> answer).compile()
    plain, autocast = (
        plan.estimate({"answer": (60, 60)}, pairs=8, device="cpu", bf16=bf16).footprints["answer"].graph
        for bf16 in (False, True)
    )
    assert autocast < plain
