"""Values that somebody gave for a run's nodes, as the cells that the run would have had."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sysdag.components.component import Component
from sysdag.data.branches import Run, told_failure
from sysdag.data.parts import with_parts
from sysdag.data.row_paths import whole_path
from sysdag.errors import DataError
from sysdag.graph.plan import Plan
from sysdag.traces.cells import ABSENT, Cell, Draw, value_of


def given_cells(
    plan: Plan, inputs: Mapping[str, Any], given: Mapping[str, Any], where: str, folder: Path | None
) -> dict[str, Cell]:
    """What a run's nodes hold of which values were given, and which did not run as another branch was taken.

    Args:
        inputs: of the run.
        given: by node; the value of a switch is that of the branch it took, too.
        where, folder: see `given_cell`.

    Raises:
        DataError: naming the row, and the node or router.
    """
    try:
        given = with_parts(plan, given)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if not plan.system.switches:
        return {name: given_cell(plan, name, given[name], where, folder) for name in plan.order if name in given}
    known = {name: value for name, value in given.items() if value is not None and name in plan.order}
    try:
        run = Run(plan, inputs, known)
    except Exception as error:  # a router may be computed by functions of the user's
        name, text = told_failure(error)
        raise DataError(f"{where}, node {name!r}: {text}" if name else f"{where}: {text}") from error
    if both := run.contradicted():
        raise DataError(f"{where}: node {both[0]!r} has a value, but another branch was taken.")
    cells: dict[str, Cell] = {}
    for name in plan.order:
        end = run.end_of(name) if plan.switch(name) else None
        if name in run.skipped:
            cells[name] = ABSENT
        elif end in cells:
            cells[name] = Draw(value_of(cells[end]))
        elif name in run.given:
            cells[name] = given_cell(plan, name, run.given[name], where, folder)
    return cells


def given_cell(plan: Plan, name: str, value: Any, where: str, folder: Path | None) -> Cell:
    """What a node holds in a run whose value of it was given; images are read from their files.

    Args:
        where: what an error calls the row.
        folder: of the row's file, which paths are relative to.

    Raises:
        DataError: naming the row and the node.
    """
    component = plan.system[name].component
    if made := plan.switch(name):  # of which the router is not known
        readers = [end for end in plan.ends_of(name) if getattr(plan.system[end].component, "reads_files", False)]
        if readers and isinstance(value, (str, Path, bytes)):
            raise DataError(
                f"{where}: whether the value of {name!r} is an image of node {readers[0]!r} cannot be told, as its "
                f"router {made.router!r} is not known; give that in the row's intermediates."
            )
    if not plan.is_plate(name):
        return _draw(component, value, name, where, folder)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: node {name!r} is a plate, whose value is a list, got {type(value).__name__}.")
    return tuple(_draw(component, element, name, where, folder) for element in value)


def _draw(component: Component | None, value: Any, name: str, where: str, folder: Path | None) -> Draw:
    if isinstance(value, Draw):
        return value
    if component is not None and component.reads_files and isinstance(value, (str, Path, bytes)):
        return Draw(_image(whole_path(component, value, folder), name, where))
    match value:
        case [{"role": "assistant", "content": str(text)}]:
            return Draw(text)
    return Draw(value)


def _image(value: str | Path | bytes, name: str, where: str) -> Any:
    """The image of a file or its bytes."""
    from PIL import Image

    try:
        return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value).copy()
    except Exception as error:  # the decoders of PIL raise a dozen types on damaged files
        what = "bytes" if isinstance(value, bytes) else f"the file {str(value)!r}"
        raise DataError(
            f"{where}, node {name!r}: expected an image, got {what}, which PIL cannot read ({error})."
        ) from error
