"""Agreement between annotators, corrected for chance."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from sysdag.errors import DataError


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two annotators: (observed - expected agreement) / (1 - expected).

    Cohen (1960), A coefficient of agreement for nominal scales.

    Args:
        first, second: their labels of the same units, in the same order; categories are compared by equality.

    Returns:
        At most 1, 0 for what chance explains; None where it is undefined: without units, or where both gave all of
        them one and the same label.

    Raises:
        DataError: for different numbers of labels.
    """
    if len(first) != len(second):
        raise DataError(f"Cohen's kappa needs the same units twice, got {len(first)} and {len(second)} labels.")
    units = len(first)
    if not units:
        return None
    one, other = Counter(first), Counter(second)
    expected = sum(one[label] * other[label] for label in one) / units**2
    if len(one.keys() | other.keys()) == 1:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / units
    return (observed - expected) / (1 - expected)


def krippendorff_alpha(
    units: Sequence[Mapping[str, Hashable]], difference: Callable[[Any, Any], float] = operator.ne
) -> float | None:
    """Krippendorff's alpha: 1 - observed / expected disagreement.

    Krippendorff (2011), Computing Krippendorff's alpha-reliability. Annotators may have labelled different units; one
    that has a single label tells nothing and does not count.

    Args:
        units: of each, the label by annotator.
        difference: of two labels, squared; by default that of nominal data. `squared` is that of interval data.

    Returns:
        At most 1, 0 for what chance explains; None where it is undefined: no unit with two labels, or all labels of
        such units alike.
    """
    paired = [Counter(unit.values()) for unit in units if len(unit) >= 2]
    total = sum(counts.total() for counts in paired)
    marginals = sum(paired, Counter())
    if len(marginals) < 2:
        return None
    # Ordered pairs of unlike labels: within units, each unit's weighted by 1 / (labels - 1); and among all labels.
    observed = sum(_unlike(counts, difference) / (counts.total() - 1) for counts in paired)
    expected = _unlike(marginals, difference) / (total - 1)
    return 1 - observed / expected


def squared(first: float, second: float) -> float:
    """The squared difference of two labels that are numbers."""
    return (first - second) ** 2


def _unlike(counts: Counter, difference: Callable[[Any, Any], float]) -> float:
    return sum(n * m * difference(one, other) for one, n in counts.items() for other, m in counts.items())
