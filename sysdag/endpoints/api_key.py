"""API keys: read from the environment, and sent to the service that they belong to alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from sysdag.errors import EndpointError

# Variables whose name says whose key they hold, and the domains of that service.
_SERVICES: Mapping[str, tuple[str, ...]] = {
    "OPENAI_API_KEY": ("openai.com",),
    "AZURE_OPENAI_API_KEY": ("azure.com", "azure.cn", "azure.us"),
    "ANTHROPIC_API_KEY": ("anthropic.com",),
    "HF_TOKEN": ("huggingface.co",),
    "HUGGING_FACE_HUB_TOKEN": ("huggingface.co",),
}


def api_key_of(variable: str | None, url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that an environment variable holds, or None where no variable is named.

    Args:
        variable: its name; what other variables hold is never looked at.
        url: of the server that the key is for.

    Raises:
        EndpointError: if it is not set, or by its name holds the key of another service than the one at `url`.
    """
    if variable is None:
        return None
    host = (urlsplit(url).hostname or "").rstrip(".")
    owners = _SERVICES.get(variable)
    if owners is not None and not any(host == owner or host.endswith(f".{owner}") for owner in owners):
        raise EndpointError(
            f"The environment variable {variable} (--api-key-env) holds a key of {owners[0]}, which is not sent to "
            f"{host}. Put the key of that server into a variable of its own, and name that one."
        )
    if not environment.get(variable, "").strip():
        raise EndpointError(f"The environment variable {variable} (--api-key-env) is not set or empty.")
    return environment[variable].strip()
