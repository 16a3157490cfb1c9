"""Scores of options by how probable a language model finds each as an answer to the query."""

from __future__ import annotations

import copy
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.input_reader import InputReader
from sysdag.components.language.causal_lm import CausalLM
from sysdag.components.selection.prompt import ChoicePrompt
from sysdag.components.selection.scorer import Scorer, as_text
from sysdag.errors import DataError, PlanError
from sysdag.files.saved_files import only
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from sysdag.components.component import Component
    from sysdag.components.footprint import Footprint


_SAVED: Mapping[str, tuple[type, ...]] = {"per_token": (bool,), "model": (dict,)}


class OptionLikelihood(Scorer):
    """log p(option | query) of a language model, its end of sequence included.

    The query is the model's prompt: a text, chat messages or a `ChatPrompt`. Each option is a completion, and they
    share their prompt where the model can (`pack_prefixes`).

    Args:
        model: the language model; with a `peft_config` its adapter trains.
        per_token: divides by the number of the option's tokens, so that short options have no advantage.

    Raises:
        PlanError: for something else than a `CausalLM`.
    """

    def __init__(self, model: CausalLM, *, per_token: bool = False) -> None:
        if not isinstance(model, CausalLM):
            raise PlanError(f"OptionLikelihood takes a CausalLM, as OptionLikelihood(CausalLM({model!r})).")
        self.model = model
        self.per_token = per_token

    def __repr__(self) -> str:
        return f"OptionLikelihood({self.model!r})"

    @property
    def module(self) -> nn.Module:
        return self.model.module

    def scores(self, prompts: Sequence[ChoicePrompt]) -> list[Float[Tensor, " options"]]:
        inputs, draws = self._completions(prompts)
        found = self.model.log_prob(inputs, draws)
        if self.per_token:
            found = found / torch.tensor(self.model.lengths(draws), device=found.device).clamp(min=1)
        return list(found.split([len(prompt.options) for prompt in prompts]))

    def _completions(self, prompts: Sequence[ChoicePrompt]) -> tuple[list[Any], list[Draw]]:
        """The prompt and the completion of every option of every row, row by row."""
        rows = [element for element, prompt in enumerate(prompts) for _ in prompt.options]
        texts = [text for prompt in prompts for text in prompt.texts]
        texts = [as_text(repr(self), text, "option", row) for text, row in zip(texts, rows, strict=True)]
        inputs = [prompts[row].query for row in rows]
        try:
            draws = self.model.in_context(inputs, self.model.observe(texts))
            longest = [self.model.longest_draw(prompt.query) for prompt in prompts]
        except DataError as error:
            error.element = None if error.element is None else rows[error.element]
            raise
        for row, draw in zip(rows, draws, strict=True):
            room, length = longest[row], len(draw.record["token_ids"])
            if room is not None and length > room:
                raise DataError(
                    f"{self!r}: the option {draw.value!r:.100} has {length} tokens, and behind the query there is room "
                    f"for {room} (max_length). Shorten the query or the option.",
                    element=row,
                )
        return inputs, draws

    def pieces(self, prompts: Sequence[ChoicePrompt]) -> list[dict[Hashable, int]]:
        _, draws = self._completions(prompts)
        lengths = iter(self.model.positions(draws))
        found = []
        for prompt, ids in zip(prompts, self.model.prompt_ids([prompt.query for prompt in prompts]), strict=True):
            own: dict[Hashable, int] = {}
            for text in prompt.texts:
                if self.model.pack_prefixes:
                    own |= {(tuple(ids), None): len(ids), (tuple(ids), text): next(lengths)}
                else:
                    own[tuple(ids), text] = len(ids) + next(lengths)
            found.append(own)
        return found

    def cut_from(self, prompt: ChoicePrompt) -> int:
        self._completions([prompt])
        return self.model.cut_from(prompt.query)

    def input_reader(self) -> InputReader:
        return self.model.input_reader()

    @property
    def base_model(self) -> str | None:
        return self.model.base_model

    @property
    def base_key(self) -> Hashable:
        return self.model.base_key

    def share_base(self, others: Iterable[Component]) -> None:
        self.model.share_base(_models(others))

    def connect(self, components: Mapping[str, Component]) -> None:
        self.model.connect(dict(zip(components, _models(components.values()), strict=True)))

    def prepare_training(self) -> None:
        self.model.prepare_training()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return self.model.own_parameters()

    def _with(self, model: Any) -> Self:
        view = copy.copy(self)
        view.model = model
        return view

    def reference(self, *, moves: bool = False) -> Self:
        return self._with(self.model.moving_reference() if moves else self.model.reference())

    def fresh(self) -> Self | None:
        return self._with(self.model.fresh()) if self.model.lm.is_named else None

    def reading(self) -> str:
        return json.dumps([self.model.reading(), self.per_token])

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        return self.model.footprint(tokens=tokens, labels=labels, trains=trains, checkpoints=checkpoints, device=device)

    def save(self, folder: Path) -> dict[str, Any]:
        return {"per_token": self.per_token, "model": dict(self.model.save_pretrained(folder))}

    @classmethod
    def load(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        options = only(options, _SAVED, cls.__name__, required=_SAVED)
        return cls(CausalLM.from_pretrained(folder, options["model"]), per_token=options["per_token"])

    @property
    def trusts_remote_code(self) -> bool:
        return self.model.trusts_remote_code

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        self.model.read_from(folder, trust_remote_code=trust_remote_code)

    def refilled(self, folder: Path, options: Mapping[str, Any]) -> Self:
        return self._with(self.model.refilled(folder, options["model"]))

    def load_weights(self, folder: Path) -> None:
        self.model.load_weights(folder)


def _models(components: Iterable[Component]) -> list[Any]:
    """The language models inside choices, in their place."""
    found = [(each, getattr(each, "scorer", None)) for each in components]
    return [scorer.model if isinstance(scorer, OptionLikelihood) else each for each, scorer in found]
