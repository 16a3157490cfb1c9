"""Training for the worst group: the minimax of enumerated systems, and what a training keeps of it."""

import itertools
import math

import numpy
import pytest
import torch
from scipy.optimize import minimize
from trained_systems import rows as llm_rows
from trained_systems import two_llms, weights_of

from sysdag import DataError, Input, SerializationError, SysDPOConfig, SysDPOTrainer, System, node
from sysdag.components import Tabular
from sysdag.data.encoding import encode_pairs
from sysdag.engine.replay import accumulate_gradients
from sysdag.engine.step import SystemModel
from sysdag.objectives.group_weights import GroupWeights
from sysdag.objectives.options import EngineOptions, ObjectiveOptions

OUTCOMES = list(itertools.product("uv", "pq"))
REWARDS = {"many": [1.0, 0.2, -0.3, -0.9], "few": [-1.1, 0.4, 0.6, 0.3]}  # of two groups that disagree
COPIES = {"many": 4, "few": 1}


def chain():
    """x -> y -> z with the arrow x -> z: any distribution of the four outcomes."""

    @node(Tabular({"x": {"u": 0.6, "v": 0.4}}))
    def y(x):
        return x

    @node(Tabular({"u": {"p": 0.3, "q": 0.7}, "v": {"p": 0.8, "q": 0.2}}))
    def z(y):
        return y

    return System(Input("x") >> y >> z)


def rows():
    """Every ordered pair of outcomes in every group; its weight is how probably the group prefers it so."""
    return [
        {"x": "x", "chosen": won[1], "rejected": lost[1], "chosen_intermediates": {"y": won[0]},
         "rejected_intermediates": {"y": lost[0]}, "group": group,
         "weight": 1 / (1 + math.exp(reward[j] - reward[i]))}
        for group, reward in REWARDS.items()
        for i, won in enumerate(OUTCOMES)
        for j, lost in enumerate(OUTCOMES)
        if i != j
        for _ in range(COPIES[group])
    ]  # fmt: skip


def group_losses(implicit):
    """Mean loss of each group, of the implicit rewards of the four outcomes."""
    found = []
    for reward in map(numpy.array, REWARDS.values()):
        prefers = 1 / (1 + numpy.exp(reward[None] - reward[:, None]))
        terms = prefers * numpy.logaddexp(0, implicit[None] - implicit[:, None])
        found.append((terms.sum() - terms.trace()) / 12)
    return numpy.array(found)


def trained(steps, group_dro, step_size=0.01, lr=0.05):
    """Losses by group after full-batch training, and the weights of the groups."""
    plan = chain().compile()
    options = ObjectiveOptions(beta=1.0, group_dro=group_dro)
    model = SystemModel(plan, options, engine=EngineOptions(engine="one_pass"))
    pairs = encode_pairs(plan, rows(), "direct")
    model.groups = GroupWeights(pairs, step_size) if group_dro else None
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        accumulate_gradients(model, model(pairs))
        optimizer.step()
        if model.groups is not None:
            model.groups.update()
    with torch.no_grad():
        losses = model(pairs).losses
    by_group = {g: float(losses[[p.group == g for p in pairs]].mean()) for g in REWARDS}
    return numpy.array(list(by_group.values())), None if model.groups is None else model.groups.weights


def test_the_worst_group_gets_what_the_minimax_gives_it():
    shares = numpy.array([0.8, 0.2])
    plain = minimize(lambda h: shares @ group_losses(h), numpy.zeros(4), tol=1e-12)
    fair = minimize(
        lambda v: v[4], numpy.zeros(5), method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "ineq", "fun": lambda v: v[4] - group_losses(v[:4])},
    )  # fmt: skip
    found, _ = trained(120, group_dro=False, lr=0.1)
    assert found == pytest.approx(group_losses(plain.x), abs=2e-4)
    robust, weights = trained(300, group_dro=True, step_size=0.5, lr=0.1)
    assert fair.fun < group_losses(plain.x).max() - 0.05  # the groups disagree, and the few lose by the mean
    assert robust.max() == pytest.approx(fair.fun, abs=2e-3)
    assert weights["few"] > 0.4  # of a fifth of the data


def test_the_first_step_is_that_of_the_plain_mean():
    plan = chain().compile()
    pairs = encode_pairs(plan, rows(), "direct")
    model = SystemModel(plan, ObjectiveOptions(beta=1.0), engine=EngineOptions(engine="one_pass"))
    plain = float(model(pairs).loss)
    model.groups = GroupWeights(pairs, 0.01)
    assert float(model(pairs).loss) == pytest.approx(plain, rel=1e-6)
    assert model.groups.weights == pytest.approx({"few": 0.2, "many": 0.8})


def test_weights_climb_by_the_formula_whatever_the_batches():
    plan = chain().compile()
    pairs = encode_pairs(plan, rows(), "direct")
    losses = torch.linspace(0.1, 3, len(pairs), dtype=torch.float64)
    means = {g: float(losses[[p.group == g for p in pairs]].mean()) for g in REWARDS}
    raw = {g: share * math.exp(0.5 * means[g]) for g, share in {"many": 0.8, "few": 0.2}.items()}
    expected = {g: value / sum(raw.values()) for g, value in raw.items()}
    whole, parts = (GroupWeights(pairs, 0.5) for _ in range(2))
    whole.observe(pairs, losses)
    whole.update()
    assert whole.weights == pytest.approx(expected)
    for start in range(0, len(pairs), 7):
        parts.observe(pairs[start : start + 7], losses[start : start + 7])
    parts.update(lambda sums: 3 * sums)  # as if three processes had seen the same
    assert parts.weights == pytest.approx(expected)
    parts.update()
    assert parts.weights == pytest.approx(expected)  # nothing was seen since


def test_groups_that_are_missing_or_unknown_are_named():
    plan = chain().compile()
    given = rows()
    with pytest.raises(DataError, match=r"needs two groups or more in the column `group`, got \['few'\]"):
        GroupWeights(encode_pairs(plan, [row for row in given if row["group"] == "few"], "direct"), 0.1)
    pairs = encode_pairs(plan, given, "direct")
    del given[3]["group"]
    with pytest.raises(DataError, match="pair 3 has no `group`"):
        GroupWeights(encode_pairs(plan, given, "direct"), 0.1)
    groups = GroupWeights(pairs, 0.1)
    other = encode_pairs(plan, [given[0] | {"group": "new"}], "direct")
    with pytest.raises(DataError, match=r"the group 'new' is none of the training data's, \['few', 'many'\]"):
        groups.of(other, torch.zeros(1))
    for state in (None, {"few": 0.0}):
        with pytest.raises(SerializationError, match=r"expected \['few', 'many'\]"):
            groups.load(state)


def config(folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "group_dro": True, "group_dro_step_size": 1.0,
    }  # fmt: skip
    return SysDPOConfig(**(defaults | options))


def run(folder, resume=None, **options):
    torch.manual_seed(0)
    data = [row | {"group": "ab"[i % 4 == 3]} for i, row in enumerate(llm_rows(16))]
    trainer = SysDPOTrainer(two_llms(), config(folder, **options), train_dataset=data, eval_dataset=data[:7])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_accumulated_batches_move_weights_as_one_batch_does(tmp_path):
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert parts.model.groups.weights == pytest.approx(whole.model.groups.weights, rel=1e-5)
    assert whole.model.groups.weights != pytest.approx({"a": 0.75, "b": 0.25}, abs=1e-3)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=1e-4, atol=1e-5)
    logged = [entry["groups/b/weight"] for entry in whole.state.log_history if "groups/b/weight" in entry]
    assert len(logged) == 4
    assert logged[-1] == pytest.approx(whole.model.groups.weights["b"])


def test_weights_of_groups_go_on_from_a_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=2)
    run(tmp_path / "parts", max_steps=2, save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "parts", resume=True, save_strategy="steps", save_steps=2)
    assert resumed.model.groups.weights == pytest.approx(whole.model.groups.weights, rel=1e-9)
    torch.testing.assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)


def test_evaluations_tell_groups_apart(tmp_path):
    trainer = run(tmp_path, per_device_eval_batch_size=3)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx((6 * found["eval_groups/a/loss"] + found["eval_groups/b/loss"]) / 7)
    assert found["eval_groups/worst_loss"] == max(found["eval_groups/a/loss"], found["eval_groups/b/loss"])
    assert 0 <= found["eval_groups/a/rewards/accuracies"] <= 1
