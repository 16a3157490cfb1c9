"""Answers of a language model behind an OpenAI-compatible endpoint: several at once, retried, and kept on disk.

Requests go through Python's own HTTP client: Hugging Face's would send the user's Hub token to any server that is asked
without a key, and refuses local servers where `HF_HUB_OFFLINE` is set.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import random
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sysdag.errors import JudgeError
from sysdag.files.keyed_lines import KeyedLines

logger = logging.getLogger(__name__)

OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 1024}
_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server says how long
_REFUSED = (400, 413, 422)  # what is wrong with one request, as its length, rather than with the endpoint
_MOST_REFUSED = 10  # requests in a row, with no answer yet
_TOO_EARLY = (408, 409, 425, 429)


@dataclass(frozen=True)
class Answer:
    """What the endpoint said.

    Attributes:
        text: None where it gave none.
        problem: why, or "".
    """

    text: str | None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible chat completion endpoint.

    Attributes:
        url: its base, as `https://api.openai.com/v1`.
        model: as the endpoint calls it.
        api_key: sent as a bearer token; never shown or written.
        options: of every request, as `temperature`; None leaves one out.
        timeout: seconds without an answer after which a request has failed.
        retries: further tries after timeouts, broken connections, and the statuses 429 and 5xx.
        concurrency: requests at once.
        cache: JSON lines, `{"key", "model", "text", "problem"}`: what was answered is appended, and not asked again. A
            key is the hash of model, messages and options.

    Raises:
        JudgeError: for a URL or a key that cannot be used.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    options: Mapping[str, Any] = field(default_factory=lambda: OPTIONS)
    timeout: float = 120.0
    retries: int = 6
    concurrency: int = 8
    cache: Path | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(f"{self.url!r} is no http(s) URL of an endpoint, as http://localhost:8000/v1.")
        if parts.username or parts.password or parts.query:
            raise JudgeError(
                f"The endpoint's URL at {parts.hostname} holds credentials or a query; give the key in an environment "
                "variable (--api-key-env)."
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise JudgeError("The API key is empty, or holds line breaks or characters that no key has.")

    def answers(self, messages: Iterable[list[dict[str, Any]]]) -> Iterator[Answer]:
        """The answer to each list of messages, in order.

        Raises:
            JudgeError: if the endpoint refuses all requests, or still fails after the last retry. What was answered
                before is in the cache.
        """
        session = _Session(self)
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool:
            waiting: deque[Future[Answer]] = deque()
            try:
                for asked in messages:
                    waiting.append(pool.submit(session.answer, asked))
                    while len(waiting) >= 4 * self.concurrency or (waiting and waiting[0].done()):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
                session.finish()
            finally:
                session.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)


class _Session:
    """One use of an endpoint; its methods are called from several threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._cache = _opened_cache(endpoint.cache)
        self._known: dict[str, Answer] = {}
        self._answered = bool(self._cache)
        self._refused = 0
        self._refusal = ""
        self._failure: JudgeError | None = None
        self._opener = urllib.request.build_opener(_NoRedirects)
        base = endpoint.url.rstrip("/")
        self._url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def answer(self, messages: list[dict[str, Any]]) -> Answer:
        body = {"model": self.endpoint.model, "messages": messages}
        body |= {name: value for name, value in self.endpoint.options.items() if value is not None}
        data = json.dumps(body, sort_keys=True).encode()
        key = hashlib.sha256(data).hexdigest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        if self._cache is not None and (row := self._cache.get(key)) is not None:
            return Answer(row["text"], row["problem"])
        try:
            found = self._ask(data)
        except JudgeError as error:
            with self._lock:
                self._failure = self._failure or error
            self.stopped.set()
            raise self._failure from None
        if found.text is not None or not found.problem.startswith("refused"):
            self._keep(key, found)
        return found

    def finish(self) -> None:
        """Raises a JudgeError where every request was refused."""
        if self._refused and not self._answered:
            raise JudgeError(f"{self._url} refused every request: {self._refusal}")

    def _ask(self, data: bytes) -> Answer:
        tries = self.endpoint.retries + 1
        problem = ""
        for attempt in range(tries):
            if self.stopped.is_set():
                raise JudgeError(f"{self._url}: stopped.")
            wait = min(_LONGEST_WAIT, 2**attempt) * random.uniform(0.5, 1)
            try:
                return self._request(data)
            except urllib.error.HTTPError as error:
                said = self._said(error)
                if error.code in _REFUSED:
                    return self._refuse(said)
                if error.code not in _TOO_EARLY and error.code < 500:
                    raise JudgeError(f"{self._url} answered {said}{_advice(error.code)}") from None
                problem, wait = said, _asked_wait(error, wait)
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                slow = isinstance(reason, TimeoutError)
                problem = f"no answer in {self.endpoint.timeout:g} s" if slow else f"{type(reason).__name__}: {reason}"
            except _Garbage as error:
                problem = str(error)
            if attempt + 1 < tries:
                self.stopped.wait(wait)
        kept = (
            f". The answers so far are in {self.endpoint.cache}; run it again to go on" if self.endpoint.cache else ""
        )
        raise JudgeError(f"{self._url} gave no answer in {tries} tries: {self._clean(problem).rstrip('.')}{kept}.")

    def _request(self, data: bytes) -> Answer:
        headers = {"Content-Type": "application/json", "User-Agent": "sysdag"}
        if self.endpoint.api_key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.api_key}"
        request = urllib.request.Request(self._url, data=data, headers=headers)
        with self._opener.open(request, timeout=self.endpoint.timeout) as response:
            raw = response.read()
        try:
            choice = json.loads(raw)["choices"][0]
            text, why = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = self._clean(raw.decode("utf-8", "replace"))[:200]
            raise _Garbage(
                f"what it sent is no chat completion: {shown!r}. Does the URL end as it should (/v1)?"
            ) from None
        with self._lock:
            self._answered = True
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str) or not text.strip():
            return Answer(None, f"an empty answer (finish_reason {why!r})")
        text = self._clean(text)
        return Answer(text, f"cut off at its longest (finish_reason {why!r})" if why == "length" else "")

    def _refuse(self, said: str) -> Answer:
        with self._lock:
            self._refused, self._refusal = self._refused + 1, said
            if self._refused >= _MOST_REFUSED and not self._answered:
                raise JudgeError(f"{self._url} refused its first {self._refused} requests: {said}")
        return Answer(None, f"refused: {said}")

    def _keep(self, key: str, answer: Answer) -> None:
        if self._cache is None:
            with self._lock:
                self._known[key] = answer
        else:
            self._cache.put({"key": key, "model": self.endpoint.model, "text": answer.text, "problem": answer.problem})

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            text = " ".join(error.read(2**16).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException):
            text = ""
        return f"HTTP {error.code} {self._clean(error.reason)}{': ' if text else ''}{self._clean(text)[:300]}"

    def _clean(self, text: str) -> str:
        return text.replace(self.endpoint.api_key, "***") if self.endpoint.api_key else text


class _Garbage(Exception):
    """An answer that is no chat completion, which a retry may mend."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: following one would send the key elsewhere."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _advice(status: int) -> str:
    if status in (401, 403):
        return ". Name the environment variable that holds the key: --api-key-env."
    if status in (301, 302, 303, 307, 308, 404, 405):
        return ". Check the URL (it usually ends in /v1) and --model."
    return "."


def _asked_wait(error: urllib.error.HTTPError, otherwise: float) -> float:
    asked = error.headers.get("Retry-After", "")
    return min(float(asked), 10 * _LONGEST_WAIT) if asked.strip().isdecimal() else otherwise


def _opened_cache(path: Path | None) -> KeyedLines | None:
    """The answers of earlier runs; what is no answer is asked again."""
    if path is None:
        return None
    cache = KeyedLines(path, ["text", "problem"])
    if cache.damaged:
        logger.warning("%s: %d line(s) hold no answer of an endpoint; those are asked for again.", path, cache.damaged)
    return cache


def api_key_of(variable: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that an environment variable holds, or None where no variable is named.

    Raises:
        JudgeError: if it is not set.
    """
    if variable is None:
        return None
    if not environment.get(variable, "").strip():
        raise JudgeError(f"The environment variable {variable} (--api-key-env) is not set or empty.")
    return environment[variable].strip()
