"""Switches in the language: what they mean, what is refused, how plans and pictures tell of them."""

import json
import pickle
import re

import pytest
import torch
from systems import Fake, edges, node_of

from sysdag import DataError, GraphError, Input, PlanError, System, loop, node, switch
from sysdag.components import Tabular
from sysdag.execution.likelihood import log_probs
from sysdag.graph.outline import to_dict, to_text
from sysdag.graph.render import draw

x = Input("x")


def random(name, parameters="x"):
    return node_of(name, parameters, Fake(name))


r, a, b, c, d = (random(name) for name in "rabcd")
after_b = random("after_b", "b")
each = random("e", "v")
texts, words = (node_of(name, "x", Fake(name, value_type=str)) for name in ("texts", "words"))


def same(x):
    return x


def of_x(name):
    """A node that another process can import the function of."""
    return node(name=name)(same)


def refused(text):
    return pytest.raises((GraphError, PlanError), match=re.escape(text))


def test_a_switch_joins_its_branches_under_its_name():
    last = random("last", "x v")
    value = switch(r, {"p": a, "q": b >> after_b}, name="v")
    system = System(x >> [r, a, b], (x & value) >> last)
    assert edges(system) == {
        "x >> r", "x >> a", "x >> b", "x >> last", "b >> after_b", "v >> last",
        "r >> a as ", "r >> b as ", "r >> v as ", "a >> v as ", "after_b >> v as ",
    }  # fmt: skip
    plan = system.compile()
    assert plan.levels == (("r",), ("a", "b"), ("after_b",), ("v",), ("last",))
    assert plan.results == ("last",)
    assert plan.latents("sampling") == ("r", "a", "b", "after_b")
    assert System(x >> [r, a, b], value).compile().results == ("a", "after_b")
    assert System.from_parts(system.inputs, system.nodes, system.edges, system.outputs, system.switches) == system
    assert system.with_components({"a": Fake("new")}).switches == system.switches
    assert switch(r, {"p": a, "q": b}).name == "r_switch"
    assert System(x >> [r, a, b], switch(r, {"p": a, "q": b})).outputs == ("r_switch",)


def test_a_node_may_be_in_several_branches_and_a_switch_inside_one():
    inner = switch(c, {1: a, 2: b}, name="inner")
    outer = switch(r, {"p": inner, "q": d}, name="outer")
    plan = System(x >> [r, a, b, c, d], outer).compile()
    assert set(plan.results) == {"a", "b", "d"}
    assert {name: len(plan.switches_over(name)) for name in "abcdr"} == {"a": 2, "b": 2, "c": 1, "d": 1, "r": 0}
    shared = System(x >> [r, a, b], switch(r, {"p": a, "q": a, "s": b}, name="v")).compile()
    ((_, places),) = shared.switches_over("a")
    assert places == {0, 1}


def test_nodes_that_the_router_depends_on_run_always():
    """A cascade: a small model's answer is taken where a judge is content."""
    judge, large = random("judge", "x a"), random("large", "x")
    plan = System(x >> [a, large], (x & a) >> judge, switch(judge, {"good": a, "bad": large}, name="v")).compile()
    assert plan.switches_over("a") == ()
    assert len(plan.switches_over("large")) == 1
    plan.check("direct")
    with refused("Node 'a' is the value of one branch of the switch 'v', and runs where another is taken"):
        plan.check("sampling")
    assert System(x >> [r, a], switch(r, {"p": a, "q": r}, name="v")).switches[0].cases[1].nodes == ()


def test_in_a_loop_every_visit_takes_a_branch_anew():
    text = random("text", "x")
    route, keep, change = random("route", "text"), random("keep", "text"), random("change", "text")
    value = switch(route, {"p": keep, "q": change}, name="v")
    system = System(x >> text, text >> [route, keep, change], loop(value, carry={"text": value}, times=2))
    assert system.outputs == ("v[1]",)
    assert [made.router for made in system.switches] == ["route[0]", "route[1]"]
    assert "v[0] >> change[1] as text" in edges(system)
    ((made, _),) = system.compile().switches_over("keep[1]")
    assert made.name == "v[1]"


def test_a_loop_may_be_a_branch():
    critic, rewrite = random("critic", "draft"), random("rewrite", "critic")
    draft = random("draft")
    inner = loop(critic >> rewrite, carry={"draft": rewrite}, times=2)
    system = System(x >> [r, draft, a], draft >> critic, switch(r, {"p": [inner, rewrite], "q": a}, name="v"))
    assert set(system.switches[0].cases[0].nodes) == {"critic[0]", "critic[1]", "rewrite[0]", "rewrite[1]"}
    assert system.switches[0].cases[0].end == "rewrite[1]"
    plan = system.compile()
    assert plan.switches_over("draft") == ()
    assert plan.results == ("a", "rewrite[1]")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: switch("r", {"p": a, "q": b}), "the router must be an input or a node, got 'r'"),
        (lambda: switch(r, [a, b]), "switch(r, ...) takes a dict from the router's values to branches"),
        (lambda: switch(r, {}), "takes a dict"),
        (lambda: switch(r, {"p": a}), "needs two branches or more"),
        (lambda: switch(r, {"p": a, " p\n": b}), "two branches are for 'p'"),
        (lambda: switch(r, {"p": a, "q": "b"}), "branch 'q' must be a node, arrows, a loop, a switch"),
        (lambda: switch(r, {"p": a, "q": []}), "branch 'q' is empty"),
        (lambda: switch(r, {"p": a, "q": x >> [b, c]}), "branch 'q' ends in ['b', 'c'], and its value is that of one"),
        (lambda: switch(r, {"p": a, "q": b}, name="a b"), "must be a Python identifier"),
        (lambda: x >> switch(r, {"p": a, "q": b}), "A switch has no arrows into it"),
        (lambda: System(x >> [r, a, b, c], switch(r, {"p": a, "q": b}, name="v"), outputs=["v", "a"]),
         "Output 'a' runs only in branch p of the switch 'v'"),
        (lambda: System(x >> [r, a, b], b >> after_b, switch(r, {"p": a, "q": b}, name="v")),
         "Node 'after_b' reads 'b', which runs only in branch q of the switch 'v'"),
        (lambda: System(x >> [r, a, b], switch(r, {"p": a, "q": b}), switch(r, {"p": b, "q": a})),
         "Name 'r_switch' stands for 2 different inputs or nodes"),
        (lambda: System(x.each() >> r, x >> [a, b], switch(r, {"p": a, "q": b}, name="v")),
         "The router 'r' of switch 'v' runs once for every element of a list"),
        (lambda: System(x >> [r, a, b], switch(r, {"p": a, "q": b}, name="a")), "Name 'a' stands for 2 different"),
        (lambda: System(x >> [r, a], switch(r, {"p": a, "q": b}, name="v")), "Node 'b': parameter 'x' of its function"),
        (lambda: System(x >> [r, texts, words], switch(r, {"p": texts, "q": words}, name="v").each() >> each),
         "v.each() >> e: a plate needs a list, but 'v' gives str"),
    ],
)  # fmt: skip
def test_what_is_no_switch_is_refused(make, text):
    with refused(text):
        make()


def test_what_a_router_of_finitely_many_values_says_is_compared_with_the_branches():
    def routed(values, **options):
        router = node(Tabular({"x": dict.fromkeys(values, 1 / len(values))}), name="r")(same)
        return System(x >> [router, a, b], switch(router, {"p": a, "q": b}, name="v", **options))

    assert routed(["p", " q"]).switches
    with refused("The router 'r' may say 's', which names no branch of the switch 'v'; its branches are 'p', 'q'."):
        routed(["p", "q", "s"])
    with refused("Switch 'v': branch q is never taken, as its router 'r' is one of ['p', 'Q']."):
        routed(["p", "Q"], default=b)


def test_a_switch_has_no_function_and_can_be_pickled():
    value = switch(x, {"p": a, "q": b}, name="v")
    with refused("A switch has no function to be called"):
        value()
    first, second = of_x("first"), of_x("second")
    made = switch(x, {"p": first, "q": x >> second}, name="v")
    assert pickle.loads(pickle.dumps(made)) == made


def test_plans_and_pictures_tell_of_switches(tmp_path):
    plan = System(x >> [r, a, b], switch(r, {"p": a, "s": a, "q": b >> after_b}, default=c, name="v"), x >> c).compile()
    table = to_text(plan)
    assert re.search(r"after_b +b, if r is q +Fake", table)
    assert re.search(r"a +x, if r is p, s +Fake", table)
    assert re.search(r"c +x, if r is otherwise +Fake", table)
    assert re.search(r"v \* +a or after_b or c by r +\(switch\)", table)
    data = json.loads(json.dumps(to_dict(plan)))
    assert data["switches"][0]["cases"][2] == {"is": "q", "nodes": ["b", "after_b"], "end": "after_b"}
    (own,) = (each for each in data["nodes"] if each["name"] == "after_b")
    assert own["runs_if"] == [{"router": "r", "switch": "v", "is": "q"}]
    assert own["parents"] == [{"name": "b", "parameter": "b", "each": False}]
    mermaid = plan.to_mermaid()
    number = {
        name: re.search(rf'(n\d+)[\[({{]+"{name}(<br/>|")', mermaid)[1] for name in ("r", "a", "b", "after_b", "v")
    }
    assert f'{number["r"]} -. "p, s" .-> {number["a"]}' in mermaid
    assert f'{number["r"]} -. "q" .-> {number["b"]}' in mermaid
    assert f"{number['after_b']} --> {number['v']}" in mermaid
    assert f"{number['r']} --> {number['v']}" not in mermaid
    assert '"v" [shape=diamond' in plan.to_dot()
    assert '"r" -> "b" [style=dashed, label="q"];' in plan.to_dot()
    graph = plan.to_networkx()
    assert graph.nodes["v"]["kind"] == "switch"
    assert graph.edges["r", "b"] == {"parameter": "", "each": False, "when": "q"}
    draw(plan, tmp_path / "plan.svg")
    assert "otherwise" in (tmp_path / "plan.svg").read_text() or (tmp_path / "plan.svg").stat().st_size > 1000


# --- what nests, run and scored ---


def test_a_switch_in_a_loop_and_one_in_a_branch_have_the_likelihood_of_their_paths():
    flip = {"u": {"p": 0.25, "q": 0.75}, "v": {"p": 0.5, "q": 0.5}}
    keep, change = {"u": {"u": 0.8, "v": 0.2}, "v": {"u": 0.3, "v": 0.7}}, {"u": {"u": 0.1, "v": 0.9}, "v": {"u": 1.0}}

    def reads(name, table):
        return node(Tabular(table), name=name)(lambda text: text)

    start = node(Tabular({"x": {"u": 0.5, "v": 0.5}}), name="text")(lambda x: x)
    route, one, other = reads("route", flip), reads("one", keep), reads("other", change)
    value = switch(route, {"p": one, "q": other}, name="v")
    system = System(x >> start, start >> [route, one, other], loop(value, carry={"text": value}, times=2))
    plan = system.compile()
    trace = plan.sample({"x": ["x"] * 300}, seed=0)
    joint = torch.stack(list(log_probs(plan, trace).values())).sum(0).exp().tolist()
    seen = set()
    for row in range(300):
        text, expected, path = trace["text"][row], 0.5, [trace["text"][row]]
        for visit in range(2):
            chosen = trace[f"route[{visit}]"][row]
            name, table = {"p": ("one", keep), "q": ("other", change)}[chosen]
            result = trace[f"{name}[{visit}]"][row]
            assert trace[f"v[{visit}]"][row] == result
            assert trace[f"{'other' if name == 'one' else 'one'}[{visit}]"][row] is None
            expected *= flip[text][chosen] * table[text][result]
            text, path = result, [*path, chosen, result]
        assert joint[row] == pytest.approx(expected)
        seen.add(tuple(path))
    assert len(seen) > 15


def test_a_nested_switch_runs_what_both_choose():
    def reads(name, table):
        return node(Tabular(table), name=name)(lambda x: x)

    route, kind = reads("r", {"x": {"p": 0.5, "q": 0.5}}), reads("k", {"x": {1: 0.25, 2: 0.75}})
    one, two, other = (reads(name, {"x": {"u": p, "v": 1 - p}}) for name, p in (("one", 0.1), ("two", 0.3), ("o", 0.6)))
    inner = switch(kind, {1: one, 2: two}, name="inner")
    plan = System(x >> [route, kind, one, two, other], switch(route, {"p": inner, "q": other}, name="v")).compile()
    trace = plan.sample({"x": ["x"] * 200}, seed=0)
    joint = torch.stack(list(log_probs(plan, trace).values())).sum(0).exp().tolist()
    for row in range(200):
        values = {name: trace[name][row] for name in plan.order}
        if values["r"] == "q":
            assert [values[name] for name in ("k", "one", "two", "inner")] == [None] * 4
            expected = 0.5 * {"u": 0.6, "v": 0.4}[values["o"]]
        else:
            first = values["k"] == 1
            own, share = ("one", 0.1) if first else ("two", 0.3)
            assert values["two" if first else "one"] is None
            assert values["v"] == values["inner"] == values[own]
            expected = 0.5 * (0.25 if first else 0.75) * (share if values["v"] == "u" else 1 - share)
        assert joint[row] == pytest.approx(expected)


def test_a_switch_that_does_not_run_asks_nothing_of_its_router():
    """Its router is an input, which has a value everywhere: also one that names no branch."""
    kind = Input("kind")

    def reads(name):
        return node(Tabular({"x": {"u": 0.25, "v": 0.75}}), name=name)(lambda x: x)

    one, two, other = reads("one"), reads("two"), reads("other")
    route = node(name="route")(lambda x, kind: "q" if kind == "none" else "p")
    inner = switch(kind, {1: one, 2: two}, name="inner")
    system = System((x & kind) >> route, x >> [one, two, other], switch(route, {"p": inner, "q": other}, name="v"))
    trace = system.compile().sample({"x": ["x"] * 3, "kind": [1, "none", 2]})
    assert [trace[name][1] for name in ("one", "two", "inner")] == [None] * 3
    assert [value is None for value in trace["other"]] == [True, False, True]
    assert trace["v"] == [trace["one"][0], trace["other"][1], trace["two"][2]]
    scores = torch.stack(list(log_probs(system.compile(), trace).values())).sum(0).exp()
    assert scores.tolist() == pytest.approx([{"u": 0.25, "v": 0.75}[value] for value in trace["v"]])
    with pytest.raises(DataError, match="Input 'kind', row 1: 3 names no branch of the switch 'inner'"):
        system.compile().sample({"x": ["x"] * 2, "kind": [1, 3]})
