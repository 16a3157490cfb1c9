"""Theorem 1 in numbers, and feedback loops against enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sysdag import DiverseBeamSearch, Exhaustive, ImportanceSampling, Input, MonteCarlo, PlanError, System, loop, node
from sysdag.components import Opaque, Tabular
from sysdag.theory import check_alignment, enumerate_outcomes

X = Input("x")
INPUTS = {"x": ["a", "b"]}


def table(keys, values, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(len(keys), len(values), generator=generator, dtype=torch.float64) + 0.2
    rows = rows / rows.sum(1, keepdim=True)
    return Tabular({key: dict(zip(values, row.tolist(), strict=True)) for key, row in zip(keys, rows, strict=True)})


def draft_and_answer(skip=True, seed=0):
    """x -> y -> z, with or without the arrow x -> z."""

    @node(table("ab", "uvw", seed))
    def y(x):
        return x

    pairs = [(x, v) for x in "ab" for v in "uvw"]

    @node(table(pairs, "pqr", seed + 1))
    def z(x, y):
        return x, y

    @node(table("uvw", "pqr", seed + 1))
    def z_blind(y):
        return y

    return System(X >> y, (X & y) >> z) if skip else System(X >> y >> z_blind, outputs=["z_blind"])


def reward_table(names, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = {}

    def reward(inputs, nodes):
        key = (*inputs.values(), *(nodes[name] for name in names))
        if key not in values:
            values[key] = float(torch.randn((), generator=generator, dtype=torch.float64))
        return values[key]

    return reward


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_direct_recovers_any_reward_of_a_fully_connected_system(beta):
    system = draft_and_answer()
    before = {n.name: n.component.module["logits"].clone() for n in system.nodes}
    report = check_alignment(system, reward_table(["y", "z"], None, 1), INPUTS, beta=beta)
    assert report.deviation < 1e-6
    assert report.missing_edges == ()
    for n in system.nodes:
        torch.testing.assert_close(n.component.module["logits"], before[n.name], rtol=0, atol=0)


def test_a_reward_that_needs_an_absent_edge_is_not_recovered_and_the_edge_is_named():
    system = draft_and_answer(skip=False)
    report = check_alignment(system, reward_table(["y", "z_blind"], None, 2), INPUTS)
    assert report.deviation > 0.1
    assert report.gradient < 1e-8
    assert report.missing_edges == (("x", "z_blind"),)
    assert "the optimum needs x >> z_blind" in str(report)


def test_a_reward_that_factorises_is_recovered_without_the_edge():
    weights = {"u": 0.3, "v": -1.0, "w": 0.8, "p": 0.0, "q": 1.5, "r": -0.4}
    report = check_alignment(
        draft_and_answer(skip=False), lambda x, v: weights[v["y"]] + weights[v["y"]] * weights[v["z_blind"]], INPUTS
    )
    assert report.deviation < 1e-6
    assert report.missing_edges == ()


def test_a_coupled_reward_over_two_outputs_of_one_latent_is_not_representable():
    @node(table("ab", "uv", 3))
    def y(x):
        return x

    left, right = (node(table("uv", "pq", 4 + side), name=f"z{side}")(lambda y: y) for side in range(2))
    system = System(X >> y, y >> [left, right])
    coupled = check_alignment(system, lambda x, v: 2.0 * (v["z0"] == v["z1"]), INPUTS)
    assert coupled.deviation > 0.1
    assert coupled.missing_edges == (("z0", "z1"),)
    apart = check_alignment(system, lambda x, v: 2.0 * (v["z0"] == "p") + (v["z1"] == "q") * (v["y"] == "u"), INPUTS)
    assert apart.deviation < 1e-6
    assert apart.missing_edges == ()


@settings(max_examples=6)
@given(st.integers(0, 10_000))
def test_the_minimiser_is_the_tilted_reference(seed):
    """p* = q exp(r / beta) / Z, the optimum that Theorem 1 rests on."""
    system = draft_and_answer(seed=seed)
    reward = reward_table(["y", "z"], None, seed + 7)
    report = check_alignment(system, reward, INPUTS, beta=0.7)
    for x in "ab":
        plan, trained = system.compile(), report.system.compile()
        trace = enumerate_outcomes(plan, {"x": x})
        q = sum(plan.log_probs(trace).values()).detach()
        r = torch.tensor([reward({"x": x}, {"y": y, "z": z}) for y, z in zip(trace["y"], trace["z"], strict=True)])
        tilted = (q + r / 0.7).log_softmax(0)
        torch.testing.assert_close(sum(trained.log_probs(trace).values()).detach(), tilted, rtol=0, atol=1e-5)


def test_sampling_over_all_candidates_recovers_the_reward_of_the_output():
    reward = reward_table(["z"], None, 5)
    plain = check_alignment(draft_and_answer(), reward, INPUTS, objective="sampling")
    by_candidates = check_alignment(draft_and_answer(), reward, INPUTS, objective="sampling", candidates=Exhaustive())
    assert plain.deviation < 1e-6
    assert by_candidates.deviation < 1e-6


def test_sampling_over_some_candidates_is_biased_and_less_so_with_more():
    reward = reward_table(["z"], None, 5)
    for strategy in (DiverseBeamSearch, MonteCarlo, ImportanceSampling):
        deviations = {}
        for k in (2, 12):
            runs = [
                check_alignment(
                    draft_and_answer(),
                    reward,
                    INPUTS,
                    objective="sampling",
                    candidates=strategy(num_candidates=k),
                    seed=seed,
                ).deviation
                for seed in range(1 if strategy is DiverseBeamSearch else 4)
            ]
            deviations[k] = sum(runs) / len(runs)
        assert deviations[2] > 1e-3
        assert deviations[12] < deviations[2]


def test_what_cannot_be_enumerated_is_refused():
    @node(Opaque(str.upper))
    def tool(x):
        return x

    @node(table("AB", "uv", 0))
    def y(tool):
        return tool

    with pytest.raises(PlanError, match="'tool'.*cannot be enumerated"):
        enumerate_outcomes(System(X >> tool >> y).compile(), {"x": "a"})
    with pytest.raises(PlanError, match="belong to objective='sampling'"):
        check_alignment(draft_and_answer(), lambda x, v: 0.0, INPUTS, candidates=Exhaustive())


# A generator whose feedback comes from a critic of its own draft.

GENERATOR = {(x, c): None for x in "ab" for c in ("none", "good", "bad")}


def generator_and_critic():
    generator = table(list(GENERATOR), "uv", 11)
    critic = table([(x, d) for x in "ab" for d in "uv"], ["good", "bad"], 12)
    return generator, critic


def unrolled(generator, critic):
    @node
    def critique(x):
        return "none"

    @node(generator, name="draft")
    def write(x, critique):
        return x, critique

    @node(critic, name="review")
    def review(x, draft):
        return x, draft

    @node(generator, name="rewrite")
    def rewrite(x, review):
        return x, review

    once = loop((X & write) >> review, (X & review) >> rewrite, carry={"draft": rewrite}, times=2)
    return System(X >> critique, (X & critique) >> write, once)


def naive(generator, critic):
    """The cycle cut: the generator writes without feedback, the critic's verdict goes nowhere."""

    @node(generator, name="rewrite")
    def write(x):
        return x, "none"

    @node(critic, name="review")
    def review(x, rewrite):
        return x, rewrite

    return System(X >> write, (X & write) >> review, outputs=["rewrite"])


def marginal_by_hand(generator, critic, x):
    """log p(z|x) of two rounds of feedback, by nested sums over the tables."""
    g, c = (component.module["logits"].softmax(-1) for component in (generator, critic))
    row = {key: number for number, key in enumerate(GENERATOR)}
    critic_row = {key: number for number, key in enumerate((x, d) for x in "ab" for d in "uv")}
    totals = []
    for z in range(2):
        total = 0.0
        for d0, c0, d1, c1 in itertools.product(range(2), repeat=4):
            total = total + (
                g[row[x, "none"], d0]
                * c[critic_row[x, "uv"[d0]], c0]
                * g[row[x, ("good", "bad")[c0]], d1]
                * c[critic_row[x, "uv"[d1]], c1]
                * g[row[x, ("good", "bad")[c1]], z]
            )
        totals.append(total.log())
    return totals


def sampling_loss(marginals, beta=0.5):
    """-log sigmoid of the margin between z = u and z = v, for both inputs, against a uniform reference."""
    return -sum(torch.nn.functional.logsigmoid(beta * (u - v)) for u, v in marginals)


def marginals_of(system, x):
    plan = system.compile()
    (output,) = plan.system.outputs
    drawn = Exhaustive().draw(plan, {"x": [x]}) if plan.latents("sampling") else None
    found = []
    for z in "uv":
        component = plan.system[output].component
        if drawn is None:
            found.append(component.log_prob([(x, "none")], component.observe([z]))[0])
        else:
            trace = drawn.trace.updated({output: component.observe([z]) * len(drawn.prompt)})
            from sysdag.execution.execute import fill

            found.append(torch.logsumexp(sum(plan.log_probs(fill(plan, trace)).values()), 0))
    return found


def gradients(loss, *components):
    return torch.autograd.grad(
        loss, [c.module["logits"] for c in components], allow_unused=True, materialize_grads=True
    )


def test_the_unrolled_loop_has_the_gradient_of_enumeration_and_the_naive_cut_has_not():
    generator, critic = generator_and_critic()
    truth = gradients(sampling_loss([marginal_by_hand(generator, critic, x) for x in "ab"]), generator, critic)
    right = gradients(sampling_loss([marginals_of(unrolled(generator, critic), x) for x in "ab"]), generator, critic)
    wrong = gradients(sampling_loss([marginals_of(naive(generator, critic), x) for x in "ab"]), generator, critic)
    for got, expected in zip(right, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (truth, wrong)]
    cosine = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert cosine < 0.5
    assert float(wrong[1].abs().max()) == 0
    assert float(truth[1].abs().max()) > 1e-4
    rows_with_feedback = [number for number, (_, c) in enumerate(GENERATOR) if c != "none"]
    assert float(wrong[0][rows_with_feedback].abs().max()) == 0
    assert float(truth[0][rows_with_feedback].abs().min()) > 1e-4
    assert not math.isclose(float(wrong[0][0, 0]), float(truth[0][0, 0]), rel_tol=0.5)
