"""Likelihoods, candidates and certificates against brute-force enumeration."""

import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tabular_systems import TabularSystem, Variable, probabilities, tabular_systems
from tiny import char_tokenizer, llama

from sysdag import (
    DiverseBeamSearch,
    Exhaustive,
    ImportanceSampling,
    Input,
    MonteCarlo,
    PlanError,
    System,
    Trace,
    loop,
    node,
)
from sysdag.components import CausalLM, Tabular
from sysdag.execution.execute import fill
from sysdag.objectives.candidate_sums import candidate_log_sum, certificate

EXAMPLES = settings(max_examples=60)


def trace_of(plan, x, outcomes):
    """A trace whose rows hold the given outcomes."""
    cells = {}
    for name in plan.random_nodes:
        component = plan.system[name].component
        column = [outcome[name] for outcome in outcomes]
        cells[name] = (
            [tuple(component.observe(v)) for v in column] if plan.is_plate(name) else component.observe(column)
        )
    return fill(plan, Trace({i.name: [x] * len(outcomes) for i in plan.system.inputs}, cells))


def estimates(plan, x, z, strategy, generator=None):
    """log p-hat(z|x) and the coverage of the candidates, from log-probabilities by node."""
    names = [i.name for i in plan.system.inputs]
    drawn = strategy.draw(plan, {name: [x] for name in names}, generator)
    count = len(drawn.prompt)
    outputs = {}
    for name, value in z.items():
        component = plan.system[name].component
        cell = tuple(component.observe(value)) if plan.is_plate(name) else component.observe([value])[0]
        outputs[name] = [cell] * count
    log_probs = plan.log_probs(fill(plan, drawn.trace.updated(outputs)))
    latent = sum(log_probs[name] for name in log_probs if name not in z) + torch.zeros(count, dtype=torch.float64)
    joint = latent + sum(log_probs[name] for name in z)
    if drawn.log_weight is not None:
        joint = joint + torch.tensor(drawn.log_weight, dtype=joint.dtype)
    with torch.no_grad():
        return candidate_log_sum(joint, torch.zeros(count, dtype=torch.long), 1), latent.exp().sum(0, keepdim=True)


def has_latents(plan):
    return any(name not in plan.system.outputs for name in plan.random_nodes)


@EXAMPLES
@given(tabular_systems(), st.sampled_from("ab"))
def test_the_joint_equals_enumeration_and_sums_to_1(made, x):
    plan = made.system().compile()
    outcomes = list(made.outcomes(x))
    x = x if plan.system.inputs else None
    joint = sum(plan.log_probs(trace_of(plan, x, [values for values, _ in outcomes])).values())
    assert joint.exp().tolist() == pytest.approx([p for _, p in outcomes], rel=1e-9)
    assert float(joint.detach().exp().sum()) == pytest.approx(1.0, rel=1e-9)


@EXAMPLES
@given(tabular_systems(), st.randoms())
def test_a_score_depends_on_its_own_row_alone(made, random):
    plan = made.system().compile()
    outcomes = [values for values, _ in itertools.islice(made.outcomes("a"), 40)]
    whole = sum(plan.log_probs(trace_of(plan, "a", outcomes)).values())
    order = list(range(len(outcomes)))
    random.shuffle(order)
    shuffled = sum(plan.log_probs(trace_of(plan, "a", [outcomes[row] for row in order])).values())
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-12, atol=1e-12)
    alone = sum(plan.log_probs(trace_of(plan, "a", [outcomes[order[0]]])).values())
    torch.testing.assert_close(alone, whole[order[:1]], rtol=1e-12, atol=1e-12)


@EXAMPLES
@given(tabular_systems(), st.randoms())
def test_the_order_of_declaration_does_not_change_a_score(made, random):
    plan = made.system().compile()
    variables = list(made.variables)
    random.shuffle(variables)
    parts = []
    for variable in variables:
        parts += [plan.system[variable.name]]
    edges = list(plan.system.edges)
    random.shuffle(edges)
    other = System.from_parts(plan.system.inputs, parts, edges, plan.system.outputs).compile()
    outcomes = [values for values, _ in itertools.islice(made.outcomes("b"), 20)]
    for name, log_prob in other.log_probs(trace_of(other, "b", outcomes)).items():
        torch.testing.assert_close(log_prob, plan.log_probs(trace_of(plan, "b", outcomes))[name])


@settings(max_examples=25)
@given(tabular_systems(max_nodes=4), st.integers(0, 2**31))
def test_sampling_frequencies_agree_with_the_joint(made, seed):
    plan = made.system().compile()
    draws = 1500
    trace = plan.sample({i.name: ["a"] * draws for i in plan.system.inputs}, seed=seed)
    counts = Counter(zip(*(map(str, trace[name]) for name in made.random), strict=True))
    expected = defaultdict(float)
    for values, p in made.outcomes("a"):
        expected[tuple(str(values[name]) for name in made.random)] += p * draws
    assert counts.keys() <= expected.keys()
    large = [key for key, value in expected.items() if value >= 5]
    small = sum(value for key, value in expected.items() if value < 5)
    statistic = sum((counts[key] - expected[key]) ** 2 / expected[key] for key in large)
    if small > 0:
        statistic += (sum(counts[key] for key in expected if key not in set(large)) - small) ** 2 / max(small, 1)
    # 25 systems a run: a false alarm in 10,000 runs
    assert statistic < chi2.isf(1e-4 / 25, max(1, len(large) - (0 if small else 1)))


@EXAMPLES
@given(tabular_systems(max_nodes=4, plates=False), st.sampled_from("ab"))
def test_marginals_by_exhaustive_candidates_equal_enumeration(made, x):
    plan = made.system().compile()
    assume(has_latents(plan) and plan.system.inputs)
    marginal = defaultdict(float)
    for values, p in made.outcomes(x):
        marginal[tuple(values[name] for name in plan.system.outputs)] += p
    for z, p in itertools.islice(marginal.items(), 6):
        z = dict(zip(plan.system.outputs, z, strict=True))
        log_sum, coverage = estimates(plan, x, z, Exhaustive())
        assert float(log_sum.exp()) == pytest.approx(p, rel=1e-9)
        assert float(coverage) == pytest.approx(1.0, rel=1e-9)


@EXAMPLES
@given(tabular_systems(max_nodes=4, plates=False), st.integers(2, 4), st.integers(0, 2**31))
def test_the_certificate_always_brackets_the_truth(made, k, seed):
    plan = made.system().compile()
    assume(has_latents(plan) and plan.system.inputs)
    marginal = defaultdict(float)
    for values, p in made.outcomes("a"):
        marginal[tuple(values[name] for name in plan.system.outputs)] += p
    generator = torch.Generator().manual_seed(seed)
    for strategy in (DiverseBeamSearch(num_candidates=k), MonteCarlo(num_candidates=k)):
        for z, p in itertools.islice(marginal.items(), 4):
            log_sum, coverage = estimates(
                plan, "a", dict(zip(plan.system.outputs, z, strict=True)), strategy, generator
            )
            assert float(coverage) <= 1 + 1e-12
            lower, upper = certificate(log_sum, coverage)
            assert float(lower.exp()) <= p + 1e-12
            assert float(upper.exp()) >= p - 1e-12


@settings(max_examples=15)
@given(tabular_systems(max_nodes=4), st.integers(2, 6), st.sampled_from([None, 0.7, 1.6]), st.integers(0, 2**31))
def test_importance_sampling_is_unbiased_whatever_the_temperature(made, k, temperature, seed):
    plan = made.system().compile()
    assume(has_latents(plan) and plan.system.inputs)
    marginal = defaultdict(float)
    for values, p in made.outcomes("a"):
        marginal[str([values[name] for name in plan.system.outputs])] += p
    z = next(values for values, _ in made.outcomes("a"))
    z = {name: z[name] for name in plan.system.outputs}
    assume(not any(value == [] for value in z.values()))
    lists = [name for name in z if plan.is_plate(name)]
    assume(not lists)
    generator = torch.Generator().manual_seed(seed)
    strategy = ImportanceSampling(num_candidates=k, temperature=temperature)
    names = [i.name for i in plan.system.inputs]
    runs = 300
    drawn = strategy.draw(plan, {name: ["a"] * runs for name in names}, generator)
    assert Counter(drawn.prompt) == dict.fromkeys(range(runs), k)
    outputs = {name: plan.system[name].component.observe([value] * len(drawn.prompt)) for name, value in z.items()}
    log_probs = plan.log_probs(fill(plan, drawn.trace.updated(outputs)))
    joint = sum(log_probs.values()) + torch.tensor(drawn.log_weight, dtype=torch.float64)
    found = candidate_log_sum(joint, torch.tensor(drawn.prompt), runs).exp().detach()
    error = float(found.std()) / math.sqrt(runs)
    # 15 systems a run: a false alarm in about 10,000 runs
    assert abs(float(found.mean()) - marginal[str(list(z.values()))]) < 4.5 * error + 1e-12


@EXAMPLES
@given(st.data(), st.integers(1, 3))
def test_an_unrolled_loop_with_tied_weights_equals_enumeration(data, times):
    tables = {
        "draft": {("a",): data.draw(probabilities("uv"))},
        "critic": {(v,): data.draw(probabilities("gb")) for v in "uv"},
        "rewrite": {(v, c): data.draw(probabilities("uv")) for v in "uv" for c in "gb"},
    }
    x = Input("x")

    @node(Tabular(tables["draft"]))
    def draft(x):
        return (x,)

    @node(Tabular(tables["critic"]))
    def critic(draft):
        return (draft,)

    @node(Tabular(tables["rewrite"]))
    def rewrite(draft, critic):
        return (draft, critic)

    body = loop(draft >> critic, (draft & critic) >> rewrite, carry={"draft": rewrite}, times=times)
    plan = System(x >> draft, body).compile()

    variables = [Variable("draft", ("x",), tables["draft"])]
    last = "draft"
    for visit in range(times):
        variables.append(Variable(f"critic[{visit}]", (last,), tables["critic"]))
        variables.append(Variable(f"rewrite[{visit}]", (last, f"critic[{visit}]"), tables["rewrite"]))
        last = f"rewrite[{visit}]"
    outcomes = list(TabularSystem(tuple(variables)).outcomes("a"))
    joint = sum(plan.log_probs(trace_of(plan, "a", [values for values, _ in outcomes])).values())
    assert joint.exp().tolist() == pytest.approx([p for _, p in outcomes], rel=1e-9)
    for z in "uv":
        log_sum, _ = estimates(plan, "a", {f"rewrite[{times - 1}]": z}, Exhaustive())
        truth = sum(p for values, p in outcomes if values[f"rewrite[{times - 1}]"] == z)
        assert float(log_sum.exp()) == pytest.approx(truth, rel=1e-9)


# The same on real language models whose latents can be enumerated.


def enumerable_lms():
    """draft -> answer on Llamas over 5 tokens, drafts of at most 3."""
    drafter = CausalLM(llama(2, vocab_size=5, peaked=1.5), char_tokenizer("ab"), max_new_tokens=3)
    answerer = CausalLM(llama(3, vocab_size=5, peaked=1.5), char_tokenizer("ab"), max_new_tokens=3)

    @node(drafter)
    def draft(question):
        return question

    @node(answerer)
    def answer(question, draft):
        return question + draft

    return System(Input("question") >> draft, (Input("question") & draft) >> answer).compile()


def every_completion(limit):
    """Token ids of every outcome: ended by token 1 at any length, or cut at the limit."""
    for length in range(1, limit + 1):
        for body in itertools.product([0, 2, 3, 4], repeat=length - 1):
            yield [*body, 1]
    yield from (list(body) for body in itertools.product([0, 2, 3, 4], repeat=limit))


def enumerated(plan, question):
    component = plan.system["draft"].component
    drafts = [component._completer().draw(ids, None) for ids in every_completion(3)]
    return drafts, component.log_prob([question] * len(drafts), drafts).detach()


def test_a_language_models_outcomes_sum_to_1():
    plan = enumerable_lms()
    drafts, log_probs = enumerated(plan, "ab")
    assert len(drafts) == 1 + 4 + 16 + 64
    assert float(log_probs.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_estimates_over_a_language_models_drafts_agree_with_the_sum_over_all():
    plan = enumerable_lms()
    drafts, log_probs = enumerated(plan, "ab")
    (z,) = plan.system["answer"].component.observe(["ba"])
    prompts = [f"ab{draft.value}" for draft in drafts]
    z_log_probs = plan.system["answer"].component.log_prob(prompts, [z] * len(drafts)).detach()
    truth = float((log_probs + z_log_probs).double().exp().sum())

    for strategy in (DiverseBeamSearch(num_candidates=8), MonteCarlo(num_candidates=8)):
        log_sum, coverage = estimates(plan, "ab", {"answer": "ba"}, strategy, torch.Generator().manual_seed(0))
        lower, upper = certificate(log_sum, coverage)
        assert float(lower.exp()) <= truth + 1e-6
        assert float(upper.exp()) >= truth - 1e-6
        assert 0.1 < float(coverage) < 1

    runs, k = 400, 4
    for temperature in (None, 1.5):
        strategy = ImportanceSampling(num_candidates=k, temperature=temperature)
        drawn = strategy.draw(plan, {"question": ["ab"] * runs}, torch.Generator().manual_seed(1))
        found = plan.log_probs(drawn.trace.updated({"answer": [z] * runs * k}))
        joint = sum(found.values()).detach() + torch.tensor(drawn.log_weight)
        each = candidate_log_sum(joint, torch.tensor(drawn.prompt), runs).exp()
        assert abs(float(each.mean()) - truth) < 4 * float(each.std()) / math.sqrt(runs)


def test_sampled_drafts_of_a_language_model_agree_with_their_probabilities():
    plan = enumerable_lms()
    drafts, log_probs = enumerated(plan, "b")
    draws = 4000
    component = plan.system["draft"].component
    sampled = component.sample(["b"] * draws, generator=torch.Generator().manual_seed(3))
    counts = Counter(component.key(draw) for draw in sampled)
    expected = {component.key(draft): draws * math.exp(p) for draft, p in zip(drafts, log_probs.tolist(), strict=True)}
    large = [key for key, value in expected.items() if value >= 5]
    rest = draws - sum(expected[key] for key in large)
    statistic = sum((counts[key] - expected[key]) ** 2 / expected[key] for key in large)
    statistic += (draws - sum(counts[key] for key in large) - rest) ** 2 / max(rest, 1)
    assert statistic < chi2.isf(1e-3, len(large))


def test_exhaustive_refuses_what_it_cannot_enumerate():
    plan = enumerable_lms()
    with pytest.raises(PlanError, match="finitely many values; node 'draft'"):
        Exhaustive().draw(plan, {"question": ["a"]})
    x = Input("x")

    @node(Tabular({"a": dict.fromkeys("uvwyz", 0.2)}))
    def first(x):
        return x

    @node(Tabular({v: {"p": 1.0} for v in "uvwyz"}))
    def last(first):
        return first

    with pytest.raises(PlanError, match="'first' makes 5 paths a prompt, more than num_candidates=4"):
        Exhaustive(num_candidates=4).draw(System(x >> first >> last).compile(), {"x": ["a"]})
    with pytest.raises(PlanError, match="distinct must be False"):
        ImportanceSampling(num_candidates=2, distinct=True)
