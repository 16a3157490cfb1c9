"""What stands for several arrows until a system is built: loops, switches, and the branches of these. No torch here."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sysdag.errors import GraphError
from sysdag.graph.variables import Edges, Input, Link, Node, parameters


@dataclass(frozen=True)
class Loop:
    """A feedback loop to be unrolled when the system is built; made by `loop`.

    Attributes:
        links: the arrows of the body, those inside switches among them.
        switches: of the body.
    """

    links: tuple[Link, ...]
    carry: tuple[tuple[str, Node], ...]
    times: int
    switches: tuple[Switch, ...] = ()

    not_a_child: ClassVar[str] = (
        "Name its nodes, and give the loop to System beside the arrows: System(x >> critic, loop(...))."
    )

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are repeated: children in the body, switches with what is in their branches, and parents and
        routers that read a carried value."""
        carried = {name for name, _ in self.carry}
        found = {link.child.base_name: link.child for link in self.links}
        for made in self.switches:
            found |= {made.base_name: made} | {inner.base_name: inner for inner in nodes_of(made.parts)}
        for source in [*(link.source for link in self.links), *(made.router for made in self.switches)]:
            if isinstance(source, Node) and carried & set(parameters(source)):
                found[source.base_name] = source
        return tuple(found.values())

    @property
    def body(self) -> frozenset[str]:
        """Names of the nodes that are repeated."""
        return frozenset(repeated.base_name for repeated in self.nodes)


@dataclass(frozen=True, repr=False)
class Switch(Node):
    """A node whose value is that of one of several branches; made by `switch`.

    Attributes:
        router: whose value chooses the branch.
        branches: each with the values that choose it, none for the default.
    """

    router: Input | Node | None = None
    branches: tuple[tuple[tuple[Hashable, ...], tuple[Part, ...]], ...] = ()

    not_a_child: ClassVar[str | None] = "A switch has no arrows into it: its router and its branches are its parents."

    def __repr__(self) -> str:
        assert self.router is not None
        return f"switch({self.router.name!r}, name={self.base_name!r})"

    def __reduce__(self):
        return Switch, (self.function, None, self.base_name, self.visit, self.router, self.branches)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What all branches are made of."""
        return tuple(part for _, parts in self.branches for part in parts)


Part = Node | Edges | Loop
"""What a branch is made of."""


def nodes_of(parts: Iterable[Part]) -> list[Node]:
    """The nodes that stand in a branch: also those of the switches in it, with their routers."""
    found: list[Node] = []
    for part in parts:
        here: list[Input | Node] = [part] if isinstance(part, Node) else []
        if not isinstance(part, Node):
            here += [end for link in part.links for end in (link.source, link.child)]
        if isinstance(part, Loop):
            here += part.nodes
        for each in here:
            if isinstance(each, Switch):
                found += [each, *nodes_of(each.parts), *([each.router] if isinstance(each.router, Node) else [])]
            elif isinstance(each, Node):
                found.append(each)
    return list({each.base_name: each for each in found}.values())


def end_of(parts: Sequence[Part], where: str = "A branch") -> Node:
    """The last node of a branch, whose value is the branch's.

    Args:
        where: what an error calls the branch.

    Raises:
        GraphError: where that is not one node.
    """
    last = parts[-1]
    if isinstance(last, Node):
        return last
    if isinstance(last, Edges):
        ends = list(last.tails)
    else:
        read = {link.source.base_name for link in last.links if isinstance(link.source, Node)}
        ends = [each for each in last.nodes if each.base_name not in read]
    if len(ends) != 1:
        raise GraphError(
            f"{where} ends in {sorted(each.base_name for each in ends)}, and its value is that of one node. Name it "
            "last: [..., node]."
        )
    return ends[0]
