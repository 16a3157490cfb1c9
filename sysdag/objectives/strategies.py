"""Candidate strategies as configuration files name them: `{strategy: diverse_beam_search, num_candidates: 4}`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from sysdag.errors import PlanError
from sysdag.objectives.candidates import (
    CandidateStrategy,
    DiverseBeamSearch,
    Exhaustive,
    ImportanceSampling,
    MonteCarlo,
)

STRATEGIES: dict[str, type[CandidateStrategy]] = {
    "diverse_beam_search": DiverseBeamSearch,
    "monte_carlo": MonteCarlo,
    "importance_sampling": ImportanceSampling,
    "exhaustive": Exhaustive,
}


def strategy_from(options: Any) -> CandidateStrategy:
    """The strategy that a configuration describes.

    Args:
        options: a name of `STRATEGIES`, or a dict of `strategy` and its options.

    Raises:
        PlanError: for an unknown strategy or option (the nearest known one is named), or a value of another type.
    """
    given = {"strategy": options} if isinstance(options, str) else options
    if not isinstance(given, Mapping) or not isinstance(given.get("strategy"), str):
        raise PlanError(
            f"candidates must be the name of a strategy, or a mapping with the key 'strategy'; got {options!r}. The "
            f"strategies are {sorted(STRATEGIES)}."
        )
    name = given["strategy"]
    if name not in STRATEGIES:
        raise PlanError(
            f"candidates: unknown strategy {name!r}{_nearest(name, STRATEGIES)}; known: {list(STRATEGIES)}."
        )
    defaults = {field.name: field.default for field in fields(STRATEGIES[name])}
    chosen: dict[str, Any] = {str(option): value for option, value in given.items() if option != "strategy"}
    for option, value in chosen.items():
        if option not in defaults:
            raise PlanError(
                f"candidates: {name} has no option {option!r}{_nearest(option, defaults)}; it has {list(defaults)}."
            )
        if not _fits(value, defaults[option]):
            raise PlanError(f"candidates: {option} of {name} must be {_kind(defaults[option])}, got {value!r}.")
    return STRATEGIES[name](**chosen)


def strategy_options(strategy: CandidateStrategy) -> dict[str, Any]:
    """What `strategy_from` makes an equal strategy from; one of another class has its class's name."""
    names = {kind: name for name, kind in STRATEGIES.items()}
    own = fields(strategy) if is_dataclass(strategy) else ()
    values = {field.name: getattr(strategy, field.name) for field in own}
    plain = {name: v for name, v in values.items() if v is None or isinstance(v, (bool, int, float, str))}
    return {"strategy": names.get(type(strategy), type(strategy).__qualname__), **plain}


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if default is None:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, int if isinstance(default, int) else (int, float))


def _kind(default: Any) -> str:
    kinds = {bool: "true or false", int: "an integer", float: "a number"}
    return kinds.get(type(default), "a number or null")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
