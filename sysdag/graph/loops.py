"""Feedback loops, to be unrolled into visits when the system is built. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from sysdag.errors import GraphError
from sysdag.graph.blocks import Loop, Switch
from sysdag.graph.variables import Edges, Link, Node, parameters


def loop(*parts: Edges | Switch, carry: Mapping[str, Node], times: int) -> Loop:
    """Unrolls a feedback loop into visits that share weights.

    `loop(critic >> rewrite, carry={"draft": rewrite}, times=3)` gives the nodes `critic[0]`, `rewrite[0]`, ...,
    `rewrite[2]`. In visit 0 the parameter `draft` is the parent of that name, or its default where no arrow gives one;
    in visit t it is `rewrite[t - 1]`. Arrows of the system into a node of the body reach every visit; arrows out of one
    leave from the last visit. A switch in the body takes a branch anew in every visit.

    Args:
        parts: the arrows and switches of the body.
        carry: for each parameter that is fed back, the node of the body whose last value it takes.
        times: number of visits, at least 1.

    Raises:
        GraphError: if `times` is no positive integer, the body holds another loop, nothing is carried, a carried node
            is outside the body, or no node of the body takes the parameter.
    """
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise GraphError(f"loop(times=...) must be a positive integer, got {times!r}.")
    links: list[Link] = []
    switches: list[Switch] = []
    waiting = list(parts)
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, Edges):
            links += part.links
        elif isinstance(part, Switch):
            switches.append(part)
            waiting += [inner for inner in part.parts if not isinstance(inner, Node) or isinstance(inner, Switch)]  # type: ignore[misc]
        else:
            raise GraphError(
                f"loop(...) takes arrows made with `>>` and switches, got {type(part).__name__}; loops do not nest."
            )
    if not isinstance(carry, Mapping) or not carry:
        raise GraphError(
            f"loop(carry=...) must be a dict from a parameter to the node that it is fed back from, got {carry!r}; "
            "without one every visit would be the same."
        )
    made = Loop(tuple(links), tuple(carry.items()), times, tuple(switches))
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
