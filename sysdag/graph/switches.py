"""Branches of which one runs: what `switch` takes, and what a system knows of it. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysdag.errors import GraphError, shown
from sysdag.graph.blocks import Loop, Part, Switch, end_of
from sysdag.graph.parts import Split
from sysdag.graph.variables import Edge, Edges, Input, Node


def taken() -> Any:
    """Stands for the function of a switch's node, whose value is that of the branch which a run has taken."""
    raise GraphError("A switch has no function to be called: its value is that of the branch which a run has taken.")


@dataclass(frozen=True)
class Case:
    """One branch of a switch, by names.

    Attributes:
        values: of the router, that choose it; none for the default, which any other value chooses.
        nodes: those that run where it is taken, and where no case that has them is, do not.
        end: the node whose value is the switch's.
    """

    values: tuple[Hashable, ...]
    nodes: tuple[str, ...]
    end: str


@dataclass(frozen=True)
class Branching:
    """A switch of a system, by names.

    Attributes:
        name: the node that has the value of the branch which was taken.
        router: the input or node whose value chooses.
        cases: the branches.
    """

    name: str
    router: str
    cases: tuple[Case, ...]

    @property
    def nodes(self) -> frozenset[str]:
        """Those that do not always run."""
        return frozenset(name for case in self.cases for name in case.nodes)

    @property
    def known(self) -> str:
        """The values that branches have, for an error."""
        return ", ".join(repr(value) for case in self.cases for value in case.values)

    def case_of(self, value: Any) -> int | None:
        """The place of the branch that a router's value chooses; None if there is none.

        White space around a text does not count.
        """
        value = value.strip() if isinstance(value, str) else value
        for place, case in enumerate(self.cases):
            if any(_same(value, own) for own in case.values):
                return place
        return next((place for place, case in enumerate(self.cases) if not case.values), None)

    def places(self, name: str) -> frozenset[int]:
        """The cases in which a node runs; none for one that is in no branch."""
        return frozenset(place for place, case in enumerate(self.cases) if name in case.nodes)

    def title(self, places: Iterable[int]) -> str:
        """Some of the branches, as a picture names them."""
        return ", ".join(" or ".join(map(str, self.cases[place].values)) or "otherwise" for place in sorted(places))


def _same(value: Any, own: Hashable) -> bool:
    if not isinstance(value, Hashable) or isinstance(value, bool) != isinstance(own, bool):
        return False
    return getattr(value, "shape", ()) == () and bool(value == own)  # an array, even of one number, is no name


def switch(
    router: Input | Node,
    branches: Mapping[Hashable, Part | Sequence[Part]],
    *,
    default: Part | Sequence[Part] | None = None,
    name: str | None = None,
) -> Switch:
    """Branches of which a run takes one, the router's: the others do not run and are not scored.

    `switch(router, {"math": solve, "code": outline >> write}, name="solution") >> report` gives `report` the value of
    `solve` where the router's is "math", and that of `write` where it is "code". The branches' nodes have arrows into
    them like any other.

    Args:
        router: an input or a node; its value is the key of a branch, but for white space around a text.
        branches: by the router's value a node, arrows, a loop, another switch, or a list of these. All nodes that stand
            in them belong to the branch, apart from those that the router depends on, which have run when it chooses.
            The branch's value is that of its last node.
        default: the branch for all other values; without it they are errors.
        name: under which functions receive the value; by default the router's name with `_switch`.

    Raises:
        GraphError: for fewer than two branches, one that is none of these or has no last node, or a name that is none.
    """
    if not isinstance(router, (Input, Node)):
        raise GraphError(f"switch(router, ...): the router must be an input or a node, got {router!r}.")
    own = router.name if isinstance(router, Input) else router.base_name
    name = f"{own}_switch" if name is None else name
    if not isinstance(name, str) or not name.isidentifier():
        raise GraphError(
            f"switch(name=...) must be a Python identifier (it is a parameter of functions), got {name!r}."
        )
    if not isinstance(branches, Mapping) or not branches:
        raise GraphError(
            f"switch({own}, ...) takes a dict from the router's values to branches, as {{'math': solve, 'code': write}}"
            f", got {shown(branches)}."
        )
    found: list[tuple[tuple[Hashable, ...], tuple[Part, ...]]] = [
        ((value.strip() if isinstance(value, str) else value,), _parts(given, repr(value), own))
        for value, given in branches.items()
    ]
    values = [value for keys, _ in found for value in keys]
    for place, value in enumerate(values):
        if value in values[:place]:
            raise GraphError(
                f"switch({own}, ...): two branches are for {value!r}; white space around it does not count."
            )
    if default is not None:
        found.append(((), _parts(default, "default", own)))
    if len(found) < 2:
        raise GraphError(f"switch({own}, ...) needs two branches or more, got {values}; with one there is no choice.")
    return Switch(taken, None, name, None, router, tuple(found))


def _parts(given: Any, which: str, router: str) -> tuple[Part, ...]:
    parts = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    parts = tuple(Edges(part.inner_links(), part.variables[-1:]) if isinstance(part, Split) else part for part in parts)
    where = f"switch({router}, ...): branch {which}"
    for part in parts:
        if not isinstance(part, (Node, Edges, Loop)):
            raise GraphError(
                f"{where} must be a node, arrows, a loop, a switch, or a list of these, got {shown(part)}."
            )
    if not parts:
        raise GraphError(f"{where} is empty; a node that returns its parent does nothing.")
    end_of(parts, where)
    return parts


def without_ancestors(switches: Sequence[Branching], read: Iterable[Edge]) -> list[Branching]:
    """The switches, each without its router and what that depends on, which have run before a branch is chosen.

    Args:
        switches: all of the system.
        read: the arrows that pass values to functions.
    """
    import networkx

    graph = networkx.DiGraph((edge.parent, edge.child) for edge in read)
    graph.add_edges_from((source, own.name) for own in switches for source in (own.router, *_ends(own)))
    found = []
    for made in switches:
        above = {made.router} | (networkx.ancestors(graph, made.router) if made.router in graph else set())
        cases = [replace(case, nodes=tuple(name for name in case.nodes if name not in above)) for case in made.cases]
        found.append(replace(made, cases=tuple(cases)))
    return found


def _ends(made: Branching) -> list[str]:
    return [case.end for case in made.cases]


def arrows(branchings: Sequence[Branching], read: Iterable[Edge]) -> list[Edge]:
    """The arrows of switches: from the router to where each branch begins and to the switch's node, and from the ends.

    Args:
        read: the arrows that pass values to functions.
    """
    parents: dict[str, list[str]] = {}
    for edge in read:
        parents.setdefault(edge.child, []).append(edge.parent)
    inner = {own.name: own for own in branchings}
    found = []
    for made in branchings:
        found.append(Edge(made.router, made.name, ""))
        found += [Edge(end, made.name, "") for end in _ends(made)]
        for name in made.nodes:
            above = list(parents.get(name, ()))
            if name in inner:  # a switch inside runs where its router or its branches do
                above += [inner[name].router, *_ends(inner[name])]
            if not any(made.places(parent) == made.places(name) for parent in above):
                found.append(Edge(made.router, name, ""))
    return found


def check_switches(
    branchings: Sequence[Branching], nodes: Sequence[Node], edges: Sequence[Edge], outputs: Iterable[str]
) -> None:
    """Whether every value that is read is there.

    Raises:
        GraphError: naming what reads a value that a run may not have, a router that gives lists, or a switch that is in
            no system.
    """
    of_name = {made.name: made for made in branchings}
    known = {each.name for each in nodes}
    for each in nodes:
        if (each.function is taken) != (each.name in of_name):
            raise GraphError(f"Node {each.name!r} is a switch's: System.from_parts(...) needs it in `switches`, too.")
    plated = {edge.child for edge in edges if edge.each}
    for name, count in Counter(made.name for made in branchings).items():
        if count > 1:
            raise GraphError(f"{count} switches are called {name!r}; name each: switch(..., name='...').")
    for made in branchings:
        if made.router in plated:
            raise GraphError(
                f"The router {made.router!r} of switch {made.name!r} runs once for every element of a list, and its "
                "value is a list. A switch takes one branch a run: put what chooses into a node of its own."
            )
        for case in made.cases:
            if missing := sorted({*case.nodes, case.end} - known):
                raise GraphError(
                    f"Switch {made.name!r}: no node is named {missing[0]!r}; the nodes are {sorted(known)}."
                )
        if made.name in made.nodes or made.router in made.nodes:
            raise GraphError(f"Switch {made.name!r}: it and its router cannot be in a branch of it.")
        _check_values(made, next((each.component for each in nodes if each.name == made.router), None))
    for edge in edges:
        for made in branchings:
            places = made.places(edge.parent)
            if not places or edge.child == made.name:
                continue
            reader = made.places(edge.child)
            if not reader or not reader <= places:
                raise GraphError(
                    f"Node {edge.child!r} reads {edge.parent!r}, which runs only in branch {made.title(places)} of the "
                    f"switch {made.name!r}. Read {made.name!r}, the value of the branch that is taken; or put "
                    f"{edge.child!r} into that branch; or declare the arrows of {edge.parent!r} outside the switch, so "
                    "that it always runs."
                )
    for output in outputs:
        for made in branchings:
            if made.places(output):
                raise GraphError(
                    f"Output {output!r} runs only in branch {made.title(made.places(output))} of the switch "
                    f"{made.name!r}. Name {made.name!r} as the output, the value of the branch that is taken; or let "
                    f"something in the branch read {output!r}."
                )


def _check_values(made: Branching, component: Any) -> None:
    """Refuses branches that a router with finitely many values never takes, and values of it without a branch."""
    values = getattr(component, "values", None)
    if not isinstance(values, tuple):
        return
    for value in values:
        if made.case_of(value) is None:
            raise GraphError(
                f"The router {made.router!r} may say {value!r}, which names no branch of the switch {made.name!r}; its "
                f"branches are {made.known}. Add that branch, or a default=..."
            )
    chosen = {made.case_of(value) for value in values}
    for place, case in enumerate(made.cases):
        if case.values and place not in chosen:
            raise GraphError(
                f"Switch {made.name!r}: branch {made.title([place])} is never taken, as its router {made.router!r} is "
                f"one of {list(values)}."
            )
