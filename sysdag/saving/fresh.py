"""A system as it was before it was loaded and trained."""

from __future__ import annotations

from typing import Any

from sysdag.errors import PlanError
from sysdag.graph.system import System
from sysdag.saving.serialization import component_keys


def fresh_system(system: System) -> System:
    """The system with its components as they were before they were loaded and trained; see `Component.fresh`.

    Raises:
        PlanError: naming the node whose component was given its weights as an object.
    """
    made: dict[str, Any] = {}
    keys = component_keys(system)
    for key, component in keys.items():
        try:
            made[key] = component.fresh()
        except PlanError as error:
            raise PlanError(f"Node {key!r}: {error}") from error
    for component in made.values():
        component.connect(made)
    key_of = {id(component): key for key, component in keys.items()}
    return system.with_components({n.name: made[key_of[id(n.component)]] for n in system.nodes if n.is_random})
