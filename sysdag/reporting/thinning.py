"""Fewer points with the same look: what a curve of thousands of points needs to be drawn, its extremes among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy


def thin(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most about `most` points, in order, that keep a curve's extremes.

    The points are cut into equal parts, of each of which the smallest and the largest value are kept, and one that is
    not finite if it has one. The first and the last point are always among them.

    Args:
        values: the curve; nan where it has a gap.
        most: 3 points for each part, and the two ends; all are kept if there are no more than that.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    array = numpy.asarray(values, dtype=float)
    borders = numpy.linspace(0, count, max(1, (most - 2) // 3) + 1).astype(int)
    for start, end in itertools.pairwise(borders):
        part = array[start:end]
        gaps = ~numpy.isfinite(part)
        if gaps.any():
            kept.add(int(start + gaps.argmax()))
        if not gaps.all():
            kept.add(int(start + numpy.where(gaps, numpy.inf, part).argmin()))
            kept.add(int(start + numpy.where(gaps, -numpy.inf, part).argmax()))
    return sorted(kept)
