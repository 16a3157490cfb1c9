"""Columns about a pair itself: weight, margin and group; and losses that a training cannot serve with them."""

import json
import math
import sys

import pytest
import torch
from trained_systems import question, rows, two_llms

from sysdag import DataError, DiverseBeamSearch, Input, PlanError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import Categorical, CausalLM, Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.data.validation import validate_rows
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives import PairScores
from sysdag.objectives.options import EngineOptions, ObjectiveOptions
from sysdag.training.resume import pairs_hash

ONE_PASS = EngineOptions(engine="one_pass")


def config(folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return SysDPOConfig(**(defaults | options))


def stepped(columns, **options):
    """Losses without and with columns beside four rows, of one model away from its reference; and its gradients."""
    torch.manual_seed(0)
    plan = two_llms().compile()
    model = SystemModel(plan, ObjectiveOptions(**options), engine=ONE_PASS)
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = []
    for beside in ([{}] * 4, columns):
        for parameter in model.trained_parameters():
            parameter.grad = None
        output = model(encode_pairs(plan, [row | own for row, own in zip(rows(4), beside, strict=True)], "direct"))
        accumulate_gradients(model, output)
        found.append((output, torch.cat([p.grad.flatten().clone() for p in model.trained_parameters()])))
    return found


WEIGHTS = [0.5, 2.0, 0.0, 1.0]


@pytest.mark.parametrize("loss_type", [("sigmoid",), ("nca_pair", "sft"), ("cpo",)])
def test_a_weight_multiplies_the_loss_of_its_pair(loss_type):
    (plain, _), (weighted, _) = stepped([{"weight": w} for w in WEIGHTS], loss_type=loss_type)
    expected = plain.losses * torch.tensor(WEIGHTS)
    torch.testing.assert_close(weighted.losses, expected)
    torch.testing.assert_close(weighted.loss.detach(), expected.mean())
    assert weighted.metrics["rewards/margins"].tolist() == plain.metrics["rewards/margins"].tolist()


def test_equal_weights_are_a_factor_and_none_is_one():
    (_, plain), (_, doubled) = stepped([{"weight": 2}] * 4)
    torch.testing.assert_close(doubled, 2 * plain)
    (_, plain), (_, same) = stepped([{"weight": None}] * 4)
    assert torch.equal(same, plain)


@pytest.mark.parametrize("objective", ["direct", "sampling"])
def test_a_margin_is_taken_off_inside_the_loss(objective):
    """As in TRL's RewardTrainer: -log sigmoid(chosen reward - rejected reward - margin)."""
    plan = two_llms().compile()
    margins = [1.5, 0.0, -0.5, 3.0]
    data = [row | {"margin": m} for row, m in zip(rows(4), margins, strict=True)]
    candidates = DiverseBeamSearch(num_candidates=2) if objective == "sampling" else None
    model = SystemModel(plan, ObjectiveOptions(objective=objective), candidates=candidates, engine=ONE_PASS)
    output = model(encode_pairs(plan, data, objective))
    rewards = output.metrics["rewards/margins"]
    expected = -torch.nn.functional.logsigmoid(rewards - torch.tensor(margins))
    torch.testing.assert_close(output.losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("weight", "1", r"Row 1: weight must be a number, got '1'"),
        ("weight", True, "Row 1: weight must be a number, got True"),
        ("weight", -0.5, "Row 1: weight must be finite and 0 or more, got -0.5"),
        ("weight", math.nan, "Row 1: weight must be finite"),
        ("margin", math.inf, "Row 1: margin must be finite, got inf"),
        ("margin", [1.0], "Row 1: margin must be a number"),
        ("group", 1.5, "Row 1: group must be a name or a whole number, got 1.5"),
        ("group", ["a"], "Row 1: group must be"),
    ],
)
def test_values_that_cannot_be_used_are_named_with_their_row(column, value, message):
    plan = two_llms().compile()
    data = rows(3)
    data[1][column] = value
    with pytest.raises(DataError, match=message):
        encode_pairs(plan, data, "direct")
    report = validate_rows(plan, data, "direct")
    assert report.errors == 1
    assert not report.unread


def test_an_input_of_that_name_stays_an_input():
    @node(Tabular({key: {"light": 0.5, "heavy": 0.5} for key in (1.0, 2.0)}))
    def said(weight):
        return weight

    plan = System(Input("weight") >> said).compile()
    [pair] = encode_pairs(plan, [{"weight": 2.0, "chosen": "heavy", "rejected": "light", "group": 3}], "direct")
    assert (pair.inputs, pair.weight, pair.group) == ({"weight": 2.0}, 1.0, "3")


@pytest.mark.parametrize(
    ("column", "loss_type", "message"),
    [
        (
            {"margin": 0.5},
            ["nca_pair"],
            r"`margin`, which has no place in loss_type 'nca_pair'; it enters \['cpo'",
        ),
        ({"margin": 0.5}, ["sigmoid", "ipo"], "no place in loss_type 'ipo'"),
        ({"weight": 0.5}, ["aot"], "column `weight`, and loss_type 'aot' sorts pairs"),
    ],
)
def test_columns_that_a_loss_has_no_use_for_are_refused_before_training(tmp_path, column, loss_type, message):
    data = rows(8)
    data[5] |= column
    with pytest.raises(PlanError, match=message):
        SysDPOTrainer(two_llms(), config(tmp_path, loss_type=loss_type), train_dataset=data)


def test_what_is_said_of_pairs_is_a_part_of_the_data():
    plan = two_llms().compile()
    plain = encode_pairs(plan, rows(2), "direct")
    hashes = {pairs_hash(plain)}
    for column, value in (("weight", 2.0), ("margin", 2.0), ("group", "2.0")):
        pairs = encode_pairs(plan, [row | {column: value} for row in rows(2)], "direct")
        hashes.add(pairs_hash(pairs))
        assert pairs[0].key == plain[0].key  # scores of the reference do not depend on it
    assert len(hashes) == 4
    assert pairs_hash(encode_pairs(plan, [row | {"weight": 1} for row in rows(2)], "direct")) in hashes


# Losses that a training cannot serve


@pytest.mark.parametrize("loss_type", ["aot", ["sigmoid", "aot_unpaired"]])
def test_losses_that_sort_a_batch_need_it_whole(tmp_path, loss_type, monkeypatch):
    with pytest.raises(PlanError, match="gradient_accumulation_steps=2 would sort each part.*per_device_train_batch"):
        SysDPOTrainer(
            two_llms(), config(tmp_path, loss_type=loss_type, gradient_accumulation_steps=2), train_dataset=rows(4)
        )
    monkeypatch.setattr(SysDPOConfig, "world_size", 3)
    with pytest.raises(PlanError, match="3 processes would each sort their own"):
        SysDPOTrainer(two_llms(), config(tmp_path, loss_type=loss_type), train_dataset=rows(4))


def test_a_loss_that_a_system_cannot_have_is_refused_before_models_load(tmp_path):
    @node(Categorical(["short", "long"], 2))
    def route(question):
        return [1.0, 0.0]

    @node(CausalLM("no/such-model"))
    def answer(question, route):
        return f"{question} {route}"

    system = System(question >> route, (question & route) >> answer)
    with pytest.raises(PlanError, match="loss_type 'simpo' divides .* and node 'route'"):
        SysDPOTrainer(system, config(tmp_path, loss_type="simpo"), train_dataset=rows(4))


@pytest.mark.parametrize("option", ["precompute_ref_log_probs", "sync_ref_model"])
def test_what_becomes_of_a_reference_needs_one(tmp_path, option):
    with pytest.raises(PlanError, match=rf"{option}=True has no use: loss_type \['simpo'\] trains without a reference"):
        SysDPOTrainer(two_llms(), config(tmp_path, loss_type="simpo", **{option: True}), train_dataset=rows(4))


@pytest.mark.parametrize("loss_type", [["simpo"], ["cpo"]])
def test_training_without_a_reference_starts_and_learns(tmp_path, loss_type):
    trainer = SysDPOTrainer(
        two_llms(), config(tmp_path, loss_type=loss_type, max_steps=12, learning_rate=5e-3), train_dataset=rows(8)
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0]


# A function as a loss


def squared_hinge(scores: PairScores, beta, label_smoothing):
    return torch.relu(1 - scores.margins) ** 2


def test_a_function_is_a_loss_and_its_name_stands_in_the_record(tmp_path, known_losses):
    args = config(tmp_path, loss_type=[squared_hinge, "sft"], loss_weights=[1.0, 0.1])
    assert args.loss_type == [f"{__name__}:squared_hinge", "sft"]
    trainer = SysDPOTrainer(two_llms(), args, train_dataset=rows(4))
    trainer.train()
    recorded = json.loads((tmp_path / "run.json").read_text())["config"]["loss_type"]
    assert recorded == args.loss_type
    assert sys.modules[__name__].squared_hinge is squared_hinge
    assert config(tmp_path, loss_type=squared_hinge).loss_type == [f"{__name__}:squared_hinge"]
    with pytest.raises(PlanError, match="has no gradient"):
        config(tmp_path, loss_type=lambda scores, beta, e: scores.margins.detach())


def test_a_lambda_trains_under_a_name_of_its_own(tmp_path, known_losses):
    args = config(tmp_path, loss_type=lambda scores, beta, e: torch.relu(1 - scores.margins))
    assert len(args.loss_type) == 1
    assert "<lambda>" in args.loss_type[0]
    hinge = SysDPOTrainer(two_llms(), config(tmp_path, loss_type="hinge"), train_dataset=rows(4))
    own = SysDPOTrainer(two_llms(), args, train_dataset=rows(4))
    pairs = own.train_dataset
    assert float(own.model(pairs).loss) == float(hinge.model(pairs).loss)
