"""Defaults: those of TRL but for the ones that docs/faq.md lists, and rates and adapters that follow what trains."""

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch
from judged_answers import judged, rows
from peft import LoraConfig
from test_trainer import config, lora
from tiny import char_tokenizer, llama
from trained_systems import rows as text_rows
from trained_systems import two_llms
from trl import DPOConfig

from sysdag import DiverseBeamSearch, Input, PlanError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import CausalLM, Tabular
from sysdag.components.component import Component
from sysdag.data.encoding import encode_pairs
from sysdag.engine.step import SystemModel
from sysdag.objectives.options import ObjectiveOptions
from sysdag.traces.cells import Draw
from sysdag.training.learning_rates import OF_ADAPTERS, OF_WEIGHTS

FAQ = Path(__file__).resolve().parents[1] / "docs" / "faq.md"
question = Input("question", str)


def table() -> dict[str, tuple[str, str]]:
    """The rows of the table of defaults: option to TRL's and sysdag's."""
    section = FAQ.read_text().partition("## Which defaults differ from TRL's?")[2].partition("\n## ")[0]
    cells = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("| `"): (row[1].strip(" `"), row[2].strip(" `")) for row in cells}


def test_the_documented_differences_are_all_there_are(tmp_path):
    theirs = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    ours = SysDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    common = {f.name for f in dataclasses.fields(DPOConfig)} & {f.name for f in dataclasses.fields(SysDPOConfig)}
    derived = {
        "activation_checkpointing",
        "ddp_find_unused_parameters",
        "ddp_broadcast_buffers",
        "dataloader_pin_memory",
    }
    different = {name for name in common - derived if getattr(theirs, name) != getattr(ours, name)}
    assert different == table().keys()
    for name, (of_trl, own) in table().items():
        assert of_trl == repr(getattr(theirs, name))
        if name != "learning_rate":
            assert own == repr(getattr(ours, name))
    rates = [float(number) for number in re.findall(r"1e-\d+", table()["learning_rate"][1])]
    assert rates == [OF_WEIGHTS, OF_ADAPTERS]
    assert theirs.logging_steps == ours.logging_steps == 10


def group_rates(trainer):
    """The learning rate that the optimizer has for each parameter, by the node."""
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    return {
        key: {rates[id(p)] for p in component.own_parameters().values() if p.requires_grad}
        for key, component in trainer.model.components.items()
    }


@pytest.mark.parametrize(
    ("given", "nodes", "expected"),
    [
        (None, None, {"draft": 1e-6, "answer": 1e-5}),
        (3e-4, None, {"draft": 3e-4, "answer": 3e-4}),
        (None, {"answer": {"learning_rate": 2e-3}}, {"draft": 1e-6, "answer": 2e-3}),
        (3e-4, {"draft": {"learning_rate": 2e-3}}, {"draft": 2e-3, "answer": 3e-4}),
    ],
)
def test_the_rate_follows_what_trains_and_what_is_given_wins(tmp_path, given, nodes, expected):
    """The drafter trains all weights, the refiner an adapter."""
    args = config(tmp_path, learning_rate=given, nodes=nodes)
    trainer = SysDPOTrainer(two_llms(lora(), tmp_path / "base"), args, train_dataset=text_rows(4))
    assert group_rates(trainer) == {name: {rate} for name, rate in expected.items()}
    assert args.learning_rate == given


def adapter_of(folder, seed, peft_config=None):
    model = llama(0)
    model.save_pretrained(folder / "base")

    def component():
        chosen = peft_config or LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian")
        return CausalLM(folder / "base", char_tokenizer(), max_new_tokens=4, peft_config=chosen)

    @node(component())
    def draft(question):
        return question

    @node(component())
    def answer(question, draft):
        return question + draft

    system = System(question >> draft, (question & draft) >> answer)
    SysDPOTrainer(system, config(folder, seed=seed), train_dataset=text_rows(2))
    return [dict(system[name].component.own_parameters()) for name in ("draft", "answer")]


def test_a_new_adapter_follows_the_seed_and_nothing_else(tmp_path):
    torch.manual_seed(11)
    first = adapter_of(tmp_path, 1)
    torch.manual_seed(12)
    again, other = adapter_of(tmp_path, 1), adapter_of(tmp_path, 2)
    for ours, theirs in zip(first, again, strict=True):
        assert ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    name = next(name for name in first[0] if "lora_A" in name)
    assert not torch.equal(first[0][name], other[0][name])
    assert not torch.equal(first[0][name], first[1][name])  # two nodes do not start alike


def test_a_second_training_says_what_it_starts_from_and_fresh_gives_the_first_start(tmp_path, caplog):
    system = judged()
    start = system["answer"].component.module["logits"].detach().clone()

    def train(of):
        with caplog.at_level(logging.WARNING, logger="sysdag"):
            caplog.clear()
            args = config(tmp_path, max_steps=2, learning_rate=0.1)
            trainer = SysDPOTrainer(of, args, train_dataset=rows())
            trainer.train()
        return "Nodes ['answer'] were trained by an earlier trainer" in caplog.text

    assert not train(system)
    assert not torch.equal(system["answer"].component.module["logits"], start)
    assert train(system)
    fresh = system.fresh()
    assert torch.equal(fresh["answer"].component.module["logits"], start)
    assert not train(fresh)


def test_fresh_reads_named_models_again_and_refuses_given_ones(tmp_path):
    system = two_llms(lora(), tmp_path / "base")
    with pytest.raises(PlanError, match="Node 'draft': .*given as an object.*with_components"):
        system.fresh()
    char_tokenizer().save_pretrained(tmp_path / "base")
    named = system.with_components({"draft": CausalLM(tmp_path / "base", max_new_tokens=4)})
    before = {name: p.detach().clone() for name, p in named["draft"].component.module.named_parameters()}
    with torch.no_grad():
        for n in named.nodes:
            for parameter in n.component.own_parameters().values():
                parameter.add_(1.0)
    fresh = named.fresh()
    found = dict(fresh["draft"].component.module.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    adapted = fresh["answer"].component.own_parameters()
    assert all(not p.any() for name, p in adapted.items() if "lora_B" in name)


class Fixed(Component):
    """Draws what it is told to, with the log-probabilities of a unit Gaussian at those places."""

    likelihood = "exact"

    def __init__(self, values, density=None):
        self.values = values
        self.is_density = density

    def sample(self, inputs, *, generator=None):
        return [Draw(self.values[at % len(self.values)], {}, 0.0) for at in range(len(inputs))]

    def observe(self, values):
        return [Draw(value) for value in values]

    def log_prob(self, inputs, draws):
        return torch.tensor([-float(str(len(str(draw.value)))) for draw in draws])

    def search(self, inputs, num_candidates, diversity_penalty, ngram_size=1):
        return [self.observe(self.values[:num_candidates]) for _ in inputs]

    def save_pretrained(self, folder):
        return {}


@pytest.mark.parametrize(
    ("values", "density", "covers"),
    [
        ([0.5, 1.5], None, False),
        ([torch.tensor([0.5]), torch.tensor([1.5])], None, False),
        (["a", "bb"], None, True),
        (["a", "bb"], True, False),
        ([0.5, 1.5], False, True),
    ],
)
def test_a_density_has_no_coverage_and_no_certificate(values, density, covers):
    @node(Fixed(values, density))
    def place(question):
        return question

    @node(Tabular({"k": {"yes": 0.5, "no": 0.5}}))
    def answer(question, place):
        return "k"

    plan = System(question >> place, (question & place) >> answer).compile()
    model = SystemModel(plan, ObjectiveOptions(objective="sampling"), candidates=DiverseBeamSearch(num_candidates=2))
    pairs = encode_pairs(plan, [{"question": "q", "chosen": "yes", "rejected": "no"}], "sampling")
    metrics = model(pairs).metrics
    assert "candidates/effective_sample_size" in metrics
    for name in ("candidates/coverage", "candidates/certified_lower", "candidates/certified_upper"):
        assert (name in metrics) == covers, name


@pytest.mark.parametrize(("odds", "collapses"), [(1.0, False), (1e6, True)])
def test_collapse_is_told_before_the_first_step(tmp_path, caplog, odds, collapses):
    share = odds / (1 + odds)

    @node(Tabular({"k": {"p": share, "r": 1 - share}}))
    def draft(question):
        return "k"

    @node(Tabular({"k": {"yes": 0.5, "no": 0.5}}))
    def answer(question, draft):
        return "k"

    system = System(question >> draft, (question & draft) >> answer)
    trainer = SysDPOTrainer(
        system, config(tmp_path, objective="sampling", max_steps=1, logging_steps=50),
        candidates=DiverseBeamSearch(num_candidates=2),
        train_dataset=[{"question": "q", "chosen": "yes", "rejected": "no"}],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="sysdag"):
        trainer.train()
    assert ("Before the first step the responsibilities have collapsed" in caplog.text) == collapses
