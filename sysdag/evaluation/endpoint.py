"""Answers of a language model behind an OpenAI-compatible endpoint: several at once, retried, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sysdag.endpoints.http_client import HttpClient, Refused, Unreadable
from sysdag.errors import EndpointError, JudgeError
from sysdag.files.keyed_lines import KeyedLines

logger = logging.getLogger(__name__)

OPTIONS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 1024}
_MOST_REFUSED = 10  # requests in a row, with no answer yet


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
        self.client()

    def client(self) -> HttpClient:
        """What asks it, for one use.

        Raises:
            JudgeError: see `Endpoint`.
        """
        try:
            return HttpClient(url=self.url, api_key=self.api_key, timeout=self.timeout, max_retries=self.retries)
        except EndpointError as error:
            raise JudgeError(str(error)) from None

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
        self._client = endpoint.client()
        self.stopped = self._client.stopped
        self._lock = threading.Lock()
        self._cache = _opened_cache(endpoint.cache)
        self._known: dict[str, Answer] = {}
        self._answered = bool(self._cache)
        self._refused = 0
        self._refusal = ""
        self._failure: JudgeError | None = None
        self._url = self._client.at("/chat/completions")

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
        try:
            return self._client.request(self._url, data, self._read)
        except Refused as error:
            return self._refuse(str(error))
        except EndpointError as error:
            kept = ""
            if error.status is None and self.endpoint.cache and not self.stopped.is_set():
                kept = f". The answers so far are in {self.endpoint.cache}; run it again to go on"
            raise JudgeError(f"{error}{kept}{_advice(error.status)}") from None

    def _read(self, raw: bytes) -> Answer:
        try:
            choice = json.loads(raw)["choices"][0]
            text, why = choice["message"].get("content"), choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            shown = self._client.clean(raw.decode("utf-8", "replace"))[:200]
            raise Unreadable(
                f"what it sent is no chat completion: {shown!r}. Does the URL end as it should (/v1)?"
            ) from None
        with self._lock:
            self._answered = True
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str) or not text.strip():
            return Answer(None, f"an empty answer (finish_reason {why!r})")
        text = self._client.clean(text)
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


def _advice(status: int | None) -> str:
    if status in (401, 403):
        return ". Name the environment variable that holds the key: --api-key-env."
    if status in (301, 302, 303, 307, 308, 404, 405):
        return ". Check the URL (it usually ends in /v1) and --model."
    return "."


def _opened_cache(path: Path | None) -> KeyedLines | None:
    """The answers of earlier runs; what is no answer is asked again."""
    if path is None:
        return None
    cache = KeyedLines(path, ["text", "problem"])
    if cache.damaged:
        logger.warning("%s: %d line(s) hold no answer of an endpoint; those are asked for again.", path, cache.damaged)
    return cache
