"""The language: inputs, nodes, edges, plates and loops, and the `System` they form. No torch here.

A system is a directed acyclic graph of random variables (SysDPO, arXiv 2502.17721, section 3.1). A node's function
turns its parents' values into the input of the node's component; the component is the conditional distribution.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sysdag.errors import GraphError

LikelihoodKind = Literal["exact", "bound", "none"]


class _Source:
    """What can stand left of `>>`: an input, a node, a plate over one of them, or several joined by `&`."""

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


def function_path(function: Callable[..., Any]) -> str | None:
    """Where `import_function` finds a function, as `module:qualname`; None for a local one or a callable object."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return None if not module or not qualname or "<" in qualname else f"{module}:{qualname}"


def import_object(path: str) -> Any:
    """What stands at `module:qualname`."""
    module_name, _, qualname = path.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


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


@dataclass(frozen=True)
class Join(_Source):
    """`a & b`: parents that a child receives together."""

    members: tuple[Input | Node | Plate, ...]

    def _sources(self) -> tuple[Input | Node | Plate, ...]:
        return self.members


@dataclass(frozen=True)
class Edge:
    """One arrow of a system, by names.

    Attributes:
        parent, child: names of an input or node, and of a node.
        parameter: the parameter of the child's function that receives the parent's value.
        each: whether the child runs once for every element of the parent's value.
    """

    parent: str
    child: str
    parameter: str
    each: bool = False


@dataclass(frozen=True)
class _Link:
    source: Input | Node
    child: Node
    each: bool


@dataclass(frozen=True)
class Edges:
    """What `>>` returns: the arrows so far, and the nodes that a further `>>` continues from."""

    links: tuple[_Link, ...]
    tails: tuple[Node, ...]

    def __rshift__(self, children: Node | Sequence[Node]) -> Edges:
        return _connect(self.tails, children, self.links)

    def __and__(self, other: Any) -> Join:
        raise GraphError("`&` joins inputs and nodes, not arrows. `>>` binds tighter than `&`: write (a & b) >> c.")


@dataclass(frozen=True)
class Loop:
    """A feedback loop to be unrolled when the system is built; made by `loop`."""

    links: tuple[_Link, ...]
    carry: tuple[tuple[str, Node], ...]
    times: int

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are repeated: children in the body, and parents that read a carried value."""
        carried = {name for name, _ in self.carry}
        found = {link.child.base_name: link.child for link in self.links}
        for link in self.links:
            if isinstance(link.source, Node) and carried & set(parameters(link.source)):
                found[link.source.base_name] = link.source
        return tuple(found.values())

    @property
    def body(self) -> frozenset[str]:
        """Names of the nodes that are repeated."""
        return frozenset(repeated.base_name for repeated in self.nodes)


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


def loop(*parts: Edges, carry: Mapping[str, Node], times: int) -> Loop:
    """Unrolls a feedback loop into visits that share weights.

    `loop(critic >> rewrite, carry={"draft": rewrite}, times=3)` gives the nodes `critic[0]`, `rewrite[0]`, ...,
    `rewrite[2]`. In visit 0 the parameter `draft` is the parent of that name, or its default where no arrow gives one;
    in visit t it is `rewrite[t - 1]`. Arrows of the system into a node of the body reach every visit; arrows out of one
    leave from the last visit.

    Args:
        parts: the arrows of the body.
        carry: for each parameter that is fed back, the node of the body whose last value it takes.
        times: number of visits, at least 1.

    Raises:
        GraphError: if `times` is no positive integer, the body holds another loop, nothing is carried, a carried node
            is outside the body, or no node of the body takes the parameter.
    """
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise GraphError(f"loop(times=...) must be a positive integer, got {times!r}.")
    for part in parts:
        if not isinstance(part, Edges):
            raise GraphError(f"loop(...) takes arrows made with `>>`, got {type(part).__name__}; loops do not nest.")
    if not isinstance(carry, Mapping) or not carry:
        raise GraphError(
            f"loop(carry=...) must be a dict from a parameter to the node that it is fed back from, got {carry!r}; "
            "without one every visit would be the same."
        )
    made = Loop(tuple(link for part in parts for link in part.links), tuple(carry.items()), times)
    for parameter, source in made.carry:
        if source not in made.nodes:
            raise GraphError(
                f"loop(carry={{{parameter!r}: ...}}) must name a node of the loop's body {sorted(made.body)}, "
                f"got {source!r}."
            )
        if not any(parameter in parameters(repeated) for repeated in made.nodes):
            raise GraphError(
                f"loop(carry={{{parameter!r}: ...}}): no node of the loop's body {sorted(made.body)} takes a parameter "
                f"{parameter!r}."
            )
    return made


def _connect(
    sources: Iterable[Input | Node | Plate], children: Node | Sequence[Node], before: tuple[_Link, ...]
) -> Edges:
    heads = tuple(children) if isinstance(children, (list, tuple)) else (children,)
    links = list(before)
    if not heads:
        raise GraphError("`>>` must point to a node or a list of nodes, got an empty list.")
    for child in heads:
        if not isinstance(child, Node):
            raise GraphError(f"`>>` must point to a node or a list of nodes, got {child!r}. {_child_hint(child)}")
        for source in sources:
            plate = isinstance(source, Plate)
            links.append(_Link(source.source if plate else source, child, plate))  # type: ignore[union-attr, arg-type]
    return Edges(tuple(links), heads)


def _child_hint(child: Any) -> str:
    match child:
        case Input():
            return "An input has no parents."
        case Plate():
            return "`.each()` belongs to the arrow that leaves: a >> b, b.each() >> c."
        case Join():
            return "To reach several nodes, list them: a >> [b, c]."
        case Edges():
            return "Write a chain without brackets: a >> b >> c."
        case Loop():
            return "Name its nodes, and give the loop to System beside the arrows: System(x >> critic, loop(...))."
    return "Decorate the function with @node."


@dataclass(frozen=True, init=False, repr=False)
class System:
    """A compound system: inputs, nodes and the arrows between them, checked when built, immutable after.

    Args:
        parts: arrows (`a >> b`), loops (`loop(...)`), and nodes that have no parents.
        outputs: names (or nodes) whose values are the system's result; by default the nodes that no other reads.
            A name inside a loop means its last visit.

    Attributes:
        inputs, nodes, edges: sorted by name, so that the order of declaration does not matter.
        outputs: names of the output nodes.

    Raises:
        GraphError: on a cycle, an unknown or missing parent, a parameter that is no parent, a duplicate name, an
            output that nothing produces, an unused input, or a plate over a value that is no list.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    outputs: tuple[str, ...]

    def __init__(
        self, *parts: Edges | Loop | Node | Input, outputs: Iterable[str | Node] | str | Node | None = None
    ) -> None:
        from sysdag.build import build

        for field, value in build(parts, outputs).items():
            object.__setattr__(self, field, value)

    @classmethod
    def from_parts(
        cls, inputs: Iterable[Input], nodes: Iterable[Node], edges: Iterable[Edge], outputs: Iterable[str]
    ) -> System:
        """A system from its parts as attributes hold them (loops already unrolled), checked like any other."""
        from sysdag.build import check

        system = object.__new__(cls)
        for field, value in check(inputs, nodes, edges, outputs).items():
            object.__setattr__(system, field, value)
        return system

    def __getitem__(self, name: str) -> Node:
        for candidate in self.nodes:
            if candidate.name == name:
                return candidate
        raise GraphError(f"The system has no node {name!r}; its nodes are {[n.name for n in self.nodes]}.")

    def with_components(self, components: Mapping[str, Any]) -> System:
        """The same system with the named nodes' components replaced."""
        for name in components:
            self[name]
        nodes = [dataclasses.replace(n, component=components.get(n.name, n.component)) for n in self.nodes]
        return System.from_parts(self.inputs, nodes, self.edges, self.outputs)

    def compile(self):
        """The plan of this system: order, branches, lifetimes and what each objective observes (`sysdag.plan.Plan`)."""
        from sysdag.plan import compile_system

        return compile_system(self)

    def save_pretrained(self, folder) -> None:
        """Writes `system.json` and one folder for each distinct model; see `sysdag.serialization.save_system`."""
        from sysdag.serialization import save_system

        save_system(self, folder)

    def push_to_hub(self, repo_id, **options) -> str:
        """Uploads the system with a model card; see `sysdag.publish.push_system`."""
        from sysdag.publish import push_system

        return push_system(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, folder, *, revision=None, token=None) -> System:
        """A system that `save_pretrained` wrote, its node functions imported by path; see `sysdag.serialization`.

        Args:
            folder: the folder, or `org/name` of a repository on the Hub.
            revision, token: of a repository on the Hub.
        """
        from sysdag.serialization import load_system

        return load_system(folder, revision=revision, token=token)

    def load(self, folder) -> System:
        """This system's functions with the components that `save_pretrained` wrote to `folder`."""
        from sysdag.serialization import load_system

        return load_system(folder, functions={n.base_name: n.function for n in self.nodes})

    def __repr__(self) -> str:
        arrows = ", ".join(f"{e.parent}{'.each()' if e.each else ''} >> {e.child}" for e in self.edges)
        return f"System({arrows or ', '.join(n.name for n in self.nodes)}; outputs={list(self.outputs)})"


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key under which `critic[2]` comes before `critic[10]`; no two names share one (`a1` and `a01` do not)."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)), name
