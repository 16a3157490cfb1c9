"""What a component meets: the conditional distribution of a node, with its weights.

A component works on flat lists: one input and one draw an element. Rows, plates and candidates are the executor's
business, so a component knows neither the graph nor the objective.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.constructor_options import ConstructorOptions
from sysdag.components.input_reader import InputReader
from sysdag.components.module_walk import modules_of
from sysdag.components.random_streams import RowGenerator, seed_of
from sysdag.errors import DeclarationNeeded, PlanError, shown
from sysdag.graph.variables import LikelihoodKind
from sysdag.traces.cells import Draw

if TYPE_CHECKING:
    from sysdag.components.footprint import Footprint
    from sysdag.components.residence import Residence
    from sysdag.graph.parts import Partition


Takes = Callable[[Any, Any], bool]
"""Whether a value surely can be scored behind an input; see `Component.screen`."""


class Component(InputReader, ConstructorOptions, ABC):
    """A conditional distribution p(value | input).

    Constructors are cheap: weights load when `module` is first read, so a graph can be built, printed and saved
    without them.

    Class attributes:
        not_taken: see `ConstructorOptions`.
        likelihood: `exact` (log-probabilities), `bound` (a per-draw estimate of a lower bound, never summed over
            candidates) or `none`.
        value_type: the type of a drawn value, where it is always the same; lets `.each()` be checked early.
        reads_files: whether an observed text is a file's path; in the rows of a file it is relative to that one's
            folder.
        is_density: whether an exact `log_prob` is the logarithm of a density, as a Gaussian's, and not of a
            probability. None where the values tell: real numbers, and arrays of them, come from a density.
        has_tokens: whether `lengths` counts tokens, so that a likelihood can be averaged over them.
        row_options: see `InputReader`.
        takes_row_seeds: whether `sample` and `propose` are given a seed for each input, which what is drawn for it
            depends on, whatever is drawn beside it. Else they get one generator for all.
        observes_in_context: whether an observed value may stand for another, which its input tells (the number of an
            option): `in_context` finds it, before anything else reads the value.
        winner_safeguard: of a bound, how much of the winner's gradient is to stay (see `sysdag.engine.safeguard`); None
            where that is not looked after.

    Attributes:
        saved_folder: of a component of a saved system, where what it loads late is read from; errors name it.
        residence: what moves frozen weights to the host while others work, where an engine does (`offload_idle`).
    """

    likelihood: ClassVar[LikelihoodKind]
    value_type: type | None = None
    reads_files: ClassVar[bool] = False
    is_density: ClassVar[bool | None] = None
    has_tokens: ClassVar[bool] = False
    takes_row_seeds: ClassVar[bool] = False
    observes_in_context: ClassVar[bool] = False
    residence: Residence | None = None
    winner_safeguard: float | None = None
    saved_folder: Path | None = None

    @property
    def module(self) -> nn.Module | None:
        """The weights, loaded on first access; None for a component without any."""
        return None

    @property
    def parts_objection(self) -> str:
        """Why it cannot write a completion in parts (see `sysdag.graph.parts`); "" where it can."""
        return "it writes no text whose tokens can be cut; CausalLM does"

    def check_partition(self, partition: Partition) -> None:
        """Refuses parts that it cannot tell apart; loads nothing.

        Raises:
            GraphError: with the reason.
        """
        return

    def part_values(self, value: Any, partition: Partition) -> list[Any] | None:
        """The parts of a whole completion, in order; None for a value that is none."""
        return None

    def is_over(self, input: Any) -> bool:
        """Whether nothing is left to be drawn for an input: its value is the empty one, with probability 1."""
        return False

    @property
    def draws_without_weights(self) -> bool:
        """Whether `sample` leaves the weights unread, as where a server draws."""
        return False

    @property
    def base_model(self) -> str | None:
        """The name or folder of the pretrained model that it was made from; None where there is none."""
        return None

    @property
    def base_key(self) -> Hashable:
        """Equal for components whose own weights are on one loaded model; None where they share with none."""
        return None

    def share_base(self, others: Iterable[Component]) -> None:
        """Loads nothing that one of the others, which come before it in a system, loads already."""
        return

    def prepare_training(self) -> None:
        """Called before the weights train, and before they load if they have not: for what training asks of them."""
        return

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a component without any."""
        parameter = None if self.module is None else next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @abstractmethod
    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        """Draws one value for each input, with no gradient.

        An exact component fills `Draw.log_prob`, and `log_prob` of the draw gives the same number.

        Args:
            generator: a CPU generator; torch's global one for None. A component that `takes_row_seeds` is given the
                seed of each input instead, and what it draws for one depends on that alone.
        """

    def generator_for(self, seeds: Sequence[int]) -> RowGenerator:
        """What `sample` and `propose` are given to draw for inputs with these seeds."""
        return list(seeds) if self.takes_row_seeds else torch.Generator().manual_seed(seed_of(*seeds))

    def propose(
        self,
        inputs: Sequence[Any],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        generator: RowGenerator = None,
    ) -> list[Draw]:
        """Draws with other options than `sample`; `Draw.log_prob` is under the distribution they were drawn from.

        Args:
            temperature, top_p, top_k: None leaves the component's own; top_k=0 is all.
        """
        raise PlanError(f"{self!r} cannot be sampled at another temperature, top_p or top_k.")

    @abstractmethod
    def observe(self, values: Sequence[Any]) -> list[Draw]:
        """Draws that stand for given values (a completion's text, an image).

        Where their records depend on the input, as a completion's tokens do on the prompt, `in_context` makes them.

        Raises:
            DataError: for a value that this component could not have drawn; `DataError.element` is its index.
        """

    def in_context(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> list[Draw]:
        """Draws with the records that they are scored by, given their inputs; loads no weights.

        What was sampled, or is complete without its input, comes back as it is; so does what came from here.

        Raises:
            DataError: for a value that cannot follow its input; `DataError.element` is its index.
        """
        return list(draws)

    def input_reader(self) -> InputReader:
        """What does the same with an input as this component, where the node's function is called by another process.

        Raises:
            PlanError: for a class that overrides what an `InputReader` does, and not this.
        """
        own = type(self)
        if own.tell_apart is not InputReader.tell_apart or own.with_row_options is not InputReader.with_row_options:
            raise PlanError(
                f"{self!r} reads its inputs in a way of its own: override `input_reader(self)` in {own.__name__} to "
                "return an InputReader that does the same without the weights, so that it can be sent to Ray's tasks."
            )
        return InputReader()

    def check(self, values: Sequence[Any]) -> list[Draw]:
        """As `observe`, as far as that goes without loading weights: some records may be missing."""
        return self.observe(values)

    def check_draws(self, draws: Sequence[Draw]) -> None:
        """Refuses draws, made elsewhere or read from a file, whose records it cannot score; loads no weights.

        Raises:
            DataError: `DataError.element` is the draw's index.
        """
        return

    def is_empty(self, draw: Draw) -> bool:
        """Whether there is nothing in a draw that could be preferred: a completion without text."""
        return False

    def longest_draw(self, input: Any = None) -> int | None:
        """Most `positions` of a draw that there is room for, without loading weights; None if unlimited.

        Args:
            input: what it is drawn from, as for `sample`; None for the most that any input leaves room for.
        """
        return None

    def screen(self) -> Takes | None:
        """What tells fast, without weights, of most inputs and values that they can be scored whole, and of no others.

        Returns:
            a function of an input (None where it is not known) and a value: whether the value surely can be scored
            behind the whole input, as `check`, `in_context`, `longest_draw` and `cut_from` would say. None where none
            can be told.
        """
        return None

    def cut_from(self, input: Any) -> int:
        """How many positions of an input are cut off because there is no room for them, without loading weights."""
        return 0

    def log_prob(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        """Natural log-probability of each draw given its input, differentiable, fp32 or better."""
        if self.likelihood != "exact":
            raise PlanError(f"{self!r} has no exact likelihood (its kind is {self.likelihood!r}).")
        raise PlanError(
            f"{self!r} has an exact likelihood, but no log-probabilities: override `log_prob(self, inputs, draws)` in "
            f"{type(self).__name__}."
        )

    def noise(self, draws: Sequence[Draw], generator: torch.Generator | None = None) -> Any:
        """What a bound's estimate is random in, for these draws; passed to both policy and reference.

        Its `select(elements)` gives the noise of some of the draws, which may repeat; its `join(parts)` that of
        several lists of draws.
        """
        return None

    def fit_noise(self, noise: Any, draws: Sequence[Draw], generator: torch.Generator | None = None) -> Any:
        """Noise for these draws that has in common with `noise`, made for others, what their shapes let them share."""
        return noise

    def score(self, inputs: Sequence[Any], draws: Sequence[Draw], noise: Any = None) -> Float[Tensor, " n"]:
        """What enters a preference margin: the log-probability, or for a bound its estimate at the given noise."""
        return self.log_prob(inputs, draws)

    def weighted_score(
        self, inputs: Sequence[Any], draws: Sequence[Draw], heads: Sequence[int], tail: float
    ) -> Float[Tensor, " n"]:
        """As `score`, with the terms of each draw's log-likelihood behind its first `heads` weighted by `tail`.

        A draw whose likelihood is a single term has nothing behind it.
        """
        return self.score(inputs, draws)

    def typicality(self, inputs: Sequence[Any], draws: Sequence[Draw]) -> Float[Tensor, " n"]:
        """Sum over a draw's terms of log p - log sum_v p(v)^2, without gradient.

        The second is the probability that two draws agree: the scale on which the first says how typical the draw is
        (WPO, Zhou et al. 2024, arXiv 2406.11827).
        """
        raise PlanError(
            f"{self!r} does not know the distributions that its draws are from: override `typicality(self, inputs, "
            f"draws)` in {type(self).__name__}, or leave out use_weighting."
        )

    def take_auxiliary_loss(self) -> tuple[float, Tensor] | None:
        """What the model's training adds to its loss for the draws scored last, once: a coefficient and the loss, ().

        The load balancing of a mixture of experts; None for most models.
        """
        return None

    def take_residuals(self) -> list[Tensor] | None:
        """What the model answered minus what it should have, for each draw scored last, once; see `winner_safeguard`.

        One tensor a draw without gradient, weighted as its square is in the score.
        """
        return None

    @property
    def drops_inputs(self) -> bool:
        """Whether `noise` in train mode hides the inputs of some draws, so that they score otherwise in evaluation."""
        return False

    def usual_beta(self, draws: Sequence[Draw]) -> tuple[float, float] | None:
        """From which to which beta scores on the scale of a bound are usually trained; loads no weights.

        None where that is not told, and for log-probabilities.
        """
        return None

    def lengths(self, draws: Sequence[Draw]) -> list[int]:
        """How many terms each draw's log-likelihood sums: scored tokens of a text, 1 for anything else.

        Of a draw that `in_context` would complete it may be an estimate.
        """
        return [1] * len(draws)

    def positions(self, draws: Sequence[Draw]) -> list[int]:
        """How many positions each draw takes behind its input: those that `lengths` counts, and any only read."""
        return self.lengths(draws)

    def locate_non_finite(self, input: Any, draw: Draw) -> str:
        """Where in one draw the log-likelihood stops being finite, in words, for an error; "" where it cannot tell."""
        return ""

    def token_counts(self, draws: Sequence[Draw]) -> list[int]:
        """What scoring each draw weighs in a micro-batch, in positions that its model computes."""
        return [1] * len(draws)

    def micro_batches(self, inputs: Sequence[Any], draws: Sequence[Draw], max_tokens: int | None) -> list[list[int]]:
        """Partition of the elements into groups that are scored one after the other, in bounded memory.

        Group g is scored by `score([inputs[i] for i in g], [draws[i] for i in g], noise.select(g))`. Equal arguments
        give equal groups.

        Args:
            max_tokens: most positions of a group (see `token_counts`); None puts all elements into one group. An
                element that is larger is a group of its own.

        Raises:
            PlanError: if `max_tokens` is below 1.
        """
        check_max_tokens(max_tokens)
        found: list[list[int]] = []
        filled = 0
        for element, count in enumerate(self.token_counts(draws)):
            if not found or (max_tokens is not None and filled + count > max_tokens):
                found.append([])
                filled = 0
            found[-1].append(element)
            filled += count
        return found

    def footprint(self, *, tokens: int, labels: int, trains: bool, checkpoints: bool, device: str) -> Footprint | None:
        """Memory of a micro-batch and of the weights, without loading them; None where that is not known.

        Args:
            tokens: of a micro-batch, as `token_counts` counts them.
            labels: how many of them a language model scores.
            trains: False for a model that is frozen.
            checkpoints: whether it recomputes its activations (gradient checkpointing).
            device: `cpu` or `cuda`, whose kernels are assumed.
        """
        return None

    @property
    def tells_options_apart(self) -> bool:
        """Whether options that are chosen from have weights of their own that train.

        `footprint` is then told as `options` how many of the tokens are theirs; None where that is not known.
        """
        return False

    def shares_prefixes(self, longest: int) -> bool:
        """Whether what elements of a micro-batch begin with is computed once, as far as that is known without weights.

        Where it is not, `footprint` is told `tries=False` and the number of elements as `rows`.

        Args:
            longest: tokens of an element.
        """
        return True

    def tokens_of_images(self, sizes: Sequence[tuple[int, int]]) -> int | None:
        """How many tokens of a prompt stand for images of such sizes (width, height); None where prompts hold none.

        Where it is a number, `footprint` is told these sizes as `images`, and as `rows` how many prompts of a
        micro-batch have their images computed.

        Raises:
            DataError: for sizes that the component does not take.
        """
        return None

    def decoding_bytes(self, *, rows: int, tokens: int, device: str) -> int:
        """What drawing or searching takes beside the weights, without loading them; 0 where that is not known.

        Args:
            rows: that are asked for; fewer may be drawn side by side.
            tokens: of a row, its prompt's among them.
            device: `cpu` or `cuda`.
        """
        return 0

    def tokens_of_any_draw(self) -> int | None:
        """What `token_counts` says of every draw, without loading weights; None where it depends on the draw."""
        return None

    def key(self, draw: Draw) -> Any:
        """A hashable value that two draws share exactly when they are the same outcome; by default the drawn value.

        Raises:
            PlanError: for a value without a hash, where a subclass does not override this.
        """
        try:
            hash(draw.value)
        except TypeError as error:
            raise PlanError(
                f"{self!r} drew {shown(draw.value)}, which has no hash ({error}), so that equal candidates cannot be "
                f"told: override `key(self, draw)` in {type(self).__name__} to return something hashable, as a tuple."
            ) from error
        return draw.value

    def search(
        self, inputs: Sequence[Any], num_candidates: int, diversity_penalty: float, ngram_size: int = 1
    ) -> list[list[Draw]]:
        """Up to `num_candidates` distinct values of high probability for each input, best first; the penalty and the
        size of the n-grams it counts are those of a diverse beam search."""
        raise PlanError(f"{self!r} cannot be searched; use MonteCarlo candidates.")

    def outcome_counts(self, inputs: Sequence[Any]) -> list[int] | None:
        """How many different draws each input has; None where that is not known, or infinite. Loads no weights.

        By default as many as there are in `values`, for a class that has them: the same for every input.
        """
        values = getattr(self, "values", None)
        return None if values is None else [len(values)] * len(inputs)

    def outcomes(self, inputs: Sequence[Any]) -> list[list[Draw]]:
        """Every different draw of each input, as many as `outcome_counts` says; loads no weights."""
        values = getattr(self, "values", None)
        if values is None:
            raise PlanError(f"{self!r} does not draw from finitely many values.")
        return [self.observe(list(values))] * len(inputs)

    def reference(self) -> Component:
        """A frozen component that scores as this one does now and keeps doing so while this one trains.

        Its `module` may share weights with this one's (an adapter switched off).
        """
        if self.module is None:
            raise PlanError(f"{self!r} has no weights to compare with a reference.")
        raise PlanError(
            f"{self!r} has weights, but its reference is not known: override `reference(self)` in "
            f"{type(self).__name__} to return a frozen copy (copy.copy(self) with a deep copy of its module that "
            "requires no gradient), or keep it fixed with nodes={'<node>': {'trainable': False}}."
        )

    def moving_reference(self) -> Component:
        """As `reference`, with weights of its own for all that trains here: it will follow them (`sync_ref_model`)."""
        return self.reference()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train as this component's, by name: those of its adapter, where several share a model.

        A reference's have the names of the policy's, unless it has none of its own (an adapter switched off).
        """
        return {} if self.module is None else dict(self.module.named_parameters())

    def reading(self) -> str:
        """What its scores depend on beside weights and plain options (a tokenizer's vocabulary), as a hash; or ""."""
        return ""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        """Writes the weights in their own library's format; returns the JSON-ready options to build it again."""

    def save_checkpoint(self, folder: Path) -> Mapping[str, Any]:
        """As `save_pretrained` in the middle of a training: what is frozen, and can be had elsewhere, may be left out.

        `from_pretrained` and `load_weights` take it as they take that.
        """
        return self.save_pretrained(folder)

    def usage(self, folder: Path, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        """How other libraries load what `save_pretrained` wrote: words, and Python in which `folder` is its folder.

        Args:
            folder: where that was.
            options: what it returned.
        """
        return []

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        """A component from what `save_pretrained` wrote and returned.

        Raises:
            DeclarationNeeded: where the folder is not enough, as for a module of the user's own; a system that is
                loaded then takes the component that the node has in its own module, `refilled`.
        """
        raise DeclarationNeeded(f"{cls.__name__} has no `from_pretrained` that builds it from its folder.")

    @property
    def trusts_remote_code(self) -> bool:
        """Whether whoever made it lets code run that comes with its model."""
        return False

    def read_from(self, folder: Path, *, trust_remote_code: bool) -> None:
        """Called on what `from_pretrained` made of a saved system's folder.

        Args:
            trust_remote_code: whether whoever loads lets code run that comes with a model.
        """
        self.saved_folder = folder

    def refilled(self, folder: Path, options: Mapping[str, Any]) -> Self:
        """A copy of this component, which its user declares, with what `save_pretrained` wrote.

        Args:
            options: what that returned.

        Raises:
            SerializationError: if this is another component than the saved one.
        """
        made = copy.deepcopy(self)
        if made.module is not None:
            made.load_weights(folder)
        return made

    def fresh(self) -> Component:
        """This component as it was before its weights were loaded and trained; itself where it has none.

        Raises:
            PlanError: if its weights were given as an object, which has been trained in place.
        """
        if self.module is None:
            return self
        raise PlanError(
            f"{self!r} has weights that it was given as an object, or its class does not know where they are from "
            f"(`fresh(self)` of {type(self).__name__}), so there are no untrained ones to go back to. Build it again "
            "and use system.with_components."
        )

    def connect(self, components: Mapping[str, Component]) -> None:
        """Finds what it was saved to share with others among the components of the loaded system, by their keys."""
        return

    def load_weights(self, folder: Path) -> None:
        """Replaces the weights in place by those that `save_pretrained` wrote (a checkpoint being resumed)."""
        if self.module is None:
            raise PlanError(f"{self!r} has no weights to load.")
        raise PlanError(
            f"{self!r} has weights, but they cannot be loaded in place: override `load_weights(self, folder)` in "
            f"{type(self).__name__} to read what `save_pretrained` wrote."
        )


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, with the mode of every module inside put back afterwards."""
    training = [part for part in modules_of(module) if part.training]
    if training:
        module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def named_source(model: Any) -> str | None:
    """What a model is called by, or was loaded from: a name, a folder, or a model object."""
    if isinstance(model, (str, Path)):
        return str(model)
    return (
        getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    )


def check_max_tokens(max_tokens: int | None) -> None:
    """Raises a PlanError for a budget that holds nothing."""
    if max_tokens is not None and max_tokens < 1:
        raise PlanError(f"micro_batches needs max_tokens >= 1, or None for one group of all, got {max_tokens}.")
