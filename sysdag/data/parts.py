"""Rows that hold a whole completion where a system has nodes for its parts (see `sysdag.graph.parts`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sysdag.graph.parts import part_of
from sysdag.graph.plan import Plan
from sysdag.traces.cells import Draw


def with_parts(plan: Plan, given: Mapping[str, Any], beside: Any = None) -> dict[str, Any]:
    """Values by node, where a last part's that is a whole completion is cut into those of all parts.

    A value is one if none of its parts' is given beside it, and their markers are in it; or if it is a message of the
    assistant with its reasoning.

    Args:
        beside: by node, what else a row says of the run.

    Raises:
        DataError: for a draw that cannot be cut.
    """
    known = {**(beside if isinstance(beside, Mapping) else {}), **given}
    found = dict(given)
    for name in plan.random_nodes:
        own, value = part_of(plan.system[name]), given.get(name)
        if own is None or own.place < len(own.partition.markers) or plan.is_plate(name):
            continue
        before = [edge.parent for edge in plan.arguments(name) if edge.parameter in own.partition.names]
        before.sort(key=lambda parent: part_of(plan.system[parent]).place)  # type: ignore[union-attr]
        value = value.value if isinstance(value, Draw) and not value.record else value
        if value is None or any(known.get(parent) is not None for parent in before):
            continue
        component = plan.system[name].component
        assert component is not None  # parts are drawn
        parts = component.part_values(value, own.partition)
        if parts is not None:
            found |= zip([*before, name], parts, strict=True)
    return found
