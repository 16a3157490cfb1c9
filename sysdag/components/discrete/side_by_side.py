"""Calls of one function side by side: in threads, and for async functions on one event loop that outlives them.

The loop is a thread's of its own, so that it serves callers that are in a loop themselves (a notebook), and clients
that are bound to the loop they were first used in (an HTTP pool) stay good from one batch to the next.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from sysdag.errors import PlanError

_LONGEST_WAIT = 60.0  # seconds between two tries
_JITTER = random.Random()  # apart from the user's random numbers
_loops: dict[int, tuple[asyncio.AbstractEventLoop, threading.Thread]] = {}
_making_loops = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How a function is called on many arguments.

    Attributes:
        concurrency: calls at once; 1 makes them in the caller's own thread, one after the other.
        retries: further tries of a call that raises.
        backoff: seconds before the first of them, doubled for each next one up to a minute; each is shortened by up to
            a half at random, so that calls that failed together do not come back together.
        retry_on: the errors that a further try may mend; others are raised at once.
    """

    concurrency: int
    retries: int
    backoff: float
    retry_on: tuple[type[Exception], ...]

    def make(
        self, function: Callable[[Any], Any], arguments: Sequence[Any], keep: Callable[[int, Any], None]
    ) -> list[Any]:
        """What the function returns for each argument, in their order.

        A call sees the context variables, the grad mode, the autocast and the GPU of the caller. After an error no
        further call begins; those that run are waited for, and kept.

        Args:
            keep: called with the number of an argument and what came back for it, as soon as it has, in any thread.

        Raises:
            Exception: what the first failing argument raised, with its number in `failed_call`.
        """
        stopped = threading.Event()
        found: dict[int, Any] = {}

        def call(number: int) -> None:
            value = self._tried(function, arguments[number], stopped)
            found[number] = value
            keep(number, value)

        if min(self.concurrency, len(arguments)) <= 1:
            for number in range(len(arguments)):
                try:
                    call(number)
                except Exception as error:
                    error.__dict__[_FAILED_CALL] = number
                    raise
            return [found[number] for number in range(len(arguments))]

        def begin(number: int) -> None:
            if stopped.is_set():
                raise _Stopped
            try:
                call(number)
            except BaseException:
                stopped.set()
                raise

        caller = _TorchState()
        with ThreadPoolExecutor(min(self.concurrency, len(arguments)), "opaque") as pool:
            calls: list[Future[None]] = []
            try:
                for number in range(len(arguments)):
                    calls.append(pool.submit(contextvars.copy_context().run, caller.run, begin, number))
                concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_EXCEPTION)
            finally:  # also where the user interrupts: what runs is waited for
                stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
        for number, done in enumerate(calls):
            failed = None if done.cancelled() else done.exception()
            if failed is not None and not isinstance(failed, _Stopped):
                failed.__dict__[_FAILED_CALL] = number
                raise failed
        return [found[number] for number in range(len(arguments))]

    def _tried(self, function: Callable[[Any], Any], argument: Any, stopped: threading.Event) -> Any:
        for attempt in range(self.retries):
            try:
                return _answer(function(argument))
            except self.retry_on:
                wait = min(_LONGEST_WAIT, self.backoff * 2**attempt) * _JITTER.uniform(0.5, 1)
            if stopped.wait(wait):
                raise _Stopped
        return _answer(function(argument))


_FAILED_CALL = "_sysdag_failed_call"


def failed_call(error: BaseException) -> int | None:
    """The number of the argument at which `Calls.make` raised an error; None for any other error."""
    return getattr(error, _FAILED_CALL, None)


class _Stopped(Exception):
    """A call that was not made, or not made again, because another failed."""


class _TorchState:
    """What torch keeps apart for each thread and a call should see as its caller does."""

    def __init__(self) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._autocasts = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]  # fmt: skip
        self._device = torch.get_default_device()

    def run(self, function: Callable[[int], None], argument: int) -> None:
        with self._restored():
            function(argument)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            if not self._inference:
                stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocasts:
                stack.enter_context(torch.autocast(kind, dtype))
            if self._cuda is not None:
                stack.enter_context(torch.cuda.device(self._cuda))
            if self._device.type != "cpu":
                stack.enter_context(self._device)
            yield


def _answer(value: Any) -> Any:
    """What a call returned, awaited where that is an awaitable."""
    if not inspect.isawaitable(value):
        return value
    loop, thread = _loop()
    if threading.current_thread() is thread:
        if inspect.iscoroutine(value):
            value.close()
        raise PlanError(
            "An async function was called from another one that blocks the event loop they share: run the system there "
            "with `await asyncio.to_thread(plan.sample, ...)`."
        )

    async def awaited() -> Any:
        return await value

    answer = asyncio.run_coroutine_threadsafe(awaited(), loop)
    try:
        return answer.result()
    except BaseException:  # the user interrupts the wait: the call does not go on unseen
        answer.cancel()
        raise


def _loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """The event loop of this process's async calls, with its thread."""
    with _making_loops:
        if os.getpid() not in _loops:  # a forked process has the parent's loop without its thread
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="opaque-loop", daemon=True)
            thread.start()
            _loops[os.getpid()] = loop, thread
        return _loops[os.getpid()]
