"""The versions of what a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("torch", "triton", "transformers", "diffusers", "peft", "accelerate")


def installed_versions() -> dict[str, str | None]:
    """The version of sysdag, of Python and of each package in `PACKAGES`; None for one that is not installed.

    Torch's is its own word, which names the build (2.11.0+cu130); the metadata of a wheel may leave that out.
    """
    import torch

    import sysdag

    return {
        "sysdag": sysdag.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "torch": str(torch.__version__),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
