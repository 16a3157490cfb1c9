"""Values that somebody gave for a run's nodes, as the cells that the run would have had."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sysdag.components.component import Component
from sysdag.data.row_paths import whole_path
from sysdag.errors import DataError
from sysdag.graph.plan import Plan
from sysdag.traces.cells import Cell, Draw


def given_cell(plan: Plan, name: str, value: Any, where: str, folder: Path | None) -> Cell:
    """What a node holds in a run whose value of it was given; images are read from their files.

    Args:
        where: what an error calls the row.
        folder: of the row's file, which paths are relative to.

    Raises:
        DataError: naming the row and the node.
    """
    component = plan.system[name].component
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
