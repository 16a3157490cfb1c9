"""A system: inputs, nodes and the arrows between them, checked when built. No torch here.

A system is a directed acyclic graph of random variables (SysDPO, arXiv 2502.17721, section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sysdag.errors import GraphError
from sysdag.graph.blocks import Loop
from sysdag.graph.build import build, check
from sysdag.graph.plan import Plan, compile_system
from sysdag.graph.switches import Branching
from sysdag.graph.variables import Edge, Edges, Input, Node


@dataclass(frozen=True, init=False, repr=False)
class System:
    """A compound system: inputs, nodes and the arrows between them, checked when built, immutable after.

    Args:
        parts: arrows (`a >> b`), loops (`loop(...)`), switches (`switch(...)`), and nodes that have no parents. A
            switch that an arrow leaves need not be named again.
        outputs: names (or nodes) whose values are the system's result; by default the nodes that no other reads.
            A name inside a loop means its last visit.

    Attributes:
        inputs, nodes, edges: sorted by name, so that the order of declaration does not matter.
        outputs: names of the output nodes.
        switches: what decides which nodes run, sorted likewise.

    Raises:
        GraphError: on a cycle, an unknown or missing parent, a parameter that is no parent, a duplicate name, an
            output that nothing produces, an unused input, a plate over a value that is no list, or a value that is read
            where its branch may not be taken.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    outputs: tuple[str, ...]
    switches: tuple[Branching, ...]

    def __init__(
        self, *parts: Edges | Loop | Node | Input, outputs: Iterable[str | Node] | str | Node | None = None
    ) -> None:
        for field, value in build(parts, outputs).items():
            object.__setattr__(self, field, value)
        _share_bases(self.nodes)

    @classmethod
    def from_parts(
        cls,
        inputs: Iterable[Input],
        nodes: Iterable[Node],
        edges: Iterable[Edge],
        outputs: Iterable[str],
        switches: Iterable[Branching] = (),
    ) -> System:
        """A system from its parts as attributes hold them (loops already unrolled), checked like any other."""
        system = object.__new__(cls)
        for field, value in check(inputs, nodes, edges, outputs, switches).items():
            object.__setattr__(system, field, value)
        _share_bases(system.nodes)
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
        return System.from_parts(self.inputs, nodes, self.edges, self.outputs, self.switches)

    def compile(self) -> Plan:
        """The plan of this system: order, branches, lifetimes and what each objective observes (`Plan`)."""
        return compile_system(self)

    def save_pretrained(self, folder) -> None:
        """Writes `system.json` and one folder for each distinct model; see `sysdag.saving.save_system`."""
        from sysdag.saving.serialization import save_system

        save_system(self, folder)

    def push_to_hub(self, repo_id, **options) -> str:
        """Uploads the system with a model card; see `sysdag.saving.publish.push_system`."""
        from sysdag.saving.publish import push_system

        return push_system(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, folder, *, revision=None, token=None, trust_remote_code=False) -> System:
        """A system that `save_pretrained` wrote, its node functions imported by path; see `sysdag.saving`.

        Args:
            folder: the folder, or `org/name` of a repository on the Hub.
            revision, token: of a repository on the Hub.
            trust_remote_code: lets models run code that comes with them; a folder cannot ask for that by itself.
        """
        from sysdag.saving.serialization import read_system

        return read_system(folder, revision=revision, token=token, trust_remote_code=trust_remote_code)

    def load(self, folder, *, trust_remote_code=False) -> System:
        """This system's functions with the components that `save_pretrained` wrote to `folder`.

        Args:
            trust_remote_code: see `from_pretrained`.
        """
        from sysdag.saving.serialization import read_system

        functions = {n.base_name: n.function for n in self.nodes}
        return read_system(folder, functions, given=self, trust_remote_code=trust_remote_code)

    def fresh(self) -> System:
        """This system as it was before it was loaded and trained: models are read again from their names and folders.

        Adapters are new, too. Training changes components in place, so a second training goes on from the first one's
        weights, in whichever system they stand.

        Raises:
            PlanError: naming the node whose model was given as an object.
        """
        from sysdag.saving.fresh import fresh_system

        return fresh_system(self)

    def __repr__(self) -> str:
        arrows = ", ".join(f"{e.parent}{'.each()' if e.each else ''} >> {e.child}" for e in self.edges)
        return f"System({arrows or ', '.join(n.name for n in self.nodes)}; outputs={list(self.outputs)})"


def _share_bases(nodes: Iterable[Node]) -> None:
    """Lets each component work on what one before it in the system loads anyway (see `Component.share_base`)."""
    before: list[Any] = []
    for component in (n.component for n in nodes if n.component is not None):
        if not any(component is other for other in before):
            if hasattr(component, "share_base"):
                component.share_base(before)
            before.append(component)
