"""How a component takes what its node's function returns, in whichever process that function is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sysdag.traces.cells import Draw


@dataclass(frozen=True)
class Argument:
    """A value that a node's function is called with.

    Attributes:
        value: as the function gets it.
        origin: an input of the system, a draw of a component, or what a deterministic node computed.
        sources: for a computed one the inputs and draws that it was computed of, over all deterministic nodes between.
        draw: of which it is the value; None for an input, and for a list of a plate's.
    """

    value: Any
    origin: Literal["input", "drawn", "computed"]
    sources: Sequence[Argument] = ()
    draw: Draw | None = None


class InputReader:
    """What becomes of a function's value before the component gets it; it needs no weights, and can be pickled.

    Attributes:
        row_options: columns of a row that inputs take up beside what the node's function returns (see
            `with_row_options`).
    """

    row_options: tuple[str, ...] = ()

    def with_row_options(self, input: Any, options: Mapping[str, Any]) -> Any:
        """An input with what its row holds under the names in `row_options`.

        Raises:
            DataError: for an option of another type.
        """
        return input

    def tell_apart(self, input: Any, function: Callable[..., Any], arguments: Mapping[str, Argument]) -> Any:
        """An input in which the values that flowed into it are told apart from what the function wrote.

        Args:
            input: what the function returned.
            function: may be called again, with other values.
            arguments: what it was called with, by parameter.

        Raises:
            DataError: where that matters and cannot be told.
        """
        return input
