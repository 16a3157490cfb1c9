"""Components that a user's modules declare for the nodes of a saved system, for those that its folder cannot build.

A saved folder holds no code: it names the function of each node by its import path, and only what the module there
declares with `@node`, or puts into a system, is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sysdag.errors import SerializationError
from sysdag.graph.parts import Split
from sysdag.graph.system import System
from sysdag.graph.variables import Node
from sysdag.saving.component_folder import class_name

if TYPE_CHECKING:
    from sysdag.components.component import Component


def declared_component(data: Mapping[str, Any], key: str, given: System | None = None) -> Component | None:
    """The component that stands in the user's code where the saved one stood; None where there is none.

    Args:
        data: a saved system.
        key: of one of its components.
        given: a system at hand, whose components are used in place of those that modules declare.

    Raises:
        SerializationError: if modules declare several of that class for the component's nodes.
    """
    rows = [row for row in data["nodes"] if row["component"] == key]
    if given is not None:
        known = {n.name: n.component for n in given.nodes}
        found = [known.get(_name(row)) for row in rows]
    else:
        found = [component for row in rows for component in _in_module(row["function"])]
    kind = data["components"][key]["class"]
    distinct = {id(each): each for each in found if each is not None and class_name(type(each), key) == kind}
    if len(distinct) > 1:
        raise SerializationError(
            f"Component {key!r}: its folder cannot build it, and the nodes' modules declare {len(distinct)} of class "
            f"{kind}. Build the system with the one you mean and call system.load(folder)."
        )
    return next(iter(distinct.values()), None)


def _name(row: Mapping[str, Any]) -> str:
    return row["base_name"] if row["visit"] is None else f"{row['base_name']}[{row['visit']}]"


def _in_module(path: str | None) -> list[Component]:
    """What a node function's module gives to its node, and its systems do.

    The functions of the nodes were loaded before. What is not imported by now is not imported for this.
    """
    module_name, _, qualname = (path or "").partition(":")
    module = sys.modules.get(module_name)
    if module is None or module_name == "__main__":
        return []
    members = vars(module).values()
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part, None)
    function = found.function if isinstance(found, Node) else found
    nodes = [member for member in members if isinstance(member, Node)]
    nodes += [each for member in members if isinstance(member, System) for each in member.nodes]
    nodes += [each for member in members if isinstance(member, Split) for each in member.variables]
    return [each.component for each in nodes if each.function is function and each.is_random]
