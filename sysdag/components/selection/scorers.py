"""Scorers by the names that a saved system has of them."""

from __future__ import annotations

from typing import Any

from sysdag.components.selection.bi_encoder import BiEncoder
from sysdag.components.selection.cross_encoder import CrossEncoder
from sysdag.components.selection.feature_scorer import FeatureScorer
from sysdag.components.selection.option_likelihood import OptionLikelihood
from sysdag.components.selection.scorer import Scorer
from sysdag.errors import SerializationError
from sysdag.graph.import_path import function_path, import_object

_KNOWN: dict[str, type[Scorer]] = {
    kind.__name__: kind for kind in (BiEncoder, CrossEncoder, FeatureScorer, OptionLikelihood)
}


def scorer_name(scorer: Scorer) -> str:
    """The name that finds a scorer's class again: one of sysdag's, or `module:Class`.

    Raises:
        SerializationError: for a class that is not at the top level of a module.
    """
    kind = type(scorer)
    if _KNOWN.get(kind.__name__) is kind:
        return kind.__name__
    path = function_path(kind)
    if path is None:
        raise SerializationError(f"{kind.__qualname__} cannot be found again; move it to the top level of a module.")
    return path


def scorer_class(name: Any) -> type[Scorer]:
    """The class of that name.

    Raises:
        SerializationError: for a name of none, or a class that is no scorer.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if not isinstance(name, str) or ":" not in name:
        raise SerializationError(f"sysdag has no scorer {name!r}; it has {sorted(_KNOWN)}.")
    try:
        found = import_object(name)
    except Exception as error:  # importing a module runs it, so it may raise anything
        raise SerializationError(f"The scorer {name} cannot be imported ({type(error).__name__}: {error}).") from error
    if not isinstance(found, type) or not issubclass(found, Scorer):
        raise SerializationError(f"{name} is no subclass of Scorer.")
    return found
