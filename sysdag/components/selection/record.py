"""What a draw of a choice keeps: the options that there were, and the indices of those that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.components.selection.prompt import same_value
from sysdag.errors import DataError, shown
from sysdag.traces.cells import Draw


@dataclass(frozen=True, eq=False)
class Chosen:
    """An ordered choice.

    Attributes:
        options: all that there were.
        indices: of the chosen ones, all different, in their order.
    """

    options: Sequence[Any]
    indices: tuple[int, ...]

    def draw(self, alone: bool, log_prob: float | None = None) -> Draw:
        """As a node holds it.

        Args:
            alone: whether the value is the only chosen option, and not a list.
        """
        record: dict[str, Any] = {"options": list(self.options)}
        if alone:
            return Draw(self.options[self.indices[0]], record | {"index": self.indices[0]}, log_prob)
        values = [self.options[index] for index in self.indices]
        return Draw(values, record | {"indices": list(self.indices)}, log_prob)

    @classmethod
    def of(cls, owner: str, draw: Draw, k: int | None, element: int) -> Chosen:
        """What a draw's record says.

        Args:
            owner: what errors name.
            k: of the choice; None for one whose value is no list.

        Raises:
            DataError: for a record that is none of such a choice, or another value than it says.
        """
        options, name = draw.record.get("options"), "index" if k is None else "indices"
        found = draw.record.get(name)
        indices = [found] if k is None else found
        if (
            not isinstance(options, (list, tuple))
            or not isinstance(indices, (list, tuple))
            or not all(type(index) is int and 0 <= index < len(options) for index in indices)
            or len(set(indices)) != len(indices)
            or len(indices) != (k or 1)
        ):
            wanted = "one of them" if k is None else f"{k} different ones of them"
            raise DataError(
                f"{owner}: a draw needs its options, a list, and the {name} of {wanted}, got "
                f"{name}={shown(found)} of {len(options) if isinstance(options, (list, tuple)) else shown(options)} "
                "options. Give the option itself instead.",
                element=element,
            )
        values = [draw.value] if k is None else draw.value
        if (
            not isinstance(values, (list, tuple))
            or len(values) != len(indices)
            or not all(same_value(value, options[index]) for value, index in zip(values, indices, strict=True))
        ):
            raise DataError(
                f"{owner}: a draw has the value {shown(draw.value)}, but the {name} {shown(found)} of other options.",
                element=element,
            )
        return cls(options, tuple(indices))

    def check_options(self, owner: str, options: Sequence[Any], element: int) -> None:
        """Refuses a draw that was made of other options than its input has.

        Raises:
            DataError: naming the first difference.
        """
        if len(options) != len(self.options):
            raise DataError(
                f"{owner}: the draw was made of {len(self.options)} options, and its input has {len(options)}. Give "
                "the value alone, or the inputs that it was drawn from.",
                element=element,
            )
        for place, (own, given) in enumerate(zip(self.options, options, strict=True)):
            if not same_value(own, given):
                raise DataError(
                    f"{owner}: the draw was made of other options than its input has: at index {place}, {shown(own)} "
                    f"and not {shown(given)}. Give the value alone, or the inputs that it was drawn from.",
                    element=element,
                )

    @classmethod
    def observed(cls, owner: str, options: Sequence[Any], values: Sequence[Any], element: int) -> Chosen:
        """What observed values stand for: each an option, or the index of one.

        Raises:
            DataError: for a value that is no option or several, or is chosen twice.
        """
        indices: list[int] = []
        counts = not any(_is_number(option) for option in options)
        for value in values:
            if _is_number(value) and counts:
                if not 0 <= value < len(options):
                    raise DataError(
                        f"{owner}: the index {value} is none of the {len(options)} options' (0 to {len(options) - 1}).",
                        element=element,
                    )
                indices.append(int(value))
                continue
            places = [place for place, option in enumerate(options) if same_value(value, option)]
            if not places:
                raise DataError(
                    f"{owner}: {shown(value)} is no option of its row, which has {shown(list(options), 200)}.",
                    element=element,
                )
            if len(places) > 1:
                raise DataError(
                    f"{owner}: {shown(value)} is equal to the options {places}, which have a probability each; give "
                    "the index of the one that is meant.",
                    element=element,
                )
            indices += places
        if len(set(indices)) < len(indices):
            raise DataError(
                f"{owner}: the indices {indices} choose an option twice; each can be chosen once.", element=element
            )
        return cls(options, tuple(indices))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
