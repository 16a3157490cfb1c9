"""A node's adapter on a server: loaded under a name made of its weights, so that it can't be an older one."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sysdag.components import adapter_files, adapter_weights
from sysdag.components.language.engines.choice import Server
from sysdag.components.language.engines.completions_api import Served
from sysdag.components.language.pretrained import PretrainedLM
from sysdag.endpoints.http_client import HttpClient
from sysdag.errors import EndpointError


class ServedAdapter:
    """What a server has of one component's adapter.

    Attributes:
        name: under which it was loaded last; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._remove: functools.partial[None] | None = None  # its folder, now or when the process ends

    def refresh(
        self, owner: str, server: Server, client: HttpClient, served: Served, lm: PretrainedLM, model: Any
    ) -> str:
        """Has the server load the adapter, if it has others weights than at the last call, and unload the last one.

        Args:
            owner: whose it is, for errors.
            model: with the adapter in charge.

        Returns:
            Its name on the server.

        Raises:
            EndpointError: for a server that loads no adapters while it runs, or not this one.
        """
        assert lm.adapter is not None
        name = f"sysdag-{_digest(model, lm.adapter)}"
        if name == self.name:
            return name
        root = tempfile.gettempdir() if server.adapter_dir is None else str(server.adapter_dir)
        Path(root).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root)).resolve()
        folder.chmod(0o755)  # the server may be another user's
        try:
            adapter_files.save(model, lm.adapter, folder)
            if name not in served.known:
                self._load(owner, client, served, name, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._forget(client, served)
        self.name, self._remove = name, functools.partial(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(self._remove)
        return name

    def _load(self, owner: str, client: HttpClient, served: Served, name: str, folder: Path) -> None:
        try:
            _ask(client, served, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except EndpointError as error:
            if "already" in str(error):  # another process of this training was first
                return
            if error.status in (404, 405) and "adapter found" not in str(error):  # vLLM's word for an empty folder
                raise EndpointError(
                    f"{owner}: {client.url} loads no adapters while it runs, so it cannot draw with this component's. "
                    "Start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True (SGLang: --enable-lora); "
                    "or name an adapter that it has loaded: Server(url, model=...), or --model.",
                    status=error.status,
                ) from None
            said = str(error).rstrip(".")
            raise EndpointError(
                f"{owner}: {client.url} does not load the adapter in {folder}: {said}. It must see that folder "
                "(Server(adapter_dir=...)), and have room for it (--max-lora-rank, --max-loras).",
                status=error.status,
            ) from None

    def _forget(self, client: HttpClient, served: Served) -> None:
        if self.name is not None:
            with contextlib.suppress(EndpointError):  # it may have been started anew, or another process was first
                _ask(client, served, "unload_lora_adapter", {"lora_name": self.name})
        if self._remove is not None:
            atexit.unregister(self._remove)
            self._remove()


def _ask(client: HttpClient, served: Served, path: str, body: dict[str, Any]) -> None:
    """vLLM answers below /v1, SGLang at the root."""
    base = client.url.rstrip("/")
    if served.family == "sglang":
        base = base.removesuffix("/v1")
    once_more = replace(client, max_retries=min(1, client.max_retries))  # vLLM answers 500 to an adapter too large
    once_more.request(f"{base}/{path}", body, lambda raw: raw)


def _digest(model: Any, name: str) -> str:
    """Of an adapter's config and weights."""
    digest = hashlib.sha256()
    digest.update(json.dumps(model.peft_config[name].to_dict(), sort_keys=True, default=str).encode())
    for key, tensor in sorted(adapter_weights.state(model, name).items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
