"""The language: inputs, nodes, plates, and the arrows between them. No torch here.

A node is a random variable: its function turns its parents' values into the input of the node's component, and the
component is the conditional distribution (SysDPO, arXiv 2502.17721, section 3.1).
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sysdag.errors import GraphError
from sysdag.graph.import_path import function_path, import_object

LikelihoodKind = Literal["exact", "bound", "none"]


class _Source:
    """What can stand left of `>>`: an input, a node, a plate over one of them, or several joined by `&`.

    What is no node says in `not_a_child` why it cannot stand right of it.
    """

    def _sources(self) -> tuple[Input | Node | Plate, ...]:
        return (self,)  # type: ignore[return-value]

    def __and__(self, other: _Source) -> Join:
        if not isinstance(other, _Source):
            hint = " `>>` binds tighter than `&`: write (a & b) >> c." if isinstance(other, Edges) else ""
            raise GraphError(f"`&` joins inputs and nodes, got {type(other).__name__} beside {self!r}.{hint}")
        return Join(self._sources() + other._sources())

    def __rshift__(self, children: Node | Sequence[Node]) -> Edges:
        return _connect(self._sources(), children, ())

    def __rrshift__(self, other: Any) -> Edges:
        raise GraphError(
            f"An arrow into {self!r} must start at an input, a node, a plate or a join, got {other!r}. "
            "Join several parents with `&`: (a & b) >> c."
        )


@dataclass(frozen=True, repr=False)
class Input(_Source):
    """A value given from outside, read by nodes under its name.

    Args:
        name: the name under which node functions receive it.
        value_type: the type of one value, where known; lets `.each()` be checked when the system is built.
    """

    name: str
    value_type: type | None = None

    not_a_child: ClassVar[str] = "An input has no parents."

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise GraphError(
                f"Input name must be a Python identifier (it is a parameter of functions), got {self.name!r}."
            )

    def each(self) -> Plate:
        """A plate: the child runs once for every element of this list value."""
        return Plate(self)

    def __repr__(self) -> str:
        return f"Input({self.name!r})"


@dataclass(frozen=True, repr=False)
class Node(_Source):
    """A variable of the system: a function of its parents and, unless deterministic, a component that draws it.

    Attributes:
        function: turns the parents' values, passed by name, into the component's input (or, without a component,
            into the node's value).
        component: the conditional distribution; None for a deterministic node, which is recorded and never scored.
        base_name: the name that other functions' parameters use.
        visit: the index of the visit in an unrolled loop, None outside loops.
    """

    function: Callable[..., Any]
    component: Any
    base_name: str
    visit: int | None = None

    not_a_child: ClassVar[str | None] = None

    @property
    def name(self) -> str:
        return self.base_name if self.visit is None else f"{self.base_name}[{self.visit}]"

    @property
    def is_random(self) -> bool:
        return self.component is not None

    @property
    def likelihood(self) -> LikelihoodKind | None:
        """What the component can say of its draws; None for a deterministic node."""
        return None if self.component is None else self.component.likelihood

    def each(self) -> Plate:
        """A plate: the child runs once for every element of this list value; its factor is the sum over elements."""
        return Plate(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the decorated function itself: the prompt of a random node, the value of a deterministic one."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        drawn_by = "deterministic" if self.component is None else repr(self.component)
        return f"Node({self.name!r}, {drawn_by})"

    def __reduce__(self):
        path = function_path(self.function)
        try:
            found = None if path is None else import_function(path)
        except (ImportError, AttributeError):
            found = None
        if found is not self.function:
            problem = "is not at the top level of a module" if found is None else "shares its name with another one"
            raise GraphError(
                f"Node {self.name!r} cannot be pickled: its function {self.function!r} {problem}. Give it a name "
                "of its own at the top level of a module that can be imported."
            )
        return _unpickle_node, (path, self.component, self.base_name, self.visit)


def import_function(path: str) -> Callable[..., Any]:
    """The function at `module:qualname`; where a decorated name holds a `Node`, that node's function."""
    found = import_object(path)
    return found.function if isinstance(found, Node) else found


def _unpickle_node(path: str, component: Any, base_name: str, visit: int | None) -> Node:
    return Node(import_function(path), component, base_name, visit)


@dataclass(frozen=True)
class Plate(_Source):
    """`source.each()`: the child runs once for every element of the source's list value."""

    source: Input | Node

    not_a_child: ClassVar[str] = "`.each()` belongs to the arrow that leaves: a >> b, b.each() >> c."


@dataclass(frozen=True)
class Join(_Source):
    """`a & b`: parents that a child receives together."""

    members: tuple[Input | Node | Plate, ...]

    not_a_child: ClassVar[str] = "To reach several nodes, list them: a >> [b, c]."

    def _sources(self) -> tuple[Input | Node | Plate, ...]:
        return self.members


@dataclass(frozen=True)
class Edge:
    """One arrow of a system, by names.

    Attributes:
        parent, child: names of an input or node, and of a node.
        parameter: the parameter of the child's function that receives the parent's value; "" for an arrow of a switch,
            which decides whether the child runs, or what a switch's value is.
        each: whether the child runs once for every element of the parent's value.
    """

    parent: str
    child: str
    parameter: str
    each: bool = False


@dataclass(frozen=True)
class Link:
    """One arrow by its ends, before names are resolved."""

    source: Input | Node
    child: Node
    each: bool


@dataclass(frozen=True)
class Edges:
    """What `>>` returns: the arrows so far, and the nodes that a further `>>` continues from."""

    links: tuple[Link, ...]
    tails: tuple[Node, ...]

    not_a_child: ClassVar[str] = "Write a chain without brackets: a >> b >> c."

    def __rshift__(self, children: Node | Sequence[Node]) -> Edges:
        return _connect(self.tails, children, self.links)

    def __and__(self, other: Any) -> Join:
        raise GraphError("`&` joins inputs and nodes, not arrows. `>>` binds tighter than `&`: write (a & b) >> c.")


def node(component_or_function: Any = None, *, name: str | None = None) -> Node | Callable[[Callable[..., Any]], Node]:
    """Decorator that makes a function a node of a system.

    `@node` alone gives a deterministic node: its value is what the function returns. `@node(component)` gives a
    random variable: the function returns the component's input, the component draws the value.

    Args:
        component_or_function: a component, or (bare use) the function itself.
        name: the node's name; the function's name by default.

    Raises:
        GraphError: if the name is no identifier, or the function takes `*args` or `**kwargs`.
    """
    if inspect.isroutine(component_or_function):
        return _make_node(component_or_function, None, name)
    if isinstance(component_or_function, type):
        raise GraphError(
            f"@node got the class {component_or_function.__name__}; pass an instance of it, "
            f"@node({component_or_function.__name__}(...))."
        )
    if isinstance(component_or_function, Node):
        raise GraphError(f"@node got {component_or_function!r}, which is a node already; decorate its function once.")
    return lambda function: _make_node(function, component_or_function, name)


def _make_node(function: Callable[..., Any], component: Any, name: str | None) -> Node:
    if component is not None and getattr(component, "likelihood", None) not in typing.get_args(LikelihoodKind):
        raise GraphError(
            f"Node {getattr(function, '__name__', function)!r}: expected a component (something with `likelihood`, "
            f"`sample` and `log_prob`), got {component!r}."
        )
    if isinstance(function, Node):
        raise GraphError(f"@node got {function!r}, which is a node already; decorate its function once.")
    name = getattr(function, "__name__", "") if name is None else name
    if not name.isidentifier():
        raise GraphError(f"Node name must be a Python identifier, got {name!r}; pass @node(..., name='...').")
    made = Node(function, component, name)
    parameters(made)
    return made


def parameters(of: Node) -> dict[str, bool]:
    """Names of the parameters of a node's function, each with whether it is required.

    Raises:
        GraphError: if the function takes `*args`, `**kwargs` or positional-only parameters, or hides its signature.
    """
    found = {}
    try:
        signature = inspect.signature(of.function)
    except (TypeError, ValueError) as error:  # some functions written in C
        raise GraphError(f"Node {of.base_name!r}: {error}. Wrap it in a function with named parameters.") from error
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise GraphError(
                f"Node {of.base_name!r}: parameter {parameter} cannot be matched to a parent. "
                "Parameters are the parents' names; list them one by one."
            )
        found[parameter.name] = parameter.default is parameter.empty
    return found


def _connect(
    sources: Iterable[Input | Node | Plate], children: Node | Sequence[Node], before: tuple[Link, ...]
) -> Edges:
    heads = tuple(children) if isinstance(children, (list, tuple)) else (children,)
    links = list(before)
    if not heads:
        raise GraphError("`>>` must point to a node or a list of nodes, got an empty list.")
    sources, tails = tuple(sources), []
    for head in heads:
        members = getattr(head, "variables", (head,))  # of a split
        for child in members:
            if not isinstance(child, Node) or child.not_a_child:
                hint = getattr(child, "not_a_child", "Decorate the function with @node.")
                raise GraphError(f"`>>` must point to a node or a list of nodes, got {child!r}. {hint}")
            for source in sources:
                plate = isinstance(source, Plate)
                links.append(Link(source.source if plate else source, child, plate))  # type: ignore[union-attr, arg-type]
        if len(members) > 1:
            links += head.inner_links(each=any(isinstance(source, Plate) for source in sources))  # type: ignore[attr-defined]
        tails.append(members[-1])
    return Edges(tuple(links), tuple(tails))


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key under which `critic[2]` comes before `critic[10]`; no two names share one (`a1` and `a01` do not)."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)), name
