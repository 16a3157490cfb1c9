"""Gradient checkpointing, compiled blocks and bf16: the same step, computed otherwise."""

import math

import pytest
import torch
from peft import LoraConfig
from test_two_pass import assert_same, gradients_of, make
from tiny import char_tokenizer, llama
from torch._dynamo.utils import counters
from trained_systems import rows, two_llms

from sysdag import Input, PlanError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM, Tabular
from sysdag.components.memory import SavedBytes
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import ObjectiveOptions


@pytest.mark.parametrize("engine", ["one_pass", "two_pass"])
@pytest.mark.parametrize("case", ["sampling", "adapters"])
def test_checkpointing_changes_memory_and_not_gradients(case, engine):
    model, pairs = make(case, engine=engine)
    model.train()
    kept = {}
    found = {}
    for name in ("plain", "checkpointed"):
        with SavedBytes() as saved:
            _, found[name] = gradients_of(model, pairs)
        kept[name] = saved.total
        model.activation_checkpointing_enable()
    assert_same(found["checkpointed"], found["plain"])
    assert kept["checkpointed"] < 0.7 * kept["plain"]


def test_a_component_that_cannot_checkpoint_is_named():
    @node(Tabular({"a": {"y": 0.5, "n": 0.5}}))
    def answer(question):
        return question

    model = SystemModel(System(Input("question") >> answer).compile(), ObjectiveOptions())
    with pytest.raises(PlanError, match=r"gradient_checkpointing=True: Tabular.* has no model"):
        model.activation_checkpointing_enable()


def config(folder, **options):
    return SysDPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, beta=0.3, **options,
    )  # fmt: skip


def losses(folder, **options):
    torch.manual_seed(0)
    trainer = SysDPOTrainer(two_llms(), config(folder, **options), train_dataset=rows(12))
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("plain"))[1]


def test_compiled_blocks_give_the_same_run(plain, tmp_path):
    frames = counters["frames"]
    frames.clear()
    trainer, compiled = losses(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    # With and without gradients, of one row and of several. torch gives up at the ninth; probes are to use up none.
    assert frames["ok"] == frames["total"] == 4
    layers = [m for m in trainer.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    assert len(layers) == 4
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_bf16_starts_at_ln_2_and_learns(plain, tmp_path):
    _, found = losses(tmp_path, bf16=True)
    assert found[0] == pytest.approx(math.log(2), abs=1e-3)
    assert found[-1] < found[0] - 0.02
    assert found == pytest.approx(plain, abs=0.05)


def test_checkpointing_by_the_trainer_serves_adapters(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    data = [{"question": row["question"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows(12)]
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)

        @node(CausalLM(llama(), char_tokenizer(), max_new_tokens=4, peft_config=lora))
        def answer(question):
            return question

        system = System(Input("question") >> answer)
        trainer = SysDPOTrainer(system, config(tmp_path, gradient_checkpointing=checkpointing), train_dataset=data)
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] < found[0][0]
