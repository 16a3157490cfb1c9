"""A system sent to the Hub, with its model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sysdag.files import hub
from sysdag.graph.system import System
from sysdag.saving.model_card import write_card
from sysdag.saving.serialization import save_system


def push_system(
    system: System,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload system",
    **card: Any,
) -> str:
    """Saves a system and uploads it to a repository, from which `System.from_pretrained(repo_id)` loads it.

    Args:
        system: the system.
        repo_id: `org/name`; made if it is not there yet.
        private: of a repository that is made; by default the account's setting.
        revision: the branch to commit to.
        token: by default that of `hf auth login`.
        commit_message: of the upload.
        card: what else the model card says; see `sysdag.saving.model_card.write_card`.

    Returns:
        The commit's address.

    Raises:
        SerializationError: naming a node that cannot be saved.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_system(system, folder)
        write_card(system, folder, **{"name": repo_id.rpartition("/")[2], "loads_from": repo_id, **card})
        return hub.upload(folder, repo_id, private=private, revision=revision, token=token, message=commit_message)
