"""One component on disk: its class by name, its options, and its weights in a folder of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.errors import DeclarationNeeded, SerializationError
from sysdag.files.saved_files import check_component, reading
from sysdag.graph.import_path import function_path, import_object
from sysdag.graph.source import problem_of_import, source_hash
from sysdag.saving.schema import COMPONENT_FIELDS, check_row

if TYPE_CHECKING:
    from sysdag.components.component import Component


_KEY = re.compile(r"[^\W\d]\w*(-\d+)?")  # of `sysdag.saving.serialization.component_keys`


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


def class_row(kind: type, key: str) -> dict[str, Any]:
    """How a row of `system.json` names a component's class; one that is not sysdag's with the hash of its source."""
    name = class_name(kind, key)
    return {"class": name} if ":" not in name else {"class": name, "source_sha256": source_hash(kind)}


def _find_class(name: str, key: str, saved_hash: str | None) -> type[Component]:
    from sysdag import components
    from sysdag.components.component import Component

    if ":" not in name:
        if name not in components.__all__:
            raise SerializationError(f"Component {key!r}: sysdag has no class {name!r}; it has {components.__all__}.")
        found: Any = getattr(components, name)
    else:
        if (problem := problem_of_import(name, saved_hash)) is not None:
            raise SerializationError(
                f"Component {key!r}: its class {problem}. Import that module first, if it is the one you mean."
            )
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


def check_key(row: Any, key: str) -> None:
    """Refuses a row of `system.json` that is no component's, or is in a folder of another name.

    Raises:
        SerializationError: naming the component.
    """
    where = f"components[{key!r}]"
    check_row(row, COMPONENT_FIELDS, where, {"source_sha256": (str, type(None))})
    if not _KEY.fullmatch(key) or row["folder"] not in (None, key):
        raise SerializationError(f"{where} must be in a folder of that name, got {row['folder']!r}.")


def read_component(
    row: Any,
    folder: Path,
    key: str,
    declared: Callable[[], Component | None] = lambda: None,
    *,
    trust_remote_code: bool = False,
) -> Component:
    """The component that a row of `system.json` in `folder` describes.

    Args:
        declared: what the user's code has in its place, for a class that cannot be built from its folder alone.
        trust_remote_code: lets models of transformers run code that is in the folder, or in the base's repository.

    Raises:
        SerializationError: naming the component, and the file or option at fault.
    """
    check_key(row, key)
    if row["folder"] is not None and not (folder / key).is_dir():
        raise SerializationError(f"The folder {folder / key} of the component {key!r} is missing.")
    kind = _find_class(row["class"], key, row.get("source_sha256"))
    own_errors: tuple[type[Exception], ...] = (DeclarationNeeded, NotImplementedError)
    if ":" in row["class"]:
        own_errors = (*own_errors, TypeError)  # of a subclass whose constructor takes other arguments
    if row["folder"] is not None:
        try:
            any_format = ":" in row["class"]
            check_component(folder / key, trust_remote_code=trust_remote_code, any_format=any_format)
        except SerializationError as error:
            raise SerializationError(f"Component {key!r}: {error}") from error
    try:
        with reading(folder / key, leaving=own_errors):
            made = kind.from_pretrained(folder / key, row["options"])
        made.read_from(folder / key, trust_remote_code=trust_remote_code)
        return made
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
