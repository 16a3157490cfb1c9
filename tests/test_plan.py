"""What a graph implies: order, branches, lifetimes, and what each objective can do with its likelihoods."""

import dataclasses
import itertools
import random
import re

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Blueprint, blueprints
from systems import Fake, critic, draft, node_of, question, rewrite, words

from sysdag.errors import PlanError
from sysdag.graph.loops import loop
from sysdag.graph.system import System
from sysdag.graph.variables import Edge, Input

thorough = settings(max_examples=150, deadline=None)
x = Input("x")


def refined():
    """The looped system of the design, two visits and a deterministic end."""
    return System(
        question >> draft,
        (question & draft) >> critic,
        draft >> rewrite >> words,
        loop(critic >> rewrite, carry={"draft": rewrite}, times=2),
    ).compile()


def test_levels_order_and_random_nodes():
    plan = refined()
    assert plan.levels == (("draft",), ("critic[0]",), ("rewrite[0]",), ("critic[1]",), ("rewrite[1]",), ("words",))
    assert plan.order == ("draft", "critic[0]", "rewrite[0]", "critic[1]", "rewrite[1]", "words")
    assert plan.random_nodes == plan.order[:-1]
    assert repr(plan) == "Plan(draft | critic[0] | rewrite[0] | critic[1] | rewrite[1] | words)"


def test_a_level_holds_what_can_run_side_by_side():
    a, b, c, d = node_of("a", "x"), node_of("b", "a"), node_of("c", "x"), node_of("d", "b c")
    plan = System(x >> a >> b, x >> c, (b & c) >> d).compile()
    assert plan.levels == (("a", "c"), ("b",), ("d",))
    assert repr(plan) == "Plan(a, c | b | d)"


def test_branches_are_maximal_chains():
    a, b, c = node_of("a", "x"), node_of("b", "a x"), node_of("c", "x")
    d, e, f = node_of("d", "b c"), node_of("e", "d"), node_of("f", "d")
    plan = System(x >> [a, b, c], a >> b, (b & c) >> d >> [e, f]).compile()
    assert plan.branches == (("a", "b"), ("c",), ("d",), ("e",), ("f",))


def test_lifetimes_end_with_the_last_reader_and_outputs_never():
    assert refined().lifetimes == (
        ("critic[0]", 1, 2),
        ("critic[1]", 3, 4),
        ("draft", 0, 2),
        ("question", -1, 3),
        ("rewrite[0]", 2, 4),
        ("rewrite[1]", 4, 5),
        ("words", 5, 5),
    )
    a, b = node_of("a", "x"), node_of("b", "x a")
    assert System(x >> [a, b], a >> b, outputs=["a"]).compile().lifetimes == (("a", 0, 1), ("b", 1, 1), ("x", -1, 1))


def test_components_by_identity():
    assert refined().components == (("draft",), ("critic[0]", "rewrite[0]", "critic[1]", "rewrite[1]"))
    a, b = node_of("a", "x", Fake("same")), node_of("b", "x", Fake("same"))
    assert System(x >> [a, b]).compile().components == (("a",), ("b",))


def test_parents_plates_and_ancestors():
    a, b, c = node_of("a", "x"), node_of("b", "a x"), node_of("c", "x")
    plan = System(x >> [a, c], (a.each() & x) >> b).compile()
    assert plan.parents("b") == (Edge("a", "b", "a", each=True), Edge("x", "b", "x"))
    assert plan.is_plate("b")
    assert not plan.is_plate("a")
    assert plan.ancestors("b") == {"a", "x"}
    assert plan.ancestors("c") == {"x"}


def test_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        refined().levels = ()
    assert hash(refined()) == hash(refined())


def chain(*kinds, outputs=None, skip=()):
    """x >> a >> b >> ..., each node of the given likelihood (`det` for a deterministic one), and arrows that skip."""
    nodes = {}
    for name, kind, above in zip("abcdef", kinds, ["x", *"abcde"], strict=False):
        extra = [start for start, end in skip if end == name]
        component = None if kind == "det" else Fake(name, kind)
        nodes[name] = node_of(name, " ".join([above, *extra]), component)
    first, *rest = nodes.values()
    arrows = x >> first
    for member in rest:
        arrows = arrows >> member
    skips = [(x if start == "x" else nodes[start]) >> nodes[end] for start, end in skip]
    return System(arrows, *skips, outputs=outputs).compile()


def test_two_models_in_sequence():
    plan = chain("exact", "exact", skip=[("x", "b")])
    assert plan.latents("sampling") == ("a",)
    assert plan.observed("sampling") == ("b",)
    assert plan.latents("direct") == ()
    assert plan.observed("direct") == ("a", "b")
    assert plan.factors("sampling") == plan.factors("direct") == ("a", "b")


SAMPLING_ALLOWED = {
    "opaque first, its one draw shared": (chain("none", "exact", "exact"), ("a", "b"), ("b", "c"), {"b"}),
    "opaque after opaque": (chain("none", "none", "exact", "exact"), ("a", "b", "c"), ("c", "d"), {"c"}),
    "opaque behind a deterministic node": (chain("det", "none", "exact", "exact"), ("b", "c"), ("c", "d"), {"c"}),
    "deterministic between": (chain("exact", "det", "exact"), ("a",), ("a", "c"), {"a", "b"}),
    "opaque below an observed output": (
        chain("exact", "exact", "none", outputs=["b", "c"]),
        ("a",),
        ("a", "b"),
        {"a"},
    ),
    "bound below an observed output": (
        chain("exact", "exact", "bound", outputs=["b", "c"]),
        ("a",),
        ("a", "b", "c"),
        {"a"},
    ),
    "what no output depends on": (chain("exact", "exact", "bound", "none", outputs=["b"]), ("a",), ("a", "b"), {"a"}),
}


@pytest.mark.parametrize("case", SAMPLING_ALLOWED)
def test_sampling_allows(case):
    plan, latents, factors, varying = SAMPLING_ALLOWED[case]
    plan.check("sampling")
    assert plan.latents("sampling") == latents
    assert plan.factors("sampling") == factors
    assert plan.varying("sampling") == varying
    assert plan.observed("sampling") == tuple(n for n in plan.random_nodes if n in plan.system.outputs)


def test_bound_or_opaque_output_beside_the_latent():
    for kind, factors in (("bound", ("z", "y", "image")), ("none", ("z", "y"))):
        y, z = node_of("y", "z", Fake()), node_of("z", "x", Fake())
        image = node_of("image", "x", Fake(likelihood=kind))
        plan = System(x >> [z, image], z >> y).compile()
        assert set(plan.factors("sampling")) == set(factors)


OPAQUE = "has no likelihood (`none`), but objective='sampling' needs it: a parent differs between candidates"
BOUND = "has only a per-timestep bound (`bound`), which must not be summed over candidates"
SAMPLING_REFUSED = {
    "opaque output": (chain("exact", "none"), f"Node 'b' (Fake(b)) {OPAQUE}"),
    "opaque between": (chain("exact", "none", "exact"), f"Node 'b' (Fake(b)) {OPAQUE}"),
    "opaque behind a deterministic node": (chain("exact", "det", "none", "exact"), f"Node 'c' (Fake(c)) {OPAQUE}"),
    "opaque with one parent that varies": (
        chain("none", "exact", "none", "exact", skip=[("a", "c")]),
        f"Node 'c' (Fake(c)) {OPAQUE}",
    ),
    "bound output": (chain("exact", "bound"), f"Node 'b' (Fake(b)) {BOUND}"),
    "bound between": (chain("exact", "bound", "exact"), f"Node 'b' (Fake(b)) {BOUND}"),
    "bound first": (chain("bound", "exact", "exact"), f"Node 'a' (Fake(a)) {BOUND}"),
    "bound behind an opaque draw": (chain("none", "bound", "exact", "exact"), f"Node 'b' (Fake(b)) {BOUND}"),
    "deterministic output": (
        chain("exact", "det"),
        "objective='sampling' scores the outputs, but 'b' is deterministic and has no likelihood. Name the random node "
        "it is computed from: System(..., outputs=[...]).",
    ),
    "nothing latent": (
        chain("exact", "exact", outputs=["a", "b"]),
        "objective='sampling' needs an unobserved random node with an exact likelihood, and the system has none above "
        "its outputs ['a', 'b']; use objective='direct'.",
    ),
    "nothing latent but an opaque node": (chain("none", "exact"), "has none above its outputs ['b']"),
    "nothing latent above the output": (chain("exact", "exact", outputs=["a"]), "none above its outputs ['a']"),
    "latent below an output": (
        chain("exact", "exact", "exact", "exact", outputs=["b", "d"]),
        "Node 'c' is not observed and depends on the output 'b', whose value differs between winner and loser, while "
        "objective='sampling' gives both the same candidates. Add 'c' to the outputs, or use objective='direct'.",
    ),
    "opaque latent below an output": (
        chain("exact", "exact", "none", "exact", outputs=["b", "d"]),
        "Node 'c' is not observed and depends on the output 'b'",
    ),
}


@pytest.mark.parametrize("case", SAMPLING_REFUSED)
def test_sampling_refuses(case):
    plan, message = SAMPLING_REFUSED[case]
    for method in (plan.check, plan.factors):
        with pytest.raises(PlanError, match=re.escape(message)):
            method("sampling")
    plan.check("direct")


@pytest.mark.parametrize("kinds", [("exact", "bound"), ("none", "exact"), ("bound",), ("exact", "none", "det")])
def test_direct_takes_any_likelihood_and_leaves_out_what_has_none(kinds):
    plan = chain(*kinds)
    plan.check("direct")
    expected = tuple(name for name, kind in zip("abcd", kinds, strict=False) if kind in ("exact", "bound"))
    assert plan.factors("direct") == expected
    assert plan.observed("direct") == tuple(name for name, kind in zip("abcd", kinds, strict=False) if kind != "det")
    assert plan.varying("direct") == frozenset()


@pytest.mark.parametrize("objective", ["direct", "sampling"])
@pytest.mark.parametrize("kinds", [("none", "none"), ("det",), ("det", "none")])
def test_a_system_without_a_likelihood_cannot_be_aligned(kinds, objective):
    with pytest.raises(PlanError, match="No node of the system has a likelihood; there is nothing to align"):
        chain(*kinds).check(objective)


@pytest.mark.parametrize("method", ["latents", "observed", "factors", "check", "varying"])
def test_unknown_objective(method):
    with pytest.raises(PlanError, match="objective must be 'direct' or 'sampling', got 'dpo'"):
        getattr(refined(), method)("dpo")


@thorough
@given(blueprints())
def test_levels_are_longest_distances_and_the_order_is_topological(blueprint):
    plan = blueprint.system().compile()
    depth = {}
    for name, above in blueprint.parents.items():
        depth[name] = max((depth[parent] + 1 for parent in above if parent in depth), default=0)
    assert {name: at for at, level in enumerate(plan.levels) for name in level} == depth
    position = {name: at for at, name in enumerate(plan.order)}
    assert len(plan.order) == len(position) == len(blueprint.parents)
    for edge in plan.system.edges:
        assert edge.parent in blueprint.inputs or position[edge.parent] < position[edge.child]
    for name in plan.order:
        assert plan.ancestors(name) == networkx.ancestors(plan.to_networkx(), name)


@thorough
@given(blueprints())
def test_every_factor_appears_once(blueprint):
    plan = blueprint.system().compile()
    scored = [name for name, component in blueprint.components.items() if component and component.likelihood != "none"]
    random_nodes = [name for name, component in blueprint.components.items() if component]
    assert sorted(plan.random_nodes) == sorted(random_nodes)
    assert sorted(name for names in plan.components for name in names) == sorted(random_nodes)
    for names in plan.components:
        assert len({id(blueprint.components[name]) for name in names}) == 1
    assert len(plan.components) == len({id(blueprint.components[name]) for name in random_nodes})
    if scored:
        assert sorted(plan.factors("direct")) == sorted(scored)


@thorough
@given(blueprints(), st.randoms(use_true_random=False))
def test_declarations_commute(blueprint, shuffler: random.Random):
    parts = blueprint.parts()
    shuffler.shuffle(parts)
    system, shuffled = blueprint.system(), System(*parts, outputs=blueprint.outputs)
    assert shuffled == system
    assert hash(shuffled) == hash(system)
    assert shuffled.compile() == system.compile()


@thorough
@given(blueprints(), st.data())
def test_names_are_only_names(blueprint, data):
    names = [*blueprint.inputs, *blueprint.parents]
    new = dict(zip(names, data.draw(st.permutations([*names, "fresh", "a0"])), strict=False))
    plan, renamed = blueprint.system().compile(), blueprint.renamed(new).system().compile()

    def mapped(groups):
        return [{new[name] for name in group} for group in groups]

    assert [set(level) for level in renamed.levels] == mapped(plan.levels)
    for attribute in ("branches", "components"):
        as_sets = {frozenset(group) for group in getattr(renamed, attribute)}
        assert as_sets == {frozenset(group) for group in mapped(getattr(plan, attribute))}
    assert set(renamed.lifetimes) == {(new[name], start, end) for name, start, end in plan.lifetimes}
    assert set(renamed.system.outputs) == {new[name] for name in plan.system.outputs}
    for objective in ("direct", "sampling"):
        assert set(renamed.latents(objective)) == {new[name] for name in plan.latents(objective)}
        assert set(renamed.varying(objective)) == {new[name] for name in plan.varying(objective)}


@thorough
@given(blueprints())
def test_branches_partition_the_nodes_into_maximal_chains(blueprint):
    plan = blueprint.system().compile()
    assert sorted(name for chain in plan.branches for name in chain) == sorted(plan.order)
    arrows = [
        (parent, name) for name, above in blueprint.parents.items() for parent in above if parent in blueprint.parents
    ]
    links = {
        (parent, child)
        for parent, child in arrows
        if [p for p, c in arrows if c == child] == [parent] and [c for p, c in arrows if p == parent] == [child]
    }
    assert {pair for chain in plan.branches for pair in itertools.pairwise(chain)} == links


@thorough
@given(blueprints())
def test_lifetimes_by_counting(blueprint):
    plan = blueprint.system().compile()
    level = {name: at for at, names in enumerate(plan.levels) for name in names}
    expected = set()
    for name in [*blueprint.inputs, *blueprint.parents]:
        readers = [level[child] for child, above in blueprint.parents.items() if name in above]
        if name in plan.system.outputs:
            readers.append(len(plan.levels) - 1)
        start = level.get(name, -1)
        expected.add((name, start, max([start, *readers])))
    assert set(plan.lifetimes) == expected
    assert len(plan.lifetimes) == len(expected)


def simulated(blueprint: Blueprint, outputs: set[str], candidate: int) -> dict[str, object]:
    """Values of one candidate: latents draw anew for each candidate, opaque ones only where their parents differ."""
    needed, frontier = set(), list(outputs)
    while frontier:
        for parent in blueprint.parents.get(frontier.pop(), ()):
            needed.add(parent)
            frontier.append(parent)
    values: dict[str, object] = {name: name for name in blueprint.inputs}
    for name, above in blueprint.parents.items():
        component = blueprint.components[name]
        given_parents = (name, *(values[parent] for parent in above))
        if component is None:
            values[name] = given_parents
        elif name in outputs or name not in needed:
            values[name] = name
        else:
            values[name] = given_parents if component.likelihood == "none" else (*given_parents, candidate)
    return values


@settings(max_examples=400, deadline=None)
@given(blueprints(max_nodes=6, likelihoods=("exact", "exact", "exact", "bound", "none", None)))
def test_sampling_by_simulating_two_candidates(blueprint):
    plan = blueprint.system().compile()
    outputs = set(plan.system.outputs)
    first, second = simulated(blueprint, outputs, 1), simulated(blueprint, outputs, 2)
    assert plan.varying("sampling") == {name for name in first if first[name] != second[name]}

    kind = {name: component and component.likelihood for name, component in blueprint.components.items()}
    below = {name for name, above in blueprint.parents.items() if any(first[p] != second[p] for p in above)}
    factor_differs = below | plan.varying("sampling")
    above_outputs = set().union(*(networkx.ancestors(plan.to_networkx(), output) for output in outputs))
    latents = {name for name in above_outputs - outputs if kind.get(name)}
    assert set(plan.latents("sampling")) == latents
    impossible = (
        any(kind[output] is None for output in outputs)
        or not any(kind[name] == "exact" for name in latents)
        or any(kind[name] in ("none", "bound") and name in factor_differs for name in latents | outputs)
        or any(networkx.ancestors(plan.to_networkx(), name) & outputs for name in latents)
    )
    if impossible:
        with pytest.raises(PlanError):
            plan.check("sampling")
    else:
        plan.check("sampling")
        assert set(plan.factors("sampling")) == {n for n in latents | outputs if kind[n] in ("exact", "bound")}
