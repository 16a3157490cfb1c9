"""A system on disk: `system.json`, which holds no code, and one folder for each distinct component.

The topology names each node's function by import path and source hash. Loading imports only functions that their own
module declares as nodes, and refuses one that changed since: a saved system must not silently run other prompts.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sysdag.errors import GraphError, SerializationError, shown
from sysdag.files.atomic import SAVED, current, explaining_disk_errors, replacing
from sysdag.files.encoding import decode_value, encode_value
from sysdag.files.hub import local_folder
from sysdag.files.saved_files import check_component, check_links, reading
from sysdag.graph.import_path import function_path
from sysdag.graph.parts import PartFunction
from sysdag.graph.source import import_node_function, source_hash
from sysdag.graph.switches import Branching, Case, taken
from sysdag.graph.system import System
from sysdag.graph.variables import Edge, Input, Node
from sysdag.saving.component_folder import check_key, class_name, class_row, read_component, write_component
from sysdag.saving.declared import declared_component
from sysdag.saving.schema import FIELDS, FORMAT_VERSION, VALUE_TYPES, check_data, read_json, section_of, value_type

FILE_NAME = "system.json"


def system_to_dict(system: System) -> dict[str, Any]:
    """The topology of a system as JSON-ready data: no code, no weights.

    Nodes that share a component hold the same key of `component_keys`. An input's `value_type` is kept where it is one
    of the builtins str, int, float, list, dict and bool.
    """
    key_of = {id(component): key for key, component in component_keys(system).items()}
    name_of_type: dict[type | None, str] = {kind: name for name, kind in VALUE_TYPES.items()}
    found = {
        "format_version": FORMAT_VERSION,
        "inputs": [{"name": i.name, "value_type": name_of_type.get(i.value_type)} for i in system.inputs],
        "nodes": [
            {
                "base_name": n.base_name,
                "visit": n.visit,
                "function": None if n.function is taken else function_path(n.function),
                "source_sha256": None if n.function is taken else source_hash(n.function),
                "component": key_of[id(n.component)] if n.is_random else None,
                **_part_to_dict(n.function),
            }
            for n in system.nodes
        ],
        "edges": [
            {"parent": e.parent, "child": e.child, "parameter": e.parameter, "each": e.each} for e in system.edges
        ],
        "outputs": list(system.outputs),
    }
    return found | {"switches": [_switch_to_dict(made) for made in system.switches]} if system.switches else found


def _part_to_dict(function: Any) -> dict[str, Any]:
    """How a completion is cut that a node is a part of; nothing of another node."""
    if not isinstance(function, PartFunction):
        return {}
    cut = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(function.partition).items()}
    return {"part": {"place": function.place, **cut}}


def _switch_to_dict(made: Branching) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    for case in made.cases:
        values = [encode_value(value, made.name) for value in case.values]
        cases.append({"values": values, "nodes": list(case.nodes), "end": case.end})
    return {"name": made.name, "router": made.router, "cases": cases}


def _switch_from_dict(row: Mapping[str, Any]) -> Branching:
    cases = [Case(_keys(case["values"], row["name"]), tuple(case["nodes"]), case["end"]) for case in row["cases"]]
    return Branching(row["name"], row["router"], tuple(cases))


def _keys(values: Sequence[Any], name: str) -> tuple[Hashable, ...]:
    """A router's values; a list that was written was a tuple, as no list can be a key."""

    def key(value: Any) -> Hashable:
        made = tuple(map(key, value)) if isinstance(value, list) else value
        hash(made)
        return made

    try:
        return tuple(key(decode_value(value)) for value in values)
    except Exception as error:  # whatever damaged values raise, the switch has to be named
        raise SerializationError(f"Switch {name!r}: {shown(values)} are no values of a router ({error}).") from error


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
    check_data(data)
    return _assembled(data, _functions(data, functions or {}), components or {})


def _functions(data: Mapping[str, Any], given: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The nodes' functions by `base_name`; the visits of a loop share one."""
    first_rows = {row["base_name"]: row for row in reversed(data["nodes"])}
    for name in given:
        if name not in first_rows:
            raise SerializationError(f"The saved system has no node {name!r}; its nodes are {sorted(first_rows)}.")
    switched = {made["name"].partition("[")[0] for made in data.get("switches", ())}
    return {name: taken if name in switched else _function(row, given) for name, row in first_rows.items()}


def _assembled(
    data: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], components: Mapping[str, Any]
) -> System:
    for row in data["nodes"]:
        key = row["component"]
        if key is not None and key not in components:
            raise SerializationError(
                f"Node {row['base_name']!r} is drawn by the component {key!r}, but the components are "
                f"{sorted(components)}."
            )
    try:
        return System.from_parts(
            [Input(row["name"], value_type(row)) for row in data["inputs"]],
            [
                Node(
                    functions[row["base_name"]],
                    None if row["component"] is None else components[row["component"]],
                    row["base_name"],
                    row["visit"],
                )
                for row in data["nodes"]
            ],
            [Edge(**{field: row[field] for field in FIELDS["edges"]}) for row in data["edges"]],
            data["outputs"],
            [_switch_from_dict(row) for row in data.get("switches", ())],
        )
    except GraphError as error:
        raise SerializationError(f"The saved graph and its node functions form no system. {error}") from error


def save_system(system: System, folder: str | Path, *, checkpoint: bool = False) -> None:
    """Writes `system.json` and one folder for each distinct component.

    The old system in the folder is replaced as a whole, at one moment; see `sysdag.files.atomic`.

    Args:
        checkpoint: see `Component.save_checkpoint`.

    Raises:
        SerializationError: naming the node whose component cannot be saved, or whose name is that of something else in
            the folder, or the disk that is full; nothing has been replaced then.
    """
    from sysdag.components.component import Component

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise SerializationError(f"{folder} is a file; a system is saved to a folder.")
    components = component_keys(system)
    for key, component in components.items():
        if not isinstance(component, Component):
            raise SerializationError(
                f"Node {key!r}: {component!r} cannot be saved; its class must be a subclass of sysdag.Component."
            )
    classes = {key: class_row(type(component), key) for key, component in components.items()}
    _check_names(components, folder)
    _warn_of_main(system)
    data = system_to_dict(system)
    advice = "What the folder held before is as it was. Free some space, or save elsewhere."
    with (
        explaining_disk_errors("The system", folder, sum(map(_bytes_of, components.values())), advice),
        replacing(folder) as temporary,
    ):
        data["components"] = {
            key: {**classes[key], **write_component(component, temporary / key, key, checkpoint=checkpoint)}
            for key, component in components.items()
        }
        (temporary / FILE_NAME).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for key, row in data["components"].items():
        if row["folder"] is None and (folder / key).exists():
            shutil.rmtree(folder / key)  # the weights that an earlier component of this name had


def read_system(
    folder: str | Path,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    *,
    given: System | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> System:
    """The system that `save_system` wrote. Nothing is written here, and nothing that the folder holds is run.

    Args:
        folder: the folder; where there is none, a repository `org/name` on the Hub.
        functions: node functions by `base_name`, in place of importing them; see `system_from_dict`.
        given: the system at hand; see `sysdag.saving.declared`. What its components trust is trusted again.
        revision, token: of a repository on the Hub; see `sysdag.files.hub.local_folder`.
        trust_remote_code: lets models of transformers run code that comes with them, as its `from_pretrained` does.
            Only who loads says so, never the folder.

    Raises:
        SerializationError: naming the file, and the node or field at fault; or the repository that cannot be read.
    """
    from sysdag.components.component import Component

    folder = local_folder(folder, revision=revision, token=token)
    check_links(folder, FILE_NAME, SAVED)
    file = current(folder, FILE_NAME, FILE_NAME)
    data = read_json(file)
    try:
        check_data(data)
        rows = section_of(data, "components", dict)
        for key, row in rows.items():
            check_key(row, key)
        check_links(folder, *rows)
        found = _functions(data, functions or {})
        known = {} if given is None else component_keys(given)
        trusted = {key for key, each in known.items() if isinstance(each, Component) and each.trusts_remote_code}
        components = {
            key: read_component(
                row,
                current(folder, key, FILE_NAME).parent,
                key,
                partial(declared_component, data, key, given),
                trust_remote_code=trust_remote_code or key in trusted,
            )
            for key, row in rows.items()
        }
        with reading(file):
            for component in components.values():
                component.connect(components)
            return _assembled(data, found, components)
    except SerializationError as error:
        raise SerializationError(f"{file}: {error}") from error


def copy_system(source: Path, folder: Path) -> None:
    """Copies what `save_system` wrote over the system in another folder, as a whole.

    Raises:
        SerializationError: as `save_system`.
    """
    rows = section_of(read_json(source / FILE_NAME), "components", dict)
    _check_names(rows, folder)
    needed = sum(path.stat().st_size for key in rows for path in (source / key).rglob("*"))
    advice = "What the folder held before is as it was. Free some space."
    with explaining_disk_errors("The system", folder, needed, advice), replacing(folder) as temporary:
        for key, row in rows.items():
            if row["folder"] is not None:
                shutil.copytree(source / key, temporary / key)
        shutil.copy(source / FILE_NAME, temporary / FILE_NAME)


def load_weights(system: System, folder: str | Path) -> None:
    """Replaces the weights of a system in place by those that `save_system` wrote of the same system.

    Raises:
        SerializationError: if the folder holds another system, the first difference is named and nothing is changed;
            if a component's folder cannot be read, its node is named.
    """
    folder = Path(folder)
    check_links(folder, FILE_NAME, SAVED)
    weighted = check_same_system(system, folder)
    check_links(folder, *weighted)
    for key, (component, path) in weighted.items():
        try:
            any_format = ":" in class_name(type(component), key)
            # The model that is filled is there: no config chooses one.
            check_component(path, trust_remote_code=True, any_format=any_format)
            component.load_weights(path)
        except Exception as error:  # whatever the model's library raises, the node and its folder have to be named
            raise SerializationError(
                f"Node {key!r}: its weights cannot be loaded from {path} ({type(error).__name__}: {error})."
            ) from error


def check_same_system(system: System, folder: Path) -> dict[str, tuple[Any, Path]]:
    """Compares a system with the saved one in a folder.

    Returns:
        Each component that has weights there, by its key, and their folder.

    Raises:
        SerializationError: naming the first difference.
    """
    saved, own = read_json(current(folder, FILE_NAME, FILE_NAME)), system_to_dict(system)
    for section in ("inputs", "nodes", "edges", "outputs", "switches"):
        if saved.get(section) != own.get(section):
            raise SerializationError(
                f"{folder} holds another system: its {section} are {saved.get(section)}, expected {own.get(section)}."
            )
    rows = section_of(saved, "components", dict)
    weighted: dict[str, tuple[Any, Path]] = {}
    for key, component in component_keys(system).items():
        kind = class_name(type(component), key)
        if key in rows:
            check_key(rows[key], key)
        if key not in rows or rows[key]["class"] != kind:
            raise SerializationError(
                f"{folder} holds another system: the component of node {key!r} is a "
                f"{rows.get(key, {}).get('class')}, expected {kind}."
            )
        if rows[key]["folder"] is not None:
            path = current(folder, key, FILE_NAME)
            if not path.is_dir():
                raise SerializationError(f"Node {key!r}: the folder {path} of its weights is missing.")
            weighted[key] = component, path
    return weighted


def _check_names(components: Mapping[str, Any], folder: Path) -> None:
    """Refuses to replace a file or folder that no saved system owns."""
    file = current(folder, FILE_NAME, FILE_NAME)
    owned = section_of(read_json(file), "components", dict) if file.exists() else {}
    for key in components:
        if (folder / key).exists() and key not in owned:
            raise SerializationError(
                f"Node {key!r}: {folder / key} exists and belongs to no system saved in {folder}; saving would replace "
                "it. Rename the node, move what is there, or save to another folder."
            )


def _warn_of_main(system: System) -> None:
    names = [n.name for n in system.nodes if (function_path(n.function) or "").startswith("__main__:")]
    if names:
        warnings.warn(
            f"The functions of the nodes {names} stand in the script or notebook that runs (__main__), so "
            "System.from_pretrained will not find them. Define the nodes in a module that the script imports, or build "
            "the system again and call system.load(folder).",
            stacklevel=4,
        )


def _bytes_of(component: Any) -> int:
    parameters = [] if component.module is None else component.module.parameters()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


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


def _function(row: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    name = row["base_name"]
    if name in functions:
        function = functions[name]
        function = function.function if isinstance(function, Node) else function
        if source_hash(function) != row["source_sha256"] or _part_to_dict(function).get("part") != row.get("part"):
            warnings.warn(
                f"Node {name!r}: its function is not the one that the system was saved with; the one given is used.",
                stacklevel=3,
            )
        return function
    function = import_node_function(name, row["function"], row["source_sha256"])
    found, saved = _part_to_dict(function).get("part"), row.get("part")
    if found != saved:
        raise SerializationError(
            f"Node {name!r}: {row['function']} is cut otherwise than when the system was saved: {shown(found)}, and it "
            f"was {shown(saved)}. Build the system from the function you want and call system.load(folder)."
        )
    return function
