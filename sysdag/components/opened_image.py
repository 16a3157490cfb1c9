"""Images as users bring them, opened: PIL images, files, and what a file holds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sysdag.errors import DataError

# What an image is converted to, and from which modes: those that hold no more than 8 bits a channel, as
# diffusers' `load_image` does. It clips 16 bits at 255, so these are refused; LAB has no conversion of its own.
MODES = {
    1: ("L", ("L", "1", "LA")),
    3: ("RGB", ("RGB", "RGBX", "RGBA", "P", "PA", "L", "LA", "1", "CMYK", "YCbCr", "HSV")),
}


def is_image_source(value: Any) -> bool:
    """Whether a value is a PIL image, a path, or bytes."""
    return isinstance(value, (str, Path, bytes, bytearray)) or type(value).__module__.partition(".")[0] == "PIL"


def open_image(
    value: Any, channels: int, size: tuple[int | None, int | None] = (None, None), *, element: int | None = None
) -> Any:
    """A PIL image of mode L or RGB with a value's pixels, turned as its EXIF orientation says.

    Args:
        value: a PIL image, a path, or the bytes of a file.
        channels: 1 for gray, 3 for colour.
        size: (width, height) that is expected; None is any.
        element: goes into the error.

    Raises:
        DataError: for an unreadable file, another size, or pixels that the mode cannot hold: transparent ones, colours
            in gray, more than 8 bits.
    """
    from PIL import Image

    width, height = size
    mode, modes = MODES[channels]
    what = f"the file {str(value)!r}" if isinstance(value, (str, Path)) else type(value).__name__
    try:
        raw = Path(value).read_bytes() if isinstance(value, (str, Path)) else value
        image = Image.open(io.BytesIO(raw)) if isinstance(raw, (bytes, bytearray)) else raw
        # Size and mode are in the header: a wrong one is refused before any pixel is decoded.
        fits = any(_has_size(each, size) for each in (image.size, image.size[::-1]))
        if fits and image.mode in modes:
            image = _upright(image)
            fits = _has_size(image.size, size)
            see_through = _is_see_through(image)
            opened = image.convert(mode)
    except FileNotFoundError as error:
        raise DataError(f"expected a readable image, got {what}, which does not exist.", element=element) from error
    except Exception as error:  # the decoders of PIL raise a dozen types on damaged files
        raise DataError(
            f"expected a readable image, got {what} that PIL cannot decode ({type(error).__name__}: {error}).",
            element=element,
        ) from error
    if not fits or image.mode not in modes:
        asked = "" if width is None else f" of {width}x{height} (width x height)"
        raise DataError(
            f"expected an image{asked} with {channels} channel(s), mode {mode}, got {image.width}x{image.height} mode "
            f"{image.mode}. Resize it and convert its mode first.",
            element=element,
        )
    if see_through:
        raise DataError(
            f"expected an opaque image, got {what} of mode {image.mode} with transparent pixels; paste it onto the "
            "background that it was seen on.",
            element=element,
        )
    return opened


def _has_size(size: tuple[int, int], wanted: tuple[int | None, int | None]) -> bool:
    return all(want in (None, got) for got, want in zip(size, wanted, strict=True))


def _upright(image: Any) -> Any:
    """The image as it is looked at: turned and mirrored as its EXIF data say."""
    from PIL import ExifTags, ImageOps

    turned = image.getexif().get(ExifTags.Base.Orientation) is not None
    return ImageOps.exif_transpose(image) if turned else image


def _is_see_through(image: Any) -> bool:
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
