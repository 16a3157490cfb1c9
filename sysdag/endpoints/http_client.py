"""Requests of JSON to one server, tried again while it may still answer.

Requests go through Python's own HTTP client: Hugging Face's would send the user's Hub token to any server that is asked
without a key, and refuses local servers where `HF_HUB_OFFLINE` is set.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sysdag.errors import EndpointError

Read = TypeVar("Read")

_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server says how long
_REFUSED = (400, 413, 422)  # what is wrong with one request, as its length, rather than with the server
_TOO_EARLY = (408, 409, 425, 429)
_INVALID = "validation error"  # pydantic's words, which some servers (llama-cpp-python) send with the status 500


class Refused(EndpointError):
    """The server refuses this request, and would again; others it may answer."""


class Stopped(EndpointError):
    """It was not asked any more, as another request had failed."""


class Unreadable(Exception):
    """An answer that is not what was asked for, which another try may mend."""


@dataclass(frozen=True, kw_only=True)
class HttpClient:
    """Asks one server; its methods may be called from several threads.

    Attributes:
        url: its base, as `http://127.0.0.1:8000/v1`.
        api_key: sent as a bearer token, and to no other server: redirects are errors. Never shown or written.
        timeout: seconds without an answer after which a try has failed.
        max_retries: further tries after timeouts, broken connections, unreadable answers, and the statuses 408, 409,
            425, 429 and 5xx, each after twice the wait, or after the one that the server asks for (`Retry-After`).
        stopped: ends the waits, and whatever has not been asked yet, when it is set.

    Raises:
        EndpointError: for a URL or a key that cannot be used.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    max_retries: int = 6
    stopped: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    _opener: urllib.request.OpenerDirector = field(
        default_factory=lambda: urllib.request.build_opener(_NoRedirects), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_url(self.url)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise EndpointError("The API key is empty, or holds line breaks or characters that no key has.")

    def at(self, path: str) -> str:
        """The URL of a path below the base; one that the base ends in is not put behind it again."""
        base = self.url.rstrip("/")
        return base if base.endswith(path) else f"{base}{path}"

    def request(self, url: str, body: Any, read: Callable[[bytes], Read]) -> Read:
        """What `read` makes of the answer.

        Args:
            url: see `at`.
            body: sent as JSON, or as it is if it is bytes; None asks with GET.
            read: raises `Unreadable` for what is no answer.

        Raises:
            Stopped: once `stopped` is set.
            Refused: for the statuses 400, 413 and 422, and for 500 where the request was not valid.
            EndpointError: for other statuses below 500, with `status`; or if there is no answer after the last try.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body, sort_keys=True).encode()
        tries = self.max_retries + 1
        problem = ""
        for attempt in range(tries):
            if self.stopped.is_set():
                raise Stopped(f"{url}: stopped.")
            wait = min(_LONGEST_WAIT, 2**attempt) * random.uniform(0.5, 1)
            try:
                return read(self._once(url, data))
            except urllib.error.HTTPError as error:
                said = self._said(error)
                if error.code in _REFUSED or (error.code == 500 and _INVALID in said):
                    raise Refused(said, status=error.code) from None
                if error.code not in _TOO_EARLY and error.code < 500:
                    raise EndpointError(f"{url} answered {said}", status=error.code) from None
                problem, wait = said, _asked_wait(error, wait)
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                slow = isinstance(reason, TimeoutError)
                problem = f"no answer in {self.timeout:g} s" if slow else f"{type(reason).__name__}: {reason}"
            except Unreadable as error:
                problem = str(error)
            if attempt + 1 < tries:
                self.stopped.wait(wait)
        raise EndpointError(f"{url} gave no answer in {tries} tries: {self.clean(problem).rstrip('.')}")

    def _once(self, url: str, data: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "sysdag"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(url, data=data, headers=headers)
        with self._opener.open(request, timeout=self.timeout) as response:
            return response.read()

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            text = " ".join(error.read(2**16).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            text = ""
        return f"HTTP {error.code} {self.clean(error.reason)}{': ' if text else ''}{self.clean(text)[:300]}"

    def clean(self, text: str) -> str:
        """A text of the server's without the key, which it may have echoed."""
        return text.replace(self.api_key, "***") if self.api_key else text


def check_url(url: str) -> None:
    """Refuses what is no base URL, or holds a secret.

    Raises:
        EndpointError: saying what to give instead; it does not show credentials.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"{url!r} is no http(s) URL of an endpoint, as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query:
        raise EndpointError(
            f"The endpoint's URL at {parts.hostname} holds credentials or a query; give the key in an environment "
            "variable (--api-key-env)."
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: following one would send the key elsewhere."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _asked_wait(error: urllib.error.HTTPError, otherwise: float) -> float:
    asked = error.headers.get("Retry-After", "")
    return min(float(asked), 10 * _LONGEST_WAIT) if asked.strip().isdecimal() else otherwise
