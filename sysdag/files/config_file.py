"""A configuration file in YAML: its keys with the lines they stand in, so that a mistake can be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sysdag.errors import OptionError

MAX_BYTES, MAX_DEPTH = 2**20, 32
_CORE = "tag:yaml.org,2002:"
_MERGE, _NO_MERGE = "<<", "a merge key (<<) is not taken; write the keys out."
_NOT_PLAIN = tuple(_CORE + kind for kind in ("timestamp", "value", "merge"))


class _Loader(yaml.SafeLoader):
    """Takes 1e-5 for a number, as YAML 1.2 does, and a date for a text, as JSON does."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, pattern) for tag, pattern in known if tag not in _NOT_PLAIN]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Setting:
    """One key of a file.

    Attributes:
        key: the key, hyphens as underscores.
        place: file and line, for a message.
        value: for a scalar its text as written (so that `no` stays `no`), for null None; else a list or a dict; for a
            section (see `read_settings`) a list of its settings.
    """

    key: str
    place: str
    value: Any

    def error(self, message: str) -> OptionError:
        """An error that names the key and its line."""
        return OptionError(f"{self.place}: {self.key}: {message}")

    def flags(self, kinds: Sequence[type]) -> list[str]:
        """The setting as arguments of a command line.

        Args:
            kinds: of `list` and `dict`, those that the option takes beside scalars.

        Raises:
            OptionError: for a list or a mapping where none is taken.
        """
        if isinstance(self.value, dict):
            if dict not in kinds:
                raise self.error(f"expected {_wanted(kinds)}, got a mapping.")
            return [f"--{self.key}={json.dumps(self.value)}"]
        if isinstance(self.value, list):
            if list not in kinds:
                raise self.error(f"expected {_wanted(kinds)}, got a list.")
            return [f"--{self.key}", *self.value]
        return [f"--{self.key}={self.value}"]


def read_settings(file: str | Path, sections: Sequence[str] = ()) -> list[Setting]:
    """The settings of a YAML file, in its order.

    Args:
        sections: keys whose value is a mapping of options by itself: a list of settings with lines of their own.

    Raises:
        OptionError: naming the file, and the line that is no YAML, whose key is no text, or that repeats a key, nested
            ones too; that has a tag or an alias, or is nested too deep; or a section that is no mapping.
    """
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise OptionError(f"{file} has more than {MAX_BYTES} bytes; that is no configuration file.")
        text = content.decode("utf-8-sig")
        _check_plain(text, str(file))
        root = yaml.compose(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"The configuration file {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise OptionError(f"{file}{place}: not YAML: {what}.") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise OptionError(f"{file} must be a mapping of options to values, got a {root.id}.")
    return _settings(root, str(file), sections)


def _check_plain(text: str, file: str) -> None:
    """Refuses what a few lines can make endless or anything of, before anything is built: see `read_settings`."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{file}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise OptionError(f"{place}: an alias (*{event.anchor}) is not taken; write the value out.")
        tag = getattr(event, "tag", None)
        if tag is not None and tag.removeprefix(_CORE) not in ("str", "int", "float", "bool", "null", "seq", "map"):
            written = tag.replace(_CORE, "!!")
            raise OptionError(f"{place}: a tag ({written}) is not taken; write the value alone.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise OptionError(f"{place}: values are nested more than {MAX_DEPTH} deep.")


def _settings(root: yaml.MappingNode, file: str, sections: Sequence[str]) -> list[Setting]:
    found: dict[str, Setting] = {}
    for key_node, node in root.value:
        place = f"{file}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise OptionError(f"{place}: a key must be the name of an option.")
        key = key_node.value.replace("-", "_")
        if key == _MERGE:
            raise OptionError(f"{place}: {_NO_MERGE}")
        if key in found:
            raise OptionError(f"{place}: {key} stands there a second time; the first is in {found[key].place}.")
        if key not in sections:
            found[key] = Setting(key, place, _value(node, file, key))
        elif isinstance(node, yaml.MappingNode):
            found[key] = Setting(key, place, _settings(node, file, ()))
        else:
            raise OptionError(f"{place}: {key}: expected a mapping of options to values, got a {node.id}.")
    return list(found.values())


def _value(node: yaml.Node, file: str, option: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(element, yaml.ScalarNode) for element in node.value):
        return [element.value for element in node.value]
    return _nested(node, file, option)


def _nested(node: yaml.Node, file: str, option: str) -> Any:
    """What a value holds, as YAML reads it; each mapping with every key once."""
    if isinstance(node, yaml.SequenceNode):
        return [_nested(element, file, option) for element in node.value]
    if isinstance(node, yaml.ScalarNode):
        try:
            return _Loader("").construct_document(node)
        except (yaml.YAMLError, ValueError) as error:
            what = getattr(error, "problem", None) or str(error)
            raise OptionError(f"{file}, line {node.start_mark.line + 1}: {option}: not a value: {what}.") from error
    assert isinstance(node, yaml.MappingNode)
    found: dict[Any, Any] = {}
    lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        place = f"{file}, line {line}: {option}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise OptionError(f"{place}: a key must be a single value.")
        if key_node.value == _MERGE:
            raise OptionError(f"{place}: {_NO_MERGE}")
        key = _nested(key_node, file, option)
        if key in found:
            raise OptionError(
                f"{place}: {key_node.value!r} stands there a second time; the first is in line {lines[key]}."
            )
        found[key], lines[key] = _nested(value_node, file, option), line
    return found


def _wanted(kinds: Sequence[type]) -> str:
    names: dict[type, str] = {list: "a list", dict: "a mapping"}
    return " or ".join(["a single value", *(names[kind] for kind in kinds)])
