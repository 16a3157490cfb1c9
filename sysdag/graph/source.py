"""Node functions as a saved system knows them: an import path and a hash of the source, never code."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from sysdag.errors import SerializationError
from sysdag.graph.import_path import import_object
from sysdag.graph.module_source import Definition, definitions, module_source
from sysdag.graph.variables import Node


def source_hash(function: Callable[..., Any]) -> str | None:
    """SHA-256 of a function's or class's source from its `def` or `class` on; None where there is no source to be read.

    Decorators are left out: the component that `@node(...)` names is saved apart.
    """
    try:
        return _hash(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return None


def _hash(source: str) -> str:
    try:
        definition = ast.parse(source).body[0]
    except SyntaxError:  # a lambda inside a longer expression
        definition = None
    if isinstance(definition, Definition):
        source = "".join(source.splitlines(keepends=True)[definition.lineno - 1 :])
    return hashlib.sha256(source.strip().encode("utf-8")).hexdigest()


def problem_of_import(path: str, saved_hash: str | None) -> str | None:
    """Why the module of `module:qualname` must not be imported for what a file says; None where it may.

    Importing a module runs it. So one that is not imported yet has to define that function or class with the source
    that the hash was taken of, which is looked up without running anything.
    """
    module_name, _, qualname = path.partition(":")
    if module_name in sys.modules:
        return None
    try:
        source = module_source(module_name)
        found = [] if source is None else definitions(source, qualname)
        if source is not None and not found and "." in qualname:  # a part of what a function's completion is split into
            found = definitions(source, qualname.rpartition(".")[0])
    except ModuleNotFoundError as error:
        where = "from where it can be imported, or with PYTHONPATH=FOLDER, if you trust what is in the folder it is in"
        return f"{path} cannot be imported ({type(error).__name__}: {error}; run {where})"
    except SyntaxError as error:
        return f"{path} cannot be imported ({type(error).__name__}: {error})"
    if saved_hash is None:
        return f"{path} had no source to compare with when the system was saved"
    if not found:
        what = "has no source" if source is None else f"defines no {qualname}"
        return f"{path} cannot be compared with what was saved: {module_name} {what}"
    if saved_hash not in map(_hash, found):
        return f"{path} changed since the system was saved"
    return None


def import_node_function(name: str, path: str | None, saved_hash: str | None) -> Callable[..., Any]:
    """The function of the node `name`, imported from `path`.

    Only a function that its own module declares as a node is taken: any other would be code of the file's choosing. A
    module is not run before its source is that of the hash.

    Raises:
        SerializationError: if it cannot be imported, is no node, or changed since its hash was taken.
    """
    if path is None:
        raise _refusal(name, "was not at the top level of a module")
    if path.startswith("__main__:"):
        raise _refusal(name, f"{path} was defined in a script or notebook")
    problem = problem_of_import(path, saved_hash)
    if problem is not None:
        raise _refusal(name, problem)
    try:
        found = import_object(path)
    except Exception as error:  # importing a module runs it, so it may raise anything
        raise _refusal(name, f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    if isinstance(found, Node):
        function = found.function
    else:
        members = vars(sys.modules[path.partition(":")[0]]).values()
        if not any(isinstance(member, Node) and member.function is found for member in members):
            raise _refusal(name, f"{path} is not declared as a node (@node) by its module")
        function = found
    if saved_hash is None:
        raise _refusal(name, f"{path} had no source to compare with when the system was saved")
    if source_hash(function) != saved_hash:
        raise _refusal(name, f"{path} changed since the system was saved")
    return function


def _refusal(name: str, problem: str) -> SerializationError:
    return SerializationError(
        f"Node {name!r}: its function {problem}. Build the system from the function you want and call "
        "system.load(folder) on it."
    )
