"""A system or a function from what a command line names: `FILE.py:name`, `package.module:name`, or a saved folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sysdag.errors import LoadingError
from sysdag.graph import System


def load_system(spec: str) -> System:
    """The system that `spec` names; its models' weights are not read yet.

    A file is imported as the module of its name from its own folder, so that the systems it saves can be loaded again
    beside it. Without `:name` the file's only `System` is taken.

    Raises:
        LoadingError: if there is no such file, module, folder or system; naming those that are there.
    """
    place, _, name = spec.partition(":")
    if (Path(place) / "system.json").is_file():
        return System.from_pretrained(place)
    module = _imported(place, spec, "SYSTEM.py:name, package.module:name or a saved system's folder")
    systems = {key: value for key, value in vars(module).items() if isinstance(value, System)}
    if name:
        found = getattr(module, name, None)
        if not isinstance(found, System):
            what = "has no" if found is None else f"has a {type(found).__name__} as"
            raise LoadingError(f"{place} {what} {name!r}; its systems are {sorted(systems)}.")
        return found
    if len(systems) != 1:
        raise LoadingError(f"{place} has the systems {sorted(systems)}; say which: {place}:name.")
    return next(iter(systems.values()))


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `FILE.py:name` or `package.module:name` names; a file is imported as in `load_system`.

    Raises:
        LoadingError: if there is no such file, module or function; naming the functions that are there.
    """
    place, _, name = spec.partition(":")
    module = _imported(place, spec, "FILE.py:function or package.module:function")
    found = getattr(module, name, None) if name else None
    if not callable(found):
        here = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == getattr(module, "__name__", "")
        )
        if not name:
            raise LoadingError(f"{spec} names no function; say which of {here}: {place}:function.")
        what = f"has no {name!r}" if found is None else f"has {name!r}, a {type(found).__name__} that cannot be called"
        raise LoadingError(f"{place} {what}; its functions are {here}.")
    return found


def _imported(place: str, spec: str, expected: str) -> object:
    path = Path(place)
    if path.is_dir():
        raise LoadingError(f"{place} is no saved system: it has no system.json.")
    if path.suffix == ".py":
        if not path.is_file():
            raise LoadingError(f"There is no file {place}.")
        folder, place = str(path.resolve().parent), path.stem
        loaded = sys.modules.get(place)
        if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() != path.resolve():
            raise LoadingError(f"{path} has the name of a module that is imported already, {loaded!r}; rename it.")
        sys.path.insert(0, folder)
    elif "/" in place or ":" not in spec:
        raise LoadingError(f"There is no {place}; give {expected}.")
    try:
        return importlib.import_module(place)
    except Exception as error:  # importing a module runs it, so it may raise anything
        raise LoadingError(f"{spec}: {type(error).__name__} while it was imported: {error}") from error
