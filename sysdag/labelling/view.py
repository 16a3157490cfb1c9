"""Values as the page shows them: JSON of text, images, lists and fields, which the page puts in as text alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from sysdag.labelling.records import Assignment
from sysdag.traces.cells import ABSENT, Cell, Draw, value_of
from sysdag.traces.pictures import picture_of
from sysdag.traces.trace import Trace

_MOST_CHARACTERS = 200_000  # of one text; a browser lays out more only slowly


def single(trace: Trace, outputs: Sequence[str], shown: Assignment) -> dict[str, Any]:
    """What an annotator sees of a single run: `pair`, `inputs`, and `run` with `outputs` and `intermediates`, as in
    `comparison`. Columns beside the run (a user's thumb, a reference answer) are not shown."""
    found = comparison(trace, outputs, shown)
    return {"pair": found["pair"], "inputs": found["inputs"], "run": found["left"]}


def comparison(trace: Trace, outputs: Sequence[str], shown: Assignment) -> dict[str, Any]:
    """What an annotator sees of a pair; nothing in it tells one run from the other.

    Returns:
        `pair`; `inputs`; and `left` and `right`, each with `outputs` and `intermediates`. All are lists of
        `{"name", "view"}`, in the trace's order, without what did not run; a `view` is as in `view_of`.
    """

    def side(row: int) -> dict[str, Any]:
        ran = {name: column[row] for name, column in trace.cells.items() if column[row] is not ABSENT}
        parts = {name: {"name": clean(name), "view": _view_of_cell(cell)} for name, cell in ran.items()}
        return {
            "outputs": [parts[name] for name in outputs],
            "intermediates": [part for name, part in parts.items() if name not in outputs],
        }

    return {
        "pair": shown.pair,
        "inputs": [_named(name, column[shown.left]) for name, column in trace.inputs.items()],
        "left": side(shown.left),
        "right": side(shown.right),
    }


def _view_of_cell(cell: Cell) -> dict[str, Any]:
    """What a node drew; of a choice the options, too, by their places, and which of them were chosen."""
    if isinstance(cell, tuple) and any("options" in draw.record for draw in cell):
        return {"kind": "list", "items": list(map(_view_of_cell, cell))}
    value = value_of(cell)
    if not isinstance(cell, Draw) or not isinstance(cell.record.get("options"), (list, tuple)):
        return view_of(value)
    order = cell.record.get("indices", [cell.record.get("index")])
    marks = {index: " (chosen)" if len(order) == 1 else f" (chosen {at})" for at, index in enumerate(order, start=1)}
    options = [
        _named(f"option {place + 1}{marks.get(place, '')}", option)
        for place, option in enumerate(cell.record["options"])
    ]
    return {"kind": "fields", "items": [_named("chosen", value), *options]}


def view_of(value: Any) -> dict[str, Any]:
    """A value as JSON: `{"kind": "text", "text"}`, `{"kind": "image", "source", "width", "height"}` with a PNG inline,
    `{"kind": "list", "items": [view]}`, or `{"kind": "fields", "items": [{"name", "view"}]}` for a dict. What is none
    of these is shown as Python writes it.
    """
    if isinstance(value, str):
        return {"kind": "text", "text": clean(value)}
    if (picture := picture_of(value)) is not None:
        return {"kind": "image", "source": _png(picture), "width": picture.width, "height": picture.height}
    if isinstance(value, (list, tuple)):
        return {"kind": "list", "items": [view_of(element) for element in value]}
    if isinstance(value, Mapping):
        return {"kind": "fields", "items": [_named(str(key), element) for key, element in value.items()]}
    if isinstance(value, numpy.ndarray):
        text = f"array of {value.dtype}, shape {value.shape}\n{numpy.array2string(value, threshold=200)}"
        return {"kind": "text", "text": text}
    return {"kind": "text", "text": clean(repr(value))}


def _named(name: str, value: Any) -> dict[str, Any]:
    return {"name": clean(name), "view": view_of(value)}


def clean(text: str) -> str:
    """Text that has a UTF-8 form: half of a surrogate pair becomes a question mark, and what is too long is cut."""
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]}\n[cut here: {len(text) - _MOST_CHARACTERS} more characters]"
    return text.encode("utf-8", "replace").decode("utf-8")


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
