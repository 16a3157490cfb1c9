"""The language: operators, decorators, loops, and the `System` they form."""

import copy
import dataclasses
import pickle

import pytest
import systems
from systems import Equal, Fake, critic, draft, edges, node_of, question, rewrite, words

from sysdag.errors import GraphError
from sysdag.graph.import_path import function_path
from sysdag.graph.loops import loop
from sysdag.graph.system import System
from sysdag.graph.variables import Edge, Input, Node, import_function, natural_key, node, parameters

x = Input("x")


def test_bare_node_is_deterministic_and_calls_its_function():
    @node
    def shout(x):
        return x.upper()

    assert isinstance(shout, Node)
    assert shout.name == "shout"
    assert not shout.is_random
    assert shout.likelihood is None
    assert shout("a") == shout(x="a") == "A"


def test_node_without_a_component_in_brackets_is_deterministic_too():
    @node()
    def shout(x):
        return x

    assert shout.component is None
    assert node(name="louder")(shout.function).name == "louder"


@pytest.mark.parametrize("likelihood", ["exact", "bound", "none"])
def test_node_with_a_component_is_random(likelihood):
    component = Fake(likelihood=likelihood)

    @node(component, name="speech")
    def shout(x):
        return x

    assert shout.name == "speech"
    assert shout.is_random
    assert shout.component is component
    assert shout.likelihood == likelihood


def test_parameters_tell_required_from_optional():
    @node
    def mix(a, b=1, *, c, d=None):
        return a

    assert parameters(mix) == {"a": True, "b": False, "c": True, "d": False}


def test_a_signature_that_was_set_is_honoured():
    assert parameters(node_of("y", "a b")) == {"a": True, "b": True}
    assert node_of("y", "a b")(a=1, b=2) == {"a": 1, "b": 2}


def test_arrow_chain():
    a, b, c = node_of("a", "x"), node_of("b", "a"), node_of("c", "b")
    system = System(x >> a >> b >> c)
    assert edges(system) == {"x >> a", "a >> b", "b >> c"}
    assert system.outputs == ("c",)
    assert [n.name for n in system.nodes] == ["a", "b", "c"]
    assert system.inputs == (x,)


def test_fan_out_and_on_from_all_of_them():
    a, b, c, d = node_of("a", "x"), node_of("b", "a"), node_of("c", "a"), node_of("d", "b c")
    assert edges(System(x >> a >> [b, c] >> d)) == {"x >> a", "a >> b", "a >> c", "b >> d", "c >> d"}
    assert edges(System(x >> a, a >> (b, c))) == {"x >> a", "a >> b", "a >> c"}


def test_join_of_inputs_nodes_and_joins():
    y = Input("y")
    a, b, c = node_of("a", "x"), node_of("b", "y"), node_of("c", "x a b y")
    system = System(x >> a, y >> b, ((x & a) & (b & y)) >> c)
    assert edges(system) == {"x >> a", "y >> b", "x >> c", "a >> c", "b >> c", "y >> c"}
    d, e = node_of("d", "x y"), node_of("e", "x y")
    assert edges(System((x & y) >> [d, e])) == {"x >> d", "y >> d", "x >> e", "y >> e"}


def test_each_marks_its_own_arrow_only():
    a, b, c = node_of("a", "x"), node_of("b", "x a"), node_of("c", "a b")
    system = System(x >> a, (x & a.each()) >> b, (a & b.each()) >> c)
    assert edges(system) == {"x >> a", "x >> b", "a.each() >> b", "a >> c", "b.each() >> c"}
    assert Edge("a", "b", "a", each=True) in system.edges
    assert edges(System(x.each() >> a)) == {"x.each() >> a"}


def test_the_same_arrow_twice_is_one_arrow():
    a = node_of("a", "x")
    assert len(System(x >> a, x >> a).edges) == 1


def test_a_node_without_parents_stands_alone():
    system = System(node_of("a"), node_of("b"))
    assert system.edges == ()
    assert system.outputs == ("a", "b")


def test_optional_parameter_needs_no_arrow():
    @node
    def a(x, hint=None):
        return x

    assert edges(System(x >> a)) == {"x >> a"}
    hint = Input("hint")
    assert edges(System((x & hint) >> a)) == {"x >> a", "hint >> a"}


def test_outputs_by_name_by_node_alone_and_in_order():
    a, b = node_of("a", "x"), node_of("b", "a")
    for outputs in (["b", "a", "b"], [b, a], ["b", a]):
        assert System(x >> a >> b, outputs=outputs).outputs == ("b", "a")
    assert System(x >> a >> b, outputs="a").outputs == ("a",)
    assert System(x >> a >> b, outputs=a).outputs == ("a",)


UNROLLED = {
    "question >> draft",
    *(f"question >> critic[{visit}]" for visit in range(3)),
    *("draft >> critic[0]", "rewrite[0] >> critic[1] as draft", "rewrite[1] >> critic[2] as draft"),
    *("draft >> rewrite[0]", "rewrite[0] >> rewrite[1] as draft", "rewrite[1] >> rewrite[2] as draft"),
    *(f"critic[{visit}] >> rewrite[{visit}]" for visit in range(3)),
}


def test_loop_with_arrows_outside_the_body():
    system = System(
        question >> draft,
        (question & draft) >> critic,
        draft >> rewrite,
        loop(critic >> rewrite, carry={"draft": rewrite}, times=3),
    )
    assert edges(system) == UNROLLED
    assert len(system.edges) == len(UNROLLED)
    assert system.outputs == ("rewrite[2]",)


def test_loop_with_arrows_inside_the_body():
    body = ((question & draft) >> critic >> rewrite, draft >> rewrite)
    system = System(question >> draft, loop(*body, carry={"draft": rewrite}, times=3))
    assert edges(system) == UNROLLED
    assert [n.name for n in system.nodes] == ["critic[0]", "critic[1]", "critic[2]", "draft"] + [
        f"rewrite[{visit}]" for visit in range(3)
    ]


def test_visits_share_the_component():
    body = ((question & draft) >> critic >> rewrite, draft >> rewrite)
    system = System(question >> draft, loop(*body, carry={"draft": rewrite}, times=3))
    for visit in range(3):
        assert system[f"critic[{visit}]"].component is systems.shared
        assert system[f"critic[{visit}]"].visit == visit
        assert system[f"critic[{visit}]"].base_name == "critic"


def test_arrows_out_of_a_loop_leave_from_the_last_visit():
    system = System(
        question >> draft,
        (question & draft) >> critic,
        draft >> rewrite,
        rewrite >> words,
        loop(critic >> rewrite, carry={"draft": rewrite}, times=2),
    )
    assert {edge for edge in edges(system) if edge.endswith("words")} == {"rewrite[1] >> words"}
    assert system.outputs == ("words",)


def test_loop_outputs_by_base_name_mean_the_last_visit():
    parts = (
        (question & draft) >> critic,
        question >> draft >> rewrite,
        loop(critic >> rewrite, carry={"draft": rewrite}, times=3),
    )
    assert System(*parts, outputs=["rewrite"]).outputs == ("rewrite[2]",)
    assert System(*parts, outputs=[critic, "rewrite[0]"]).outputs == ("critic[2]", "rewrite[0]")


def test_one_visit_is_the_body_once():
    system = System(
        question >> draft,
        (question & draft) >> critic,
        draft >> rewrite,
        loop(critic >> rewrite, carry={"draft": rewrite}, times=1),
    )
    assert edges(system) == {
        "question >> draft",
        "question >> critic[0]",
        "draft >> critic[0]",
        "draft >> rewrite[0]",
        "critic[0] >> rewrite[0]",
    }


def test_a_loop_of_one_node():
    refine = node_of("refine", "x start")
    start = node_of("start", "x")
    system = System(x >> start, loop((x & start) >> refine, carry={"start": refine}, times=2))
    assert edges(system) == {
        "x >> start",
        "x >> refine[0]",
        "x >> refine[1]",
        "start >> refine[0]",
        "refine[0] >> refine[1] as start",
    }


def test_two_loops_in_sequence():
    a, b = node_of("a", "x"), node_of("b", "a")
    system = System(loop(x >> a, carry={"x": a}, times=2), loop(a >> b, carry={"a": b}, times=2))
    assert edges(system) == {"x >> a[0]", "a[0] >> a[1] as x", "a[1] >> b[0]", "b[0] >> b[1] as a"}
    assert system.outputs == ("b[1]",)


def test_a_plate_into_a_loop_reaches_every_visit():
    a = node_of("a", "x state")
    state = node_of("state")
    system = System(x.each() >> a, state >> a, loop(state >> a, carry={"state": a}, times=2))
    assert edges(system) == {"x.each() >> a[0]", "x.each() >> a[1]", "state >> a[0]", "a[0] >> a[1] as state"}


def test_feedback_of_a_plate_is_a_plate():
    start, a = node_of("start"), node_of("a", "start")
    system = System(loop(start.each() >> a, carry={"start": a}, times=2))
    assert edges(system) == {"start.each() >> a[0]", "a[0].each() >> a[1] as start"}


@pytest.mark.parametrize("written", [True, False])
def test_feedback_into_an_optional_parameter_starts_at_its_default(written):
    @node
    def ask(x, reply=None):
        return x

    reply = node_of("reply", "ask")
    body = [x >> ask >> reply, reply >> ask] if written else [x >> ask >> reply]
    system = System(loop(*body, carry={"reply": reply}, times=3))
    assert edges(system) == {
        *(f"x >> ask[{visit}]" for visit in range(3)),
        *(f"ask[{visit}] >> reply[{visit}]" for visit in range(3)),
        *("reply[0] >> ask[1]", "reply[1] >> ask[2]"),
    }


def test_system_is_frozen():
    system = System(question >> draft)
    with pytest.raises(dataclasses.FrozenInstanceError):
        system.nodes = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        question.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        draft.component = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        system.edges[0].each = True


def test_permuted_declarations_give_equal_systems_of_one_hash():
    parts = [question >> draft, question >> critic, draft >> critic, (critic & draft) >> rewrite]
    systems_ = [System(*parts), System(*reversed(parts)), System((draft & critic) >> rewrite, *parts[:3])]
    assert len(set(systems_)) == 1
    assert systems_[0] == systems_[1] == systems_[2]
    assert systems_[0] != System(question >> draft)
    assert systems_[0] != System(*parts, outputs=["critic", "rewrite"])


def test_names_that_differ_by_leading_zeros_keep_one_order():
    a, b = node_of("a1", "x"), node_of("a01", "x")
    assert System(x >> [a, b]) == System(x >> [b, a])
    assert natural_key("a1") != natural_key("a01")
    names = ["a[10]", "b", "a[2]", "a", "a[2]b3"]
    assert sorted(names, key=natural_key) == ["a", "a[2]", "a[2]b3", "a[10]", "b"]


def test_two_systems_of_the_same_nodes():
    alone, both = System(question >> draft), System(question >> draft, (question & draft) >> critic)
    assert alone["draft"] is both["draft"] is draft
    assert alone.outputs == ("draft",)
    assert both.outputs == ("critic",)


def test_getitem_names_the_nodes_there_are():
    with pytest.raises(GraphError, match=r"no node 'critic'; its nodes are \['draft'\]"):
        System(question >> draft)["critic"]


def test_with_components_replaces_the_named_ones_alone():
    system = System(question >> draft, (question & draft) >> critic)
    other = Fake("other")
    changed = system.with_components({"critic": other})
    assert changed["critic"].component is other
    assert changed["draft"].component is draft.component
    assert changed.edges == system.edges
    assert changed.outputs == system.outputs
    assert system["critic"].component is systems.shared
    with pytest.raises(GraphError, match="no node 'critik'"):
        system.with_components({"critik": other})
    a = node_of("a", "x", Fake("m"))
    visits = System(loop(x >> a, carry={"x": a}, times=2)).with_components({"a[1]": other}).nodes
    assert [visit.component.label for visit in visits] == ["m", "other"]


def test_from_parts_rebuilds_and_checks():
    a = node_of("a", "x")
    system = System(loop(x >> a, carry={"x": a}, times=2))
    assert System.from_parts(system.inputs, system.nodes, system.edges, system.outputs) == system
    with pytest.raises(GraphError, match="has no arrow"):
        System.from_parts(system.inputs, system.nodes, (), system.outputs)


def test_reprs():
    a, b = node_of("a", "x"), node_of("b", "a x", Fake("gpt"))
    system = System(x >> a, (a.each() & x) >> b)
    assert repr(system) == "System(a.each() >> b, x >> a, x >> b; outputs=['b'])"
    assert repr(System(node_of("alone"))) == "System(alone; outputs=['alone'])"
    assert repr(x) == "Input('x')"
    assert repr(a) == "Node('a', deterministic)"
    assert repr(b) == "Node('b', Fake(gpt))"


def test_system_and_plan_survive_pickle():
    body = ((question & draft) >> critic >> rewrite, draft >> rewrite)
    system = System(question >> draft, rewrite >> words, loop(*body, carry={"draft": rewrite}, times=2))
    plan = system.compile()
    loaded = pickle.loads(pickle.dumps(plan))
    assert loaded == plan
    assert loaded.system == system
    assert str(loaded) == str(plan)
    assert loaded.system["critic[0]"].component is loaded.system["rewrite[1]"].component  # weights stay tied
    assert loaded.system["draft"].function is draft.function
    assert copy.deepcopy(system) == system


def test_pickle_of_a_local_function_is_refused():
    @node(Equal("m"))
    def local(x):
        return x

    with pytest.raises(GraphError, match=r"Node 'local' cannot be pickled: .* is not at the top level of a module"):
        pickle.dumps(System(x >> local))


def test_pickle_of_a_function_that_another_one_hides_is_refused():
    def hidden(question):
        return question

    hidden.__module__, hidden.__qualname__ = "systems", "draft"
    with pytest.raises(GraphError, match=r"Node 'hidden' cannot be pickled: .* shares its name with another one"):
        pickle.dumps(node(hidden))
    hidden.__qualname__ = "nowhere"
    with pytest.raises(GraphError, match="is not at the top level of a module"):
        pickle.dumps(node(hidden))


def test_import_function_takes_the_function_out_of_its_node():
    assert function_path(draft.function) == "systems:draft"
    assert import_function("systems:draft") is draft.function
    assert import_function("systems:edges") is edges
    assert function_path(lambda: 0) is None
    assert function_path(Fake()) is None
