"""The groups of pairs in a training: their weights move after each step, and evaluations tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from sysdag.data.preferences import Feedback
from sysdag.engine.step import SystemModel
from sysdag.objectives.group_weights import GroupWeights

_COLUMN = "group"
_APART = ("loss", "rewards/accuracies", "rewards/margins")


class PairGroups(TrainerCallback):
    """What a column `group` is for; nothing where no pair has one.

    Args:
        model: gets the weights of the training data's groups, if its options ask for them.
        datasets: all pairs that the trainer was given, by name.
        add_up: sums a tensor over processes.
    """

    def __init__(self, model: SystemModel, datasets: Mapping[str, Any], add_up: Callable[[Tensor], Tensor]) -> None:
        self._model, self._add_up = model, add_up
        found = {pair.group for part in lists_of_pairs(datasets) for pair in part if pair.group is not None}
        self._names = sorted(found)
        if model.options.group_dro:
            model.groups = GroupWeights(datasets["train_dataset"] or [], model.options.group_dro_step_size)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._model.groups is not None:
            self._model.groups.update(self._add_up)

    def weights(self) -> dict[str, float]:
        """To log: of each group that is trained for, `groups/<name>/weight`."""
        groups = self._model.groups
        return {} if groups is None else {f"groups/{name}/weight": q for name, q in groups.weights.items()}

    def column(self, pairs: Sequence[Feedback]) -> dict[str, Tensor]:
        """The group of each pair as a number, -1 for none."""
        if not self._names:
            return {}
        place = {name: number for number, name in enumerate(self._names)}
        return {_COLUMN: torch.tensor([float(place.get(pair.group or "", -1)) for pair in pairs], device="cpu")}

    def taken_apart(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Columns of each group alone, `groups/<name>/loss` and others, of columns that have `column`, which goes."""
        if not self._names:
            return {}
        index = columns.pop(_COLUMN)
        return {
            f"groups/{name}/{what}": columns[what][index == number]
            for number, name in enumerate(self._names)
            for what in _APART
            if what in columns and bool((index == number).any())
        }

    def worst(self, means: Mapping[str, float]) -> dict[str, float]:
        """The largest loss of a group, for `metric_for_best_model="groups/worst_loss"`."""
        losses = [means[key] for name in self._names if (key := f"groups/{name}/loss") in means]
        return {"groups/worst_loss": max(losses)} if losses else {}


def lists_of_pairs(datasets: Mapping[str, Any]) -> Iterator[Sequence[Feedback]]:
    """The lists of pairs among datasets, of which some may be dicts of others."""
    for part in datasets.values():
        if isinstance(part, Mapping):
            yield from lists_of_pairs(part)
        elif isinstance(part, list):
            yield part
