"""Images in chat messages: parts `{"type": "image"}` with what they hold, told by the hash of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdag.components.language.messages import Message, checked
from sysdag.components.opened_image import is_image_source, open_image
from sysdag.errors import DataError, shown

_HOLDS = ("image", "path")
_REMOTE = ("url", "image_url", "base64")


class HeldImage(str):
    """An image of a message, as a text that is equal for equal content, so that messages remain plain values.

    Attributes:
        source: a PIL image, a path, or the bytes of a file.
    """

    source: Any

    def __new__(cls, source: Any) -> HeldImage:
        made = super().__new__(cls, _digest(source))
        made.source = source
        return made

    def opened(self) -> Any:
        """Its pixels as a PIL image of mode RGB.

        Raises:
            DataError: for what cannot be read, or is another image than it was.
        """
        if _digest(self.source) != str(self):
            raise DataError(f"the image {shown(self.source)} has changed since it was first read.")
        return open_image(self.source, 3)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldImage, (self.source,)


def _digest(source: Any) -> str:
    """A hash of a file's bytes, or of the pixels that an image holds."""
    if isinstance(source, (str, Path)):
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise DataError(f"expected a readable image, got the file {str(source)!r}: {error}.") from error
        return hashlib.sha256(content).hexdigest()
    if isinstance(source, (bytes, bytearray)):
        return hashlib.sha256(source).hexdigest()
    opened = open_image(source, 3)
    return hashlib.sha256(f"{opened.size}".encode() + opened.tobytes()).hexdigest()


def checked_with_images(messages: Sequence[Any]) -> list[Message]:
    """As `checked`, with parts of images among the texts; each holds a `HeldImage` under "image".

    Raises:
        DataError: naming the message and the part, for images that cannot be read and for sound and video.
    """
    found = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)) or not any(_kind(part) != "text" for part in content):
            found += checked([message])
            continue
        assert isinstance(message, Mapping)
        place = f"message {number} (role {message.get('role')!r})"
        parts = [_part(part, f"{place}, part {which}") for which, part in enumerate(content)]
        # What is not its images is checked as any message is.
        [plain] = checked([{**message, "content": "".join(part.get("text", "") for part in parts)}])
        found.append({**plain, "content": parts})
    return found


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _part(part: Any, place: str) -> Message:
    kind = _kind(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return {key: value for key, value in part.items() if value is not None}
    if kind in _REMOTE:
        raise DataError(f"{place}: {kind} parts are not read from afar; give {{'type': 'image', 'image': ...}}.")
    if kind != "image":
        what = f"a part of type {kind!r}" if kind else shown(part)
        raise DataError(f"{place}: expected a part of type 'text' or 'image', got {what}.")
    given = {key: part[key] for key in (*_HOLDS, *_REMOTE) if part.get(key) is not None}
    if [key for key in given if key in _REMOTE]:
        raise DataError(
            f"{place}: images are not read from afar ({', '.join(given)}); give a PIL image, a path or a file's bytes "
            "as {'type': 'image', 'image': ...}."
        )
    if len(given) != 1:
        raise DataError(
            f"{place}: a part of type 'image' holds one image, as {{'type': 'image', 'image': ...}}; got {shown(part)}."
        )
    [(key, value)] = given.items()
    if isinstance(value, HeldImage):
        return {"type": "image", "image": value}
    if not is_image_source(value) or (key == "path" and not isinstance(value, (str, Path))):
        raise DataError(
            f"{place}: expected a PIL image, a path or the bytes of a file, got {type(value).__name__} {shown(value)}."
        )
    try:
        return {"type": "image", "image": HeldImage(value)}
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def images_of(messages: Sequence[Mapping[str, Any]]) -> list[HeldImage]:
    """The images of messages, in their order."""
    return [
        part["image"]
        for message in messages
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, Mapping) and isinstance(part.get("image"), HeldImage)
    ]


def without_pixels(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as templates of processors take them: every content a list, and of an image its place alone."""
    return [
        {**message, "content": _parts(message["content"])} if "content" in message else dict(message)
        for message in messages
    ]


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return content
    return [{"type": "image"} if _kind(part) == "image" else part for part in content]
