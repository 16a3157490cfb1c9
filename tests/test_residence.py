"""Idle models on the host: the same steps, and only the weights of the model at work are where it works."""

import logging

import pytest
import torch
from peft import LoraConfig
from test_mixed_system import direct_model
from test_two_pass import CASES, gradients_of, make
from tiny import char_tokenizer, llama
from tiny_diffusion import seed
from trained_systems import rows, two_llms

from sysdag import SysDPOConfig, SysDPOTrainer
from sysdag.components import CausalLM
from sysdag.components.component import Component
from sysdag.components.residence import Residence
from sysdag.engine.step import SystemModel
from sysdag.errors import PlanError
from sysdag.objectives.options import EngineOptions


def frozen_of(component):
    return [p for p in component.module.parameters() if not p.requires_grad]


def is_present(model, parameter):
    """Whether it has left the host; on a CPU its place in memory tells."""
    return parameter.data_ptr() != model.residence._hosted[parameter].data_ptr()


def assert_equal(found, expected):
    assert any(gradient is not None for gradient in expected.values())
    for name, truth in expected.items():
        assert (found[name] is None) == (truth is None), name
        assert truth is None or torch.equal(found[name], truth), name


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_models_that_stay(case):
    _, expected = gradients_of(*make(case, engine="two_pass"), torch.Generator().manual_seed(0))
    model, pairs = make(case, engine="auto", offload_idle=True)
    output, found = gradients_of(model, pairs, torch.Generator().manual_seed(0))
    assert not output.loss.requires_grad
    assert_equal(found, expected)
    assert_equal(gradients_of(model, pairs, torch.Generator().manual_seed(0))[1], expected)


def test_a_language_model_beside_a_diffusion_model():
    _, expected = gradients_of(*direct_model("two_pass"), seed(3))
    model, pairs = direct_model("two_pass", offload_idle=True)
    assert_equal(gradients_of(model, pairs, seed(3))[1], expected)
    assert model.residence is not None
    assert all(frozen_of(reference) for reference in model.references.values())


@pytest.mark.parametrize("case", ["direct", "adapters", "sampling"])
def test_only_the_model_at_work_and_its_reference_are_present(case, monkeypatch):
    model, pairs = make(case, engine="two_pass", offload_idle=True)
    systems = {}
    for key, policy in model.components.items():
        reference = model.references[key]
        together = [policy, *([reference] if isinstance(reference, Component) else [])]
        systems.update({id(member): together for member in together})
    everything = [*model.components.values(), *(r for r in model.references.values() if isinstance(r, Component))]
    ends = []
    log_prob = CausalLM.log_prob

    def watched(self, inputs, draws):
        together = systems[id(self)]
        assert all(is_present(model, p) for p in frozen_of(self))
        idle = [p for each in everything if each not in together for p in frozen_of(each)]
        assert not any(is_present(model, p) for p in idle)
        ends.append((len(idle), torch.is_grad_enabled()))
        return log_prob(self, inputs, draws)

    monkeypatch.setattr(CausalLM, "log_prob", watched)
    gradients_of(model, pairs)
    assert {with_graph for _, with_graph in ends} == {True, False}
    assert all(idle for idle, _ in ends)


def trained(folder, *, offload_idle, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    system = two_llms(lora, folder / "base")
    args = SysDPOConfig(
        output_dir=folder / "run", beta=0.3, learning_rate=0.05, max_steps=3, per_device_train_batch_size=4,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, engine="two_pass",
        offload_idle=offload_idle, **options,
    )  # fmt: skip
    trainer = SysDPOTrainer(system, args, train_dataset=rows(12))
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 1}], ids=["fixed", "moved"])
def test_a_training_ends_in_the_weights_it_has_without(tmp_path, options, caplog):
    options = options | {"nodes": {"answer": {"trainable": False}}} if options else options
    kept = trained(tmp_path / "kept", offload_idle=False, **options)
    with caplog.at_level(logging.WARNING, logger="sysdag.components.residence"):
        moved = trained(tmp_path / "moved", offload_idle=True, **options)
    assert "offload_idle=True only takes time here" in caplog.text
    for one, other in (
        (kept.model.components, moved.model.components),
        (kept.model.references, moved.model.references),
    ):
        for key, component in one.items():
            if isinstance(component, Component):
                expected, found = component.module.state_dict(), other[key].module.state_dict()
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    samples = [list(trainer.model.plan.sample({"question": ["a1", "b2"]}, seed=5).rows()) for trainer in (kept, moved)]
    assert samples[0] == samples[1]
    assert moved.model.residence is not None


def test_what_changes_while_present_is_what_returns():
    lm = CausalLM(llama(0), char_tokenizer())
    lm.module.requires_grad_(False)
    residence = Residence([lm])
    residence.admit(lm)
    weight = next(lm.module.parameters())
    weight.mul_(2.0)
    changed = weight.clone()
    residence.admit()
    assert torch.equal(weight, changed)
    weight.add_(1.0)
    residence.admit(lm)
    assert torch.equal(weight, changed + 1.0)


def test_one_pass_cannot_offload():
    with pytest.raises(PlanError, match="offload_idle=True needs two passes"):
        EngineOptions(engine="one_pass", offload_idle=True)


def test_quantised_weights_are_refused():
    lm = CausalLM(llama(0), char_tokenizer())
    packed = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    lm.module.model.layers[0].mlp.register_parameter("packed", packed)
    with pytest.raises(PlanError, match="quantised weights"):
        Residence([lm])


def test_sharded_models_are_refused(monkeypatch):
    model, pairs = make("direct", engine="two_pass", offload_idle=True)
    monkeypatch.setattr(SystemModel, "rounds", lambda self: lambda count: count)
    with pytest.raises(PlanError, match="FSDP2"):
        model(pairs)
