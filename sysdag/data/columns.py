"""Which columns of rows a system reads, the inputs out of them, and what is said of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sysdag.components.language.messages import read_tools
from sysdag.errors import DataError, shown
from sysdag.execution.execute import row_options
from sysdag.files.encoding import is_text
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.reshaping import advice

SIDES = ("chosen", "rejected")
OUTPUTS = ("output", "completion")
"""Columns of a row for the output of its one run; the second is TRL's."""
UNPAIRED = (*OUTPUTS, "label")
"""Columns of a row that is one run with a label, as in TRL's format for KTO."""
PAIR_COLUMNS = ("weight", "margin", "group")
"""Columns about a pair or an unpaired run itself, where they are no inputs; see `read_pair_columns`."""


def input_column(plan: Plan, row: Mapping[str, Any], name: str) -> str:
    """The key of a row under which an input stands: its name, or `prompt` for a system's only input."""
    return "prompt" if len(plan.system.inputs) == 1 and name not in row and "prompt" in row else name


def is_unpaired(plan: Plan, row: Mapping[str, Any]) -> bool:
    """Whether a row is one run with a label, and not a pair of runs."""
    taken = {given.name for given in plan.system.inputs}
    return not any(side in row for side in SIDES) and any(name in row and name not in taken for name in UNPAIRED)


def output_column(plan: Plan, row: Mapping[str, Any]) -> str | None:
    """The key of an unpaired row under which its output stands, `output` or TRL's `completion`; None if both do."""
    taken = {given.name for given in plan.system.inputs}
    found = [name for name in OUTPUTS if name in row and name not in taken]
    return None if len(found) == 2 else (found or ["output"])[0]


def read_label(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The label of an unpaired row, as `read_pair_columns` returns what it reads.

    True or false, or 1 or 0; of CSV these as text.
    """
    if row.get("label") is None:
        keys = ", ".join(sorted(map(shown, row)))
        text = f"'label' is missing, which says whether the run is desirable (true or false); the row has [{keys}]."
        return {}, [("missing", text)]
    value = row["label"]
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    written = _LABELS.get(value.strip().lower()) if isinstance(value, str) else None
    if written is None and isinstance(value, (bool, int, float)) and value in (0, 1):
        written = bool(value)
    if written is not None:
        return {"label": written}, []
    text = f"label must be true or false, whether the run is desirable, got {shown(value)}."
    return {}, [("wrong type", f"{text} Scores and thumbs become labels by `sysdag judge --rows unpaired`.")]


_LABELS = {"true": True, "1": True, "false": False, "0": False}


def read_columns(plan: Plan, row: Mapping[str, Any], objective: Objective) -> set[str]:
    """The keys of a row that are looked at."""
    names = {input_column(plan, row, given.name) for given in plan.system.inputs}
    unpaired = is_unpaired(plan, row)
    if objective == "direct" or any(name not in plan.system.outputs for name in plan.results):
        names |= {"intermediates"} if unpaired else {f"{side}_intermediates" for side in SIDES}
    names |= set(UNPAIRED) if unpaired else set(SIDES)
    return names | set(row_options(plan)) | set(pair_columns(plan))


def read_inputs(plan: Plan, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The inputs of a row that can be used, and of each other one the kind of its problem and what is wrong."""
    found = {}
    problems = []
    for given in plan.system.inputs:
        column = input_column(plan, row, given.name)
        if column not in row:
            keys = ", ".join(sorted(map(shown, row)))
            problems.append(("missing", f"input {given.name!r} is missing; the row has [{keys}]."))
        elif given.value_type is not None and not isinstance(row[column], given.value_type):
            expected, got = given.value_type.__name__, f"{type(row[column]).__name__} {shown(row[column], 80)}"
            told = f"input {given.name!r} must be {expected}, got {got}."
            if given.value_type is str and isinstance(row[column], list):
                told += f" Declare Input({given.name!r}) without a type to get chat messages as they are."
            problems.append(("wrong type", told))
        elif not is_unicode(row[column]):
            text = f"input {given.name!r} holds half of a surrogate pair, which is no text."
            problems.append(("invalid value", text))
        else:
            found[given.name] = row[column]
    for option in row_options(plan):
        if row.get(option) is not None:
            try:
                found[option] = _read_option(option, row[option])
            except DataError as error:
                problems.append(("wrong type", str(error)))
    return found, problems


def pair_columns(plan: Plan) -> list[str]:
    """Those of `PAIR_COLUMNS` that are not something else to the system."""
    taken = {given.name for given in plan.system.inputs} | set(row_options(plan))
    return [name for name in PAIR_COLUMNS if name not in taken]


def read_pair_columns(plan: Plan, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What a row says of its pair or run: `weight`, how often it counts (1 where nothing is said); `margin`, by how
    much the winner's reward should exceed the loser's (0); `group`, a name or number.

    Returns:
        What can be used; and of the rest the kind of its problem and what is wrong.
    """
    found: dict[str, Any] = {}
    problems = []
    for name in pair_columns(plan):
        value = row.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "group":
            if (isinstance(value, str) and is_text(value)) or type(value) is int:
                found[name] = str(value)
            else:
                problems.append(("wrong type", f"group must be a name or a whole number, got {shown(value)}."))
        elif not is_number:
            problems.append(("wrong type", f"{name} must be a number, got {shown(value)}."))
        elif not math.isfinite(value) or (name == "weight" and value < 0):
            least = "finite and 0 or more" if name == "weight" else "finite"
            problems.append(("invalid value", f"{name} must be {least}, got {value}."))
        else:
            found[name] = float(value)
    return found, problems


def _read_option(option: str, value: Any) -> Any:
    if not is_unicode(value):
        raise DataError(f"{option} holds half of a surrogate pair, which is no text.")
    if option == "tools":
        return read_tools(value)
    if not isinstance(value, Mapping):
        raise DataError(f"{option} must be a dict of the chat template's variables, got {shown(value)}.")
    return {name: part for name, part in value.items() if part is not None}  # columns of Arrow have every key


def is_unicode(value: Any) -> bool:
    """Whether all text in a value can be written down; JSON may hold half of a surrogate pair."""
    if isinstance(value, str):
        return is_text(value)
    if isinstance(value, Mapping):
        return all(is_unicode(key) and is_unicode(element) for key, element in value.items())
    return not isinstance(value, (list, tuple)) or all(map(is_unicode, value))


def told_unread(names: Iterable[str]) -> str:
    """Columns that no node reads, in words."""
    return f"Columns that no node reads: {', '.join(name if name.strip() else repr(name) for name in names)}."


def advice_on(plan: Plan, rows: Iterable[Any], needed: Iterable[str] = SIDES) -> str:
    """What to do where a column that every row needs is in none of them; or "".

    Args:
        needed: the columns besides the inputs; of unpaired rows, which are told by theirs, an output and a label.
    """
    columns = {str(key) for row in rows if isinstance(row, Mapping) for key in row}
    if is_unpaired(plan, dict.fromkeys(columns)):
        needed = {output_column(plan, dict.fromkeys(columns)) or "output", "label"} if needed else ()
    needed = {*needed, *(given.name for given in plan.system.inputs)}
    if len(plan.system.inputs) == 1 and "prompt" in columns:
        needed -= {plan.system.inputs[0].name}
    if not columns or needed <= columns:
        return ""
    has_implicit = len(plan.system.inputs) == 1 and columns <= {"chosen", "rejected"}
    return "" if has_implicit else advice(columns)


def unread_columns(plan: Plan, rows: Iterable[Any], objective: Objective) -> tuple[str, ...]:
    """The columns that no node reads in any row, in order."""
    found: dict[str, None] = {}
    read: set[str] = set()
    for row in rows:
        if isinstance(row, Mapping):
            found |= dict.fromkeys(map(str, row))
            read |= read_columns(plan, row, objective)
    return tuple(name for name in found if name not in read)
