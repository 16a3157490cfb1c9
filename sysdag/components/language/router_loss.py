"""Load balancing of a mixture of experts: the auxiliary loss of its training (Switch Transformer, arXiv 2101.03961).

The model's own function computes it from its routers' logits. Tokens weigh as often as sequences pass through them, so
that sequences which share a prefix give the loss that they give in rows of their own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sysdag.components.language.language_head import inner_model
from sysdag.components.language.token_trie import TokenTrie
from sysdag.errors import PlanError


class RouterLoss:
    """Of one model.

    Attributes:
        coefficient: what its config multiplies the loss by (`router_aux_loss_coef`).
        value: () the loss of the latest forward that was recorded; None before one.
    """

    @classmethod
    def of(cls, model: Any) -> RouterLoss | None:
        """None for a model that has no experts, or whose coefficient is 0.

        Raises:
            PlanError: for a model with a coefficient whose loss cannot be computed here.
        """
        config = inner_model(model).config.get_text_config(decoder=True)
        coefficient = getattr(config, "router_aux_loss_coef", None)
        return cls(model, config, coefficient) if coefficient and hasattr(config, "output_router_logits") else None

    def __init__(self, model: Any, config: Any, coefficient: float) -> None:
        inner = inner_model(model)
        self.coefficient = float(coefficient)
        self.value: Tensor | None = None
        self._decoder = getattr(inner, "base_model", None)
        self._function = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
        self._experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        self._chosen = getattr(config, "num_experts_per_tok", None)
        self._name = type(inner).__name__
        if self._decoder in (None, inner) or self._function is None or not self._experts or not self._chosen:
            raise self._refusal()

    def _refusal(self) -> PlanError:
        return PlanError(
            f"{self._name} has router_aux_loss_coef={self.coefficient:g}, and how it balances its experts is not known "
            "here. Train without: model_kwargs={'router_aux_loss_coef': 0.0}, or the same in the config of a loaded "
            "model."
        )

    @contextlib.contextmanager
    def recording(self, trie: TokenTrie) -> Iterator[None]:
        """Takes the loss of the one forward inside, which scores the trie."""
        seen: list[Any] = []
        decoder: Any = self._decoder

        def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"output_router_logits": True}

        def take(module: Any, args: Any, output: Any) -> None:
            seen.append(getattr(output, "router_logits", None))

        handles = [decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(take)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not seen or not seen[-1]:
            raise self._refusal()
        weights = passes(trie).to(seen[-1][0].device)
        assert self._function is not None
        self.value = self._function(tuple(seen[-1]), self._experts, self._chosen, weights)

    def take(self) -> tuple[float, Tensor] | None:
        """The coefficient and the loss that was recorded, once: it holds the forward's graph."""
        value, self.value = self.value, None
        return None if value is None else (self.coefficient, value)


def passes(trie: TokenTrie) -> Float[Tensor, "R T"]:
    """How many of the sequences that have a completion pass through each token."""
    width = trie.tokens.shape[1]
    mask, found = trie.mask(), torch.zeros(trie.tokens.shape)
    last = {int(sequence): int(label) for sequence, label in zip(trie.sequence, trie.label, strict=True)}
    for label in last.values():
        row, before = divmod(int(trie.rows[label]), width)
        end = (trie.parent[row] == before) & (trie.tokens[row] == trie.labels[label])
        found[row] += mask[row, int(end.nonzero()[0])]
    return found
