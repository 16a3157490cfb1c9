"""Feedback loops: what `loop` takes, to be unrolled into visits when the system is built. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sysdag.errors import GraphError
from sysdag.graph.variables import Edges, Link, Node, parameters


@dataclass(frozen=True)
class Loop:
    """A feedback loop to be unrolled when the system is built; made by `loop`."""

    links: tuple[Link, ...]
    carry: tuple[tuple[str, Node], ...]
    times: int

    not_a_child: ClassVar[str] = (
        "Name its nodes, and give the loop to System beside the arrows: System(x >> critic, loop(...))."
    )

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
