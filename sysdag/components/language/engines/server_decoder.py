"""Completions drawn by a server, checked, and scored by the model that is here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sysdag.components import adapter_weights
from sysdag.components.language.completer import Completer
from sysdag.components.language.engines.choice import Server
from sysdag.components.language.engines.completions_api import (
    Reply,
    Served,
    check_sampling,
    complete,
    refused_all,
    request_body,
    served_model,
)
from sysdag.components.language.engines.draw_checks import check_log_probs, check_text, kept_length
from sysdag.components.language.engines.served_adapter import ServedAdapter
from sysdag.components.language.engines.teacher_forcing import read_tokens
from sysdag.endpoints.http_client import HttpClient, Refused, Stopped
from sysdag.errors import DataError, EndpointError
from sysdag.traces.cells import Draw

_MOST_READ = 16  # elements of each tensor that tell whether weights have changed


class ServerDecoder:
    """One component's use of a server, over all its calls.

    Args:
        owner: the component, for errors.
        server: where its model is.
    """

    def __init__(self, owner: str, server: Server) -> None:
        self.owner, self.server = owner, server
        self._adapter = ServedAdapter()
        self._weights: str | None = None

    def sample(
        self,
        completer: Completer,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        top_p: float,
        top_k: int | None,
        seeds: Sequence[int],
    ) -> list[Draw]:
        """A draw for each prompt, as `Completer.sample`; its log-probability is None unless `score_draws`.

        Args:
            seeds: one a prompt, below 2**63, which the server draws from in a way of its own.

        Raises:
            PlanError: for options that servers take otherwise.
            DataError: for a prompt that the server refuses, while it takes others.
            EndpointError: for a server that does not answer, or with what the model here would not have drawn.
        """
        if not prompts:
            return []
        client = self.server.client()
        served = served_model(self.owner, self.server, client)
        check_sampling(self.owner, served, temperature, top_p, top_k)
        loaded = self._served_adapter(completer, client, served)
        options: dict[str, Any] = {
            "adapter": loaded, "max_new_tokens": completer.max_new_tokens, "temperature": temperature, "top_p": top_p,
            "top_k": top_k, "stop": completer.stop_texts, "end_token_ids": completer.lm.eos_token_ids,
        }  # fmt: skip
        bodies = [
            request_body(served, prompt, seed=seed % 2**31, **options)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        replies = self._replies(client, served, bodies)
        where = f"{self.owner}: {client.url}, asked for {bodies[0]['model']!r},"
        ids: list[list[int]] = []
        for prompt, reply in zip(prompts, replies, strict=True):
            ends = completer.lm.eos_token_ids
            length = kept_length(completer, where, reply.token_ids, reply.finish_reason, ends)
            ids.append(reply.token_ids[:length])
            if length == len(reply.token_ids):
                check_text(completer, where, prompt, reply.token_ids, client.clean(reply.text))
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        log_probs = self._read(completer, where, prompts, ids, replies, sampling)
        return [completer.draw(each, log_prob) for each, log_prob in zip(ids, log_probs, strict=True)]

    def _replies(self, client: HttpClient, served: Served, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
        """One for each request; the first that fails for good ends those that wait."""
        refused: dict[int, EndpointError] = {}

        def ask(place: int) -> Reply | None:
            try:
                return complete(self.owner, client, bodies[place])
            except Refused as error:
                refused[place] = error
                return None
            except EndpointError:
                client.stopped.set()
                raise

        workers = min(self.server.concurrency, len(bodies))
        with ThreadPoolExecutor(workers, thread_name_prefix="decoder") as pool:
            asked = [pool.submit(ask, place) for place in range(len(bodies))]
            try:
                found = [each.result() for each in asked]
            except BaseException as error:
                client.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if not isinstance(error, EndpointError):
                    raise
                errors = [each.exception() for each in asked if each.done() and not each.cancelled()]
                first = next(e for e in errors if isinstance(e, EndpointError) and not isinstance(e, Stopped))
                if first.status is None and str(first).startswith(self.owner):
                    raise first from None
                message = refused_all(self.owner, client, served, bodies[0], first)
                raise EndpointError(message, status=first.status) from None
        if refused:
            place = min(refused)
            message = refused_all(self.owner, client, served, bodies[place], refused[place])
            if len(refused) == len(bodies):
                raise EndpointError(message, status=refused[place].status)
            raise DataError(message, element=place)
        return [each for each in found if each is not None]

    def _served_adapter(self, completer: Completer, client: HttpClient, served: Served) -> str | None:
        """The adapter to ask for. What the server cannot follow, as its weights change here, is refused."""
        lm = completer.lm
        has_adapter = lm.has_adapter
        if not has_adapter and not self.server.needs_weights and not lm.is_loaded:
            return None
        with lm.at_work() as model:
            if has_adapter and self.server.model is None and lm.adapter is not None and not lm.adapter_off:
                return self._adapter.refresh(self.owner, self.server, client, served, lm, model)
            now = _fingerprint(model, lm.adapter)
        if self._weights not in (None, now):
            raise EndpointError(
                f"{self.owner}: its weights have changed since {client.url} was first asked, and the server goes on "
                f"with {served.model!r} as it was started. Train an adapter (peft_config), which is loaded there "
                "at each step where Server(model=...) names none; or decode here with decoder='local'."
            )
        self._weights = now
        return None

    def _read(
        self,
        completer: Completer,
        where: str,
        prompts: Sequence[Sequence[int]],
        ids: Sequence[list[int]],
        replies: Sequence[Reply],
        sampling: dict[str, Any],
    ) -> list[float | None]:
        """Reads draws with the model here: a few to check them, or all to know their log-probabilities."""
        count = len(ids) if self.server.score_draws else min(self.server.checked_draws, len(ids))
        found: list[float | None] = [None] * len(ids)
        if not count:
            return found
        step = len(ids) / count
        places = [int(number * step) for number in range(count)]
        with completer.decoding() as model:
            read = [read_tokens(model, prompts[place], ids[place], **sampling) for place in places]
        if self.server.checked_draws:
            returned = [replies[place].log_probs[: len(ids[place])] for place in places]
            check_log_probs(where, returned, read, self.server.tolerance)
        if self.server.score_draws:
            for place, each in zip(places, read, strict=True):
                found[place] = float(each.proposal.sum())
        return found


@torch.no_grad()
def _fingerprint(model: Any, own: str | None) -> str:
    """Of a few elements of every tensor that is not another component's: once trained, hardly any stays as it was.

    Args:
        own: the name of the component's adapter.
    """
    tensors = dict(adapter_weights.base_state(model))
    if own is not None:
        tensors |= {f"adapter {key}": tensor for key, tensor in adapter_weights.state(model, own).items()}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _MOST_READ)][:_MOST_READ].cpu().contiguous()
        digest.update(name.encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
