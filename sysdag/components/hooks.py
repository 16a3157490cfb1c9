"""User functions that a saved component names by import path: never code in the folder, never any function at all.

Only a function that its own module hands to a component there is saved and loaded. Any other would let a saved folder
choose what is called with a system's values (`os.system`, say).
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any

from sysdag.components.component import Component
from sysdag.errors import SerializationError, shown
from sysdag.graph.import_path import function_path
from sysdag.graph.source import problem_of_import, source_hash
from sysdag.graph.variables import Node


def describe(option: str, function: Callable[..., Any] | None) -> dict[str, str | None] | None:
    """What is saved of the function that a component was given as `option`: its path and a hash of its source.

    Raises:
        SerializationError: if `load` could not find it again.
    """
    if function is None:
        return None
    saved = {"path": function_path(function), "source_sha256": source_hash(function)}
    if load(option, saved) is not function:
        raise SerializationError(f"{option}={function!r}: another function stands at {saved['path']}.")
    return saved


def load(option: str, saved: Mapping[str, Any] | None) -> Callable[..., Any] | None:
    """The function that `describe` described.

    Raises:
        SerializationError: if it is not at the top level of an importable module, its module gives it to no component
            there, or it changed.
    """
    if saved is None:
        return None
    texts = [saved.get(name) for name in ("path", "source_sha256")] if isinstance(saved, Mapping) else [0]
    if not all(isinstance(text, (str, type(None))) for text in texts) or len(saved) != 2:
        raise SerializationError(f"{option} must be null or have a path and a source_sha256, got {shown(saved)}.")
    path, saved_hash = texts
    module_name, _, name = (path or "").partition(":")
    if path is None or module_name == "__main__" or "." in name:
        raise SerializationError(
            f"{option}={path} must be a function at the top level of a module that can be imported."
        )
    if (problem := problem_of_import(path, saved_hash)) is not None:
        raise SerializationError(f"{option}={problem}.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a module runs it, so it may raise anything
        raise SerializationError(f"{option}={path} cannot be imported ({type(error).__name__}: {error}).") from error
    function = vars(module).get(name)
    if not isinstance(function, types.FunctionType) or not _is_given_to_component(module, function):
        raise SerializationError(
            f"{option}={path}: {module_name} gives no such function to a component. Make the node, "
            f"@node(...({option}={name})), or the component at the top level of that module."
        )
    if source_hash(function) != saved_hash:
        raise SerializationError(f"{option}={path} changed since the component was saved.")
    return function


def _is_given_to_component(module: types.ModuleType, function: Callable[..., Any]) -> bool:
    members = [member.component if isinstance(member, Node) else member for member in vars(module).values()]
    return any(
        value is function
        for component in members
        if isinstance(component, Component)
        for value in vars(component).values()
    )
