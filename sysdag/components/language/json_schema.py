"""Which JSON schemas a grammar can say whole, and JSON values as the texts that such a grammar has for them.

outlines-core turns a schema into a regular expression, and leaves out what it does not know (`minimum`, `uniqueItems`,
`allOf`, ...) without a word. A text of such a grammar need not be valid under the schema. So what it does not say is
refused here, by its path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sysdag.errors import PlanError, shown

_NOTES = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment", "$defs"}
_NOTES |= {"definitions"}
_OF_TYPE: Mapping[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": set(), "number": set(), "boolean": set(), "null": set(),
}  # fmt: skip
_FORMATS = ("date", "date-time", "uuid")
_PYTHON: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


def check_schema(schema: Mapping[str, Any]) -> list[str]:
    """Refuses a schema that says more than a regular expression of outlines-core would.

    Args:
        schema: a JSON schema whose values are objects or arrays.

    Returns:
        The patterns of its strings, which must not write what ends or escapes a JSON string.

    Raises:
        PlanError: naming the part by its path.
    """
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PlanError(f"grammar: a JSON schema is plain data of JSON: {error}.") from error
    top = _resolved(schema, schema, "#")
    tops = [_resolved(each, schema, "#/anyOf") for each in top.get("anyOf", [top])]
    for each in tops:
        values = each["enum"] if isinstance(each.get("enum"), list) else [each["const"]] if "const" in each else None
        if not (
            _kind(each) in ("object", "array") if values is None else all(isinstance(v, (dict, list)) for v in values)
        ):
            raise PlanError(
                "grammar: the value of a JSON schema's node is an object or an array, so its type must be 'object' or "
                f"'array', got {shown(each)}. Wrap it in an object, or give a regular expression, whose value is text."
            )
    return list(_checked(schema, schema, "#", ()))


def ordered(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """A value with the keys of its objects in the schema's order, the only one that the grammar has."""
    schema = _resolved(schema, root, "#")
    if isinstance(value, dict):
        branches = [_resolved(each, root, "#") for each in schema.get("anyOf", [])]
        fitting = [each for each in branches if value.keys() <= each.get("properties", {}).keys()]
        if fitting:
            return ordered(value, fitting[0], root)
        known = schema.get("properties", {})
        names = [*(name for name in known if name in value), *(name for name in value if name not in known)]
        return {name: ordered(value[name], known.get(name, {}), root) for name in names}
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        parts = [*first, *[schema.get("items", {})] * len(value)]
        return [ordered(each, part, root) for each, part in zip(value, parts, strict=False)]
    return value


def _kind(schema: Mapping[str, Any]) -> Any:
    if "type" in schema:
        return schema["type"]
    return "object" if "properties" in schema else "array" if "items" in schema else None


def _resolved(schema: Any, root: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """What a reference leads to, a schema itself where it is none."""
    seen = 0
    while isinstance(schema, Mapping) and "$ref" in schema:
        place: Any = root
        name = schema["$ref"]
        for part in str(name).removeprefix("#/").split("/"):
            place = place.get(part) if isinstance(place, Mapping) else None
        seen += 1
        if not str(name).startswith("#/") or not isinstance(place, Mapping) or seen > 64:
            raise PlanError(f"grammar: {path}: $ref must lead to a part of the schema (#/$defs/NAME), got {name!r}.")
        schema = place
    if not isinstance(schema, Mapping):
        raise PlanError(f"grammar: {path}: a JSON schema is a dict, got {shown(schema)}.")
    return schema


def _checked(schema: Any, root: Mapping[str, Any], path: str, above: tuple[str, ...]) -> Iterator[str]:
    """Goes through a schema and yields its patterns; `above` are the references that lead here."""
    if isinstance(schema, Mapping) and "$ref" in schema:
        name = str(schema["$ref"])
        if name in above:
            raise PlanError(
                f"grammar: {path}: {name!r} refers to itself, and texts nested without a bound are no regular "
                "language. Write the levels out that are wanted."
            )
        _only(schema, {"$ref"}, path)
        yield from _checked(_resolved(schema, root, path), root, name, (*above, name))
        return
    schema = _resolved(schema, root, path)
    if "enum" in schema or "const" in schema:
        _only(schema, {"enum", "type"} if "enum" in schema else {"const", "type"}, path)
        _check_values(schema, path)
        return
    if "anyOf" in schema:
        _only(schema, {"anyOf"}, path)
        for place, each in enumerate(_list(schema["anyOf"], f"{path}/anyOf")):
            yield from _checked(each, root, f"{path}/anyOf/{place}", above)
        return
    kind = _kind(schema)
    if not isinstance(kind, str) or kind not in _OF_TYPE:
        raise PlanError(
            f"grammar: {path}: needs one type of {sorted(_OF_TYPE)} or enum, const, anyOf or $ref, got {shown(schema)}."
        )
    _only(schema, {"type"} | _OF_TYPE[kind], path)
    if kind == "string":
        yield from _check_string(schema, path)
    elif kind == "object":
        yield from _check_object(schema, root, path, above)
    elif kind == "array":
        _check_counts(schema, path, "minItems", "maxItems")
        if ("items" in schema) == ("prefixItems" in schema) or (
            "prefixItems" in schema and {"minItems", "maxItems"} & schema.keys()
        ):
            raise PlanError(
                f"grammar: {path}: an array needs `items`, or `prefixItems` for one of a fixed length, not both; "
                "counts go with `items`."
            )
        if "items" in schema:
            yield from _checked(schema["items"], root, f"{path}/items", above)
        for place, each in enumerate(schema.get("prefixItems", [])):
            yield from _checked(each, root, f"{path}/prefixItems/{place}", above)


def _only(schema: Mapping[str, Any], known: set[str], path: str) -> None:
    others = sorted(schema.keys() - known - _NOTES)
    if others:
        raise PlanError(
            f"grammar: {path}: {others[0]!r} is not said by the grammar of this schema, which says {sorted(known)} "
            "here. Leave it out, and check it in the next node; or write a regular expression."
        )


def _list(value: Any, path: str) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise PlanError(f"grammar: {path}: needs a list that is not empty, got {shown(value)}.")
    return value


def _check_values(schema: Mapping[str, Any], path: str) -> None:
    values = _list(schema["enum"], f"{path}/enum") if "enum" in schema else [schema["const"]]
    kind = schema.get("type")
    if "type" in schema and (not isinstance(kind, str) or kind not in _PYTHON):
        raise PlanError(f"grammar: {path}: needs one type of {sorted(_PYTHON)}, got {shown(kind)}.")
    types = (object,) if kind is None else _PYTHON[kind]
    for value in values:
        if not isinstance(value, types) or (isinstance(value, bool) and kind in ("integer", "number")):
            raise PlanError(f"grammar: {path}: the value {shown(value)} is not of its type {kind!r}.")


def _check_counts(schema: Mapping[str, Any], path: str, least: str, most: str) -> None:
    low, high = schema.get(least, 0), schema.get(most)
    for value in (low, high):
        if value is not None and (type(value) is not int or value < 0):
            raise PlanError(f"grammar: {path}: {least} and {most} are integers of 0 or more, got {shown(value)}.")
    if high is not None and high < low:
        raise PlanError(f"grammar: {path}: {most} {high} is less than {least} {low}.")


def _check_string(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    _check_counts(schema, path, "minLength", "maxLength")
    if len({"pattern", "format"} & schema.keys()) + bool({"minLength", "maxLength"} & schema.keys()) > 1:
        raise PlanError(f"grammar: {path}: a string has lengths, or a pattern, or a format; only one of them is said.")
    if schema.get("format", "date") not in _FORMATS:
        raise PlanError(
            f"grammar: {path}: known formats are {list(_FORMATS)}, got {schema['format']!r}. Give a pattern."
        )
    if "pattern" in schema:
        if not isinstance(schema["pattern"], str):
            raise PlanError(f"grammar: {path}: a pattern is a text, got {shown(schema['pattern'])}.")
        yield schema["pattern"].removeprefix("^").removesuffix("$")


def _check_object(schema: Mapping[str, Any], root: Mapping[str, Any], path: str, above: Any) -> Iterator[str]:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    others = schema.get("additionalProperties", False)
    if not isinstance(properties, Mapping) or (not properties and not isinstance(others, Mapping)):
        raise PlanError(
            f"grammar: {path}: an object needs `properties`, or a schema of `additionalProperties`: texts of "
            "objects of any kind are no regular language."
        )
    if properties and others is not False:
        raise PlanError(
            f"grammar: {path}: beside `properties`, `additionalProperties` must be false or left out: the grammar has "
            "no others."
        )
    for name in properties:
        if json.dumps(name, ensure_ascii=False) != f'"{name}"':
            raise PlanError(f"grammar: {path}: the property {name!r} must be without what JSON escapes.")
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        raise PlanError(f"grammar: {path}: `required` lists names of `properties`, got {shown(required)}.")
    for name, each in properties.items():
        yield from _checked(each, root, f"{path}/properties/{name}", above)
    if not properties:
        yield from _checked(others, root, f"{path}/additionalProperties", above)
