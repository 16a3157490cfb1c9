"""How many positions a model has at which a token is turned by the same angles whatever stands beside it.

Under two schemes of rotary embeddings transformers chooses the frequencies of all tokens by the longest sequence of a
call: `longrope` (arXiv 2402.13753) has other ones beyond the original length, `dynamic` stretches them with each token
beyond the model's positions. There a score would depend on the other rows of its batch, and no draw would be scored as
it was drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sysdag.errors import PlanError


def positions_of(config: Any) -> int | None:
    """Most tokens of a sequence; None where nothing limits it.

    Args:
        config: of the text model.
    """
    positions = getattr(config, "max_position_embeddings", None)
    limits = [each for each in (positions, _fixed(config)[0]) if isinstance(each, int) and each > 0]
    return min(limits, default=None)


def check_length(owner: str, config: Any, option: str, length: int | None) -> None:
    """Refuses a length at which frequencies would follow that of the batch.

    Args:
        owner, option: whose length it is and what it is called, for the message.

    Raises:
        PlanError: naming the scheme and the longest length.
    """
    fixed, scheme = _fixed(config)
    if fixed is not None and length is not None and length > fixed:
        raise PlanError(
            f"{owner}: {option}={length} is beyond the {fixed} positions up to which the model's rotary frequencies "
            f"are fixed. Behind them (rope_type={scheme!r}) those of all tokens follow the longest sequence of a call, "
            f"so that a score would depend on the rows beside it. Use {option}={fixed} or less."
        )


def by_layer(config: Any) -> dict[str, Mapping[str, Any]]:
    """The parameters by kind of layer; under "" where all layers have the same, which may be none."""
    given = getattr(config, "rope_parameters", None) or {}
    return {kind: each for kind, each in given.items() if isinstance(each, Mapping)} or {"": given}


def _fixed(config: Any) -> tuple[int | None, str]:
    """Up to where the frequencies are fixed, and by which scheme they change behind; None where they never do."""
    found: list[tuple[int, str]] = []
    for parameters in by_layer(config).values():
        scheme = str(parameters.get("rope_type", "default"))
        if scheme == "longrope":
            found.append((parameters["original_max_position_embeddings"], scheme))
        elif "dynamic" in scheme:
            found.append((config.max_position_embeddings, scheme))
    return min(found, default=(None, ""))
