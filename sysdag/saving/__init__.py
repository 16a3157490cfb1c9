"""A system as a folder that its models' own libraries can read, and what a command line names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sysdag import exports

if TYPE_CHECKING:
    from sysdag.saving.loading import load_function, load_system
    from sysdag.saving.model_card import write_card
    from sysdag.saving.publish import push_system
    from sysdag.saving.serialization import read_system, save_system, system_from_dict, system_to_dict

__all__ = [
    "load_function",
    "load_system",
    "push_system",
    "read_system",
    "save_system",
    "system_from_dict",
    "system_to_dict",
    "write_card",
]
__getattr__ = exports(
    __name__,
    {
        "loading": ["load_function", "load_system"],
        "model_card": ["write_card"],
        "publish": ["push_system"],
        "serialization": ["read_system", "save_system", "system_from_dict", "system_to_dict"],
    },
)
