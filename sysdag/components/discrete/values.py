"""What components over finitely many values share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.component import Component
from sysdag.components.decoding import draw_options, first_undrawable
from sysdag.components.random_streams import RowGenerator, row_seeds
from sysdag.errors import DataError, shown
from sysdag.traces.cells import Draw


class Discrete(Component):
    """A component that draws one of `values`; subclasses say where the logits come from."""

    likelihood = "exact"
    is_density = False
    takes_row_seeds = True
    values: tuple[Hashable, ...]

    @abstractmethod
    def logits(self, inputs: Sequence[Any]) -> Float[Tensor, "n values"]:
        """Unnormalised log-probabilities of every value for each input."""

    def _checked_logits(self, inputs: Sequence[Any]) -> Float[Tensor, "n values"]:
        """The logits, which something is drawn from.

        Raises:
            DataError: naming the first element whose logits give no distribution: nan, infinite, or none above -inf.
        """
        logits = self.logits(inputs)
        element = first_undrawable(logits)
        if element is not None:
            raise DataError(
                f"{self!r}: its features or logits are not finite (logits {logits[element].tolist()!r:.200} for the "
                f"input {shown(inputs[element])}); check what the node's function returns, and the weights.",
                element=element,
            )
        return logits

    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        return self.propose(inputs, generator=generator)

    def propose(
        self,
        inputs: Sequence[Any],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: RowGenerator = None,
    ) -> list[Draw]:
        with torch.no_grad():
            temperature, top_p = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
            logits = self._checked_logits(inputs)
            seeds = torch.tensor(row_seeds(generator, len(logits)), device=logits.device)
            drawn, log_probs = draw_options(
                logits, seeds, torch.zeros_like(seeds), temperature=temperature, top_p=top_p, top_k=top_k
            )
        return [self._draw(index, log_prob) for index, log_prob in zip(drawn.tolist(), log_probs.tolist(), strict=True)]

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        return [self._draw(self._index(value, element)) for element, value in enumerate(values)]

    def _index(self, value: Any, element: int) -> int:
        places = {known: place for place, known in enumerate(self.values)}
        try:
            return places[value]
        except (KeyError, TypeError) as error:  # a TypeError is of a value that cannot be hashed
            raise DataError(
                f"{self!r}: {shown(value)} is none of its values {list(self.values)}.", element=element
            ) from error

    def check_draws(self, draws: Sequence[Draw]) -> None:
        for element, draw in enumerate(draws):
            if draw.record.get("index") != self._index(draw.value, element):
                raise DataError(
                    f"{self!r}: the draw of {shown(draw.value)} has the index {shown(draw.record.get('index'))}; it "
                    "was made by a component with other values.",
                    element=element,
                )

    def _draw(self, index: int, log_prob: float | None = None) -> Draw:
        return Draw(self.values[index], {"index": index}, log_prob)

    def log_prob(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        log_probs = self.logits(inputs).log_softmax(-1)
        indices = torch.tensor([draw.record["index"] for draw in draws], device=log_probs.device)
        return log_probs.gather(1, indices[:, None])[:, 0]

    @torch.no_grad()
    def typicality(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        return self.log_prob(inputs, draws) - (2 * self.logits(inputs).log_softmax(-1)).logsumexp(-1)

    def search(
        self, inputs: Sequence[Any], num_candidates: int, diversity_penalty: float, ngram_size: int = 1
    ) -> list[list[Draw]]:
        """The most probable values: what a diverse beam search of length 1 finds under any penalty that separates."""
        with torch.no_grad():
            log_probs = self._checked_logits(inputs).log_softmax(-1)
            best = log_probs.topk(min(num_candidates, len(self.values)), dim=-1)
        return [
            [self._draw(index) for index, log_prob in zip(indices, scores, strict=True) if log_prob > -torch.inf]
            for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
