"""Scores of options by a module of the user's own, from vectors of features."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.precision import widened
from sysdag.components.selection.prompt import ChoicePrompt
from sysdag.components.selection.scorer import Scorer
from sysdag.errors import DataError, DeclarationNeeded, PlanError, shown


class FeatureScorer(Scorer):
    """A module on features: `module(queries, options)` of shapes (n, Q) and (n, D) gives the scores (n,).

    A row is laid out with its query once for each option. The query and what is read of the options (`read_as` of a
    `ChoicePrompt`, or the options themselves) are vectors: lists, arrays or tensors of one dimension.

    Args:
        module: with at least one parameter, whose dtype and device the features get.

    Raises:
        PlanError: for something else.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module) or next(module.parameters(), None) is None:
            raise PlanError(f"FeatureScorer takes a torch module with parameters, got {module!r:.100}.")
        self._module = module

    def __repr__(self) -> str:
        return f"FeatureScorer({type(self._module).__name__})"

    @property
    def module(self) -> nn.Module:
        return self._module

    def scores(self, prompts: Sequence[ChoicePrompt]) -> list[Float[Tensor, " options"]]:
        queries = self._features([prompt.query for prompt in prompts], range(len(prompts)), "query")
        counts = [len(prompt.options) for prompt in prompts]
        rows = [element for element, count in enumerate(counts) for _ in range(count)]
        options = self._features([text for prompt in prompts for text in prompt.texts], rows, "option")
        found = self.module(queries[rows], options)
        if found.shape == (len(rows), 1):
            found = found[:, 0]
        if found.shape != (len(rows),):
            raise PlanError(
                f"{self!r}: the module must return one score for each of {len(rows)} pairs, got shape "
                f"{tuple(found.shape)}."
            )
        return list(widened(found).split(counts))

    def _features(self, values: Sequence[Any], rows: Sequence[int], what: str) -> Float[Tensor, "n features"]:
        parameter = next(self.module.parameters())
        found: list[Tensor] = []
        for element, value in zip(rows, values, strict=True):
            try:
                vector = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"{self!r} reads vectors, got {shown(value)} as {what}; give the features of options that are none "
                    "in read_as of a ChoicePrompt.",
                    element=element,
                ) from error
            if vector.ndim != 1 or (found and vector.shape != found[0].shape):
                wanted = f" of {len(found[0])} features" if found else ""
                raise DataError(
                    f"{self!r} reads vectors of one length{wanted}, got shape {tuple(vector.shape)} as {what}.",
                    element=element,
                )
            found.append(vector)
        return torch.stack(found)

    def pieces(self, prompts: Sequence[ChoicePrompt]) -> list[dict[Hashable, int]]:
        return [{(element, place): 1 for place in range(len(p.options))} for element, p in enumerate(prompts)]

    def reference(self, *, moves: bool = False) -> Self:
        view = copy.copy(self)
        view._module = copy.deepcopy(self._module).requires_grad_(False).eval()
        return view

    def fresh(self) -> None:
        return None

    def save(self, folder: Path) -> dict[str, Any]:
        from safetensors.torch import save_model

        save_model(self._module, str(folder / "model.safetensors"))
        return {}

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        raise DeclarationNeeded(
            f"{folder}: the scorer is a module of your own, which sysdag cannot build. Build the component and call "
            "its load_weights with this folder."
        )

    def load_weights(self, folder: Path) -> None:
        from safetensors.torch import load_model

        device = next(self._module.parameters()).device
        load_model(self._module, folder / "model.safetensors", device=str(device))
