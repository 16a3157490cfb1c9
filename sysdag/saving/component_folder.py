"""One component on disk: its class by name, its options, and its weights in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.errors import DeclarationNeeded, SerializationError
from sysdag.graph.import_path import function_path, import_object
from sysdag.saving.schema import COMPONENT_FIELDS, check_row

if TYPE_CHECKING:
    from sysdag.components.component import Component


def class_name(kind: type, key: str) -> str:
    """The name that finds a component's class again: one of sysdag's, or `module:Class`."""
    from sysdag import components

    if kind.__module__.startswith("sysdag.components.") and kind.__name__ in components.__all__:
        return kind.__name__
    path = function_path(kind)
    if path is None:
        raise SerializationError(
            f"Node {key!r}: its component's class {kind.__qualname__} cannot be found again; move it to the top level "
            "of a module."
        )
    return path


def _find_class(name: str, key: str) -> type[Component]:
    from sysdag import components
    from sysdag.components.component import Component

    if ":" not in name:
        if name not in components.__all__:
            raise SerializationError(f"Component {key!r}: sysdag has no class {name!r}; it has {components.__all__}.")
        return getattr(components, name)
    try:
        found = import_object(name)
    except Exception as error:  # importing a module runs it, so it may raise anything
        raise SerializationError(
            f"Component {key!r}: its class {name} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(found, type) or not issubclass(found, Component):
        raise SerializationError(f"Component {key!r}: {name} is no subclass of sysdag.Component.")
    return found


def write_component(component: Component, folder: Path, key: str, *, checkpoint: bool = False) -> dict[str, Any]:
    """Saves a component to a new folder; returns its row of `system.json` without the class."""
    folder.mkdir()
    options = component.save_checkpoint(folder) if checkpoint else component.save_pretrained(folder)
    try:
        options = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SerializationError(f"Node {key!r}: {component!r} returned options that are not JSON: {error}") from error
    if any(folder.iterdir()):
        return {"folder": key, "options": options}
    folder.rmdir()  # a component without weights; an empty folder would not survive an upload
    return {"folder": None, "options": options}


def read_component(
    row: Any, folder: Path, key: str, declared: Callable[[], Component | None] = lambda: None
) -> Component:
    """The component that a row of `system.json` in `folder` describes.

    Args:
        declared: what the user's code has in its place, for a class that cannot be built from its folder alone.
    """
    check_row(row, COMPONENT_FIELDS, f"components[{key!r}]")
    if Path(key).name != key or row["folder"] not in (None, key):
        raise SerializationError(f"components[{key!r}] must be in a folder of that name, got {row['folder']!r}.")
    if row["folder"] is not None and not (folder / key).is_dir():
        raise SerializationError(f"The folder {folder / key} of the component {key!r} is missing.")
    kind = _find_class(row["class"], key)
    own_errors: tuple[type[Exception], ...] = (DeclarationNeeded, NotImplementedError)
    if ":" in row["class"]:
        own_errors = (*own_errors, TypeError)  # of a subclass whose constructor takes other arguments
    try:
        return kind.from_pretrained(folder / key, row["options"])
    except own_errors as error:
        found = declared()
        if found is None:
            raise SerializationError(
                f"Component {key!r}: {error} Its node's module declares no {kind.__name__} in its place: give it to "
                f"the node there, @node({kind.__name__}(...)), or build the system and call system.load(folder)."
            ) from error
        return _refilled(found, folder / key, row["options"], key)


def _refilled(declared: Component, folder: Path, options: Any, key: str) -> Component:
    try:
        return declared.refilled(folder, options)
    except SerializationError as error:
        raise SerializationError(f"Component {key!r}: {error}") from error
    except Exception as error:  # whatever reads the weights raises
        raise SerializationError(
            f"Component {key!r}: the {declared!r} that its node has cannot take the saved weights "
            f"({type(error).__name__}: {error})."
        ) from error
