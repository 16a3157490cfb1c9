#!/usr/bin/env bash
# outlines-core 0.2.14: an `Index` lacks texts of its regular expression, and a schema's expression lacks its keywords.
#
# Guess: `Index` accepts every text that the expression matches as a whole; a keyword of JSON Schema that
# `build_regex_from_schema` does not know is an error, as an unknown type is.
# Seen: matches are leftmost-first, so `a|ab` does not have "ab", and where a match could end already, the first byte of a
# longer one is left out: `x(ab)?` does not have "xab". `minimum` and `uniqueItems` change nothing, the parts of `allOf` are
# joined, a property's name is not escaped, `time` has a backslash too many.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet outlines-core==0.2.14
"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import json
import re

from outlines_core import Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema


def has(regex, text):
    index = Index(regex, Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    state = index.get_initial_state()
    for byte in text.encode():
        state = index.get_transitions().get(state, {}).get(byte)
        if state is None:
            return False
    return index.is_final_state(state)


def regex(schema):
    return build_regex_from_schema(json.dumps(schema))


print("outlines-core", importlib.metadata.version("outlines-core"))
for expression, text in (("a|ab", "ab"), ("x(ab)?", "xab")):
    assert re.fullmatch(expression, text)
    print(expression, "has", text, has(expression, text))
    assert not has(expression, text)
assert regex({"type": "integer", "minimum": 3}) == regex({"type": "integer"})
array = {"type": "array", "items": {"type": "boolean"}}
assert regex(array | {"uniqueItems": True}) == regex(array)
print("allOf", regex({"allOf": [{"type": "integer"}, {"type": "null"}]}))
assert re.fullmatch(regex({"allOf": [{"type": "integer"}, {"type": "null"}]}), "1null")
assert '"a"b"' in regex({"type": "object", "properties": {'a"b': {"type": "integer"}}})
assert not re.fullmatch(regex({"type": "string", "format": "time"}), '"10:20:30.5Z"')
PY
