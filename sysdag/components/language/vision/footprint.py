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


def tokens_of(span: Sequence[int], rows: int, length: int, filler: int) -> torch.Tensor:
    """Ids (rows, length) of a micro-batch, each row with the images of a prompt and a text behind them."""
    return torch.tensor([[*span, *[filler] * (length - len(span))]] * rows)


@contextlib.contextmanager
def reading(model: Any, processing: ImageProcessing) -> Iterator[None]:
    """Has a model of fake tensors called with images while the context lasts."""
    with KnownValues(), image_forward.installed(model, ImageForward(model, processing)):
        yield
