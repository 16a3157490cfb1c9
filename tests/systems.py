"""Components that declare a likelihood and do nothing else, and small systems made of them."""

import inspect
from collections.abc import Iterable

from sysdag.graph.system import System
from sysdag.graph.variables import Edge, Input, Node, node


class Fake:
    """What the graph sees of a component. Equal only to itself, as components with weights are."""

    def __init__(self, label: str = "m", likelihood: str = "exact", value_type: type | None = None) -> None:
        self.label, self.likelihood, self.value_type = label, likelihood, value_type

    def __repr__(self) -> str:
        return f"Fake({self.label})"


class Equal(Fake):
    """A component equal to any of the same label, so that copies of a system can be compared."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal) and self.label == other.label

    def __hash__(self) -> int:
        return hash(self.label)


question = Input("question", str)
shared = Equal("shared")


@node(Equal("drafter"))
def draft(question):
    return f"Draft an answer. {question}"


@node(shared)
def critic(question, draft):
    return f"Criticise: {question} {draft}"


@node(shared)
def rewrite(draft, critic):
    return f"Rewrite: {draft} {critic}"


@node
def words(rewrite) -> list[str]:
    return rewrite.split()


def function_of(name: str, parameters: Iterable[str]):
    """A function of the given name whose parameters are the given names; returns them as a dict."""

    def function(**values):
        return values

    function.__name__ = function.__qualname__ = name
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters]
    )
    return function


def node_of(name: str, parameters: str = "", component=None) -> Node:
    """A node of the given name; `parameters` are names separated by spaces."""
    made = node(component, name=name) if component is not None else node(name=name)
    return made(function_of(name, parameters.split()))


def edges(system: System) -> set[str]:
    """The arrows of a system, `parent >> child` each, with `.each()` on plates and the parameter where it differs."""

    def written(edge: Edge) -> str:
        parameter = "" if edge.parameter == edge.parent.partition("[")[0] else f" as {edge.parameter}"
        return f"{edge.parent}{'.each()' if edge.each else ''} >> {edge.child}{parameter}"

    return {written(edge) for edge in system.edges}
