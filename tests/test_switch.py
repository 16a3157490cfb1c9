"""Systems with switches, run and scored: against enumerations by hand that share no code with sysdag."""

import collections
import json
import math
import re

import numpy
import pytest
import torch
from scipy.stats import chisquare
from switched_systems import SOLUTIONS, build, outcomes, reported_outcomes

from sysdag import DataError, Input, PlanError, SerializationError, System, Trace, node, switch
from sysdag.components import Tabular
from sysdag.execution.execute import fill
from sysdag.execution.likelihood import log_probs
from sysdag.objectives.candidate_sums import candidate_log_sum
from sysdag.objectives.strategies import DiverseBeamSearch, Exhaustive, ImportanceSampling, MonteCarlo
from sysdag.theory import check_alignment, enumerate_outcomes
from sysdag.traces.cells import ABSENT, Draw


def key(values):
    return tuple(sorted(values.items()))


def run_of(trace, row, names):
    cells = {name: trace.cells[name][row] for name in names}
    return {name: cell.value for name, cell in cells.items() if cell is not ABSENT}


@pytest.mark.parametrize(("behind", "oracle"), [(False, outcomes), (True, reported_outcomes)])
@pytest.mark.parametrize("x", "ab")
def test_runs_follow_the_joint_and_are_scored_by_it(x, behind, oracle):
    plan = build(behind=behind).compile()
    exact = {key(values): p for values, p in oracle(x)}
    assert math.fsum(exact.values()) == pytest.approx(1)
    count = 2000
    trace = plan.sample({"x": [x] * count}, seed=3)
    seen = collections.Counter(key(run_of(trace, row, plan.order)) for row in range(count))
    assert seen.keys() <= exact.keys()
    assert chisquare([seen[k] for k in exact], [p * count for p in exact.values()]).pvalue > 1e-3
    joint = torch.stack(list(log_probs(plan, trace).values())).sum(0)
    expected = torch.tensor([math.log(exact[key(run_of(trace, row, plan.order))]) for row in range(count)])
    torch.testing.assert_close(joint.detach().float(), expected)


def test_a_skipped_branch_is_not_called():
    system = build()
    trace = system.compile().sample({"x": ["a", "b"] * 50}, seed=0)
    of_math = trace["route"].count("math")
    assert 20 < of_math < 80
    calls = {name: system[name].component.calls for name in ("solve", "outline", "write")}
    assert calls == {"solve": of_math, "outline": 100 - of_math, "write": 100 - of_math}
    log_probs(system.compile(), trace)
    assert system["solve"].component.calls == 2 * of_math
    assert system["outline"].component.calls == 2 * (100 - of_math)


def test_enumeration_has_the_runs_that_there_are():
    plan = build(behind=True).compile()
    trace = enumerate_outcomes(plan, {"x": "a"})
    exact = {key(values): p for values, p in reported_outcomes("a")}
    found = [key(run_of(trace, row, plan.order)) for row in range(len(trace))]
    assert sorted(found) == sorted(exact)
    joint = torch.stack(list(log_probs(plan, trace).values())).sum(0).exp()
    assert joint.tolist() == pytest.approx([exact[k] for k in found])


# --- values that contradict the router ---


def test_a_value_in_a_branch_that_is_not_taken_is_refused():
    plan = build().compile()
    trace = plan.sample({"x": ["a", "b"]}, seed=0)
    routed = trace.updated({"route": plan.system["route"].component.observe(["math", "code"])})
    cells = {"solve": [Draw("u", {"index": 0})] * 2, "outline": [ABSENT, Draw("o", {"index": 0})]}
    with pytest.raises(PlanError, match="Node 'solve', row 1: it has a value, but another branch is taken there"):
        log_probs(plan, fill(plan, routed.updated(cells)), ["solve"])
    with pytest.raises(PlanError, match="Node 'solve', row 0: it has no value, but runs there"):
        log_probs(plan, routed.updated({"solve": [ABSENT] * 2}), ["solve"])


def test_a_value_that_names_no_branch_is_refused_by_row():
    x = Input("x")
    one, other = (node(name=name)(lambda x: x) for name in ("one", "other"))
    route = node(name="route")(lambda x: {"poem": "poetry"}.get(x, f" {x}\n"))
    system = System(x >> [route, one, other], switch(route, {"math": one, "code": other}, name="value"))
    assert system.compile().sample({"x": ["code", "math"]})["value"] == ["code", "math"]  # white space does not count
    with pytest.raises(DataError, match="Node 'route', row 1: 'poetry' names no branch of the switch 'value'; expected "
                       "one of 'math', 'code'"):  # fmt: skip
        system.compile().sample({"x": ["math", "poem"]})
    chosen = System(x >> [one, other], switch(x, {1: one, "code": other}, name="value")).compile()
    assert chosen.sample({"x": [1, "code"]})["value"] == [1, "code"]
    for wrong in (True, [1], "math", None, numpy.ones(2), torch.ones(2)):
        with pytest.raises(DataError, match="Input 'x', row 1: .* names no branch"):
            chosen.sample({"x": [1, wrong]})
    with_default = System(x >> [route, one, other], switch(route, {"math": one}, default=other, name="value")).compile()
    trace = with_default.sample({"x": ["math", "poem", "code"]})
    assert trace["value"] == ["math", "poem", "code"]
    assert trace["one"] == ["math", None, None]


@pytest.mark.parametrize(
    ("objective", "candidates"), [("direct", None), ("sampling", None), ("sampling", Exhaustive())]
)
def test_minimising_the_population_loss_recovers_the_reward(objective, candidates):
    """Theorem 1, where nodes of one run depend on its route: every factor can have its optimum."""

    def reward(inputs, values):
        if objective == "sampling":
            return float(values["solution"] == "u")
        return (values["solution"] == "u") + 0.5 * (values["route"] == "math") + 0.3 * (values["outline"] == "o")

    report = check_alignment(build(), reward, {"x": ["a", "b"]}, objective=objective, candidates=candidates)
    assert report.deviation < 1e-6
    assert report.missing_edges == ()


# --- Sampling ---


def log_p_hat(plan, x, z, drawn):
    """log of the sum over candidates, of sysdag's own scores of the run with the output at the branch that is taken."""
    rows = drawn.trace
    ends = {
        name: [
            ABSENT if rows["route"][row] != route else plan.system[name].component.observe([z])[0]
            for row in range(len(rows))
        ]
        for name, route in (("solve", "math"), ("write", "code"))
    }
    joint = torch.stack(list(log_probs(plan, fill(plan, rows.updated(ends))).values())).sum(0)
    if drawn.log_weight is not None:
        joint = joint + torch.tensor(drawn.log_weight)
    return candidate_log_sum(joint, torch.tensor(drawn.prompt), 1)


@pytest.mark.parametrize("z", "uv")
@pytest.mark.parametrize("x", "ab")
def test_the_sum_over_all_candidates_is_the_marginal(x, z):
    plan = build().compile()
    assert plan.latents("sampling") == ("route", "outline")
    drawn = Exhaustive().draw(plan, {"x": [x]})
    assert len(drawn.prompt) == 3  # math, code with either outline
    exact = math.fsum(p for values, p in outcomes(x) if values["solution"] == z)
    assert float(log_p_hat(plan, x, z, drawn).detach()) == pytest.approx(math.log(exact))


@pytest.mark.parametrize("strategy", [MonteCarlo(num_candidates=6), DiverseBeamSearch(num_candidates=3)])
def test_candidates_lie_in_several_branches_and_are_distinct(strategy):
    plan = build(behind=True).compile()
    drawn = strategy.draw(plan, {"x": ["a", "b"]}, torch.Generator().manual_seed(0))
    paths = [(p, *key(run_of(drawn.trace, row, plan.latents("sampling")))) for row, p in enumerate(drawn.prompt)]
    assert len(set(paths)) == len(paths)
    for row in range(len(paths)):
        assert (drawn.trace["solve"][row] is None) == (drawn.trace["route"][row] == "code")
        assert (drawn.trace["outline"][row] is None) == (drawn.trace["route"][row] == "math")
    assert set(drawn.trace["route"]) == {"math", "code"}
    for number, x in enumerate("ab"):  # no more than all of it, and all of it where every path was found
        mine = [row for row, p in enumerate(drawn.prompt) if p == number]
        p_latent = log_probs(plan, drawn.trace, plan.latents("sampling"))
        total = float(torch.stack(list(p_latent.values())).sum(0)[mine].exp().sum().detach())
        exact = collections.Counter()
        for values, p in reported_outcomes(x):
            exact[key({n: v for n, v in values.items() if n not in ("report", "solution")})] += p
        found = [key(run_of(drawn.trace, row, plan.latents("sampling"))) for row in mine]
        assert total == pytest.approx(math.fsum(exact[path] for path in found))


def test_importance_sampling_is_unbiased_over_branches():
    plan = build().compile()
    x, z = "a", "u"
    exact = math.fsum(p for values, p in outcomes(x) if values["solution"] == z)
    drawn = [
        ImportanceSampling(num_candidates=2, temperature=2.0).draw(plan, {"x": [x]}, [seed]) for seed in range(400)
    ]
    estimates = torch.stack([log_p_hat(plan, x, z, each).exp()[0] for each in drawn])
    error = float(estimates.std() / len(drawn) ** 0.5)
    assert abs(float(estimates.mean()) - exact) < 4 * error


# --- on disk ---


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_absent_values_are_kept_apart_from_nulls(tmp_path, ending):
    x = Input("x")
    one = node(name="one")(lambda x: None)
    many = node(name="many")(lambda x: ["p", "q"])
    each = node(Tabular({"p": {"u": 1.0}, "q": {"v": 1.0}}), name="each")(lambda many: many)
    value = switch(x, {"one": one, "many": [many.each() >> each]}, name="value")
    plan = System(x >> [one, many], value).compile()
    trace = plan.sample({"x": ["one", "many", "one"]})
    assert trace["value"] == [None, ["u", "v"], None]
    trace.save(tmp_path / f"runs.{ending}")
    loaded = Trace.load(tmp_path / f"runs.{ending}")
    for name in plan.order:
        absent = [cell is ABSENT for cell in trace.cells[name]]
        assert absent == [cell is ABSENT for cell in loaded.cells[name]]
        assert loaded[name] == trace[name]
    assert [cell is ABSENT for cell in loaded.cells["one"]] == [False, True, False]
    assert [cell is ABSENT for cell in loaded.cells["each"]] == [True, False, True]
    assert list(loaded.rows()) == list(trace.rows())
    scores = log_probs(plan, loaded)["each"]
    assert scores.tolist() == [0.0, 0.0, 0.0]


def test_a_saved_system_is_the_same(tmp_path):
    system = build(behind=True)
    system.save_pretrained(tmp_path / "saved")
    loaded = system.load(tmp_path / "saved")
    assert (loaded.edges, loaded.switches, loaded.outputs) == (system.edges, system.switches, system.outputs)
    trace = system.compile().sample({"x": ["a", "b"]}, seed=1)
    ours, theirs = log_probs(system.compile(), trace), log_probs(loaded.compile(), trace)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda made: made.pop("router"), "switches[0] must have 'router', of type str"),
        (lambda made: made["cases"][0].update(nodes=[1]), "switches[0], case 0, must have names as 'nodes'"),
        (lambda made: made["cases"][1].update(values=[{"a": 1}]), "Switch 'solution': "),
        (lambda made: made["cases"][1].update(end="nobody"), "nobody"),
        (lambda made: made["cases"].pop(), "'code'"),
        (lambda made: made.update(name="nobody"), "nobody"),
    ],
)
def test_damaged_switches_are_refused(tmp_path, damage, text):
    build().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "system.json"
    data = json.loads(file.read_text())
    damage(data["switches"][0])
    file.write_text(json.dumps(data))
    with pytest.raises(SerializationError, match=re.escape(text)):
        build().load(tmp_path / "saved")


def test_log_probs_have_gradients_of_the_branch_that_is_taken_alone():
    plan = build().compile()
    trace = plan.sample({"x": ["a"] * 10}, seed=0)
    rows = [row for row, route in enumerate(trace["route"]) if route == "math"]
    scores = log_probs(plan, trace.select(rows))
    sum(values.sum() for values in scores.values()).backward()
    for name in ("solve", "outline"):
        gradient = plan.system[name].component.module["logits"].grad
        assert (gradient is None) == (name == "outline")
    expected = torch.zeros(2)
    for row in rows:
        expected += torch.tensor([float(trace["solve"][row] == "u"), float(trace["solve"][row] == "v")])
        expected -= torch.tensor(list(SOLUTIONS["a"].values()))
    got = plan.system["solve"].component.module["logits"].grad[0]
    torch.testing.assert_close(got.float(), expected)
