"""What a processor makes of the images of one prompt, and the tokens that stand for them.

A model puts the features of images where placeholders stand, all of one token id. So that equal ids are equal inputs,
as decoding and packed scoring have it, the placeholders of a prompt get an id of their own, above any vocabulary: a
hash of its images and of the text up to the last of them (SGLang tells the prefixes in its cache apart in this way). It
is taken back where the model is called (`image_forward`). Two sequences that share such an id are thus the same up to
their last image.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sysdag.components.footprint import bytes_of
from sysdag.components.language.vision.image_parts import HeldImage
from sysdag.errors import DataError, PlanError

FIRST = 1 << 61  # above any vocabulary; below 2 ** 62, so that sums of few stay 64-bit integers
HELD_BYTES = 1 << 29
_LATEST = 64  # which live until a prompt that has them is kept
# Of what processors make of images, what stands beside the tokens; each either one entry an image (or patch of it), or
# one a row with its images along the second axis. `_Layout` finds out which.
_BESIDE = (
    "pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes", "batch_num_images",
    "image_position_ids",
)  # fmt: skip
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What tells of each token whether it is an image's."""


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images of a prompt, as far as they are told apart.

    Attributes:
        token: the id that their placeholders have in sequences.
        count: how many placeholders there are.
        images: what they are, in their order.
        text: the rendered conversation that the processor got, one placeholder an image.
    """

    token: int
    count: int
    images: tuple[HeldImage, ...]
    text: str


class ImageProcessing:
    """A processor at work on the images of prompts.

    Args:
        owner: whose it is, for errors.
        processor: of transformers.
        image_token: the id of a placeholder.
    """

    def __init__(self, owner: str, processor: Any, image_token: int) -> None:
        self.owner, self.processor, self.image_token = owner, processor, image_token
        self._known: weakref.WeakValueDictionary[int, PromptImages] = weakref.WeakValueDictionary()
        self._latest: deque[PromptImages] = deque(maxlen=_LATEST)
        self._held: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._by_row: dict[str, bool] | None = None

    def __call__(
        self, text: str, images: Sequence[HeldImage], retokenised: Callable[[str], list[int]] | None = None
    ) -> tuple[list[int], PromptImages]:
        """Token ids of a text whose images are put in, without what the tokenizer puts around a text.

        Args:
            text: a rendered conversation, one placeholder an image.
            retokenised: the ids of the text that the processor tokenised, in place of the tokenizer's own.

        Returns:
            the ids, the placeholders' own among them; and the images.

        Raises:
            DataError: for images that the processor refuses, or more or fewer of them than the text has places for.
            PlanError: for a processor of a kind that is not served.
        """
        written, made = self._processed(text, images)
        ids = made.pop("input_ids")[0].tolist()
        return self.told_apart(ids if retokenised is None else retokenised(written), images, text, made)

    def told_apart(
        self, ids: Sequence[int], images: Sequence[HeldImage], text: str, made: Mapping[str, Tensor] | None = None
    ) -> tuple[list[int], PromptImages]:
        """The ids with the placeholders' own in place of the one that they have in common."""
        places = [place for place, token in enumerate(ids) if token == self.image_token]
        if not places:
            raise DataError(f"{self.owner}: of {len(images)} images none is left in its prompt.")
        digest = hashlib.sha256(repr((list(images), list(ids[: places[-1] + 1]))).encode()).digest()
        token = FIRST + (int.from_bytes(digest[:8], "little") >> 4)
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = PromptImages(token, len(places), tuple(images), text)
        self._latest.append(found)
        if made is not None:
            self._hold(token, {name: value for name, value in made.items() if name in _BESIDE})
        return [token if each == self.image_token else each for each in ids], found

    def known(self, token: int) -> PromptImages:
        """The images that a token stands for."""
        return self._known[token]

    def plain(self, ids: Sequence[int]) -> list[int]:
        """Ids as the model's tokenizer has them."""
        return [self.image_token if token >= FIRST else token for token in ids]

    def tensors(self, images: PromptImages) -> dict[str, Tensor]:
        """What the processor makes of them, of one row."""
        if images.token not in self._held:
            _, made = self._processed(images.text, images.images)
            self._hold(images.token, {name: value for name, value in made.items() if name in _BESIDE})
        self._held.move_to_end(images.token)
        return self._held[images.token]

    def _hold(self, token: int, made: dict[str, Tensor]) -> None:
        self._held[token] = made
        self._held.move_to_end(token)
        total = sum(bytes_of(value) for held in self._held.values() for value in held.values())
        while total > HELD_BYTES and len(self._held) > 1:
            _, gone = self._held.popitem(last=False)
            total -= sum(map(bytes_of, gone.values()))

    def _processed(self, text: str, images: Sequence[HeldImage]) -> tuple[str, dict[str, Tensor]]:
        """The text that was tokenised, and what the processor returns of it and its images."""
        recorder = _Recorder(self.processor.tokenizer)
        try:
            pixels = [image.opened() for image in images]
        except DataError as error:
            raise DataError(f"{self.owner}: {error}") from error
        try:
            made = _with_tokenizer(self.processor, recorder)(
                text=[text], images=[pixels], return_tensors="pt", add_special_tokens=False
            )
        except (ValueError, TypeError, IndexError, KeyError, StopIteration) as error:
            raise DataError(
                f"{self.owner}: its processor refuses a prompt with {len(images)} image(s) of the sizes "
                f"{[image.size for image in pixels]}: {type(error).__name__}: {error!s:.300}"
            ) from error
        found = dict(made.items())
        found.pop("attention_mask", None)
        self._check(found)
        return recorder.text, found

    def _check(self, made: Mapping[str, Any]) -> None:
        kind = type(self.processor).__name__
        own = made["input_ids"][0] == self.image_token
        for name, value in made.items():
            if name == "input_ids":
                continue
            if name not in (*_BESIDE, *TOKEN_TYPES):
                raise PlanError(
                    f"{self.owner}: {kind} returns {name!r}, which is not served; what is served beside the tokens: "
                    f"{[*_BESIDE, *TOKEN_TYPES]}. Use another model."
                )
            if not isinstance(value, Tensor):
                raise PlanError(f"{self.owner}: {kind} returns {name!r} in several tensors, which is not served.")
            if name in TOKEN_TYPES and not torch.equal(value[0] == 1, own):
                raise PlanError(
                    f"{self.owner}: {kind} tells as {name!r} something else than where its placeholders stand, which "
                    "is not served. Use another model."
                )

    def together(self, rows: Sequence[Sequence[PromptImages]], names: Collection[str] = _BESIDE) -> dict[str, Tensor]:
        """What the model's forward gets for rows of tokens: `pixel_values` and their like.

        Args:
            rows: of each row its prompts' images, in the order of their placeholders.
            names: of what is wanted, as far as the processor makes it.
        """
        by_row = self._layout()
        found: dict[str, Tensor] = {}
        parts = [[self.tensors(images) for images in row] for row in rows]
        first = next((made for row in parts for made in row), {})
        for name, example in first.items():
            if name not in names:
                continue
            if by_row[name]:
                rest = example.shape[2:]
                whole = [
                    _joined([made[name] for made in row], 1) if row else example.new_zeros(1, 0, *rest) for row in parts
                ]
                found[name] = _joined(whole, 0)
            else:
                found[name] = _joined([made[name] for row in parts for made in row], 0)
        return found

    def _layout(self) -> dict[str, bool]:
        """Of each name whether it has one entry a row, with the row's images along the second axis."""
        if self._by_row is None:
            from PIL import Image

            blank = HeldImage(Image.linear_gradient("L").resize((64, 48)))
            text = getattr(self.processor, "image_token", None) or self.processor.tokenizer.decode([self.image_token])
            _, made = self._processed(text * 2, [blank, blank])
            self._by_row = {
                name: value.shape[0] == 1 and value.ndim > 1 and value.shape[1] > 1
                for name, value in made.items()
                if name in _BESIDE
            }
        return self._by_row


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors one after the other, padded by zeros in the other axes."""
    shapes = [list(part.shape) for part in parts]
    most = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for part in parts:
        room = [0 if at == axis else size - part.shape[at] for at, size in enumerate(most)]
        fill = [amount for size in reversed(room) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(part, fill) if any(room) else part)
    return torch.cat(padded, axis)


class _Recorder:
    """A tokenizer that remembers the text it was called with last."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""

    def __call__(self, text: Any, **options: Any) -> Any:
        self.text = text[0] if isinstance(text, list) else text
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _with_tokenizer(processor: Any, tokenizer: Any) -> Any:
    made = copy.copy(processor)
    made.tokenizer = tokenizer
    return made
