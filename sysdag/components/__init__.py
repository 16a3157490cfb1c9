"""The components that come with sysdag. Names load on first use, so importing this package loads no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sysdag.components.categorical import Categorical
    from sysdag.components.causal_lm import CausalLM
    from sysdag.components.diffusion import Diffusion
    from sysdag.components.opaque import Opaque
    from sysdag.components.tabular import Tabular

_MODULES = {
    "Categorical": "categorical",
    "CausalLM": "causal_lm",
    "Diffusion": "diffusion",
    "Opaque": "opaque",
    "Tabular": "tabular",
}
__all__ = ["Categorical", "CausalLM", "Diffusion", "Opaque", "Tabular"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"sysdag.components.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
