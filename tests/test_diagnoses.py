"""What `sysdag report` says in words: each diagnosis on a log that has it, and on one that has not."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import log, preference_line

from sysdag.reporting.diagnoses import diagnose
from sysdag.reporting.diagnosis import Facts
from sysdag.reporting.formats import number
from sysdag.reporting.history import History
from sysdag.reporting.node_signs import EVERYTHING
from sysdag.reporting.preference_signs import over_optimisation
from sysdag.reporting.shares import last_shares, shares_of
from sysdag.reporting.trends import noise


def kinds(lines, facts=None):
    return {diagnosis.kind: diagnosis for diagnosis in diagnose(History.of(lines), facts)}


def updated(lines, train=None, evaluation=None):
    """The lines with metrics replaced: `name: function of the step`."""
    found = []
    for line in lines:
        changes = train if "loss" in line else evaluation
        prefix = "" if "loss" in line else "eval_"
        found.append(line | {prefix + name: function(line["step"]) for name, function in (changes or {}).items()})
    return found


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_training_has_no_diagnosis(seed):
    assert kinds(log(seed=seed)) == {}


def test_every_diagnosis_tells_its_numbers_steps_and_what_to_try():
    broken = updated(
        log(), {"logps/chosen": lambda s: -20 - s, "candidates/coverage": lambda s: 0.01, "loss": lambda s: math.nan}
    )
    found = diagnose(History.of(broken))
    assert [d.level for d in found] == sorted((d.level for d in found), key=["problem", "warning", "note"].index)
    for diagnosis in found:
        assert any(character.isdigit() for character in diagnosis.evidence)
        assert 0 <= diagnosis.first_step <= diagnosis.last_step <= 60
        assert len(diagnosis.advice) > 40
        assert set(diagnosis.to_dict()) == {
            "kind", "level", "title", "evidence", "advice", "first_step", "last_step"
        }  # fmt: skip


def test_falling_chosen_log_probs():
    fall = kinds(updated(log(), evaluation={"logps/chosen": lambda step: -20 - 0.5 * step}))["chosen_log_probs_fall"]
    assert "in evaluation fell from" in fall.evidence
    assert (fall.first_step, fall.last_step) == (5, 60)
    assert "sft" in fall.advice
    training = [line for line in updated(log(), {"logps/chosen": lambda step: -20 - 0.5 * step}) if "loss" in line]
    evidence = kinds(training)["chosen_log_probs_fall"].evidence
    assert f"in training fell from {number(-23.25)} to {number(-47.25)} nats between step 1 and step 60" in evidence


@pytest.mark.parametrize(
    "chosen",
    [lambda step: -20 - 0.01 * step, lambda step: -20 + 0.5 * step, lambda step: -20 + 8 * (-1) ** (step // 5)],
    ids=["by less than a nat", "rising", "noise"],
)
def test_log_probs_that_do_not_fall(chosen):
    assert "chosen_log_probs_fall" not in kinds(updated(log(), evaluation={"logps/chosen": chosen}))


def test_falling_log_probs_without_growing_margins_are_another_matter():
    lines = updated(log(), evaluation={"logps/chosen": lambda s: -20 - 0.5 * s, "rewards/margins": lambda s: 1.0})
    assert "chosen_log_probs_fall" not in kinds(lines)
    noise_alone = {"logps/chosen": lambda s: -20 - 0.5 * s, "rewards/margins": lambda s: 1 + (s + 1) % 2}
    assert "chosen_log_probs_fall" not in kinds(updated(log(), evaluation=noise_alone))


@pytest.mark.parametrize(("size", "gap", "fires"), [(1.01, 0.001, True), (1.01, 0.2, False), (1.5, 0.001, False)])
def test_collapse_of_responsibilities(size, gap, fires):
    late = {
        "candidates/effective_sample_size": lambda step: 2.5 if step < 20 else size,
        "candidates/responsibility_gap": lambda step: 0.3 if step < 20 else gap,
    }
    found = kinds(updated(log(), late)).get("responsibilities_collapse")
    assert (found is not None) == fires
    if found:
        assert found.level == "problem"
        assert "From step 49 to step 60 the effective sample size is 1.01" in found.evidence
        assert "responsibility_temperature" in found.advice


def rewards_of(draft, answer):
    nodes = {"draft": draft, "answer": answer}
    return lambda: [preference_line(s, nodes) for s in range(1, 31)] + [preference_line(30, nodes, prefix="eval_")]


@pytest.mark.parametrize(
    ("draft", "answer", "fires"),
    [
        ((0.02, 0.01), (1.0, -1.0), "answer"),
        ((0.0, 0.1), (1.0, -1.0), "answer"),
        ((0.5, 0.0), (1.0, -1.0), None),
        ((0.001, 0.0), (0.01, 0.0), None),
    ],
    ids=["the rest", "against the other", "one fifth", "nothing at all"],
)
def test_one_node_that_carries_everything(draft, answer, fires):
    found = kinds(rewards_of(draft, answer)()).get("one_node_carries_everything")
    assert (found and found.title) == (fires and f"Node {fires} carries everything")
    if found:
        assert "At step 30 (evaluation)" in found.evidence
        assert "lower its beta" in found.advice
        assert "nodes={'answer': {'beta': ...}}" in found.advice
        assert "larger beta" not in found.advice


def test_the_advice_on_beta_evens_the_parts_out():
    found = kinds(rewards_of((0.12, 0.0), (3.0, 0.0))())["one_node_carries_everything"]
    assert "at 1/25 of it, answer would be as large as the next" in found.advice


def test_the_only_node_that_trains_may_carry_everything():
    lines = rewards_of((0.0, 0.0), (1.0, -1.0))()
    frozen = Facts(component_of={"draft": "draft", "answer": "answer"}, frozen=frozenset({"draft"}))
    assert set(kinds(lines)) == {"one_node_carries_everything", "node_learns_nothing", "loss_does_not_move"}
    assert set(kinds(lines, frozen)) == {"loss_does_not_move"}
    only_answer = [line | {"nodes/answer/grad_norm": 1.0} if "loss" in line else line for line in lines]
    assert set(kinds(only_answer)) == {"loss_does_not_move"}


def test_a_node_whose_rewards_stay_0():
    found = kinds(
        updated(log(), *[{f"nodes/draft/rewards/{side}": lambda s: 1e-5 for side in ("chosen", "rejected")}] * 2)
    )["node_learns_nothing"]
    assert found.title == "Node draft learns nothing"
    assert "largest reward, on winners or losers, is 1e-5" in found.evidence


def test_a_node_whose_gradient_is_0():
    found = kinds(updated(log(), {"nodes/draft/grad_norm": lambda step: 0.0}))["node_learns_nothing"]
    assert found.title == "Node draft learns nothing"
    assert "Its gradient norm is 0 from step 1 to step 60" in found.evidence
    some = updated(log(), {"nodes/draft/grad_norm": lambda step: 0.0 if step < 60 else 1e-3})
    assert "node_learns_nothing" not in kinds(some)


def test_a_node_whose_branch_no_run_takes():
    found = kinds(updated(log(), {"nodes/draft/taken": lambda step: 0.0}))["node_learns_nothing"]
    assert found.title == "Node draft learns nothing"
    assert "No run takes its branch from step 1 to step 60" in found.evidence
    assert "node_learns_nothing" not in kinds(updated(log(), {"nodes/draft/taken": lambda step: float(step == 9)}))


def test_visits_of_a_loop_have_the_gradient_of_their_shared_component():
    nodes = {"critic[0]": (0.5, -0.5), "critic[1]": (0.4, -0.4)}
    lines = [preference_line(s, nodes) | {"nodes/critic/grad_norm": 0.0} for s in range(1, 31)]
    facts = Facts(component_of=dict.fromkeys(nodes, "critic"))
    found = [d.title for d in diagnose(History.of(lines), facts) if d.kind == "node_learns_nothing"]
    assert found == ["Node critic[0] learns nothing", "Node critic[1] learns nothing"]


def evaluations(values, name="loss", every=10):
    return [{"step": every * at, f"eval_{name}": value} for at, value in enumerate(values, start=1)]


U_SHAPED = [0.69, 0.60, 0.52, 0.47, 0.45, 0.46, 0.50, 0.55, 0.60, 0.66]


def test_over_optimisation():
    found = kinds(evaluations(U_SHAPED))["over_optimisation"]
    assert found.title == "Over-optimised after step 50"
    assert "loss was best at step 50 (0.45) and its last 3 values, to step 100, have a mean of 0.603" in found.evidence
    assert (found.first_step, found.last_step) == (50, 100)
    assert "load_best_model_at_end" in found.advice
    upside_down = evaluations([1 - value for value in U_SHAPED], "rewards/margins")
    assert "rewards/margins was best at step 50" in kinds(upside_down)["over_optimisation"].evidence


def test_over_optimisation_of_accuracies_is_measured_by_the_number_of_pairs():
    falling = [0.6, 0.7, 0.8, 0.9, 0.89, 0.87, 0.85, 0.84, 0.83, 0.82]
    few, many = Facts(evaluation_pairs=20), Facts(evaluation_pairs=2000)
    assert "over_optimisation" in kinds(evaluations(falling, "rewards/accuracies"), many)
    assert "over_optimisation" not in kinds(evaluations(falling, "rewards/accuracies"), few)


@pytest.mark.parametrize(
    "values", [U_SHAPED[:5], U_SHAPED[:6], [0.69, 0.5, 0.41, 0.40, 0.402, 0.401], [0.5] * 8, U_SHAPED[:3],
     [0.7, 0.6, 0.5, 0.4, 0.405, 0.41, 0.42]],
    ids=["still falling", "one step back", "flat at the end", "constant", "three values", "little of the gain"],
)  # fmt: skip
def test_no_over_optimisation(values):
    assert "over_optimisation" not in kinds(evaluations(values))


@pytest.mark.parametrize(("count", "most"), [(6, 16), (20, 6), (200, 2)])
def test_noise_alone_is_seldom_called_over_optimisation(count, most):
    """The more evaluations, the better the best of them is by chance."""
    generator = numpy.random.default_rng(0)
    fired = 0
    for _ in range(400):
        values = 0.5 + 0.05 * generator.normal(size=count)
        fired += over_optimisation(History.of(evaluations(values.tolist())), Facts()) is not None
    assert fired <= most


def test_a_loss_that_does_not_move():
    still = updated(log(), {"loss": lambda s: 0.6931 + 1e-4 * (-1) ** s, "rewards/margins": lambda s: 1e-4})
    found = kinds(still, Facts(config={"learning_rate": 1e-9}))["loss_does_not_move"]
    assert found.level == "problem"
    assert "0.6931" in found.evidence
    assert "The learning rate is 1e-9" in found.evidence
    assert "loss_does_not_move" not in kinds(updated(log(), {"loss": lambda s: 0.6931 - 0.001 * s}))
    only_margins = updated(log(), {"loss": lambda s: 0.6931, "rewards/margins": lambda s: 0.01 * s})
    assert "loss_does_not_move" not in kinds(only_margins)


def noisy(gain, steps, deviation, seed):
    """A training whose loss falls and whose margin rises by `gain`, under the noise of small batches."""
    generator = numpy.random.default_rng(seed)
    part = numpy.linspace(0, 1, steps)
    return updated(log(steps=steps), {
        "loss": lambda s: 0.69 - gain / 2 * part[s - 1] + deviation * generator.normal(),
        "rewards/margins": lambda s: gain * part[s - 1] + 2 * deviation * generator.normal(),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("gain", "steps", "deviation", "least", "most"),
    [(0, 200, 0.1, 30, 40), (0.6, 200, 0.1, 0, 0), (0.6, 20, 0.1, 0, 4)],
)
def test_a_loss_that_does_not_move_but_for_noise(gain, steps, deviation, least, most):
    found = [kinds(noisy(gain, steps, deviation, seed)) for seed in range(40)]
    assert least <= sum("loss_does_not_move" in each for each in found) <= most
    assert not any("loss_rises" in each for each in found)


def test_a_loss_that_rises():
    found = kinds(updated(log(), {"loss": lambda s: 0.6931 + 0.01 * s}))["loss_rises"]
    assert found.level == "problem"
    assert "was 0.7581 around step 1 and is 1.238 around step 60" in found.evidence
    assert "loss_rises" not in kinds(updated(log(), {"loss": lambda s: 0.6931 + 0.0001 * s}))
    assert "loss_rises" not in kinds(updated(log(), {"loss": lambda s: 0.6931 + (s % 7) * 0.1}))


@pytest.mark.parametrize(("accuracy", "margin", "fires"), [(1.0, 25, True), (1.0, 3, False), (0.9, 25, False)])
def test_pairs_that_are_too_easy(accuracy, margin, fires):
    late = {"rewards/accuracies": lambda s: min(s / 30, accuracy), "rewards/margins": lambda s: s / 60 * margin}
    found = kinds(updated(log(), evaluation=late)).get("too_easy")
    assert (found is not None) == fires
    if found:
        assert "Between step 50 and step 60 the accuracy in evaluation is 1 and the mean margin 22.9" in found.evidence


@pytest.mark.parametrize("name", ["grad_norm", "nodes/answer/grad_norm"])
def test_gradient_spikes(name):
    lines = updated(log(), {name: lambda step: 90.0 if step in (23, 41) else 1 + step % 2})
    found = kinds(lines, Facts(config={"max_grad_norm": 1.0}))["gradient_spikes"]
    assert found.title == "Gradient spikes at steps 23, 41"
    assert f"{name} is 90 at step" in found.evidence
    assert "clipped at max_grad_norm=1" in found.evidence


@pytest.mark.parametrize(
    "norm", [lambda s: 100 / s, lambda s: 1 + 3 * (s % 2), lambda s: 90.0 if s == 2 else 1.0, lambda s: 1e-4 * 1.1**s,
     lambda s: 1.0 if s > 15 else 0.01],
    ids=["falling", "noise", "at the start", "growing", "small in warm-up"],
)  # fmt: skip
def test_no_gradient_spikes(norm):
    assert "gradient_spikes" not in kinds(updated(log(), {"grad_norm": norm}))


def test_numbers_that_are_not_finite():
    lines = log()
    lines[3] |= {"grad_norm": None}
    lines[10] |= {"loss": float("nan"), "grad_norm": float("inf")}
    (found,) = [d for d in diagnose(History.of(lines)) if d.kind == "not_finite"]
    assert found.evidence == f"loss at step {lines[10]['step']}; grad_norm at steps 4, {lines[10]['step']}." or (
        found.evidence == f"grad_norm at steps 4, {lines[10]['step']}; loss at step {lines[10]['step']}."
    )
    assert found.level == "problem"
    assert (found.first_step, found.last_step) == (4, lines[10]["step"])
    evaluated = kinds([*log(), {"step": 61, "eval_loss": None}])["not_finite"]
    assert "eval_loss at step 61" in evaluated.evidence


@pytest.mark.parametrize(("coverage", "fires"), [(0.02, True), (1e-9, True), (0.3, False)])
def test_low_coverage(coverage, fires):
    found = kinds(updated(log(), {"candidates/coverage": lambda s: coverage})).get("low_coverage")
    assert (found is not None) == fires
    if found:
        assert found.level == "note"
        assert {0.02: "hold 2 % of it", 1e-9: "hold 1e-9 of it"}[coverage] in found.evidence.replace("2.0 %", "2 %")


def test_too_short_a_log():
    found = kinds(log(steps=6))["too_short"]
    assert "There are 6 logs of the training loss up to step 6, and 1 evaluations" in found.evidence
    assert set(kinds(log(steps=6))) == {"too_short"}
    assert "too_short" not in kinds(log(steps=10))
    assert set(kinds([])) == {"too_short"}


finite = st.floats(-1e6, 1e6, allow_nan=False)
metrics = st.sampled_from(
    ["loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "nodes/a/rewards/chosen",
     "nodes/a/rewards/rejected", "nodes/a/rewards/margins", "nodes/b/rewards/margins", "nodes/a/grad_norm",
     "candidates/coverage", "candidates/effective_sample_size", "candidates/responsibility_gap"]
)  # fmt: skip
lines_of = st.lists(
    st.builds(
        lambda step, prefix, values: {"step": step, **{prefix + name: value for name, value in values.items()}},
        st.integers(0, 40),
        st.sampled_from(["", "eval_", "eval_far_"]),
        st.dictionaries(metrics, st.one_of(finite, st.none(), st.just(math.nan), st.just(math.inf))),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(lines_of)
def test_any_log_can_be_diagnosed(lines):
    history = History.of(lines)
    for diagnosis in diagnose(history):
        assert diagnosis.first_step <= diagnosis.last_step <= history.last_step
    for split in (history.train, *history.evaluations.values()):
        for series in split.values():
            assert list(series.steps) == sorted(set(series.steps))


@given(st.lists(finite, min_size=1, max_size=8))
def test_shares_are_parts_of_all_that_moved(margins):
    shares = shares_of(margins)
    if not any(margins):
        assert shares == [None] * len(margins)
        return
    assert sum(map(abs, shares)) == pytest.approx(1)
    assert all(share * margin >= 0 for share, margin in zip(shares, margins, strict=True))
    if min(margins) >= 0 and sum(margins) > 1e-3:
        assert shares == pytest.approx([margin / sum(margins) for margin in margins])


def test_the_shares_are_those_of_the_last_evaluation_or_else_of_the_last_log():
    lines = log()
    shares = last_shares(History.of(lines), ["draft", "answer"])
    assert (shares.step, shares.split) == (60, "eval")
    assert [node.name for node in shares.nodes] == ["draft", "answer"]
    last = lines[-1]
    assert shares.margin == last["eval_rewards/margins"]
    assert shares.of("draft").margin == last["eval_nodes/draft/rewards/margins"]
    assert shares.total == pytest.approx(shares.margin)
    assert shares.of("draft").share == pytest.approx(shares.of("draft").margin / shares.total)
    training = last_shares(History.of([line for line in lines if "loss" in line]))
    assert (training.step, training.split) == (60, "training")
    assert training.of("answer").chosen == lines[-2]["nodes/answer/rewards/chosen"]
    assert training.of("answer").share > 0.5 < EVERYTHING
    assert last_shares(History.of([{"step": 1, "loss": 1.0}])) is None
    later = [*lines, preference_line(70, {"answer": (1.0, 0.5)}, prefix="eval_")]
    assert [(node.name, node.share) for node in last_shares(History.of(later)).nodes] == [("answer", 1.0)]


def test_several_evaluation_sets_and_other_keys_of_a_log():
    lines = [
        {"step": 1, "loss": 0.7, "my_loss": 3.0, "learning_rate": 1e-5, "grad_norm": 2.0},
        {"step": 2, "eval_near_loss": 0.6, "eval_near_runtime": 1.0},
        {"step": 2, "eval_far_loss": 0.65, "eval_far_nodes/a_loss/rewards/margins": 0.5},
        {"step": 2, "train_loss": 0.9, "train_runtime": 3.0, "total_flos": 0.0},
        {"step": 2, "eval_near_loss": 0.61, "name": "text"},
    ]
    history = History.of(lines)
    assert set(history.train) == {"loss", "learning_rate", "grad_norm"}
    assert list(history.evaluations) == ["eval_near", "eval_far"]
    assert history.evaluation["loss"].values == (0.61,)
    assert history.nodes == ("a_loss",)
    assert history.last_step == 2


def test_the_noise_of_a_straight_line_is_0_and_that_of_noise_its_deviation():
    history = History.of([{"step": step, "loss": 3.0 - step / 8} for step in range(20)])
    assert noise(history.train["loss"]) == pytest.approx(0, abs=1e-12)
    values = numpy.random.default_rng(0).normal(size=4000) * 0.3 + numpy.linspace(0, 50, 4000)
    history = History.of([{"step": step, "loss": float(value)} for step, value in enumerate(values)])
    assert noise(history.train["loss"]) == pytest.approx(0.3, rel=0.08)
