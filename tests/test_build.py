"""Every mistake in a graph: the message names the node, what was expected and got, and the fix."""

import re
import typing

import pytest
from systems import Fake, edges, node_of

from sysdag.errors import GraphError, SysdagError
from sysdag.graph.loops import loop
from sysdag.graph.system import System
from sysdag.graph.variables import Edge, Edges, Input, Node, node

x, y = Input("x"), Input("y")


def refused(message: str):
    return pytest.raises(GraphError, match=re.escape(message))


def test_graph_errors_are_value_errors():
    with pytest.raises(ValueError):
        System()
    assert issubclass(GraphError, SysdagError)


def test_empty_system():
    with refused("A system needs at least one node; write System(question >> answer)."):
        System()
    with refused("A system needs at least one node"):
        System(x)


def test_cycle_is_printed_and_loop_named():
    a, b, c = node_of("a", "x c"), node_of("b", "a"), node_of("c", "b")
    with refused(
        "The system has a cycle: a >> b >> c >> a. A system must be acyclic; unroll feedback with "
        "loop(..., carry={'<parameter>': c}, times=n)."
    ):
        System(x >> a >> b >> c >> a)


def test_node_that_feeds_itself():
    a = node_of("a", "a")
    with refused("The system has a cycle: a >> a."):
        System(a >> a)


def test_cycle_between_the_visits_of_a_loop():
    a, b = node_of("a", "x b"), node_of("b", "a")
    with refused("The system has a cycle: a[0] >> b[0] >> a[0]."):
        System(loop(x >> a >> b, b >> a, carry={"x": b}, times=2))


def test_parent_that_is_no_parameter():
    a = node_of("a", "x")
    with refused(
        "Node 'a' has the parent 'y', but its function takes ['x']. Add a parameter 'y' to the function or remove the "
        "arrow y >> a."
    ):
        System((x & y) >> a)


def test_missing_arrow_from_something_known():
    a, b = node_of("a", "x"), node_of("b", "x a")
    with refused("Node 'b': parameter 'x' of its function has no arrow. Add the arrow x >> b."):
        System(x >> a >> b)


def test_missing_arrow_from_something_unknown_guesses():
    draft, a = node_of("draft", "x"), node_of("a", "draft drafft")
    with refused(
        "Node 'a': parameter 'drafft' of its function has no arrow. No input or node is named 'drafft'; known: "
        "['a', 'draft', 'x']. Did you mean 'draft'?"
    ):
        System(x >> draft >> a)


def test_missing_first_value_of_a_loop():
    critic, rewrite = node_of("critic", "x rewrite"), node_of("rewrite", "critic")
    with refused(
        "Node 'critic[0]': parameter 'rewrite' of its function has no arrow. Add the arrow rewrite >> critic. If the "
        "loop feeds it back, nothing has been fed back in visit 0: give the parameter a default, or name it after the "
        "input or node of its first value."
    ):
        System(loop(x >> critic >> rewrite >> critic, carry={"rewrite": rewrite}, times=2))


def test_arrow_to_or_from_nothing():
    a = node_of("a", "x")
    with refused("Arrow 'z' >> 'a': no input or node is named 'z'; known: ['x', 'a']."):
        System.from_parts([x], [a], [Edge("z", "a", "x")], ["a"])
    with refused("Arrow 'x' >> 'critc': no input or node is named 'critc'; known: ['x', 'critic']. Did you mean"):
        System.from_parts([x], [node_of("critic", "x")], [Edge("x", "critc", "x")], ["critic"])


def test_two_parents_for_one_parameter():
    a = node_of("a", "x")
    with refused("Node 'a': parameter 'x' has 2 arrows: [('x', 'whole'), ('x', 'each')]; keep one."):
        System(x >> a, x.each() >> a)


@pytest.mark.parametrize(
    "members",
    [
        lambda: (node_of("a", "x"), node_of("a", "x")),
        lambda: (Input("a"), node_of("a", "x")),
        lambda: (Input("a"), Input("a", str)),
    ],
)
def test_duplicate_name(members):
    first, second = members()
    child = node_of("child", "a x")
    with refused(
        "Name 'a' stands for 2 different inputs or nodes; names must be unique. Rename one with @node(..., name='...')."
    ):
        System(*(x >> m for m in (first, second) if not isinstance(m, Input)), (x & first & second) >> child)


def test_input_named_as_the_node_of_a_loop():
    a = node_of("a", "x")
    with refused("Name 'a' stands for 2 different inputs or nodes"):
        System(loop(x >> a, carry={"x": a}, times=2), Input("a") >> node_of("b", "a"))


def test_node_beside_the_visits_of_a_loop():
    a = node_of("a", "x")
    once, looped = System(x >> a), System(loop(x >> a, carry={"x": a}, times=2))
    with refused("Name 'a' stands for 2 different inputs or nodes"):
        System.from_parts([x], [*once.nodes, *looped.nodes], [*once.edges, *looped.edges], ["a"])


def test_output_that_nothing_produces():
    a = node_of("answer", "x")
    with refused("Output 'anwser' is produced by no node; the nodes are ['answer']. Did you mean 'answer'?"):
        System(x >> a, outputs=["anwser"])
    with refused("Output 'x' is produced by no node; the nodes are ['answer']."):
        System(x >> a, outputs=[x])
    with refused("System(outputs=...) takes names or nodes, got 3."):
        System(x >> a, outputs=[3])
    with refused("System(outputs=[]) has no output; name at least one of ['answer']."):
        System(x >> a, outputs=[])


def test_unused_input():
    with refused("Input 'y' is used by no node; add an arrow `y >> ...` or drop it."):
        System(x >> node_of("a", "x"), y)


def annotated(kind):
    def listed(x):
        return x

    listed.__annotations__["return"] = kind
    return node(listed)


def plate_over(parent):
    """The system in which a node runs for each element of the parent."""
    child = node_of("child", parent.name if isinstance(parent, Input) else parent.base_name)
    return System(*([] if isinstance(parent, Input) else [x >> parent]), parent.each() >> child)


def test_plate_over_what_is_no_list():
    fix = "Put a deterministic node between them that returns a list."
    with refused(f"s.each() >> child: a plate needs a list, but 's' gives str. {fix}"):
        plate_over(Input("s", str))
    with refused(f"llm.each() >> child: a plate needs a list, but 'llm' gives str. {fix}"):
        plate_over(node_of("llm", "x", Fake(value_type=str)))
    with refused(f"listed.each() >> child: a plate needs a list, but 'listed' gives str. {fix}"):
        plate_over(annotated(str))


@pytest.mark.parametrize("kind", [str, bytes, int, dict[str, int], None, str | int, typing.Optional[str]])  # noqa: UP045
def test_plate_over_annotations_that_are_no_list(kind):
    with refused("listed.each() >> child: a plate needs a list"):
        plate_over(annotated(kind))


@pytest.mark.parametrize(
    "kind",
    [list, list[str], tuple[str, ...], list[str] | None, typing.Any, object, "list[str]", "Missing", "no.such[",
     typing.NewType("Words", list)],
)  # fmt: skip
def test_plate_over_what_is_or_may_be_a_list(kind):
    assert "listed.each() >> child" in edges(plate_over(annotated(kind)))


def test_plate_over_what_is_not_known():
    assert edges(plate_over(x)) == {"x.each() >> child"}
    assert edges(plate_over(Input("s", list[str]))) == {"s.each() >> child"}
    assert "a.each() >> child" in edges(plate_over(node_of("a", "x")))
    assert "a.each() >> child" in edges(plate_over(node_of("a", "x", Fake())))


def test_plate_over_a_plate():
    llm, image = node_of("llm", "x", Fake(value_type=str)), node_of("image", "llm", Fake(value_type=str))
    assert "llm.each() >> image" in edges(System(x.each() >> llm, llm.each() >> image))


def test_component_given_as_a_class():
    with refused("@node got the class Fake; pass an instance of it, @node(Fake(...))."):
        node(Fake)


def test_component_that_is_none():
    with refused("Node 'a': expected a component (something with `likelihood`, `sample` and `log_prob`), got 'gpt-4'."):
        node_of("a", "x", "gpt-4")
    with refused("expected a component"):
        node_of("a", "x", Fake(likelihood="likely"))


def test_node_decorated_twice():
    a = node_of("a", "x")
    with refused("@node got Node('a', deterministic), which is a node already; decorate its function once."):
        node(a)
    with refused("which is a node already"):
        node(Fake())(a)


@pytest.mark.parametrize(
    ("function", "parameter"),
    [(lambda *args: 0, "*args"), (lambda **options: 0, "**options"), (lambda x, /: 0, "x")],
)
def test_parameters_that_have_no_name(function, parameter):
    with refused(
        f"Node 'a': parameter {parameter} cannot be matched to a parent. Parameters are the parents' names; list them "
        "one by one."
    ):
        node(name="a")(function)


def test_function_without_a_signature():
    with refused("Wrap it in a function with named parameters."):
        node(name="a")(max)


@pytest.mark.parametrize("name", ["a b", 'a"b', "1a", "", "a'"])
def test_names_are_identifiers(name):
    with refused(f"Node name must be a Python identifier, got {name!r}; pass @node(..., name='...')."):
        node_of(name, "x")
    with refused(f"Input name must be a Python identifier (it is a parameter of functions), got {name!r}."):
        Input(name)
    unchecked = Node(lambda: 0, None, name)
    with refused(f"Node name must be a Python identifier, got {name!r}."):
        System.from_parts([], [unchecked], [], [name])


def test_names_of_lambdas_and_objects():
    with refused("Node name must be a Python identifier, got '<lambda>'; pass @node(..., name='...')."):
        node(lambda x: x)
    with refused("Node name must be a Python identifier, got ''; pass @node(..., name='...')."):
        node()(Fake())


A, B = node_of("a", "x a"), node_of("b", "a")


@pytest.mark.parametrize(
    ("child", "hint"),
    [
        (lambda: str.upper, "Decorate the function with @node."),
        (lambda: x, "An input has no parents."),
        (lambda: node_of("a", "x").each(), "`.each()` belongs to the arrow that leaves: a >> b, b.each() >> c."),
        (lambda: node_of("a", "x") & node_of("b", "x"), "To reach several nodes, list them: a >> [b, c]."),
        (lambda: x >> node_of("a", "x"), "Write a chain without brackets: a >> b >> c."),
        (lambda: [node_of("a", "x"), "b"], "Decorate the function with @node."),
        (
            lambda: loop(A >> B, carry={"a": B}, times=2),
            "Name its nodes, and give the loop to System beside the arrows: System(x >> critic, loop(...)).",
        ),
    ],
)
def test_arrow_to_what_is_no_node(child, hint):
    child = child()
    shown = child[1] if isinstance(child, list) else child
    with refused(f"`>>` must point to a node or a list of nodes, got {shown!r}. {hint}"):
        y >> child


def test_arrow_to_nothing():
    with refused("`>>` must point to a node or a list of nodes, got an empty list."):
        x >> []


def test_arrow_from_a_list_or_a_string():
    for start in ([x, y], "x"):
        with refused(
            f"An arrow into Node('a', deterministic) must start at an input, a node, a plate or a join, got {start!r}. "
            "Join several parents with `&`: (a & b) >> c."
        ):
            start >> node_of("a", "x y")


def test_join_with_what_has_no_value():
    a = node_of("a", "x y")
    with refused("`&` joins inputs and nodes, got str beside Input('x')."):
        x & "y"
    with refused("`&` joins inputs and nodes, got Edges beside Input('x'). `>>` binds tighter than `&`"):
        x & y >> a
    with refused("`&` joins inputs and nodes, not arrows. `>>` binds tighter than `&`: write (a & b) >> c."):
        x >> a & y


def test_parts_that_are_no_parts():
    with refused("System(...) takes arrows (a >> b), loops, switches and nodes, got 'a'."):
        System("a")
    with refused("A join or a plate needs a child: (a & b) >> c, a.each() >> c."):
        System(x & y)


a, b = node_of("a", "x"), node_of("b", "a")


@pytest.mark.parametrize("times", [0, -1, 1.0, "2", True, None])
def test_loop_times(times):
    with refused(f"loop(times=...) must be a positive integer, got {times!r}."):
        loop(x >> a, carry={"x": a}, times=times)


def test_loop_in_a_loop():
    inner = loop(x >> a, carry={"x": a}, times=2)
    with refused("loop(...) takes arrows made with `>>` and switches, got Loop; loops do not nest."):
        loop(inner, carry={"x": a}, times=2)
    with refused("loop(...) takes arrows made with `>>` and switches, got Node; loops do not nest."):
        loop(a, carry={"x": a}, times=2)


def test_node_in_two_loops():
    with refused("Node 'a' is in the body of two loops; give each loop nodes of its own."):
        System(loop(x >> a, carry={"x": a}, times=2), loop(x >> a >> b, carry={"x": a}, times=2))


def test_carry_from_outside_the_body():
    with refused("loop(carry={'x': ...}) must name a node of the loop's body ['a'], got Node('b', deterministic)."):
        loop(x >> a, carry={"x": b}, times=2)
    with refused("must name a node of the loop's body ['a'], got 'a'."):
        loop(x >> a, carry={"x": "a"}, times=2)
    with refused("must name a node of the loop's body ['a'], got Node('a', deterministic)."):
        loop(x >> a, carry={"x": node_of("a", "x")}, times=2)
    with refused("must name a node of the loop's body []"):
        loop(carry={"x": a}, times=2)


def test_carry_that_no_node_takes():
    with refused("loop(carry={'xx': ...}): no node of the loop's body ['a'] takes a parameter 'xx'."):
        loop(x >> a, carry={"xx": a}, times=2)


@pytest.mark.parametrize("carry", [{}, a, ["x"]])
def test_carry_of_nothing(carry):
    with refused("loop(carry=...) must be a dict from a parameter to the node that it is fed back from"):
        loop(x >> a, carry=carry, times=2)


def test_an_arrow_alone_checks_nothing_yet():
    assert isinstance(x >> b, Edges)
    with refused("Node 'b' has the parent 'x'"):
        System(x >> b)
