"""Scorers by the names that a saved system has of them."""

from __future__ import annotations

from sysdag.components.selection.bi_encoder import BiEncoder
from sysdag.components.selection.cross_encoder import CrossEncoder
from sysdag.components.selection.feature_scorer import FeatureScorer
from sysdag.components.selection.option_likelihood import OptionLikelihood
from sysdag.components.selection.scorer import Scorer
from sysdag.errors import DeclarationNeeded, SerializationError
from sysdag.graph.import_path import function_path

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


def scorer_class(name: str) -> type[Scorer]:
    """The class of that name.

    Raises:
        DeclarationNeeded: for one of the user's own, whose module is not imported for it.
        SerializationError: for a name of none.
    """
    if name in _KNOWN:
        return _KNOWN[name]
    if ":" in name:
        raise DeclarationNeeded(f"its scorer {name} is a class of your own, which is not looked for.")
    raise SerializationError(f"sysdag has no scorer {name!r}; it has {sorted(_KNOWN)}.")
