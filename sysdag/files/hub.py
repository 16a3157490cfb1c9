"""The Hugging Face Hub: folders that come from there and go there."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from sysdag.errors import SerializationError

logger = logging.getLogger(__name__)
_WAITED = 3.0  # seconds, for a connection
_ASKED_AGAIN = 60.0  # seconds after which a Hub that could not be reached is tried again
_found: dict[str, tuple[float, str]] = {}  # of each address, when it was tried, and why it could not be reached, or ""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What a training leaves beside the system that it saved.
_NOT_THE_SYSTEM = [
    "checkpoint-*",
    "checkpoint-*/*",
    "last-checkpoint/*",
    "traces/*",
    "runs/*",
    "*.bin",
    "*.pt",
    "*.pth",
]


def is_repository(name: str | Path) -> bool:
    """Whether a name is that of a repository, `org/name`, and of nothing on this disk."""
    return bool(_REPOSITORY.fullmatch(str(name))) and not Path(name).exists()


def local_folder(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of that name; or a repository's files, downloaded into the Hub's cache if they are not there yet.

    Args:
        name: a folder, or `org/name` where there is no such folder.
        revision: a branch, tag or commit of the repository.
        token: for a private one; by default that of `hf auth login`.

    Raises:
        SerializationError: if the repository cannot be read, or for a revision of a folder.
    """
    if not is_repository(name):
        if revision is not None:
            raise SerializationError(f"revision={revision!r} is of a repository on the Hub; {name} is none.")
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        with reaching(name):
            found = snapshot_download(str(name), revision=revision, token=token, ignore_patterns=_NOT_THE_SYSTEM)
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of them
        raise SerializationError(
            f"There is no folder {name}, and the Hub gave no repository of that name: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__} Check the name, the "
            "connection, and for a private repository `hf auth login`."
        ) from error
    return Path(found)


@contextlib.contextmanager
def reaching(name: Any) -> Iterator[None]:
    """Context in which the Hub is asked for `name`, where that is nothing on this disk.

    A Hub that cannot be reached at all is told at once, and only its cache is looked into: the libraries would try each
    file again and again, for half a minute. What breaks off later, in a download, they do try again.
    """
    if not isinstance(name, (str, Path)) or Path(name).exists():
        yield
        return
    from huggingface_hub import constants

    why = "" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    if not why:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def unreachable(endpoint: str) -> str:
    """Why nothing can be asked of an address, which is told once in a minute; "" where a connection can be made.

    Behind a proxy it is the proxy that has to be there.
    """
    at, why = _found.get(endpoint, (0.0, ""))
    if endpoint in _found and (not why or time.monotonic() - at < _ASKED_AGAIN):
        return why
    asked = urlsplit(endpoint)
    proxy = None if proxy_bypass(asked.hostname or "") else getproxies().get(asked.scheme) or getproxies().get("all")
    through = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else asked
    port = through.port or {"https": 443, "http": 80}.get(through.scheme, 1080)
    try:
        socket.create_connection((through.hostname or "", port), timeout=_WAITED).close()
    except OSError as error:
        why = str(error.strerror or error)
        logger.warning(
            "%s cannot be reached (%s): what has a name there is looked for in its cache alone. A model or data set on "
            "this disk is named by its folder.", endpoint, why,
        )  # fmt: skip
    else:
        why = ""
    _found[endpoint] = time.monotonic(), why
    return why


def upload(
    folder: Path, repo_id: str, *, private: bool | None, revision: str | None, token: str | None, message: str
) -> str:
    """Uploads a folder's files to a repository, which is made if it is not there yet; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repository, folder_path=folder, revision=revision, token=token, commit_message=message
    )
    return str(commit.commit_url)
