"""Paths in the rows of a file, which are relative to that file's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.data.columns import SIDES, is_unpaired, output_column
from sysdag.graph.plan import Plan

if TYPE_CHECKING:
    from sysdag.components.component import Component


def whole_path(component: Component | None, value: Any, folder: Path | None) -> Any:
    """The path of a file that the component would read, from the folder of the row's file; any other value as it is."""
    is_path = component is not None and component.reads_files and isinstance(value, (str, Path))
    return str(folder / value) if is_path and folder is not None else value


def with_whole_paths(plan: Plan, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a file with whole paths where it has relative ones, so that it can be written elsewhere."""
    folder = getattr(row, "folder", None)
    folder = None if folder is None else folder.absolute()

    def whole(name: str, value: Any) -> Any:
        ends = plan.ends_of(name) if name in plan.order else ()
        readers = [plan.system[end].component for end in ends if getattr(plan.system[end].component, "reads_files", 0)]
        component = readers[0] if readers and len(readers) == len(ends) else None
        if isinstance(value, list):
            return [whole_path(component, element, folder) for element in value]
        return whole_path(component, value, folder)

    found = dict(row)
    outputs = plan.system.outputs
    sides = [(side, f"{side}_intermediates") for side in SIDES]
    if is_unpaired(plan, row):
        sides = [(output_column(plan, row) or "output", "intermediates")]
    for side, beside in sides:
        if side in row and len(outputs) == 1:
            found[side] = whole(outputs[0], row[side])
        for column in (side, beside)[len(outputs) == 1 :]:
            if isinstance(row.get(column), Mapping):
                found[column] = {name: whole(name, value) for name, value in row[column].items()}
    return found
