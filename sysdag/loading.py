"""A system from what a command line names: `SYSTEM.py:name`, `package.module:name`, or a saved system's folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

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
    module = _imported(place, spec)
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


def _imported(place: str, spec: str) -> object:
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
        raise LoadingError(f"There is no {place}; give SYSTEM.py:name, package.module:name or a saved system's folder.")
    try:
        return importlib.import_module(place)
    except Exception as error:  # importing a module runs it, so it may raise anything
        raise LoadingError(f"{spec}: {type(error).__name__} while it was imported: {error}") from error
