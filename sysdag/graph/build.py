"""From arrows to a checked system: loops unrolled, names resolved, every mistake reported with its fix."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sysdag.errors import GraphError
from sysdag.graph.blocks import Loop, Switch, end_of, nodes_of
from sysdag.graph.parts import Split, check_parts
from sysdag.graph.switches import Branching, Case, arrows, check_switches, taken, without_ancestors
from sysdag.graph.variables import Edge, Edges, Input, Link, Node, natural_key, parameters


def build(parts: Iterable[Any], outputs: Iterable[str | Node] | str | Node | None) -> dict[str, tuple]:
    """The fields of a `System` from its parts, loops unrolled."""
    links, loops, alone = _gather(parts)
    everything = [*links, *(link for made in loops for link in made.links)]
    repeated = [each for made in loops for each in made.nodes]
    members = _unique([*alone, *repeated, *(end for link in everything for end in (link.source, link.child))])
    loop_of = _loop_of(loops)

    nodes: list[Node] = []
    for member in members:
        if isinstance(member, Node):
            plain = Node(taken, None, member.base_name) if isinstance(member, Switch) else member
            visits = _visits(plain.base_name, loop_of)
            nodes += [plain if t is None else dataclasses.replace(plain, visit=t) for t in visits]
    edges = [edge for link in everything for edge in _unroll(link, loop_of)]
    edges += _feedback(loops, everything)
    switches = _branchings([member for member in members if isinstance(member, Switch)], edges, loop_of)

    def resolve(given: Any) -> str:
        output = given.variables[-1] if isinstance(given, Split) else given
        if not isinstance(output, (str, Node, Input)):
            raise GraphError(f"System(outputs=...) takes names or nodes, got {output!r}.")
        name = output if isinstance(output, str) else output.name
        return f"{name}[{loop_of[name].times - 1}]" if name in loop_of else name

    inputs = [member for member in members if isinstance(member, Input)]
    if isinstance(outputs, (str, Node, Split)):
        outputs = [outputs]  # type: ignore[list-item]
    named = None if outputs is None else [resolve(output) for output in outputs]
    return check(inputs, nodes, edges, named, switches)


def check(
    inputs: Iterable[Input],
    nodes: Iterable[Node],
    edges: Iterable[Edge],
    outputs: Iterable[str] | None,
    switches: Iterable[Branching] = (),
) -> dict[str, tuple]:
    """The fields of a `System`, sorted and checked; the arrows of switches are made of `switches`."""
    inputs = tuple(sorted(inputs, key=lambda i: natural_key(i.name)))
    nodes = tuple(sorted(nodes, key=lambda n: natural_key(n.name)))
    switches = tuple(sorted(switches, key=lambda s: natural_key(s.name)))
    read = [edge for edge in edges if edge.parameter]
    found = {*read, *arrows(switches, read)}
    edges = tuple(sorted(found, key=lambda e: (natural_key(e.parent), natural_key(e.child), e.parameter, e.each)))
    if not nodes:
        raise GraphError("A system needs at least one node; write System(question >> answer).")
    _check_names(inputs, nodes)
    _check_acyclic(edges)
    _check_parents(inputs, nodes, edges)
    _check_plates(inputs, nodes, edges, switches)
    check_parts(nodes, edges)
    parents = {edge.parent for edge in edges}
    for given in inputs:
        if given.name not in parents:
            raise GraphError(f"Input {given.name!r} is used by no node; add an arrow `{given.name} >> ...` or drop it.")
    names = [n.name for n in nodes]
    if outputs is None:
        outputs = [name for name in names if name not in parents]
    outputs = tuple(dict.fromkeys(outputs))
    for output in outputs:
        if output not in names:
            raise GraphError(f"Output {output!r} is produced by no node; the nodes are {names}.{_guess(output, names)}")
    if not outputs:
        raise GraphError(f"System(outputs=[]) has no output; name at least one of {names}.")
    check_switches(switches, nodes, edges, outputs)
    return {"inputs": inputs, "nodes": nodes, "edges": edges, "outputs": outputs, "switches": switches}


def _gather(parts: Iterable[Any]) -> tuple[list[Link], list[Loop], list[Input | Node]]:
    """The arrows, loops and nodes that the parts of a system stand for; those of branches are parts like any other."""
    links: list[Link] = []
    loops: list[Loop] = []
    alone: list[Input | Node] = []
    opened: list[Switch] = []
    waiting = sorted(parts, key=lambda part: not isinstance(part, Loop))  # whose switches are theirs
    while waiting:
        part = waiting.pop(0)
        match part:
            case Edges():
                links += part.links
                waiting += [link.source for link in part.links if isinstance(link.source, Switch)]
            case Loop():
                loops += [] if part in loops else [part]
                opened += part.switches
                alone += [made.router for made in part.switches if made.router is not None]
                waiting += [link.source for link in part.links if isinstance(link.source, Switch)]
            case Switch() if part not in opened:
                opened.append(part)
                alone.append(part)
                waiting += [part.router, *part.parts]
            case Input() | Node():
                alone.append(part)
            case Split():
                alone += part.variables
                links += part.inner_links()
            case _:
                raise GraphError(
                    f"System(...) takes arrows (a >> b), loops, switches and nodes, got {part!r}. A join or a plate "
                    "needs a child: (a & b) >> c, a.each() >> c."
                )
    return links, loops, alone


def _unique(members: Iterable[Input | Node]) -> list[Input | Node]:
    found: list[Input | Node] = []
    for member in members:
        if not any(member is other or member == other for other in found):
            found.append(member)
    return found


def _loop_of(loops: Sequence[Loop]) -> dict[str, Loop]:
    loop_of: dict[str, Loop] = {}
    for made in loops:
        for name in made.body:
            if name in loop_of:
                raise GraphError(f"Node {name!r} is in the body of two loops; give each loop nodes of its own.")
            loop_of[name] = made
    return loop_of


def _visits(name: str, loop_of: Mapping[str, Loop]) -> list[int | None]:
    return [*range(loop_of[name].times)] if name in loop_of else [None]


def _branchings(switches: Sequence[Switch], edges: Sequence[Edge], loop_of: Mapping[str, Loop]) -> list[Branching]:
    """The switches by names, one for each visit of a loop that they are in."""

    def named(base: str, made: Switch, visit: int | None) -> list[str]:
        inner = loop_of.get(base)
        if visit is not None and inner is loop_of[made.base_name]:
            return [f"{base}[{visit}]"]
        return [base] if inner is None else [f"{base}[{t}]" for t in range(inner.times)]

    def branching(made: Switch, visit: int | None) -> Branching:
        assert made.router is not None
        router = made.router.name if isinstance(made.router, Input) else named(made.router.base_name, made, visit)[-1]
        cases = [
            Case(
                values,
                tuple(name for inner in nodes_of(parts) for name in named(inner.base_name, made, visit)),
                named(end_of(parts).base_name, made, visit)[-1],
            )
            for values, parts in made.branches
        ]
        return Branching(named(made.base_name, made, visit)[-1], router, tuple(cases))

    found = [branching(made, visit) for made in switches for visit in _visits(made.base_name, loop_of)]
    return without_ancestors(found, edges)


def _unroll(link: Link, loop_of: Mapping[str, Loop]) -> list[Edge]:
    """The arrows that one written arrow stands for: one for each visit of its child."""
    child, parameter = link.child.base_name, _name(link.source)
    inner, outer = loop_of.get(child), loop_of.get(parameter)
    if inner is None:
        parent = parameter if outer is None else f"{parameter}[{outer.times - 1}]"
        return [Edge(parent, child, parameter, link.each)]
    carried = dict(inner.carry).get(parameter)
    edges = []
    for visit in range(inner.times):
        if carried is not None and visit > 0:
            parent = f"{carried.base_name}[{visit - 1}]"
        elif carried is not None and carried.base_name == parameter:
            continue  # the arrow is the feedback itself, and nothing is fed back yet
        elif outer is inner:
            parent = f"{parameter}[{visit}]"
        else:
            parent = parameter if outer is None else f"{parameter}[{outer.times - 1}]"
        edges.append(Edge(parent, f"{child}[{visit}]", parameter, link.each))
    return edges


def _feedback(loops: Iterable[Loop], links: Sequence[Link]) -> list[Edge]:
    """The arrows of carried values into parameters that no written arrow leads to: visit 0 takes their default."""
    written = {(link.child.base_name, _name(link.source)) for link in links}
    return [
        Edge(f"{source.base_name}[{visit - 1}]", f"{member.base_name}[{visit}]", parameter)
        for made in loops
        for parameter, source in made.carry
        for member in made.nodes
        if parameter in parameters(member) and (member.base_name, parameter) not in written
        for visit in range(1, made.times)
    ]


def _name(member: Input | Node) -> str:
    return member.name if isinstance(member, Input) else member.base_name


def _check_names(inputs: Sequence[Input], nodes: Sequence[Node]) -> None:
    for n in nodes:
        if not n.base_name.isidentifier():
            raise GraphError(f"Node name must be a Python identifier, got {n.base_name!r}.")
    counts = Counter([i.name for i in inputs] + [n.name for n in nodes])
    if all(count == 1 for count in counts.values()):  # `critic` beside `critic[0]` is two variables of one name too
        counts = Counter([i.name for i in inputs])
        counts.update(name for name, _ in {(n.base_name, n.visit is None) for n in nodes})
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise GraphError(
            f"Name {repeated[0]!r} stands for {counts[repeated[0]]} different inputs or nodes; names must be unique. "
            "Rename one with @node(..., name='...')."
        )


def _check_parents(inputs: Sequence[Input], nodes: Sequence[Node], edges: Sequence[Edge]) -> None:
    known = [i.name for i in inputs] + [n.name for n in nodes]
    incoming: dict[str, list[Edge]] = defaultdict(list)
    for edge in edges:
        for end in (edge.parent, edge.child):
            if end not in known:
                raise GraphError(
                    f"Arrow {edge.parent!r} >> {edge.child!r}: no input or node is named {end!r}; known: {known}."
                    + _guess(end, known)
                )
        incoming[edge.child].append(edge)
    for n in nodes:
        takes = parameters(n)
        for name, count in Counter(edge.parameter for edge in incoming[n.name] if edge.parameter).items():
            if name not in takes:
                raise GraphError(
                    f"Node {n.name!r} has the parent {name!r}, but its function takes {list(takes)}. Add a parameter "
                    f"{name!r} to the function or remove the arrow {name} >> {n.base_name}."
                )
            if count > 1:
                raise GraphError(
                    f"Node {n.name!r}: parameter {name!r} has {count} arrows: "
                    f"{[(e.parent, 'each' if e.each else 'whole') for e in incoming[n.name] if e.parameter == name]}; "
                    "keep one."
                )
        missing = [
            name for name, needed in takes.items() if needed and name not in {e.parameter for e in incoming[n.name]}
        ]
        if missing:
            base_names = [i.name for i in inputs] + [other.base_name for other in nodes]
            if missing[0] in base_names:
                fix = f"Add the arrow {missing[0]} >> {n.base_name}."
                if n.visit == 0 and any(other.base_name == missing[0] and other.visit == 0 for other in nodes):
                    fix += (
                        " If the loop feeds it back, nothing has been fed back in visit 0: give the parameter a "
                        "default, or name it after the input or node of its first value."
                    )
            else:
                fix = f"No input or node is named {missing[0]!r}; known: {sorted(set(base_names))}." + _guess(
                    missing[0], base_names
                )
            raise GraphError(f"Node {n.name!r}: parameter {missing[0]!r} of its function has no arrow. {fix}")


def _check_acyclic(edges: Sequence[Edge]) -> None:
    import networkx

    graph = networkx.DiGraph((edge.parent, edge.child) for edge in edges)
    if networkx.is_directed_acyclic_graph(graph):
        return
    cycle = [parent for parent, _ in networkx.find_cycle(graph)]
    raise GraphError(
        f"The system has a cycle: {' >> '.join([*cycle, cycle[0]])}. A system must be acyclic; unroll feedback with "
        f"loop(..., carry={{'<parameter>': {cycle[-1]}}}, times=n)."
    )


def _check_plates(
    inputs: Sequence[Input], nodes: Sequence[Node], edges: Sequence[Edge], switches: Sequence[Branching]
) -> None:
    plated = {edge.child for edge in edges if edge.each}
    value_types: dict[str, Any] = {i.name: i.value_type for i in inputs}
    for n in nodes:
        value_types[n.name] = list if n.name in plated else _value_type(n)
    for made in switches:
        ends = [value_types.get(case.end) for case in made.cases]
        value_types[made.name] = ends[0] if all(map(_is_no_list, ends)) else None
    for edge in edges:
        known = value_types[edge.parent]
        if edge.each and _is_no_list(known):
            raise GraphError(
                f"{edge.parent}.each() >> {edge.child}: a plate needs a list, but {edge.parent!r} gives "
                f"{getattr(known, '__name__', known)}. Put a deterministic node between them that returns a list."
            )


def _value_type(n: Node) -> Any:
    if n.component is not None:
        return getattr(n.component, "value_type", None)
    try:
        return typing.get_type_hints(n.function).get("return")
    except (NameError, AttributeError, SyntaxError, TypeError):  # an annotation that only type checkers can resolve
        return None


def _is_no_list(kind: Any) -> bool:
    """Whether values of the type are certainly no lists; what cannot be told (None, Any, a type variable) may be."""
    origin = typing.get_origin(kind) or kind
    if origin in (typing.Any, object):
        return False
    if origin in (typing.Union, types.UnionType):
        return all(_is_no_list(member) for member in typing.get_args(kind))
    return isinstance(origin, type) and (not issubclass(origin, Sequence) or issubclass(origin, (str, bytes)))


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
