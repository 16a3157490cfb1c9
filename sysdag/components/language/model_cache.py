"""What a model keeps of the tokens that it has read, by the names that forwards and their outputs have for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

OF_KEYS = ("past_key_values", "cache")
NAMES = (*OF_KEYS, "cache_params", "state")  # transformers 5.24 calls the first three `cache`


def argument_of(accepts: Collection[str]) -> str | None:
    """The argument that takes it.

    Args:
        accepts: the names of a forward's arguments.
    """
    return next((name for name in NAMES if name in accepts), None)


def takes_mask(name: str, cache: Any) -> bool:
    """Whether an attention mask of all columns goes with it; states hold no padding.

    Args:
        name: of the argument.
    """
    if name == "cache":
        layers = getattr(cache, "layers", None)
        return layers is None or any(hasattr(layer, "keys") for layer in layers)
    return name in OF_KEYS


def cache_of(output: Any) -> Any:
    """What an output holds of it; None without any."""
    return next((held for name in reversed(NAMES) if (held := getattr(output, name, None)) is not None), None)
