"""Estimates of memory against what was measured, and against the parameters themselves."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import char_tokenizer, llama

from sysdag import Input, PlanError, System, node
from sysdag.components import CausalLM, Tabular

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import step, step_systems

LENGTHS = {"node0": (256, 64), "node1": (320, 64, 256)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of resident memory as Linux keeps it")
@pytest.mark.parametrize("name", ["sysdag", "one pass"])
@pytest.mark.parametrize("lora", [True, False])
def test_the_estimate_of_a_step_is_within_15_percent_of_the_measured_peak(lora, name):
    case = step_systems.Case("two LLMs", candidates=4, lora=lora)
    measured = step.peak_mib(case, name, "cpu")
    plan = step_systems.build(case)[0].compile()
    found = plan.estimate(
        LENGTHS, objective="sampling", num_candidates=4, engine=step.NAMES[name],
        micro_batch_tokens=step_systems.TOKENS, device="cpu",
    )  # fmt: skip
    assert found.step / 2**20 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_resident_is_counted_from_the_config_alone(tmp_path, adapter):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    llama(0).save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    component = CausalLM(tmp_path, peft_config=lora)

    @node(component)
    def answer(question):
        return question

    plan = System(Input("question") >> answer).compile()
    found = plan.estimate({"answer": (20, 10)}).footprints["answer"]
    assert component._model is None
    parameters = list(component.module.parameters())
    trained = component.own_parameters().values()
    assert found.weights == sum(4 * p.numel() for p in parameters)
    assert found.trained_count == sum(p.numel() for p in trained)
    assert found.reference == (0 if adapter else found.weights)
    resident = plan.estimate({"answer": (20, 10)}).resident
    assert resident == found.weights + found.reference + 12 * found.trained_count
    frozen = plan.estimate({"answer": (20, 10)}, frozen=["answer"]).footprints["answer"]
    assert (frozen.trained, frozen.graph, frozen.reference) == (0, 0, 0)


def test_checkpointing_and_smaller_micro_batches_need_less():
    plan = step_systems.build(step_systems.Case("two LLMs", candidates=4, lora=True))[0].compile()
    plain, checkpointed, small = (
        plan.estimate(LENGTHS, objective="sampling", device="cpu", **options).step
        for options in ({}, {"gradient_checkpointing": True}, {"micro_batch_tokens": 400})
    )
    assert checkpointed < 0.6 * plain
    assert small < 0.6 * plain


def test_what_cannot_be_estimated_is_named():
    @node(Tabular({"a": {"y": 0.5, "n": 0.5}}))
    def answer(question):
        return question

    plan = System(Input("question") >> answer).compile()
    with pytest.raises(PlanError, match="no entry for node 'answer'"):
        plan.estimate({})
    with pytest.raises(PlanError, match=r"memory of node 'answer' \(Tabular.*not known"):
        plan.estimate({"answer": (1, 1)})


def test_the_table_names_every_node():
    plan = step_systems.build(step_systems.Case("two LLMs", candidates=2, lora=True))[0].compile()
    shown = str(plan.estimate(LENGTHS, objective="sampling", num_candidates=2, device="cpu"))
    assert [line.split()[0] for line in shown.splitlines()] == ["node", "node0", "node1", "resident"]
    assert torch.get_default_device() == torch.device("cpu")
