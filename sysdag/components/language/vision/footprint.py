"""The memory of a vision-language model's part in a training step; of language models', what images add to it.

The processor reads blank images of the sizes that are asked about, and the model of fake tensors gets their pixels and
placeholders as in a step (`image_forward`). Where its images stand, and in how many tiles, decides its course, so what
depends on no weight has numbers (`sysdag.components.known_values`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sysdag.components.known_values import KnownValues
from sysdag.components.language.vision import image_forward
from sysdag.components.language.vision.image_forward import ImageForward
from sysdag.components.language.vision.prompt_images import FIRST, ImageProcessing


def span_of_images(ids: Sequence[int]) -> list[int]:
    """The part of a prompt from its first placeholder to its last; what stands between them may be text."""
    places = [place for place, token in enumerate(ids) if token >= FIRST]
    return list(ids[places[0] : places[-1] + 1]) if places else []


def tokens_of(span: Sequence[int], prompts: int, rows: int | None, tokens: int, filler: int) -> torch.Tensor:
    """Ids of a micro-batch: prompts with their images and a text, in one row or in rows of one length.

    Args:
        span: of one prompt's images.
        prompts: how many of them there are; one a row, where there are rows.
    """
    if rows is not None:
        length = tokens // rows
        return torch.tensor([_filled(span, length, filler)] * rows)
    return torch.tensor([_filled([*span, filler] * prompts, tokens, filler)])


def _filled(ids: Sequence[int], length: int, filler: int) -> list[int]:
    return [*ids, *[filler] * (length - len(ids))]


@contextlib.contextmanager
def reading(model: Any, processing: ImageProcessing) -> Iterator[None]:
    """Has a model of fake tensors called with images while the context lasts."""
    with KnownValues(), image_forward.installed(model, ImageForward(model, processing)):
        yield
