"""A system or a function from what a command line names: `FILE.py:name`, `package.module:name`, or a saved folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sysdag.errors import LoadingError
from sysdag.graph.system import System


def load_system(spec: str) -> System:
    """The system that `spec` names; its models' weights are not read yet.

    A file is imported as the module of its name from its own folder, so that the systems it saves can be loaded again
    beside it. Without `:name` the file's only `System` is taken. Functions of a saved system are imported from the
    working folder, too; no other is put on the path for it.

    Raises:
        LoadingError: if there is no such file, module, folder or system; naming those that are there.
    """
    place, _, name = spec.partition(":")
    if (Path(place) / "system.json").is_file():
        if name:
            raise LoadingError(f"{place} is a saved system, which is one by itself; give {place} without :{name}.")
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        return System.from_pretrained(place)
    module = _imported(place, spec, "SYSTEM.py:name, package.module:name or a saved system's folder")
    systems = {key: value for key, value in vars(module).items() if isinstance(value, System)}
    if name:
        found = getattr(module, name, None)
        if not isinstance(found, System):
            what = f"has no {name!r}" if found is None else f"has {name!r}, which is no System but {_kind(found)}"
            raise LoadingError(f"{place} {what}; {_those(systems)}.")
        return found
    if not systems:
        raise LoadingError(f"{place} has no system; make one in it: system = System(...).")
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
        what = f"has no {name!r}" if found is None else f"has {name!r}, {_kind(found)} that cannot be called"
        raise LoadingError(f"{place} {what}; its functions are {here}.")
    return found


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _those(systems: dict[str, System]) -> str:
    return f"its systems are {sorted(systems)}" if systems else "it has no system, so make one: system = System(...)"


def _imported(place: str, spec: str, expected: str) -> object:
    path = Path(place)
    if not place:
        raise LoadingError(f"{spec!r} names no file, module or folder; give {expected}.")
    if path.is_dir():
        raise LoadingError(f"{place} is no saved system: it has no system.json. Give {expected}.")
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
    elif path.is_file():
        raise LoadingError(f"{place} is no Python file, whose name ends in .py; give {expected}.")
    elif place.isidentifier() and Path(f"{place}.py").is_file() and not _is_module(place):
        raise LoadingError(f"There is no module {place}, but a file: give {place}.py{spec.removeprefix(place)}.")
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:  # importing a module runs it, so it may raise anything, and may end
        raise LoadingError(f"{spec}: {type(error).__name__} while it was imported{_line(error)}: {error}") from error


def _is_module(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _line(error: BaseException) -> str:
    """Where a module's code raised it: the last line that is neither this file's nor Python's own import."""
    if isinstance(error, SyntaxError):  # which says so itself
        return ""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<frozen ")]
    mine = [each for each in frames if each.filename not in (__file__, importlib.__file__)]
    return f" ({mine[-1].filename}, line {mine[-1].lineno})" if mine else ""
