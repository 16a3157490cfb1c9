"""From what a node's function returned to the keyword arguments of a denoiser.

Kinds of conditioning, one a batch: text, vectors, class labels, nothing, or whatever the user's own hook makes of it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy
import torch
from jaxtyping import Int
from torch import Tensor, nn

from sysdag.components.diffusion import rows
from sysdag.components.diffusion.kept_texts import KeptTexts, version_of
from sysdag.errors import DataError, PlanError

logger = logging.getLogger(__name__)

Hook = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Conditioner:
    """Turns a batch of inputs into keyword arguments of `denoiser`.

    Attributes:
        text_encoder, tokenizer: for text; both or neither.
        hook: makes the arguments itself from the list of inputs, instead of everything else here.
        train_text_encoder: whether gradients reach the text encoder.
        mask_padding: whether padding tokens are hidden from text encoder and denoiser. None: hidden, except for CLIP,
            whose padding Stable Diffusion and its relatives were trained to see.
        max_text_length: tokens that every text is padded or cut to; None: the tokenizer's limit.
        null_class: the label that means "no class", for guidance; None: the model's own, where it has one.
        kept: keeps what a text encoder that does not train makes of texts; None: nothing is.
    """

    denoiser: Any
    text_encoder: Any = None
    tokenizer: Any = None
    hook: Hook | None = None
    train_text_encoder: bool = False
    mask_padding: bool | None = None
    max_text_length: int | None = None
    null_class: int | None = None
    kept: KeptTexts | None = None

    def __call__(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The arguments for a batch; every tensor has the batch as its first axis.

        Raises:
            DataError: for an input of a kind that differs from the first one's or that the model cannot take.
        """
        if self.hook is not None:
            return self._from_hook(list(inputs))
        kinds = [kind_of(value, element) for element, value in enumerate(inputs)]
        for element, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise DataError(
                    f"expected one kind of conditioning in a batch, {kinds[0]} as in element 0, got {kind}.",
                    element=element,
                )
        self._check_takes(kinds[0])
        match kinds[0]:
            case "text":
                return self._from_text(inputs)
            case "vector":
                return self._from_vectors(inputs)
            case "class label":
                return {"class_labels": self._labels(inputs), **self._no_states(len(inputs))}
        labels = {"class_labels": torch.full((len(inputs),), self._null_class)} if self._has_classes else {}
        return {**labels, **self._no_states(len(inputs))}

    def unconditional(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The arguments that guidance pushes away from: the empty text, zero vectors, the null class, or the hook's
        arguments for a list of None.

        Raises:
            PlanError: if the model has no unconditional form for this kind of input.
        """
        nothing = [None] * len(inputs)
        if self.hook is not None:
            return self._from_hook(nothing)
        match kind_of(inputs[0], 0):
            case "text":
                return self._from_text([""] * len(inputs))
            case "vector":
                return self._zero_states(len(inputs))
            case "nothing":
                raise PlanError("guidance_scale other than 1 needs conditioning, but the inputs are None.")
            case _ if self._has_classes and self._null_class is None:
                raise PlanError(
                    f"guidance_scale needs a label that means 'no class', and {self._name} has none of its own; pass "
                    "null_class."
                )
        return self(nothing)

    def typical(self, count: int) -> list[Any]:
        """Inputs of the kind that the model is made for: text, a class label, a vector, or None."""
        if self.text_encoder is not None:
            return [""] * count
        if self._has_classes:
            return [0] * count
        if "encoder_hidden_states" in self._parameters and self._width is not None:
            return [numpy.zeros(self._width, dtype=numpy.float32)] * count
        return [None] * count

    def tokens_lost(self, text: str) -> int:
        """Tokens of a text for which its encoder has no room."""
        return max(0, len(self.tokenizer(text)["input_ids"]) - self._longest)

    @property
    def _longest(self) -> int:
        positions = getattr(self.text_encoder.config, "max_position_embeddings", None) or 512
        return self.max_text_length or min(self.tokenizer.model_max_length, positions)

    # What the model takes

    @property
    def _name(self) -> str:
        return type(self.denoiser).__name__

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.denoiser.forward).parameters

    @property
    def _config(self) -> Mapping[str, Any]:
        return getattr(self.denoiser, "config", {})

    @property
    def _width(self) -> int | None:
        """Size of the hidden states that the model attends to; None where it cannot be told."""
        for key in ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim"):
            size = self._config.get(key)
            if isinstance(size, (list, tuple)) and len(set(size)) == 1:
                size = size[0]
            if isinstance(size, int) and not isinstance(size, bool):
                return size
        return None

    @property
    def _num_classes(self) -> Any:
        if "class_labels" not in self._parameters:
            return None
        is_dit = self._config.get("norm_type") == "ada_norm_zero"
        return self._config.get("num_class_embeds") or (self._config.get("num_embeds_ada_norm") if is_dit else None)

    @property
    def _has_classes(self) -> bool:
        return self._num_classes is not None

    @property
    def _null_class(self) -> Any:
        if self.null_class is not None:
            return self.null_class
        # DiT's label table has one row more than classes, for classifier-free guidance.
        return self._num_classes if self._config.get("norm_type") == "ada_norm_zero" else None

    def _check_takes(self, kind: str) -> None:
        attends = "encoder_hidden_states" in self._parameters
        pooled = "pooled_projections" in self._parameters or self._config.get("addition_embed_type") is not None
        if pooled or (attends and self._config.get("use_additional_conditions")):
            raise DataError(
                f"{self._name} needs more than one kind of conditioning (pooled embeddings or sizes); pass condition=, "
                "a function from the list of inputs to the model's keyword arguments.",
                element=0,
            )
        if self._has_classes and kind != "class label" and not (kind == "nothing" and self._null_class is not None):
            limit = self._num_classes
            raise DataError(f"{self._name} takes a class label (int below {limit}), got {kind}.", element=0)
        if kind == "class label" and not self._has_classes:
            raise DataError(f"{self._name} has no classes; expected {self._expected(attends)}, got {kind}.", element=0)
        if kind in ("text", "vector") and not attends:
            raise DataError(f"{self._name} takes no {kind}; expected {self._expected(attends)}.", element=0)
        if kind == "text" and self.text_encoder is None:
            raise DataError(
                f"got text, but {self._name} came without text_encoder and tokenizer; pass both, or return vectors.",
                element=0,
            )

    def _expected(self, attends: bool) -> str:
        if not attends:
            return "None (an unconditional model)"
        return "text or a float vector" if self.text_encoder is not None else "a float vector (D,) or (L, D)"

    # The kinds

    def _labels(self, inputs: Sequence[Any]) -> Int[Tensor, " n"]:
        for element, label in enumerate(inputs):
            if not 0 <= label < self._num_classes and label != self._null_class:
                raise DataError(
                    f"expected a class label in 0..{self._num_classes - 1}, got {label}.",
                    element=element,
                )
        return torch.tensor([int(label) for label in inputs])

    def _no_states(self, count: int) -> dict[str, Any]:
        """Hidden states of nothing, for a model that cannot be called without any."""
        parameter = self._parameters.get("encoder_hidden_states")
        if parameter is None or (self._width is None and parameter.default is not parameter.empty):
            return {}
        return self._zero_states(count) if self.text_encoder is None else self._from_text([""] * count)

    def _zero_states(self, count: int) -> dict[str, Any]:
        if self._width is None:
            raise PlanError(f"{self._name} does not say the size of its encoder_hidden_states; pass condition=.")
        return {"encoder_hidden_states": torch.zeros(count, 1, self._width)}

    def _from_vectors(self, inputs: Sequence[Any]) -> dict[str, Any]:
        vectors = [torch.as_tensor(numpy.asarray(v) if not isinstance(v, Tensor) else v).float() for v in inputs]
        for element, row in enumerate(vectors):
            if row.ndim > 2 or row.numel() == 0 or (self._width is not None and row.shape[-1] != self._width):
                raise DataError(
                    f"expected a vector (D,) or (L, D) with D = {self._width or 'the width of the model'}, got shape "
                    f"{tuple(row.shape)}.",
                    element=element,
                )
        vectors = [row[None] if row.ndim == 1 else row for row in vectors]
        lengths = [len(row) for row in vectors]
        states = nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        if len(set(lengths)) == 1:
            return {"encoder_hidden_states": states}
        if "encoder_attention_mask" not in self._parameters:
            element = next(i for i, length in enumerate(lengths) if length != lengths[0])
            raise DataError(
                f"{self._name} takes no encoder_attention_mask, so each element of a batch must be as many vectors: "
                f"expected {lengths[0]} as in element 0, got {lengths[element]}.",
                element=element,
            )
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask.long()}

    def _from_text(self, texts: Sequence[str]) -> dict[str, Any]:
        if self.kept is None or self.train_text_encoder:
            states, mask = self._encoded(texts)
        else:
            device = next(self.text_encoder.parameters()).device
            computes = self.text_encoder.dtype, torch.is_autocast_enabled(device.type)
            maker = (
                id(self.text_encoder), version_of(self.text_encoder), device, computes, self._hides_padding,
                self.max_text_length,
            )  # fmt: skip
            states, mask = self.kept.of(texts, maker, device, self._encoded)
        if self._hides_padding and "encoder_attention_mask" in self._parameters:
            return {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        return {"encoder_hidden_states": states}

    @property
    def _hides_padding(self) -> bool:
        return "clip" not in self.text_encoder.config.model_type if self.mask_padding is None else self.mask_padding

    def _encoded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (n, L, D), and which tokens are seen (n, L)."""
        encoder, tokenizer = self.text_encoder, self.tokenizer
        if tokenizer.pad_token_id is None:
            raise PlanError(f"The tokenizer {type(tokenizer).__name__} has no padding token; set tokenizer.pad_token.")
        limit = self._longest
        batch = tokenizer(list(texts), padding="max_length", max_length=limit, truncation=True)
        for element, text in enumerate(texts):
            if all(batch["attention_mask"][element]) and self.tokens_lost(text):
                logger.warning("Text %d was cut to %d tokens: %.80r", element, limit, text)
        device = next(encoder.parameters()).device
        token_ids = torch.tensor(batch["input_ids"], device=device)
        mask = torch.tensor(batch["attention_mask"], device=device) if self._hides_padding else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_text_encoder):
            states = encoder(token_ids, attention_mask=mask).last_hidden_state
        return states, token_ids.new_ones(token_ids.shape) if mask is None else mask

    def _from_hook(self, inputs: list[Any]) -> dict[str, Any]:
        assert self.hook is not None
        made = self.hook(inputs)
        if not isinstance(made, Mapping):
            raise PlanError(f"condition= must return a dict of the model's arguments, got {type(made).__name__}.")
        unknown = sorted(made.keys() - self._parameters.keys())
        if unknown:
            raise PlanError(f"condition= made {unknown}, which {self._name} does not take: {list(self._parameters)}.")
        for (first, *inner), tensor in rows.leaves(made):
            if isinstance(tensor, Tensor) and tensor.shape[:1] != (len(inputs),):
                name = first + "".join(f"[{key!r}]" for key in inner)
                raise PlanError(
                    f"condition= made {name} of shape {tuple(tensor.shape)}; its first axis must be the batch of "
                    f"{len(inputs)}."
                )
        return dict(made)


def kind_of(value: Any, element: int | None = None) -> str:
    """`text`, `vector`, `class label` or `nothing`.

    Raises:
        DataError: for anything else.
    """
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Integral) and not isinstance(value, bool):
        return "class label"
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
        return "vector"
    if isinstance(value, (numpy.ndarray, list, tuple)):
        try:
            array = numpy.asarray(value)
        except ValueError:  # rows of different lengths
            array = numpy.empty(0, dtype=object)
        if array.dtype.kind == "f" and array.ndim:
            return "vector"
    raise DataError(
        "expected text (str), a float vector (D,) or (L, D), a class label (int) or None, got "
        f"{type(value).__name__} {value!r:.100}.",
        element=element,
    )
