"""A system on disk: `system.json`, which holds no code, and one folder for each distinct component.

The topology names each node's function by import path and source hash. Loading imports only functions that their own
module declares as nodes, and refuses one that changed since: a saved system must not silently run other prompts.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sysdag.errors import GraphError, SerializationError
from sysdag.graph import Edge, Input, Node, System, function_path, import_object
from sysdag.source import import_node_function, source_hash

if TYPE_CHECKING:
    from sysdag.component import Component

FORMAT_VERSION = 1
FILE_NAME = "system.json"
_VALUE_TYPES = {kind.__name__: kind for kind in (str, int, float, list, dict, bool)}
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "inputs": {"name": (str,), "value_type": (str, type(None))},
    "nodes": {
        "base_name": (str,),
        "visit": (int, type(None)),
        "function": (str, type(None)),
        "source_sha256": (str, type(None)),
        "component": (str, type(None)),
    },
    "edges": {"parent": (str,), "child": (str,), "parameter": (str,), "each": (bool,)},
}
_COMPONENT_FIELDS = {"class": (str,), "folder": (str, type(None)), "options": (dict,)}


def system_to_dict(system: System) -> dict[str, Any]:
    """The topology of a system as JSON-ready data: no code, no weights.

    Nodes that share a component hold the same key of `component_keys`. An input's `value_type` is kept where it is one
    of the builtins str, int, float, list, dict and bool.
    """
    key_of = {id(component): key for key, component in component_keys(system).items()}
    name_of_type: dict[type | None, str] = {kind: name for name, kind in _VALUE_TYPES.items()}
    return {
        "format_version": FORMAT_VERSION,
        "inputs": [{"name": i.name, "value_type": name_of_type.get(i.value_type)} for i in system.inputs],
        "nodes": [
            {
                "base_name": n.base_name,
                "visit": n.visit,
                "function": function_path(n.function),
                "source_sha256": source_hash(n.function),
                "component": key_of[id(n.component)] if n.is_random else None,
            }
            for n in system.nodes
        ],
        "edges": [
            {"parent": e.parent, "child": e.child, "parameter": e.parameter, "each": e.each} for e in system.edges
        ],
        "outputs": list(system.outputs),
    }


def system_from_dict(
    data: Mapping[str, Any],
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    components: Mapping[str, Any] | None = None,
) -> System:
    """The system that `system_to_dict` described.

    Args:
        data: what `system_to_dict` returned.
        functions: node functions by `base_name`, used as they are; one that differs from the saved one is warned of.
            The others are imported by path, and must not have changed.
        components: the components by key.

    Raises:
        SerializationError: for data that describes no system, or a node whose function or component is not to be had.
    """
    _check_data(data)
    functions, components = functions or {}, components or {}
    base_names = {row["base_name"] for row in data["nodes"]}
    for name in functions:
        if name not in base_names:
            raise SerializationError(f"The saved system has no node {name!r}; its nodes are {sorted(base_names)}.")
    first_rows = {row["base_name"]: row for row in reversed(data["nodes"])}  # the visits of a loop share a function
    function_of = {name: _function(row, functions) for name, row in first_rows.items()}
    for row in data["nodes"]:
        key = row["component"]
        if key is not None and key not in components:
            raise SerializationError(
                f"Node {row['base_name']!r} is drawn by the component {key!r}, but the components are "
                f"{sorted(components)}."
            )
    try:
        return System.from_parts(
            [Input(row["name"], _value_type(row)) for row in data["inputs"]],
            [
                Node(
                    function_of[row["base_name"]],
                    None if row["component"] is None else components[row["component"]],
                    row["base_name"],
                    row["visit"],
                )
                for row in data["nodes"]
            ],
            [Edge(**{field: row[field] for field in _FIELDS["edges"]}) for row in data["edges"]],
            data["outputs"],
        )
    except GraphError as error:
        raise SerializationError(f"The saved graph and its node functions form no system. {error}") from error


def save_system(system: System, folder: str | Path) -> None:
    """Writes `system.json` and one folder for each distinct component.

    Everything is written to a temporary folder beside them first. Then the old `system.json` goes, the components move
    into place, and the new one comes last: a folder that holds a `system.json` holds all that belongs to it.

    Raises:
        SerializationError: naming the node whose component cannot be saved; nothing has been replaced then.
    """
    from sysdag.component import Component

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SerializationError(f"{folder} is a file; a system is saved to a folder.")
    components = component_keys(system)
    for key, component in components.items():
        if not isinstance(component, Component):
            raise SerializationError(
                f"Node {key!r}: {component!r} cannot be saved; its class must be a subclass of sysdag.Component."
            )
    classes = {key: _class_name(type(component), key) for key, component in components.items()}
    data = system_to_dict(system)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        data["components"] = {
            key: {"class": classes[key], **_write_component(component, temporary / key, key)}
            for key, component in components.items()
        }
        (temporary / FILE_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        (folder / FILE_NAME).unlink(missing_ok=True)
        for key in components:
            if (folder / key).exists():
                os.replace(folder / key, temporary / f"{key}.old")
            if (temporary / key).exists():
                os.replace(temporary / key, folder / key)
        os.replace(temporary / FILE_NAME, folder / FILE_NAME)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def load_system(folder: str | Path, functions: Mapping[str, Callable[..., Any]] | None = None) -> System:
    """The system that `save_system` wrote.

    Args:
        folder: the folder.
        functions: node functions by `base_name`, in place of importing them; see `system_from_dict`.

    Raises:
        SerializationError: naming the file, and the node or field at fault.
    """
    file = Path(folder) / FILE_NAME
    data = _read_json(file)
    try:
        _check_data(data)
        rows = _section(data, "components", dict)
        components = {key: _read_component(row, Path(folder), key) for key, row in rows.items()}
        return system_from_dict(data, functions=functions, components=components)
    except SerializationError as error:
        raise SerializationError(f"{file}: {error}") from error


def load_weights(system: System, folder: str | Path) -> None:
    """Replaces the weights of a system in place by those that `save_system` wrote of the same system.

    Raises:
        SerializationError: if the folder holds another system; the first difference is named, and nothing is changed.
    """
    folder = Path(folder)
    saved, own = _read_json(folder / FILE_NAME), system_to_dict(system)
    for section in ("inputs", "nodes", "edges", "outputs"):
        if saved.get(section) != own[section]:
            raise SerializationError(
                f"{folder} holds another system: its {section} are {saved.get(section)}, expected {own[section]}."
            )
    for key, component in component_keys(system).items():
        if saved["components"][key]["folder"] is not None:
            component.load_weights(folder / key)


def component_keys(system: System) -> dict[str, Any]:
    """Each distinct component of a system under the base name of its first node (in `system.nodes`).

    Keys are names of folders, so no two may differ only by case; a number tells apart those that would.
    """
    keys: dict[str, Any] = {}
    for n in system.nodes:
        if not n.is_random or any(n.component is component for component in keys.values()):
            continue
        key, number = n.base_name, 1
        while key.casefold() in {taken.casefold() for taken in keys}:
            number += 1
            key = f"{n.base_name}-{number}"
        keys[key] = n.component
    return keys


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SerializationError(
            f"{file} does not exist; expected a folder that System.save_pretrained wrote to its end."
        ) from error
    except ValueError as error:
        raise SerializationError(f"{file} is not valid JSON: {error}") from error


def _function(row: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    name = row["base_name"]
    if name in functions:
        function = functions[name]
        function = function.function if isinstance(function, Node) else function
        if source_hash(function) != row["source_sha256"]:
            warnings.warn(
                f"Node {name!r}: its function is not the one that the system was saved with; the one given is used.",
                stacklevel=3,
            )
        return function
    return import_node_function(name, row["function"], row["source_sha256"])


def _class_name(kind: type, key: str) -> str:
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
    from sysdag.component import Component

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


def _write_component(component: Component, folder: Path, key: str) -> dict[str, Any]:
    folder.mkdir()
    options = component.save_pretrained(folder)
    try:
        options = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SerializationError(f"Node {key!r}: {component!r} returned options that are not JSON: {error}") from error
    if any(folder.iterdir()):
        return {"folder": key, "options": options}
    folder.rmdir()  # a component without weights; an empty folder would not survive an upload
    return {"folder": None, "options": options}


def _read_component(row: Any, folder: Path, key: str) -> Component:
    _check_row(row, _COMPONENT_FIELDS, f"components[{key!r}]")
    if Path(key).name != key or row["folder"] not in (None, key):
        raise SerializationError(f"components[{key!r}] must be in a folder of that name, got {row['folder']!r}.")
    if row["folder"] is not None and not (folder / key).is_dir():
        raise SerializationError(f"The folder {folder / key} of the component {key!r} is missing.")
    return _find_class(row["class"], key).from_pretrained(folder / key, row["options"])


def _check_data(data: Any) -> None:
    if not isinstance(data, Mapping) or "format_version" not in data:
        raise SerializationError("This is no saved system: it has no 'format_version'.")
    if data["format_version"] != FORMAT_VERSION:
        raise SerializationError(
            f"format_version is {data['format_version']!r}, and this version of sysdag reads {FORMAT_VERSION}; "
            "use the sysdag that wrote it."
        )
    for section, fields in _FIELDS.items():
        for number, row in enumerate(_section(data, section, list)):
            _check_row(row, fields, f"{section}[{number}]")
    if not all(isinstance(output, str) for output in _section(data, "outputs", list)):
        raise SerializationError(f"'outputs' must be names, got {data['outputs']!r}.")


def _section(data: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(data.get(name), kind):
        raise SerializationError(f"{name!r} must be a {kind.__name__}, got {data.get(name)!r}.")
    return data[name]


def _check_row(row: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    for field, kinds in fields.items():
        if not isinstance(row, Mapping) or field not in row or not isinstance(row[field], kinds):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise SerializationError(f"{where} must have {field!r}, of type {expected}, got {row!r}.")


def _value_type(row: Mapping[str, Any]) -> type | None:
    if row["value_type"] is None:
        return None
    if row["value_type"] not in _VALUE_TYPES:
        raise SerializationError(
            f"Input {row['name']!r}: unknown value_type {row['value_type']!r}; known are {sorted(_VALUE_TYPES)}."
        )
    return _VALUE_TYPES[row["value_type"]]
