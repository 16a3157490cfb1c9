"""What every language model is as a component, whatever its architecture: draws, an adapter, a reference, saving."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.component import Component, check_max_tokens
from sysdag.components.decoding import check_truncation
from sysdag.components.language.chat_template import RESERVED, schemas
from sysdag.components.language.completer import Completer
from sysdag.components.language.non_finite import first_non_finite
from sysdag.components.language.part_encoder import of_places, positions_of
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.components.language.stop_strings import StopStrings, stop_strings
from sysdag.components.language.text_component import TextComponent
from sysdag.components.random_streams import RowGenerator, row_seeds
from sysdag.errors import PlanError, SerializationError
from sysdag.files.saved_files import only
from sysdag.graph.parts import PartPrompt
from sysdag.traces.cells import Draw

Found = TypeVar("Found")
_NUMBER, _MAYBE_INT = (int, float), (int, type(None))


class LanguageModel(TextComponent):
    """A text component that draws and scores with the weights of a pretrained model.

    Args:
        lm: the model.
        temperature, top_p, top_k, max_batch_tokens, batch_size: see `CausalLM`.
        texts: see `TextComponent`.

    Class attributes:
        pretrained: what reads its models.
        saved_options: the constructor's options that `save_pretrained` keeps, by the attributes of those names.
        saved_types: the types, of JSON, of what it keeps.
    """

    likelihood = "exact"
    is_density = False
    takes_row_seeds = True
    pretrained: ClassVar[type[PretrainedLM]] = PretrainedLM
    saved_options: ClassVar[tuple[str, ...]] = (
        "temperature", "top_p", "top_k", "stop", "max_batch_tokens", "batch_size", "sanitize_control_tokens",
    )  # fmt: skip
    saved_types: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "max_new_tokens": _MAYBE_INT, "temperature": _NUMBER, "top_p": _NUMBER, "top_k": _MAYBE_INT, "stop": (list,),
        "max_batch_tokens": (int,), "batch_size": _MAYBE_INT, "sanitize_control_tokens": (bool,),
        "base": (str, type(None)), "base_of": (str,), "model_kwargs": (dict,),
    }  # fmt: skip

    def __init__(
        self,
        lm: PretrainedLM,
        *,
        temperature: float,
        top_p: float,
        top_k: int | None,
        max_batch_tokens: int,
        batch_size: int | None,
        **texts: Any,
    ) -> None:
        kind = type(self).__name__
        for option, value in {"max_batch_tokens": max_batch_tokens, "batch_size": batch_size}.items():
            if not (isinstance(value, int) and value >= 1) and (value is not None or option != "batch_size"):
                raise PlanError(f"{kind}: {option} must be an integer of 1 or more, got {value!r}.")
        check_truncation(kind, temperature, top_p, top_k)
        super().__init__(lm, **texts)
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.max_batch_tokens, self.batch_size = max_batch_tokens, batch_size
        self._scorer: Any = None

    def __repr__(self) -> str:
        return repr(self.lm)

    @property
    def base_model(self) -> str | None:
        return self.lm.base_model

    @property
    def module(self) -> Any:
        return self.lm.module

    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        return self.propose(inputs, generator=generator)

    def propose(
        self,
        inputs: Sequence[Any],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        stop: str | Sequence[str] | None = None,
        generator: RowGenerator = None,
    ) -> list[Draw]:
        """See `Component`; `stop` as for the component, whose own are left by None and put off by an empty list."""
        check_truncation(repr(self), temperature, top_p, top_k)
        options: dict[str, Any] = {
            "temperature": self.temperature if temperature is None else temperature,
            "top_p": self.top_p if top_p is None else top_p,
            "top_k": self.top_k if top_k is None else top_k,
        }
        seeds = row_seeds(generator, len(inputs))

        def sampled(completer: Completer, prompts: Sequence[Sequence[int]], places: Sequence[int]) -> list[Draw]:
            return self._sampled(completer, prompts, {**options, "seeds": [seeds[place] for place in places]})

        return self._completed(
            inputs, self._completer(stop), sampled, lambda part, draw: self._parts().drawn(part, draw),
            lambda part: self._parts().unwritten(part),
        )  # fmt: skip

    def _completed(
        self,
        inputs: Sequence[Any],
        completer: Completer,
        complete: Callable[[Completer, Sequence[Sequence[int]], Sequence[int]], list[Found]],
        read: Callable[[PartPrompt, Found], Found],
        nothing: Callable[[PartPrompt], Found],
    ) -> list[Found]:
        """What completes the inputs; those that ask for a part of a completion apart from others.

        Args:
            completer: of whole completions.
            complete: gets what completes, prompts, and these prompts' places among the inputs.
            read: makes of what completes a part's prompt what is found for the part.
            nothing: what is found for a part that its completion does not come to.
        """
        found: dict[int, Found] = {}
        for part, places in positions_of(inputs):
            over = [place for place in places if self.is_over(inputs[place])]
            found |= {place: nothing(inputs[place]) for place in over}
            places = [place for place in places if place not in over]
            if not places:
                continue
            with of_places(places):
                prompts = self.prompt_ids([inputs[place] for place in places])
                made = complete(completer if part is None else self._part_completer(completer, part), prompts, places)
            found |= {
                place: each if part is None else read(inputs[place], each)
                for place, each in zip(places, made, strict=True)
            }
        return [found[place] for place in range(len(inputs))]

    def _part_completer(self, completer: Completer, part: PartPrompt) -> Completer:
        texts = [*([] if part.marker is None else [part.marker]), *completer.stop_texts]
        stops = StopStrings(texts, self.tokenizer) if texts else None
        return dataclasses.replace(completer, max_new_tokens=self._parts().budget(part), stops=stops)

    def _sampled(
        self, completer: Completer, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]
    ) -> list[Draw]:
        return completer.sample(prompts, **options)

    def _completer(self, stop: str | Sequence[str] | None = None) -> Completer:
        strings = self.stop if stop is None else stop_strings(stop)
        stops = StopStrings(strings, self.tokenizer) if strings else None
        return Completer(
            lm=self.lm, max_new_tokens=self.max_new_tokens, max_batch_tokens=self.max_batch_tokens,
            batch_size=self.batch_size, stops=stops,
        )  # fmt: skip

    def search(
        self, inputs: Sequence[Any], num_candidates: int, diversity_penalty: float, ngram_size: int = 1
    ) -> list[list[Draw]]:
        """Diverse beam search with one beam a group (Vijayakumar et al. 2016, arXiv 1610.02424).

        Groups may end in the same text, since an end of sequence is not penalised. A prompt that is left with fewer
        than `num_candidates` distinct ones is searched again with 2, then 4 beams a group, and topped up from those.
        """

        def searched(completer: Completer, prompts: Sequence[Sequence[int]], _: Sequence[int]) -> list[list[Draw]]:
            return completer.search(prompts, num_candidates, diversity_penalty, ngram_size)

        return self._completed(
            inputs, self._completer(), searched,
            lambda part, found: [self._parts().drawn(part, draw) for draw in found],
            lambda part: [self._parts().unwritten(part)],
        )  # fmt: skip

    def log_prob(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        """Sum of the log-probabilities of the completion's tokens, its end of sequence included where it has one.

        0 of a part that the completion does not come to.
        """
        return self._scored_if_written(inputs, draws)

    def weighted_score(
        self, inputs: Sequence[Any], draws: Sequence[Draw], heads: Sequence[int], tail: float
    ) -> Float[Tensor, " n"]:
        return self._scored_if_written(inputs, draws, heads=heads, tail=tail)

    @torch.no_grad()
    def typicality(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        return self._scored_if_written(inputs, draws, typicality=True)

    def _scored_if_written(
        self, inputs: Sequence[Any], draws: Sequence[Draw], *, heads: Sequence[int] | None = None, tail: float = 1.0,
        typicality: bool = False,
    ) -> Float[Tensor, " n"]:  # fmt: skip
        """As `_scored`, with 0 for each part that a completion does not come to."""
        written = [place for place, given in enumerate(inputs) if not self.is_over(given)]
        if len(written) == len(inputs):
            weights = None if heads is None else (heads, tail)
            return self._scored(inputs, draws, weights=weights, typicality=typicality)
        self._sequences(inputs, draws)  # which refuses draws that are none of such parts
        if not written:  # the model runs all the same: processes that share it call it equally often
            first = inputs[0].before[0]
            found = self._scored([dataclasses.replace(inputs[0], place=0, before=())], [first], typicality=typicality)
            self.take_auxiliary_loss()
            return 0.0 * found.expand(len(inputs))
        weights = None if heads is None else ([heads[place] for place in written], tail)
        chosen = [inputs[place] for place in written], [draws[place] for place in written]
        with of_places(written):
            found = self._scored(*chosen, weights=weights, typicality=typicality)
        return found.new_zeros(len(inputs)).index_copy(0, torch.tensor(written, device=found.device), found)

    @abstractmethod
    def _scored(
        self,
        inputs: Sequence[Any],
        draws: Sequence[Draw],
        *,
        weights: tuple[Sequence[int], float] | None = None,
        typicality: bool = False,
    ) -> Float[Tensor, " n"]:
        """Sums over each completion's tokens: of log p, those behind its first ones weighted; or see `typicality`."""

    def _scored_sequences(
        self, inputs: Sequence[Any], draws: Sequence[Draw]
    ) -> tuple[list[tuple[list[int], list[int]]], list[Sequence[int] | None]]:
        """Prompts and completions, and for each completion which of its tokens count."""
        draws = self.in_context(inputs, draws)
        sequences = self._in_room(inputs, draws)
        masks = [draw.record.get("completion_mask") for draw in draws]
        return sequences, [mask and mask[: len(ids)] for mask, (_, ids) in zip(masks, sequences, strict=True)]

    def micro_batches(self, inputs: Sequence[Any], draws: Sequence[Draw], max_tokens: int | None) -> list[list[int]]:
        """See `Component`; an element's tokens are those that are computed, padding included and shared ones once."""
        check_max_tokens(max_tokens)
        if max_tokens is None or not draws:
            return [list(range(len(draws)))] if draws else []
        sequences = self._sequences(inputs, draws)
        written = [place for place, (_, completion) in enumerate(sequences) if completion]
        with self.lm.at_work() as model:
            found = self._scorer_of(model).groups([sequences[place] for place in written], max_tokens)
        groups = [[written[place] for place in group] for group in found]
        others = [place for place, (_, completion) in enumerate(sequences) if not completion]  # which take no room
        return [[*groups[0], *others], *groups[1:]] if groups else [others]

    @abstractmethod
    def _scorer_of(self, model: Any) -> Any:
        """What scores sequences with the model as it is now, and groups them."""

    def locate_non_finite(self, input: Any, draw: Draw) -> str:
        """The first token whose log-probability is not finite given what precedes it alone."""
        [(prompt, completion)] = self._sequences([input], [draw])
        if not completion:
            return ""
        with self.lm.at_work() as model:
            place = first_non_finite(partial(self._logits_after, model, prompt), completion)
        if place is None:
            return ""
        text = self.tokenizer.decode([completion[place]])
        return f"token {place + 1} of {len(completion)}, {text!r} (id {completion[place]})"

    @abstractmethod
    def _logits_after(self, model: Any, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
        """The logits (V,) of the token that follows the first ones of a completion, by a plain forward."""

    def _rows_at_once(self, rows: int, tokens: int) -> int:
        """How many of the rows that are asked for are decoded side by side, each of so many tokens."""
        most = max(1, self.max_batch_tokens // tokens)
        return min(rows, most if self.batch_size is None else min(most, self.batch_size))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of its adapter, where it has one; none where that is switched off."""
        return self.lm.own_parameters()

    def reference(self) -> Component:
        """The adapter switched off while it changes nothing yet, else a frozen copy of it, on the same model.

        Without an adapter the whole model is copied.

        Raises:
            PlanError: if the model's own weights cannot train: quantised, or under adapters of other components.
        """
        return self._on(self.lm.reference())

    def moving_reference(self) -> Component:
        """As `reference`, with a frozen copy of a new adapter on the same model."""
        return self._on(self.lm.reference(moves=True))

    def fresh(self) -> Component:
        if not self.lm.is_named:
            return super().fresh()
        made = self._on(self.lm.fresh())
        made._scorer = None
        return made

    def _on(self, lm: PretrainedLM) -> Self:
        """This component on another view of its model."""
        view = copy.copy(self)
        view.lm = lm
        return view

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        """Writes tokenizer and model; or the adapter in peft's layout and beside it, in `base/`, a base without a name.

        Components that share their base and are saved into one parent folder write it once.
        """
        options = {name: getattr(self, name) for name in self.saved_options}
        return {**self._saved_limits(), **options, **self._saved_chat(), **self.lm.save(folder)}

    def _saved_limits(self) -> dict[str, Any]:
        return {"max_new_tokens": self._max_new_tokens, "max_length": self._max_length}

    def _saved_chat(self) -> dict[str, Any]:
        return {"tools": schemas(self.tools), "chat_template_kwargs": self.chat_template_kwargs}

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        typed = next(each for each in cls.__mro__ if "saved_types" in vars(each))
        own = inspect.signature(cls).parameters.keys() - inspect.signature(typed).parameters.keys()  # of a subclass
        options = only(options, {**cls.saved_types, **dict.fromkeys(own, (object,))}, cls.__name__)
        if reserved := RESERVED & (options.get("chat_template_kwargs") or {}).keys():
            raise SerializationError(f"{cls.__name__}: chat_template_kwargs cannot set {sorted(reserved)}.")
        saved: dict[str, Any] = {n: options[n] for n in ("base", "base_of", "model_kwargs") if n in options}
        return cls(cls.pretrained.load(folder, saved), **{k: v for k, v in options.items() if k not in saved})

    @property
    def trusts_remote_code(self) -> bool:
        return self.lm.trusts_remote_code

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        super().read_from(folder, trust_remote_code=trust_remote_code)
        self.lm.read_from(folder, trust_remote_code=trust_remote_code)

    def prepare_training(self) -> None:
        """Has weights that train by themselves be fp32, unless another dtype was asked for (see `model_kwargs`)."""
        self.lm.prepare_training()

    @property
    def base_key(self) -> Hashable:
        return self.lm.base_key

    def share_base(self, others: Iterable[Component]) -> None:
        """Puts its adapter on the model of one of the others that names the same one, loaded alike."""
        self.lm.share_base_of_one(other.lm for other in others if isinstance(other, LanguageModel))

    def connect(self, components: Mapping[str, Component]) -> None:
        """Shares the loaded base of the component that it was saved with."""
        owner = components.get(self.lm.base_component or "")
        if owner is not self and isinstance(owner, LanguageModel):
            self.lm.share_base(owner.lm)

    def load_weights(self, folder: Path) -> None:
        self.lm.load_weights(folder)
