"""Options that a constructor does not take, refused by name; Python says no more than that they are unexpected."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sysdag.errors import PlanError


class ConstructorOptions:
    """What has options that others do not have.

    Class attributes:
        not_taken: of options that users know from elsewhere, what serves in their place.

    Raises:
        PlanError: by the constructor, for an option that it does not take.
    """

    not_taken: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "__init__" in vars(cls):
            cls.__init__ = _refusing(cls.__init__)  # type: ignore[method-assign]


def _refusing(constructor: Callable[..., None]) -> Callable[..., None]:
    """A constructor that says what serves in place of an option that it does not take."""
    parameters = inspect.signature(constructor).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return constructor
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY][1:]

    @functools.wraps(constructor)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in known:
                raise PlanError(_complaint(type(self), name, known))
        constructor(self, *args, **options)

    return checked


def _complaint(kind: type[ConstructorOptions], name: str, known: list[str]) -> str:
    if name in kind.not_taken:
        return f"{kind.__name__} takes no {name}: {kind.not_taken[name]}."
    near = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"{kind.__name__} takes no {name}.{meant} It takes {', '.join(known)}."
