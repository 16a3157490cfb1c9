"""A callable, an API or a tool as a node: it can be run, and has no likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sysdag.components import hooks
from sysdag.components.component import Component
from sysdag.components.random_streams import RowGenerator
from sysdag.traces.cells import Draw


class Opaque(Component):
    """What a function returns for the node's input; its randomness, if any, is its own.

    Args:
        function: called with what the node's function returned, once for each element. A saved system names it by
            import path; it is loaded again only if its module gives it to a component there (see `hooks`).
    """

    likelihood = "none"

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return f"Opaque({getattr(self.function, '__qualname__', self.function)})"

    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        return [Draw(self.function(element)) for element in inputs]

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        return [Draw(value) for value in values]

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        return {"function": hooks.describe("function", self.function)}

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        function = hooks.load("function", options["function"])
        assert function is not None  # an Opaque always has one
        return cls(function)
