"""The Hugging Face Hub: folders that come from there and go there."""

from __future__ import annotations

import re
from pathlib import Path

from sysdag.errors import SerializationError

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
        found = snapshot_download(str(name), revision=revision, token=token, ignore_patterns=_NOT_THE_SYSTEM)
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of them
        raise SerializationError(
            f"There is no folder {name}, and the Hub gave no repository of that name: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__} Check the name, the "
            "connection, and for a private repository `hf auth login`."
        ) from error
    return Path(found)


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
