"""One completion as several variables: what a model writes up to a marker is one, and what it goes on with another.

A completion y of one model that is cut at the first place where a marker is written has the same probability in parts:
p(y | x) = p(y_1 | x) p(y_2 | x, y_1) ... So its reasoning can be summed over while its answer is observed. No torch
here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.errors import GraphError
from sysdag.graph.variables import Edge, Link, Node, Plate, _make_node, _Source, parameters


@dataclass(frozen=True)
class Partition:
    """How completions are cut.

    Attributes:
        names: of the parts, in the order in which they are written.
        markers: the text that ends each, and belongs to it; the last part ends where the completion does.
        max_new_tokens: most tokens of each; None leaves it to the component.
        separator: what stands between a part and the next one; no part of a value.
    """

    names: tuple[str, ...]
    markers: tuple[str, ...]
    max_new_tokens: tuple[int | None, ...]
    separator: str

    def texts(self, completion: str) -> list[str] | None:
        """The parts' values of a whole completion; None where a marker is missing."""
        found: list[str] = []
        for marker in self.markers:
            before, is_there, completion = completion.partition(marker)
            if not is_there:
                return None
            found.append(self.value(before + marker) if found else before + marker)
        return [*found, self.value(completion)]

    def thought(self, reasoning: str) -> str:
        r"""A first part of this reasoning, as `<think>\n...\n</think>` of a marker `</think>`."""
        return "\n".join([opening(self.markers[0]), reasoning.strip("\n"), self.markers[0]]).lstrip("\n")

    def value(self, text: str) -> str:
        """What of a later part's text is its value: all but the separator in front of it, where just that is there."""
        rest = text.removeprefix(self.separator)
        return text if rest[:1].isspace() else rest

    def text(self, value: str) -> str:
        """What a later part of this value is written as; one that brings its own white space, or none, stays."""
        return value if not value or value[:1].isspace() else self.separator + value


def opening(marker: str) -> str:
    """What begins a part that ends with a marker in the manner of `</think>`; "" for another manner."""
    return marker.replace("/", "", 1) if marker[1:2] == "/" else ""


@dataclass(frozen=True)
class PartPrompt:
    """The input of a component that is to write one part of a completion.

    Attributes:
        prompt: what the whole completion follows.
        partition: of the completion.
        place: of the part.
        before: the draws of the parts before it.
    """

    prompt: Any
    partition: Partition
    place: int
    before: tuple[Any, ...] = ()

    @property
    def marker(self) -> str | None:
        """What ends the part; None for the last."""
        return None if self.place == len(self.partition.markers) else self.partition.markers[self.place]

    @property
    def earlier(self) -> tuple[str, ...]:
        """The names of the parts before it."""
        return self.partition.names[: self.place]


class PartFunction:
    """The function of one part's node: of the whole prompt's arguments and of the parts before it.

    Args:
        function: returns the prompt that the whole completion follows.
        partition, place: see `PartPrompt`.
    """

    def __init__(self, function: Callable[..., Any], partition: Partition, place: int) -> None:
        name = partition.names[place]
        self.partition, self.place = partition, place
        self.__wrapped__ = function
        self.__name__, self.__doc__, self.__module__ = name, function.__doc__, function.__module__
        self.__qualname__ = f"{function.__qualname__}.{name}"
        own = inspect.signature(function).parameters
        if taken := own.keys() & set(partition.names):
            raise GraphError(
                f"@split({function.__name__}): its function takes {sorted(taken)[0]!r}, which is a part of what is "
                "drawn; rename one of them."
            )
        kind = inspect.Parameter.KEYWORD_ONLY
        before = [inspect.Parameter(part, kind) for part in partition.names[:place]]
        self.__signature__ = inspect.Signature([*own.values(), *before])

    def __call__(self, *args: Any, **kwargs: Any) -> PartPrompt:
        earlier = self.partition.names[: self.place]
        own = {name: value for name, value in kwargs.items() if name not in earlier}
        return PartPrompt(self.__wrapped__(*args, **own), self.partition, self.place)


@dataclass(frozen=True, repr=False)
class Split(_Source):
    """The parts of one completion, each a node under its name; made by `split`.

    `question >> solve` leads into all of them; an arrow that leaves has the last one's value.

    Attributes:
        variables: the nodes, in order.
    """

    variables: tuple[Node, ...]

    not_a_child = None

    def __getattr__(self, name: str) -> Node:
        for part in self.__dict__.get("variables", ()):
            if part.base_name == name:
                return part
        raise AttributeError(f"{type(self).__name__} has no part {name!r}")

    def _sources(self) -> tuple[Node, ...]:
        return (self.variables[-1],)

    def inner_links(self, each: bool = False) -> tuple[Link, ...]:
        """The arrows between the parts.

        Args:
            each: whether they are written once for every element of a list.
        """
        return tuple(
            Link(earlier, later, each)
            for place, later in enumerate(self.variables)
            for earlier in self.variables[:place]
        )

    def each(self) -> Plate:
        """A plate over the last part's value."""
        return Plate(self.variables[-1])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the decorated function itself."""
        return self.variables[0].function.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"Split({', '.join(part.base_name for part in self.variables)}; {self.variables[0].component!r})"


def split(
    component: Any,
    *,
    max_new_tokens: int | Mapping[str, int] | None = None,
    separator: str = "\n\n",
    **parts: str | None,
) -> Callable[[Callable[..., Any]], Split]:
    r"""Decorator that makes a function the prompt of a completion whose parts are nodes of a system.

    `@split(model, reasoning="</think>", answer=None)` over a function `solve` gives the nodes `solve.reasoning` and
    `solve.answer` of one model. The reasoning ends with the first `</think>` that is written, which belongs to it; the
    answer goes on from its very tokens. The log-probabilities of both add up to that of the whole completion.

    A completion that ends before its marker is written, by itself or at `max_new_tokens`, has nothing behind it: the
    later parts are empty, with probability 1.

    Args:
        component: draws text by tokens, as `CausalLM`.
        max_new_tokens: most tokens of each part, by name, or of every one; by default the component's, for each part.
        separator: what a model writes between two parts: a value has none in front of it, and one that is observed
            without white space in front is scored with it.
        parts: the nodes' names in order, each with the text that ends it; None for the last, which ends as the
            completion does.

    Raises:
        GraphError: for fewer than two parts, a marker that is missing or empty, a name that is none, a budget of no
            part, or a component that cannot write in parts, with the reason.
    """
    names, markers = tuple(parts), tuple(parts.values())
    if len(names) < 2 or markers[-1] is not None or not all(isinstance(m, str) and m.strip() for m in markers[:-1]):
        raise GraphError(
            "@split(component, reasoning='</think>', answer=None) takes two parts or more, each with the text that "
            f"ends it, and None for the last, got {parts}."
        )
    for name in names:
        if hasattr(Split, name) or name in Split.__dataclass_fields__:
            raise GraphError(f"@split: a part cannot be called {name!r}, as Split has an attribute of that name.")
    if not isinstance(separator, str) or separator.strip():
        raise GraphError(f"@split: separator must be white space, or '', got {separator!r}.")
    objection = getattr(component, "parts_objection", "it is no component")
    if objection:
        raise GraphError(f"@split: {component!r} cannot write a completion in parts: {objection}.")
    partition = Partition(names, tuple(map(str, markers[:-1])), _budgets(names, max_new_tokens), separator)
    component.check_partition(partition)

    def decorate(function: Callable[..., Any]) -> Split:
        if isinstance(function, (Node, Split)):
            raise GraphError(f"@split got {function!r}, which is decorated already; decorate its function once.")
        parameters(Node(function, None, names[0]))
        made = [PartFunction(function, partition, place) for place in range(len(names))]
        return Split(tuple(_make_node(each, component, each.__name__) for each in made))

    return decorate


def _budgets(names: Sequence[str], given: int | Mapping[str, int] | None) -> tuple[int | None, ...]:
    by_name = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    if unknown := sorted(by_name.keys() - set(names)):
        raise GraphError(f"@split: max_new_tokens has {unknown[0]!r}; the parts are {list(names)}.")
    for name, most in by_name.items():
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise GraphError(f"@split: max_new_tokens of {name!r} must be an integer of 1 or more, got {most!r}.")
    return tuple(by_name.get(name) for name in names)


def part_of(node: Node) -> PartFunction | None:
    """The function of a node that is a part of a completion; None for any other node."""
    return node.function if isinstance(node.function, PartFunction) else None


def check_parts(nodes: Sequence[Node], edges: Iterable[Edge]) -> None:
    """Whether each part stands behind those before it.

    Raises:
        GraphError: naming the part and what it follows instead.
    """
    by_name = {each.name: each for each in nodes}
    for each in nodes:
        own = part_of(each)
        if own is None:
            continue
        arrows = {edge.parameter: edge for edge in edges if edge.child == each.name}
        names = own.partition.names[: own.place]
        is_plate = any(edge.each for name, edge in arrows.items() if name not in names)
        for place, name in enumerate(names):
            parent = by_name.get(arrows[name].parent)
            other = None if parent is None else part_of(parent)
            if parent is None or other is None or (other.partition, other.place) != (own.partition, place):
                raise GraphError(
                    f"Node {each.name!r} is the part behind {name!r} of one completion, but {arrows[name].parent!r} is "
                    "another variable. Use the arrows of the split itself: a >> solve."
                )
            if parent.component is not each.component:
                raise GraphError(
                    f"Nodes {parent.name!r} and {each.name!r} are parts of one completion, which one component writes; "
                    f"they have {parent.component!r} and {each.component!r}. Replace it for both."
                )
            if arrows[name].each != is_plate:
                raise GraphError(
                    f"Nodes {parent.name!r} and {each.name!r} are parts of one completion: where the one is a plate, "
                    "so is the other, over the same list. Join what leads to them: (a & b.each()) >> solve."
                )
