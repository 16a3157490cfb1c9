"""Values of traces as a page can show them: texts with what changed, images, lists; and two traces side by side."""

from __future__ import annotations

import base64
import difflib
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy

from sysdag.reporting.formats import number
from sysdag.traces.cells import ABSENT, Cell, Draw, value_of
from sysdag.traces.pictures import picture_of
from sysdag.traces.trace import Trace

MOST_LETTERS = 6000
"""A longer text is cut, and what is left out is counted."""
MOST_WORDS = 1500
"""Longer texts are compared as a whole: finding what they share takes time with the square of their lengths."""
MOST_ELEMENTS = 32
FEATURES = 8
"""So many numbers are folded."""
IMAGE_SIDE = 320
"""Larger images are shrunk to this many pixels a side."""
LEAST_SIDE = 72
"""Smaller images are shown this large."""

Sort = Literal["same", "gone", "new"]


@dataclass(frozen=True)
class Shown:
    """A value on the page; one of its parts is used.

    Attributes:
        words: parts of a text, each with its sort.
        image: a data URL of a PNG.
        width, height: the image's size on the page, in pixels.
        elements: those of a list or plate.
        note: what else is to say, such as what was left out.
        folded: in short what a text that is mostly numbers begins with; it opens to the whole. "" for other values.
        kind: `text`, `image` or `list`.
    """

    kind: Literal["text", "image", "list"]
    words: tuple[tuple[Sort, str], ...] = ()
    image: str = ""
    width: int = 0
    height: int = 0
    elements: tuple[Shown, ...] = ()
    note: str = ""
    folded: str = ""


def shown(value: Any) -> Shown:
    """A value by itself."""
    return _show(value, "same")


def shown_pair(before: Any, after: Any) -> tuple[Shown, Shown]:
    """Two values with their differences marked: words of texts, and elements of lists one by one."""
    if isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and before and after:
        if _is_vector(before) or _is_vector(after):
            return shown(before), shown(after)
        pairs = [shown_pair(a, b) for a, b in zip(before[:MOST_ELEMENTS], after[:MOST_ELEMENTS], strict=False)]
        common = len(pairs)
        parts = [[pair[side] for pair in pairs] for side in (0, 1)]
        parts[0] += [_show(rest, "gone") for rest in before[common:MOST_ELEMENTS]]
        parts[1] += [_show(rest, "new") for rest in after[common:MOST_ELEMENTS]]
        return _list(parts[0], before), _list(parts[1], after)
    if type(before) is type(after) and _is_text(before) and _is_text(after):
        old, new = _text(before), _text(after)
        left, right = _differences(old[:MOST_LETTERS], new[:MOST_LETTERS])
        return Shown("text", left, note=_cut(old)), Shown("text", right, note=_cut(new))
    return shown(before), shown(after)


def shown_choice(cell: Cell) -> Shown | None:
    """The options that a draw was chosen of, with a note at those that were; None for a cell that is no choice.

    Of a plate those of each element.
    """
    if isinstance(cell, tuple) and cell:
        each = [one for draw in cell[:MOST_ELEMENTS] if (one := shown_choice(draw)) is not None]
        return _list(each, cell) if len(each) == len(cell[:MOST_ELEMENTS]) else None
    if not isinstance(cell, Draw) or not isinstance(cell.record.get("options"), (list, tuple)):
        return None
    options, order = cell.record["options"], cell.record.get("indices", [cell.record.get("index")])
    alone = "indices" not in cell.record
    chosen = {index: "chosen" if alone else f"chosen {place}" for place, index in enumerate(order, start=1)}
    kept = [place for place in range(len(options)) if place < MOST_ELEMENTS or place in chosen]
    elements = []
    for place in kept:
        one = shown(options[place])
        notes = [note for note in (chosen.get(place), one.note) if note]
        elements.append(replace(one, note=", ".join(notes)))
    more = len(options) - len(kept)
    return Shown("list", elements=tuple(elements), note=f"and {more} more options" if more > 0 else "")


def _show(value: Any, sort: Sort) -> Shown:
    if (image := _image(value)) is not None:
        return image
    if _is_vector(value):
        text = json.dumps(list(value)) if isinstance(value, (list, tuple)) else _text(value)
        return Shown("text", ((sort, text[:MOST_LETTERS]),), note=_cut(text), folded=_in_short(value))
    if isinstance(value, Mapping) and _holds_picture(value):
        parts = [(str(name), _show(part, sort)) for name, part in value.items()]
        named = [replace(part, note=", ".join(filter(None, [name, part.note]))) for name, part in parts]
        return Shown("list", elements=tuple(named))
    if isinstance(value, (list, tuple)) and value:
        return _list([_show(element, sort) for element in value[:MOST_ELEMENTS]], value)
    text = _text(value)
    return Shown("text", ((sort, text[:MOST_LETTERS]),) if text else (), note=_cut(text))


def _holds_picture(value: Any) -> bool:
    """Whether an image is somewhere in it, as in a message of parts."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_picture, value))
    if isinstance(value, Mapping):
        return any(map(_holds_picture, value.values()))
    return picture_of(value) is not None


def _list(elements: Sequence[Shown], value: Sequence[Any]) -> Shown:
    more = len(value) - len(elements)
    return Shown("list", elements=tuple(elements), note=f"and {more} more elements" if more > 0 else "")


def _is_text(value: Any) -> bool:
    return not _holds_picture(value) and not (isinstance(value, (list, tuple)) and value)


def _is_vector(value: Any) -> bool:
    """Whether a value is features: many numbers."""
    if isinstance(value, numpy.ndarray):
        return value.size >= FEATURES and value.dtype.kind in "iufc" and _image(value) is None
    return (
        isinstance(value, (list, tuple))
        and len(value) >= FEATURES
        and all(isinstance(each, float) or _is_short_integer(each) for each in value)
    )


def _is_short_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _in_short(value: Any) -> str:
    array = numpy.asarray(value).reshape(-1)
    first = ", ".join(number(float(each.real)) for each in array[:3])
    shape = f" of shape {value.shape}" if isinstance(value, numpy.ndarray) and value.ndim > 1 else ""
    return f"{array.size} numbers{shape}: {first}, …"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, numpy.ndarray):
        return f"array of {value.dtype}, shape {value.shape}\n{numpy.array2string(value, threshold=20)}"
    try:
        return json.dumps(value, ensure_ascii=False, indent=1 if isinstance(value, dict) else None)
    except (TypeError, ValueError):
        return repr(value)


def _cut(text: str) -> str:
    more = len(text) - MOST_LETTERS
    return f"… {more:,} more characters" if more > 0 else ""


def _differences(old: str, new: str) -> tuple[tuple[tuple[Sort, str], ...], tuple[tuple[Sort, str], ...]]:
    a, b = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    if max(len(a), len(b)) > MOST_WORDS:
        return ((("same", old),), (("same", new),)) if old == new else ((("gone", old),), (("new", new),))
    left: list[tuple[Sort, str]] = []
    right: list[tuple[Sort, str]] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if j > i:
            left.append(("same" if tag == "equal" else "gone", "".join(a[i:j])))
        if m > k:
            right.append(("same" if tag == "equal" else "new", "".join(b[k:m])))
    return tuple(left), tuple(right)


def _image(value: Any) -> Shown | None:
    value = picture_of(value)
    if value is None:
        return None
    size = value.size
    picture = value if value.mode in ("1", "L", "LA", "RGB", "RGBA") else value.convert("RGB")
    if max(size) > IMAGE_SIDE:
        picture = picture.copy() if picture.mode != "1" else picture.convert("L")
        picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    scale = max(1, -(-LEAST_SIDE // max(picture.size)))
    width, height = picture.size[0] * scale, picture.size[1] * scale
    return Shown("image", image=url, width=width, height=height, note=f"{size[0]} by {size[1]} pixels")


@dataclass(frozen=True)
class Step:
    """One node's value before and after; None where the trace is not there, lacks the node, or took another branch."""

    node: str
    before: Shown | None
    after: Shown | None
    changed: bool


@dataclass(frozen=True)
class Prompt:
    """One run before and after: its inputs, and the nodes that ran, in their order."""

    inputs: tuple[tuple[str, Shown], ...]
    steps: tuple[Step, ...]


def side_by_side(traces: Mapping[str, Trace], most: int) -> list[Prompt]:
    """The runs of the traces `before` and `after`, paired where their inputs agree, at most so many."""
    before, after = traces.get("before"), traces.get("after")
    whole = after if before is None else before
    if whole is None:
        return []
    prompts = []
    for row in range(min(len(whole), most)):
        inputs = tuple((name, shown(column[row])) for name, column in whole.inputs.items())
        paired = after is not None and before is not None and row < len(after) and _same_inputs(before, after, row)
        steps = []
        for name, column in whole.cells.items():
            cells: tuple[Cell | None, Cell | None] = (None, column[row]) if whole is after else (column[row], None)
            if paired and after is not None and name in after.cells:
                cells = column[row], after.cells[name][row]
            steps.append(_step(name, *cells))
        prompts.append(Prompt(inputs, tuple(step for step in steps if step is not None)))
    return prompts


def _step(name: str, before: Cell | None, after: Cell | None) -> Step | None:
    """A node's cells before and after, None for one that is not there; None where its branch was taken in neither."""
    there = [cell for cell in (before, after) if cell is not None]
    ran = [cell for cell in there if cell is not ABSENT]
    if not ran:
        return None
    if len(ran) == 2:
        values = [value_of(cell) for cell in ran]
        left, right = shown_pair(*values)
        return Step(name, shown_choice(ran[0]) or left, shown_choice(ran[1]) or right, not _equal(*values))
    alone = shown_choice(ran[0]) or shown(value_of(ran[0]))
    is_first = ran[0] is before
    return Step(name, alone if is_first else None, None if is_first else alone, changed=len(there) == 2)


def _same_inputs(before: Trace, after: Trace, row: int) -> bool:
    return before.inputs.keys() == after.inputs.keys() and all(
        _equal(column[row], after.inputs[name][row]) for name, column in before.inputs.items()
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, numpy.ndarray) or isinstance(other, numpy.ndarray):
        return type(one) is type(other) and numpy.array_equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other)
