"""A choice among options that come with the input: passages, tools, answers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sysdag.components.component import Component, check_max_tokens
from sysdag.components.decoding import check_truncation, first_undrawable
from sysdag.components.input_reader import Argument, InputReader
from sysdag.components.random_streams import RowGenerator, row_seeds
from sysdag.components.selection import plackett_luce
from sysdag.components.selection.prompt import ChoicePrompt, ChoiceReader, read_prompt
from sysdag.components.selection.record import Chosen
from sysdag.components.selection.scorer import Scorer
from sysdag.components.selection.scorers import scorer_class, scorer_name
from sysdag.errors import DataError, PlanError, SerializationError, shown
from sysdag.files.saved_files import only
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from sysdag.components.footprint import Footprint


_SAVED: Mapping[str, tuple[type, ...]] = {
    "k": (int, type(None)), "temperature": (float,), "scorer": (str,), "of_scorer": (dict,),
}  # fmt: skip


_OF_SCORERS = (
    "model", "tokenizer", "processor", "peft_config", "model_kwargs", "max_length", "max_batch_tokens", "batch_size",
    "pack_prefixes", "tools", "chat_template_kwargs", "sanitize_control_tokens",
)  # fmt: skip
_OF_TEXTS = ("max_new_tokens", "stop", "grammar", "decoder")


class Choice(Component):
    """One of the options that a row has, or an ordered few of them: exact.

    The node's function returns the query and the list of options, as `(question, passages)`, or a `ChoicePrompt`. Rows
    may have any number of options. p(option) is the softmax of the options' scores over the temperature; k of them are
    drawn one after the other without replacement (Plackett-Luce), so their order counts. The value is the chosen
    option; with k, the list of the chosen ones in their order. The draw's record holds all `options` and the `index` of
    the chosen one, or the `indices`.

    An observed value is an option or its index, or a list of k of these. Equal options are told apart by their indices:
    each has a probability of its own, and an observed value that is equal to several must be given as an index. An
    integer is an option where any option is an integer, else an index. Of equal scores the earlier option comes first
    in a search.

    Args:
        scorer: what the scores are from: `BiEncoder`, `CrossEncoder`, `OptionLikelihood`, `FeatureScorer`, or one of
            your own (a subclass of `sysdag.components.selection.scorer.Scorer`).
        k: how many options are chosen, at most as many as a row has; None for one, whose value is no list.
        temperature: divides the scores, in sampling and in the likelihood. The cosines of a bi-encoder lie in [-1, 1]:
            0.05 is usual there.

    Raises:
        PlanError: for options out of range.
    """

    likelihood = "exact"
    is_density = False
    takes_row_seeds = True
    observes_in_context = True
    not_taken: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(_OF_SCORERS, "it belongs to the scorer, as in Choice(BiEncoder(...))"),
        **dict.fromkeys(_OF_TEXTS, "nothing is written, an option is chosen; see k and temperature"),
        **dict.fromkeys(
            ("top_p", "top_k"), "its draws are those of the whole distribution; MonteCarlo(...) candidates take it"
        ),
    }

    def __init__(self, scorer: Scorer, *, k: int | None = None, temperature: float = 1.0) -> None:
        if not isinstance(scorer, Scorer):
            raise PlanError(
                f"Choice(...) takes a scorer, as BiEncoder({scorer!r}) or CrossEncoder({scorer!r}) of a model's name, "
                "OptionLikelihood of a CausalLM, or FeatureScorer of a module."
            )
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise PlanError(f"Choice: k must be an integer of 1 or more, or None for one option, got {k!r}.")
        check_truncation("Choice", temperature, None, None)
        self.scorer = scorer
        self.k = k
        self.temperature = float(temperature)
        self.value_type = None if k is None else list
        self.row_options = scorer.input_reader().row_options

    def __repr__(self) -> str:
        several = "" if self.k is None else f", k={self.k}"
        return f"Choice({self.scorer!r}{several})"

    @property
    def _count(self) -> int:
        return 1 if self.k is None else self.k

    @property
    def module(self) -> nn.Module:
        return self.scorer.module

    def _prompts(self, inputs: Sequence[Any]) -> list[ChoicePrompt]:
        return [read_prompt(repr(self), value, self._count, element) for element, value in enumerate(inputs)]

    def _logits(self, prompts: Sequence[ChoicePrompt]) -> Float[Tensor, "B n"]:
        """The scores over the temperature; -inf behind the last option of a row."""
        scores = self.scorer.scores(prompts)
        for element, (prompt, own) in enumerate(zip(prompts, scores, strict=True)):
            if own.shape != (len(prompt.options),):
                raise PlanError(
                    f"{self!r}: its scorer must return one score for each of the {len(prompt.options)} options of row "
                    f"{element}, got shape {tuple(own.shape)}."
                )
        return nn.utils.rnn.pad_sequence(list(scores), batch_first=True, padding_value=-torch.inf) / self.temperature

    def _checked_logits(self, prompts: Sequence[ChoicePrompt]) -> Float[Tensor, "B n"]:
        """The logits, which something is drawn from.

        Raises:
            DataError: for a row whose scores are nan or +inf, or too many of them -inf.
        """
        logits = self._logits(prompts)
        element = first_undrawable(logits, least=self._count)
        if element is not None:
            own = logits[element, : len(prompts[element].options)].tolist()
            raise DataError(
                f"{self!r}: the scores of {self._count} options or more must be finite, got {own!r:.200} for the query "
                f"{shown(prompts[element].query)}; check what the node's function returns, and the weights.",
                element=element,
            )
        return logits

    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        return self.propose(inputs, generator=generator)

    @torch.no_grad()
    def propose(
        self,
        inputs: Sequence[Any],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: RowGenerator = None,
    ) -> list[Draw]:
        """See `Component`; the temperature multiplies the component's own, top_p and top_k cut each step anew."""
        check_truncation(repr(self), temperature, top_p, top_k)
        temperature, top_p = 1.0 if temperature is None else temperature, 1.0 if top_p is None else top_p
        prompts = self._prompts(inputs)
        if not prompts:
            return []
        logits, seeds = self._checked_logits(prompts), row_seeds(generator, len(prompts))
        if top_p < 1 or top_k:
            found = [
                plackett_luce.truncated_top_k(row[: len(p.options)], self._count, seed, temperature, top_p, top_k)
                for row, p, seed in zip(logits, prompts, seeds, strict=True)
            ]
            return [self._draw(prompt, *each) for prompt, each in zip(prompts, found, strict=True)]
        logits = logits / temperature
        drawn = plackett_luce.gumbel_top_k(logits, self._count, torch.tensor(seeds, device=logits.device))
        log_probs = plackett_luce.log_prob(logits, drawn).tolist()
        return [self._draw(*each) for each in zip(prompts, drawn.tolist(), log_probs, strict=True)]

    def _draw(self, prompt: ChoicePrompt, indices: Sequence[int], log_prob: float | None = None) -> Draw:
        return Chosen(tuple(prompt.options), tuple(indices)).draw(self.k is None, log_prob)

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        """Draws of options or their indices; which options there are depends on the input (see `in_context`)."""
        found = [self._values(value, element) for element, value in enumerate(values)]
        return [Draw(value if self.k is None else each) for value, each in zip(values, found, strict=True)]

    def _values(self, value: Any, element: int) -> list[Any]:
        """What an observed value says was chosen, one by one."""
        if self.k is None:
            return [value]
        if not isinstance(value, (list, tuple)) or len(value) != self.k:
            got = f"{len(value)}" if isinstance(value, (list, tuple)) else shown(value)
            raise DataError(f"{self!r}: a value is a list of {self.k} options or indices, got {got}.", element=element)
        return list(value)

    def in_context(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> list[Draw]:
        """Draws with the indices of what was chosen; a value that is an index becomes the option.

        Raises:
            DataError: for a value that is no option or is equal to several, or a draw that was made of other options.
        """
        return [
            draw if draw.record else chosen.draw(self.k is None)
            for draw, chosen in zip(draws, self._chosen(self._prompts(inputs), draws), strict=True)
        ]

    def _chosen(self, prompts: Sequence[ChoicePrompt], draws: Sequence[Draw]) -> list[Chosen]:
        """What each draw chose of its row's options; see `in_context`."""
        found = []
        for element, (prompt, draw) in enumerate(zip(prompts, draws, strict=True)):
            if draw.record:
                found.append(Chosen.of(repr(self), draw, self.k, element))
                found[-1].check_options(repr(self), prompt.options, element)
            else:
                values = self._values(draw.value, element)
                found.append(Chosen.observed(repr(self), prompt.options, values, element))
        return found

    def check_draws(self, draws: Sequence[Draw]) -> None:
        for element, draw in enumerate(draws):
            Chosen.of(repr(self), draw, self.k, element)

    def _scored(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> tuple[Float[Tensor, "B n"], Int[Tensor, "B k"]]:
        prompts = self._prompts(inputs)
        chosen = [each.indices for each in self._chosen(prompts, draws)]
        logits = self._logits(prompts)
        return logits, torch.tensor(chosen, device=logits.device)

    def log_prob(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        if not draws:
            return torch.zeros(0, device=self.device)
        return plackett_luce.log_prob(*self._scored(inputs, draws))

    @torch.no_grad()
    def typicality(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        return plackett_luce.typicality(*self._scored(inputs, draws))

    def search(
        self, inputs: Sequence[Any], num_candidates: int, diversity_penalty: float, ngram_size: int = 1
    ) -> list[list[Draw]]:
        """The most probable choices, best first; the penalty has nothing to tell apart."""
        prompts = self._prompts(inputs)
        with torch.no_grad():
            logits = self._checked_logits(prompts)
        return [
            [
                self._draw(prompt, each)
                for each in plackett_luce.best(row[: len(prompt.options)], self._count, num_candidates)
            ]
            for prompt, row in zip(prompts, logits.tolist(), strict=True)
        ]

    def outcome_counts(self, inputs: Sequence[Any]) -> list[int]:
        return [plackett_luce.count(len(prompt.options), self._count) for prompt in self._prompts(inputs)]

    def outcomes(self, inputs: Sequence[Any]) -> list[list[Draw]]:
        return [
            [self._draw(prompt, each) for each in plackett_luce.every(len(prompt.options), self._count)]
            for prompt in self._prompts(inputs)
        ]

    def key(self, draw: Draw) -> Any:
        """The indices: draws of one input are the same where these are."""
        if not draw.record:
            return json.dumps(draw.value, sort_keys=True, default=repr)
        return Chosen.of(repr(self), draw, self.k, 0).indices

    def lengths(self, draws: Sequence[Draw]) -> list[int]:
        """The steps of each choice."""
        return [self._count] * len(draws)

    def token_counts(self, draws: Sequence[Draw]) -> list[int]:
        raise PlanError(f"{self!r}: what scoring a draw takes depends on its input; see micro_batches.")

    def micro_batches(self, inputs: Sequence[Any], draws: Sequence[Draw], max_tokens: int | None) -> list[list[int]]:
        """See `Component`; what elements of a group have in common, as the passages of a corpus, counts once."""
        check_max_tokens(max_tokens)
        if max_tokens is None or not draws:
            return [list(range(len(draws)))] if draws else []
        groups: list[list[int]] = []
        held: dict[Hashable, int] = {}
        for element, pieces in enumerate(self.scorer.pieces(self._prompts(inputs))):
            if groups and sum(held.values()) + sum(n for key, n in pieces.items() if key not in held) <= max_tokens:
                groups[-1].append(element)
                held |= pieces
            else:
                groups.append([element])
                held = dict(pieces)
        return groups

    def cut_from(self, input: Any) -> int:
        """See `Component`; tokens of the query and the options together."""
        return self.scorer.cut_from(self._prompts([input])[0])

    def locate_non_finite(self, input: Any, draw: Draw) -> str:
        """The first option whose score is not finite."""
        with torch.no_grad():
            bad = (~self._logits(self._prompts([input]))[0].isfinite()).nonzero()[:, 0].tolist()
        return f"option {bad[0]}, {shown(draw.record['options'][bad[0]])}," if bad else ""

    def tell_apart(self, input: Any, function: Callable[..., Any], arguments: Mapping[str, Argument]) -> Any:
        return self.input_reader().tell_apart(input, function, arguments)

    def with_row_options(self, input: Any, options: Mapping[str, Any]) -> Any:
        return self.input_reader().with_row_options(input, options)

    def input_reader(self) -> InputReader:
        reader = self.scorer.input_reader()
        return reader if type(reader) is InputReader else ChoiceReader(repr(self), reader)

    @property
    def tells_options_apart(self) -> bool:
        return self.scorer.tells_options_apart

    def footprint(
        self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str, **others: Any
    ) -> Footprint | None:
        """See `Component`; tokens are those of queries and options, as `micro_batches` counts them."""
        return self.scorer.footprint(
            tokens=tokens, labels=labels, trains=trains, checkpoints=checkpoints, device=device, **others
        )

    @property
    def base_model(self) -> str | None:
        return self.scorer.base_model

    @property
    def base_key(self) -> Hashable:
        return self.scorer.base_key

    def share_base(self, others: Iterable[Component]) -> None:
        self.scorer.share_base(others)

    def connect(self, components: Mapping[str, Component]) -> None:
        self.scorer.connect(components)

    def prepare_training(self) -> None:
        self.scorer.prepare_training()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        return self.scorer.own_parameters()

    def reading(self) -> str:
        return self.scorer.reading()

    def _with(self, scorer: Scorer) -> Self:
        view = copy.copy(self)
        view.scorer = scorer
        return view

    def reference(self) -> Choice:
        return self._with(self.scorer.reference())

    def moving_reference(self) -> Choice:
        return self._with(self.scorer.reference(moves=True))

    def fresh(self) -> Component:
        scorer = self.scorer.fresh()
        return super().fresh() if scorer is None else self._with(scorer)

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        saved = self.scorer.save(folder)
        return {"k": self.k, "temperature": self.temperature, "scorer": scorer_name(self.scorer), "of_scorer": saved}

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        return self.scorer.usage(folder, options["of_scorer"])

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        options = only(options, _SAVED, cls.__name__, required=_SAVED)
        scorer = scorer_class(options["scorer"]).load(folder, options["of_scorer"])
        return cls(scorer, k=options["k"], temperature=options["temperature"])

    @property
    def trusts_remote_code(self) -> bool:
        return self.scorer.trusts_remote_code

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        super().read_from(folder, trust_remote_code=trust_remote_code)
        self.scorer.read_from(folder, trust_remote_code=trust_remote_code)

    def refilled(self, folder: Path, options: Mapping[str, Any]) -> Self:
        if scorer_name(self.scorer) != options["scorer"] or self.k != options["k"]:
            raise SerializationError(
                f"{self!r} is another choice than the one that was saved, by {options['scorer']} with k={options['k']}."
            )
        made = self._with(self.scorer.refilled(folder, options["of_scorer"]))
        made.temperature = options["temperature"]
        return made

    def load_weights(self, folder: Path) -> None:
        self.scorer.load_weights(folder)
