"""What a node holds in one run: a draw, or for a plate one draw an element; nothing where its branch was not taken.

Token ids travel with text: a draw keeps the ids that were really sampled, so scoring never tokenises a completion
again.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sysdag.files.encoding import decode_value, encode_value, is_text


@dataclass(frozen=True, eq=False)
class Draw:
    """One value of one random node.

    Attributes:
        value: what the functions of its children receive.
        record: what its component needs to score it (`token_ids` of a language model, `latents` of a diffusion
            model); empty for a deterministic node, and for a given text, whose tokens its prompt decides.
        log_prob: natural logarithm of the probability under the distribution it was drawn from; None where that is
            unknown or the value was given.
    """

    value: Any
    record: Mapping[str, Any] = field(default_factory=dict)
    log_prob: float | None = None


class Absent(enum.Enum):
    """The cell of a node that did not run, as another branch of a switch was taken."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent.ABSENT
"""The cell of a node that did not run, as another branch of a switch was taken: no draw, and a score of 0."""
Cell = Draw | tuple[Draw, ...] | Absent


def draws_of(cell: Cell) -> tuple[Draw, ...]:
    """The draws of a cell, one an element; none of an absent one."""
    if cell is ABSENT:
        return ()
    return cell if isinstance(cell, tuple) else (cell,)


def value_of(cell: Cell) -> Any:
    """What a child receives: the draw's value, or for a plate the list of its elements' values.

    None of an absent cell, which has no child that runs.
    """
    if cell is ABSENT:
        return None
    return [draw.value for draw in cell] if isinstance(cell, tuple) else cell.value


def encode_cell(cell: Cell, name: str) -> Any:
    """A draw, a plate's, or None of an absent cell, as in a line of `Trace.to_jsonl`; `name` is for errors."""
    if cell is ABSENT:
        return None
    if isinstance(cell, tuple):
        return [encode_cell(draw, name) for draw in cell]
    return {
        "value": encode_value(cell.value, name),
        "record": {key: encode_value(value, name) for key, value in cell.record.items()},
        "log_prob": encode_value(cell.log_prob, name),
    }


def decode_cell(data: Any) -> Cell:
    """What `encode_cell` wrote; anything else raises whatever it meets."""
    if data is None:
        return ABSENT
    if isinstance(data, list):
        return tuple(_decode_draw(element) for element in data)
    return _decode_draw(data)


def check_names(names: Iterable[str]) -> None:
    """JSON may hold half of a surrogate pair, which could not be written down again."""
    for name in names:
        if not is_text(name):
            raise ValueError(f"the name {name!r} is no text")


def _decode_draw(data: Any) -> Draw:
    check_names(data["record"])
    record = {key: decode_value(value) for key, value in data["record"].items()}
    log_prob = decode_value(data["log_prob"])
    if log_prob is not None and not isinstance(log_prob, (int, float)):
        raise TypeError(f"log_prob is {log_prob!r}")
    return Draw(decode_value(data["value"]), record, log_prob)
