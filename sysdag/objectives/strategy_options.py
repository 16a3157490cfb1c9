"""Candidate strategies as configuration files name them: `{strategy: diverse_beam_search, num_candidates: 4}`.

A strategy of one's own is named by its import path, `package.module:Class` or `FILE.py:Class`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from sysdag.errors import LoadingError, PlanError
from sysdag.graph.import_path import function_path
from sysdag.objectives.candidates import CandidateStrategy
from sysdag.objectives.strategies import DiverseBeamSearch, Exhaustive, ImportanceSampling, MonteCarlo
from sysdag.saving.loading import load_function

STRATEGIES: dict[str, type[CandidateStrategy]] = {
    "diverse_beam_search": DiverseBeamSearch,
    "monte_carlo": MonteCarlo,
    "importance_sampling": ImportanceSampling,
    "exhaustive": Exhaustive,
}


def strategy_from(options: Any) -> CandidateStrategy:
    """The strategy that a configuration describes.

    Args:
        options: a name of `STRATEGIES` or the import path of a class, or a dict of `strategy` and its options.

    Raises:
        PlanError: for an unknown strategy or option (the nearest known one is named), a value of another type, or an
            import path at which no strategy stands.
    """
    given = {"strategy": options} if isinstance(options, str) else options
    if not isinstance(given, Mapping) or not isinstance(given.get("strategy"), str):
        raise PlanError(
            f"candidates must be the name of a strategy, or a mapping with the key 'strategy'; got {options!r}. The "
            f"strategies are {sorted(STRATEGIES)}."
        )
    name = given["strategy"]
    kind = _strategy_class(name)
    defaults = {field.name: field.default for field in fields(kind)}
    chosen: dict[str, Any] = {str(option): value for option, value in given.items() if option != "strategy"}
    for option, value in chosen.items():
        if option not in defaults:
            raise PlanError(
                f"candidates: {name} has no option {option!r}{_nearest(option, defaults)}; it has {list(defaults)}."
            )
        if not _fits(value, defaults[option]):
            raise PlanError(f"candidates: {option} of {name} must be {_kind(defaults[option])}, got {value!r}.")
    if missing := [option for option, default in defaults.items() if default is MISSING and option not in chosen]:
        raise PlanError(f"candidates: {name} needs the options {missing}, which have no default.")
    return kind(**chosen)


def _strategy_class(name: str) -> type[CandidateStrategy]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    if ":" not in name:
        raise PlanError(
            f"candidates: unknown strategy {name!r}{_nearest(name, STRATEGIES)}; known: {list(STRATEGIES)}, or a "
            "class of yours as package.module:Class."
        )
    try:
        found: Any = load_function(name)
    except LoadingError as error:
        raise PlanError(f"candidates: {error}") from error
    if not isinstance(found, type) or not issubclass(found, CandidateStrategy):
        raise PlanError(f"candidates: {name} is no subclass of sysdag.objectives.CandidateStrategy.")
    if inspect.isabstract(found):
        raise PlanError(f"candidates: {name} does not implement {sorted(found.__abstractmethods__)}.")
    return found


def strategy_options(strategy: CandidateStrategy) -> dict[str, Any]:
    """What `strategy_from` makes an equal strategy from; one of another class has its import path."""
    names = {kind: name for name, kind in STRATEGIES.items()}
    own = fields(strategy) if is_dataclass(strategy) else ()
    values = {field.name: getattr(strategy, field.name) for field in own}
    plain = {name: v for name, v in values.items() if v is None or isinstance(v, (bool, int, float, str))}
    return {
        "strategy": names.get(type(strategy)) or function_path(type(strategy)) or type(strategy).__qualname__,
        **plain,
    }


def _fits(value: Any, default: Any) -> bool:
    if default is MISSING or not (default is None or isinstance(default, (bool, int, float))):
        return default is MISSING or isinstance(value, type(default))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if default is None:
        return value is None or isinstance(value, (int, float))
    return isinstance(value, int if isinstance(default, int) else (int, float))


def _kind(default: Any) -> str:
    kinds = {bool: "true or false", int: "an integer", float: "a number"}
    return "a number or null" if default is None else kinds.get(type(default), f"a {type(default).__name__}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
