"""Images among the values of traces, in whichever form they are held."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy

_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM")  # of an image's file


def picture_of(value: Any) -> Any:
    """The PIL image that a value is: one itself, an array of bytes (H, W) or (H, W, 3 or 4), or a file's bytes.

    None for what is no image.
    """
    if isinstance(value, numpy.ndarray) and value.dtype == numpy.uint8 and _has_shape_of_image(value):
        from PIL import Image

        return Image.fromarray(value)
    if isinstance(value, bytes) and value.startswith(_BEGINNINGS):
        from PIL import Image

        try:
            opened = Image.open(io.BytesIO(value))
            opened.load()
        except Exception:  # noqa: BLE001 - the decoders of PIL raise a dozen types on what only begins as an image does
            return None
        return opened
    module = sys.modules.get("PIL.Image")
    return value if module is not None and isinstance(value, module.Image) else None


def _has_shape_of_image(value: numpy.ndarray) -> bool:
    return min(value.shape, default=0) > 0 and (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4)))
