"""The language and the plan: what a user writes, and what follows from it. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.graph.loops import loop
    from sysdag.graph.outline import objections
    from sysdag.graph.parts import split
    from sysdag.graph.plan import Plan
    from sysdag.graph.render import draw, to_dot, to_mermaid, to_networkx, to_table
    from sysdag.graph.switches import switch
    from sysdag.graph.system import System
    from sysdag.graph.variables import Edge, Input, Node, node

__all__ = [
    "Edge",
    "Input",
    "Node",
    "Plan",
    "System",
    "draw",
    "loop",
    "node",
    "objections",
    "split",
    "switch",
    "to_dot",
    "to_mermaid",
    "to_networkx",
    "to_table",
]
__getattr__ = exports(
    __name__,
    {
        "loops": ["loop"],
        "outline": ["objections"],
        "parts": ["split"],
        "plan": ["Plan"],
        "render": ["draw", "to_dot", "to_mermaid", "to_networkx", "to_table"],
        "switches": ["switch"],
        "system": ["System"],
        "variables": ["Edge", "Input", "Node", "node"],
    },
)
