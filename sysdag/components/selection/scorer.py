"""What a scorer of options meets; the choice among them is `sysdag.components.selection.choice`'s."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.constructor_options import ConstructorOptions
from sysdag.components.input_reader import InputReader
from sysdag.components.selection.prompt import ChoicePrompt
from sysdag.errors import DataError, DeclarationNeeded, shown

if TYPE_CHECKING:
    from sysdag.components.component import Component
    from sysdag.components.footprint import Footprint


class Scorer(ConstructorOptions, ABC):
    """A score of each option of a row, given its query: p is the softmax of the scores over a temperature.

    What is not said here is as in `sysdag.components.component.Component`, of which a scorer is the part with the
    weights.
    """

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The weights, loaded on first access."""

    @abstractmethod
    def scores(self, prompts: Sequence[ChoicePrompt]) -> list[Float[Tensor, " options"]]:
        """The score of every option of each row, differentiable, fp32 or better; a larger one is more probable.

        Raises:
            DataError: for a query or an option that it cannot read; `DataError.element` is the row.
        """

    @abstractmethod
    def pieces(self, prompts: Sequence[ChoicePrompt]) -> list[dict[Hashable, int]]:
        """What scoring each row computes, and the positions of each piece; one that rows share is computed once.

        Loads no weights.
        """

    def cut_from(self, prompt: ChoicePrompt) -> int:
        """How many positions of what it reads are cut off because there is no room for them; loads no weights.

        Raises:
            DataError: see `scores`.
        """
        return 0

    def input_reader(self) -> InputReader:
        """What reads the queries before the component gets them."""
        return InputReader()

    @property
    def base_model(self) -> str | None:
        return None

    @property
    def base_key(self) -> Hashable:
        return None

    def share_base(self, others: Iterable[Component]) -> None:
        return

    def connect(self, components: Mapping[str, Component]) -> None:
        return

    def prepare_training(self) -> None:
        return

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @abstractmethod
    def reference(self, *, moves: bool = False) -> Self:
        """A frozen scorer that scores as this one does now; with weights of its own where it is to move."""

    @abstractmethod
    def fresh(self) -> Self | None:
        """This one as it was before its weights were loaded; None where they were given as an object."""

    def reading(self) -> str:
        return ""

    @property
    def tells_options_apart(self) -> bool:
        """See `Component.tells_options_apart`."""
        return False

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        return None

    @property
    def trusts_remote_code(self) -> bool:
        return False

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        return

    @abstractmethod
    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the weights; returns the JSON-ready options that `load` takes."""

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        return []

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        """A scorer from what `save` wrote and returned."""
        raise DeclarationNeeded(f"{cls.__name__} has no `load` that builds it from its folder.")

    def refilled(self, folder: Path, options: Mapping[str, Any]) -> Self:
        """A copy of this one with what `save` wrote."""
        made = copy.deepcopy(self)
        made.load_weights(folder)
        return made

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those that `save` wrote."""


def as_text(owner: str, value: Any, what: str, element: int) -> str:
    """A query or an option as the text that it must be.

    Raises:
        DataError: for anything else.
    """
    if not isinstance(value, str):
        raise DataError(
            f"{owner} reads texts, got {shown(value)} as {what}; give it a text, in read_as if the option is to stay "
            "what it is.",
            element=element,
        )
    return str(value)
