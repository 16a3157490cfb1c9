"""The graph of a recorded system, from names alone: no code of the user's is imported to report on a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx

from sysdag.errors import DataError


@dataclass(frozen=True)
class Topology:
    """The nodes and edges of a system.

    Attributes:
        inputs: names of the inputs.
        component_of: for each random node the key of its component, for each deterministic node None; in topological
            order.
        edges: (parent, child, whether it is a plate), each once; a switch has none from its router.
        beside: of edges by parent and child what stands beside them: of a router's, the branches that begin there.
        outputs: names of the outputs.
        levels: names by their distance from the start: level 0 the inputs, then nodes whose parents stand before.
    """

    inputs: tuple[str, ...]
    component_of: Mapping[str, str | None]
    edges: tuple[tuple[str, str, bool], ...]
    outputs: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    beside: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Topology:
        """The topology of what `sysdag.saving.serialization.system_to_dict` returned.

        Raises:
            DataError: for an edge of an unknown node, or a cycle.
        """
        inputs = tuple(row["name"] for row in data["inputs"])
        component_of = {
            row["base_name"] if row["visit"] is None else f"{row['base_name']}[{row['visit']}]": row["component"]
            for row in data["nodes"]
        }
        edges, beside = _edges(data)
        known = {*inputs, *component_of}
        for name in [name for edge in edges for name in edge[:2]] + list(data["outputs"]):
            if name not in known:
                raise DataError(f"{name!r} is none of the system's inputs and nodes, {sorted(known)}.")
        graph = networkx.DiGraph()
        graph.add_nodes_from([*inputs, *component_of])
        graph.add_edges_from(edge[:2] for edge in edges)
        if not networkx.is_directed_acyclic_graph(graph):
            raise DataError("the edges form a cycle.")
        level: dict[str, int] = dict.fromkeys(inputs, 0)
        for name in networkx.topological_sort(graph):
            level.setdefault(name, 1 + max((level[parent] for parent in graph.predecessors(name)), default=0))
        order = sorted(component_of, key=lambda name: level[name])
        levels = [
            tuple(n for n in (*inputs, *order) if level[n] == depth)
            for depth in range(max(level.values(), default=0) + 1)
        ]
        return cls(
            inputs=inputs,
            component_of={name: component_of[name] for name in order},
            edges=edges,
            outputs=tuple(data["outputs"]),
            levels=tuple(names for names in levels if names),
            beside=beside,
        )

    def component(self, node: str) -> str | None:
        """The key of a node's component; None for one that is deterministic or unknown."""
        return self.component_of.get(node)


def _edges(data: Mapping[str, Any]) -> tuple[tuple[tuple[str, str, bool], ...], dict[tuple[str, str], str]]:
    """The edges that are drawn, and what stands beside them."""
    beside: dict[tuple[str, str], str] = {}
    skipped = set()
    for made in data.get("switches", ()):
        if made["router"] not in [case["end"] for case in made["cases"]]:
            skipped.add((made["router"], made["name"]))
        for case in made["cases"]:
            for name in case["nodes"]:
                key = (made["router"], name)
                title = " or ".join(map(str, case["values"])) or "otherwise"
                beside[key] = f"{beside[key]}, {title}" if key in beside else title
    found: dict[tuple[str, str], bool] = {}
    for row in data["edges"]:
        ends = (row["parent"], row["child"])
        if ends not in skipped:
            found[ends] = found.get(ends, False) or row["each"]
    return tuple((*ends, each) for ends, each in found.items()), {key: t for key, t in beside.items() if key in found}
