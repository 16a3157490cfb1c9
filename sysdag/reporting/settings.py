"""The configuration of a training, what was set apart from what was left as it is by default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MISSING = "not there"


@dataclass(frozen=True)
class Setting:
    """One option as JSON text: its value, and the default where that is another."""

    name: str
    value: str
    default: str | None = None


def default_config() -> dict[str, Any]:
    """The configuration that a training has if nothing is set, by the sysdag and transformers installed here."""
    from sysdag.training.config import SysDPOConfig

    return SysDPOConfig(output_dir="").to_dict()


def split_by_default(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[list[Setting], list[Setting]]:
    """The options that differ from their defaults, and the others, each by name. An unknown option is of the first."""
    changed, left = [], []
    for name in sorted(config):
        value = _text(config[name])
        default = _text(defaults[name]) if name in defaults else None
        if value == default:
            left.append(Setting(name, value))
        else:
            changed.append(Setting(name, value, default))
    return changed, left


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The options in which several configurations differ, and the value of each, in their order; not `output_dir`."""
    names = sorted({name for config in configs.values() for name in config} - {"output_dir"})
    rows = [(name, [_text(c[name]) if name in c else _MISSING for c in configs.values()]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
