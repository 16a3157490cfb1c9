"""Functions and classes by the path under which their module is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def function_path(function: Callable[..., Any]) -> str | None:
    """Where `import_function` finds a function, as `module:qualname`; None for a local one or a callable object."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return None if not module or not qualname or "<" in qualname else f"{module}:{qualname}"


def import_object(path: str) -> Any:
    """What stands at `module:qualname`."""
    module_name, _, qualname = path.partition(":")
    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
