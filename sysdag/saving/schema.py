"""What `system.json` must hold: the types of its fields, and errors that name the one at fault."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sysdag.errors import SerializationError, shown
from sysdag.files.saved_files import is_a, read_strict_json

FORMAT_VERSION = 1
VALUE_TYPES = {kind.__name__: kind for kind in (str, int, float, list, dict, bool)}
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "inputs": {"name": (str,), "value_type": (str, type(None))},
    "nodes": {
        "base_name": (str,),
        "visit": (int, type(None)),
        "function": (str, type(None)),
        "source_sha256": (str, type(None)),
        "component": (str, type(None)),
    },
    "edges": {"parent": (str,), "child": (str,), "parameter": (str,), "each": (bool,)},
}
PART_FIELDS = {"part": (dict,)}  # of the nodes that are parts of a completion
SWITCH_FIELDS = {"name": (str,), "router": (str,), "cases": (list,)}
CASE_FIELDS = {"values": (list,), "nodes": (list,), "end": (str,)}
COMPONENT_FIELDS = {"class": (str,), "folder": (str, type(None)), "options": (dict,)}


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        SerializationError: naming the file that is missing or no JSON.
    """
    if not file.exists():
        raise SerializationError(
            f"{file} does not exist; expected a folder that System.save_pretrained wrote to its end."
        )
    return read_strict_json(file, plain=True)


def check_data(data: Any) -> None:
    """Raises a SerializationError that names the first field of a saved system which is missing or of another type."""
    if not isinstance(data, Mapping) or "format_version" not in data:
        raise SerializationError("This is no saved system: it has no 'format_version'.")
    if data["format_version"] != FORMAT_VERSION or not is_a(data["format_version"], (int,)):
        raise SerializationError(
            f"format_version is {shown(data['format_version'])}, and this version of sysdag reads {FORMAT_VERSION}; "
            "use the sysdag that wrote it."
        )
    for section, fields in FIELDS.items():
        for number, row in enumerate(section_of(data, section, list)):
            check_row(row, fields, f"{section}[{number}]", PART_FIELDS if section == "nodes" else {})
    for number, row in enumerate(section_of(data, "switches", list) if "switches" in data else ()):
        check_row(row, SWITCH_FIELDS, f"switches[{number}]")
        for place, case in enumerate(row["cases"]):
            where = f"switches[{number}], case {place},"
            check_row(case, CASE_FIELDS, where)
            if not all(isinstance(name, str) for name in case["nodes"]):
                raise SerializationError(f"{where} must have names as 'nodes', got {shown(case['nodes'])}.")
    if not all(isinstance(output, str) for output in section_of(data, "outputs", list)):
        raise SerializationError(f"'outputs' must be names, got {shown(data['outputs'])}.")
    if unknown := sorted(data.keys() - {"format_version", "outputs", "components", "switches", *FIELDS}):
        raise SerializationError(f"{shown(unknown[0])} is no part of a saved system.")


def section_of(data: Mapping[str, Any], name: str, kind: type) -> Any:
    """A part of a saved system, checked to be of that type."""
    if not isinstance(data.get(name), kind):
        raise SerializationError(f"{name!r} must be a {kind.__name__}, got {shown(data.get(name))}.")
    return data[name]


def check_row(
    row: Any,
    fields: Mapping[str, tuple[type, ...]],
    where: str,
    optional: Mapping[str, tuple[type, ...]] = MappingProxyType({}),
) -> None:
    """Raises a SerializationError for a row that lacks a field, holds another type there, or has one more."""
    for field, kinds in {**fields, **optional}.items():
        there = isinstance(row, Mapping) and field in row
        if not (is_a(row[field], kinds) if there else field in optional and isinstance(row, Mapping)):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise SerializationError(f"{where} must have {field!r}, of type {expected}, got {shown(row)}.")
    if unknown := sorted(row.keys() - fields.keys() - optional.keys()):
        raise SerializationError(f"{where} has {shown(unknown[0])}, which no saved system has there.")


def value_type(row: Mapping[str, Any]) -> type | None:
    """The type that a row of `inputs` names."""
    if row["value_type"] is None:
        return None
    if row["value_type"] not in VALUE_TYPES:
        raise SerializationError(
            f"Input {row['name']!r}: unknown value_type {shown(row['value_type'])}; known are {sorted(VALUE_TYPES)}."
        )
    return VALUE_TYPES[row["value_type"]]
