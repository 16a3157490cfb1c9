"""A module's source, and what it defines, found without importing it: importing a module runs it."""

from __future__ import annotations

import ast
import inspect
import io
import sys
import textwrap
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_source(name: str) -> str | None:
    """The source of the module that `import name` would run; None for one without, as an extension in C.

    Raises:
        ModuleNotFoundError: if there is none of that name.
    """
    parts = name.split(".")
    search: Iterable[str] | None = None
    spec = None
    for end in range(1, len(parts) + 1):
        whole = ".".join(parts[:end])
        spec = _spec(whole, search) if parts[end - 1].isidentifier() and (end == 1 or search is not None) else None
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        known = getattr(sys.modules.get(whole), "__path__", spec.submodule_search_locations)
        search = None if known is None else list(getattr(known, "_path", known))  # a namespace asks its parent module
    read = getattr(spec and spec.loader, "get_source", None)
    try:
        return None if read is None else read(name)
    except (ImportError, SyntaxError, UnicodeDecodeError):  # a bytecode file alone; a file in no encoding of Python's
        return None


def _spec(name: str, search: Iterable[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = None if find is None else find(name, search, None)
        if spec is not None:
            return spec
    return None


def definitions(source: str, qualname: str) -> list[str]:
    """The source of each function or class of that name, decorators among it, as `inspect.getsource` gives it.

    Raises:
        SyntaxError: where it is no Python.
    """
    try:
        tree = ast.parse(source)
    except (RecursionError, MemoryError, ValueError) as error:
        raise SyntaxError(f"it cannot be parsed ({type(error).__name__})") from error
    lines = io.StringIO(source).readlines()
    found = []
    for each in _named(tree, qualname.split(".")):
        first = min([each.lineno, *(decorator.lineno for decorator in each.decorator_list)])
        found.append(textwrap.dedent("".join(inspect.getblock(lines[first - 1 :]))))
    return found


def _named(scope: ast.AST, names: list[str]) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name == names[0]:
                if len(names) == 1:
                    yield child
                elif isinstance(child, ast.ClassDef):
                    yield from _named(child, names[1:])
        elif not isinstance(child, ast.expr):
            yield from _named(child, names)
