"""Random systems for property tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st
from systems import Fake, node_of

from sysdag.graph.system import System
from sysdag.graph.variables import Input, Node


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A random acyclic system: `parents[name]` maps each parent of a node to whether its arrow is a plate.

    Nodes are listed in a topological order, with names that are in no particular one.
    """

    inputs: Sequence[str]
    parents: Mapping[str, Mapping[str, bool]]
    components: Mapping[str, Fake | None]
    outputs: Sequence[str] | None
    nodes: dict[str, Input | Node] = field(init=False)

    def __post_init__(self) -> None:
        made = {name: Input(name) for name in self.inputs}
        made |= {name: node_of(name, " ".join(self.parents[name]), self.components[name]) for name in self.parents}
        object.__setattr__(self, "nodes", made)

    def parts(self) -> list:
        """One arrow a part, and the nodes that have none."""
        arrows = [
            (self.nodes[parent].each() if each else self.nodes[parent]) >> self.nodes[name]
            for name, above in self.parents.items()
            for parent, each in above.items()
        ]
        return [*arrows, *(self.nodes[name] for name in self.parents)]

    def system(self) -> System:
        return System(*self.parts(), outputs=self.outputs)

    def renamed(self, new: Mapping[str, str]) -> "Blueprint":
        return Blueprint(
            [new[name] for name in self.inputs],
            {new[name]: {new[p]: each for p, each in above.items()} for name, above in self.parents.items()},
            {new[name]: component for name, component in self.components.items()},
            None if self.outputs is None else [new[name] for name in self.outputs],
        )


NAMES = ["a", "b1", "b01", "b10", "b2", "draft", "zeta", "end", "é", "_", "x9", "X9", "graph"]
LIKELIHOODS = ("exact", "exact", "bound", "none", None)


@st.composite
def blueprints(draw: st.DrawFn, max_nodes: int = 8, likelihoods: Sequence[str | None] = LIKELIHOODS) -> Blueprint:
    """Up to `max_nodes` nodes and 3 inputs; components may be shared."""
    names = draw(st.permutations(NAMES))
    count = draw(st.integers(1, max_nodes))
    possible_inputs, order = names[count : count + draw(st.integers(0, 3))], names[:count]
    parents: dict[str, dict[str, bool]] = {}
    for number, name in enumerate(order):
        available = [*possible_inputs, *order[:number]]
        chosen = draw(st.lists(st.sampled_from(available), unique=True, max_size=4)) if available else []
        parents[name] = {parent: draw(st.booleans()) for parent in chosen}
    pool = [None if kind is None else Fake(f"{kind}-{number}", kind) for number, kind in enumerate(likelihoods)]
    components = {name: draw(st.sampled_from(pool)) for name in order}
    used = {parent for above in parents.values() for parent in above}
    outputs = draw(st.none() | st.lists(st.sampled_from(order), unique=True, min_size=1))
    return Blueprint([name for name in possible_inputs if name in used], parents, components, outputs)
