"""How large the largest micro-batch of a node is, from the lengths of its texts, before there are any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sysdag.components.component import Component


@dataclass(frozen=True)
class EstimatedBatch:
    """A micro-batch.

    Attributes:
        tokens: of it.
        labels: how many of them are scored.
        whole: tokens of all micro-batches.
        is_one_element: whether it has room for no second one.
        more: what `Component.footprint` is told of it beside.
    """

    tokens: int
    labels: int
    whole: int
    is_one_element: bool
    more: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Elements:
    """What a node scores in a step.

    Attributes:
        pairs: of the step.
        prompt, completion: tokens of each.
        common: of a prompt's tokens those that all of a pair share.
        options: of a prompt's tokens those of options, where they were given.
        prompts: of a pair, as far as they differ; 0 where all is common.
        completions: of a pair.
        share: the part of the pairs that take the node.
    """

    pairs: int
    prompt: int
    completion: int
    common: int
    options: int | None
    prompts: int
    completions: int
    share: float

    def batch(self, component: Component, most: int, images: Sequence[tuple[int, int]]) -> EstimatedBatch:
        """The largest micro-batch of at most so many tokens (or one element), with images of such sizes a prompt."""
        longest = self.prompt + self.completion
        if component.shares_prefixes(longest):
            found = self._packed(most, component.tokens_of_images(images), images)
            return replace(found, more=self._told_apart(found.tokens)) if component.tells_options_apart else found
        alone = replace(self, common=0, prompts=self.completions)
        found = alone._packed(most, None, ())
        rows = max(1, found.tokens // longest)
        more = {"rows": rows, "tries": False} | ({"images": images} if images else {})
        return replace(found, tokens=rows * longest, labels=alone._labels(rows * longest, found.whole), more=more)

    def _packed(self, most: int, placeholders: int | None, images: Sequence[tuple[int, int]]) -> EstimatedBatch:
        # Of one pair: `common` tokens are computed once in each micro-batch, `own` tokens once.
        common, different = self.common, self.prompt - self.common
        own = self.prompts * different + self.completions * self.completion
        whole = self.pairs * (own + common * math.ceil(own / max(1, most - common)))
        whole = max(1, math.ceil(self.share * whole))
        tokens = max(min(most, whole), self.prompt + self.completion)
        more: dict[str, Any] = {}
        if placeholders:
            # Images are read once a pair where they are common, and else once a prompt, with what follows it.
            per_pair, before = (1, 0) if common >= placeholders else (max(1, self.prompts), common)
            unit = (common + own - before) // per_pair
            prompts = max(1, min(math.ceil(self.share * self.pairs) * per_pair, (tokens - before) // unit))
            tokens = max(min(tokens, before + prompts * unit), self.prompt + self.completion)
            more = {"images": images, "rows": prompts}
        is_one = common + 2 * (different + self.completion) > most
        return EstimatedBatch(tokens, self._labels(tokens, whole), whole, is_one, more)

    def _told_apart(self, tokens: int) -> dict[str, Any]:
        """How many of a micro-batch's tokens are options'; those that are common are there once."""
        if self.options is None:
            return {"options": None}
        return {"options": min(self.options, tokens) if self.prompts else tokens * self.options // self.prompt}

    def _labels(self, tokens: int, whole: int) -> int:
        return max(1, math.ceil(tokens * self.share * self.pairs * self.completions * self.completion) // whole)
