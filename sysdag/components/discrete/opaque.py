"""A callable, an API or a tool as a node: it can be run, and has no likelihood."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from sysdag.components import hooks
from sysdag.components.component import Component
from sysdag.components.discrete.call_cache import CallCache
from sysdag.components.discrete.side_by_side import Calls, failed_call
from sysdag.components.random_streams import RowGenerator
from sysdag.errors import DataError, DeclarationNeeded, PlanError, SerializationError, failed_element, mark_element
from sysdag.files.saved_files import only
from sysdag.traces.cells import Draw

_KINDS: Mapping[str, tuple[type, ...]] = {
    "function": (dict,), "concurrency": (int,), "retries": (int,), "backoff": (int, float), "declared": (bool,),
}  # fmt: skip
_SAVED = ("concurrency", "retries", "backoff")


class Opaque(Component):
    """What a function returns for the node's input; its randomness, if any, is its own.

    Calls run side by side, and their results keep the inputs' order. Where one raises, no further one begins, those
    that run are waited for (and kept, where there is a cache), and the error names the node and the row of the first
    that failed.

    Args:
        function: called with what the node's function returned, once for each element. An async function is awaited,
            also where the caller is in an event loop itself, as in a notebook; all of a process share one loop. A
            saved system names the function by import path; it is loaded again only if its module gives it to a
            component there (see `hooks`).
        concurrency: calls at once, in as many threads. 1 makes them one after the other in the caller's own thread:
            for a function that is not safe to call from several.
        retries: further tries of a call that raises.
        backoff: seconds before the first of them, doubled for each next one up to a minute, and shortened by up to a
            half at random.
        retry_on: the errors that a further try may mend, as an API's rate limit; others are raised at once.
        cache: a file of JSON lines in which answers are kept as they come, by input and function (see
            `sysdag.components.discrete.call_cache.CallCache`): what is there is not called again, in this run or the
            next. Inputs that are equal then have one answer, so leave it out where the function's own randomness is
            wanted. A saved system does not name the file: it loads with the component that its module declares.
        version: what the function depends on beside its code and input, as the name and date of the model behind an
            API: answers of another version are not used.

    Raises:
        PlanError: for an option out of range.
    """

    likelihood = "none"

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        concurrency: int = 8,
        retries: int = 0,
        backoff: float = 1.0,
        retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
        cache: str | os.PathLike[str] | None = None,
        version: str = "",
    ) -> None:
        if not callable(function):
            raise PlanError(f"Opaque takes a function, got {function!r:.100}.")
        for name, number, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise PlanError(f"{name} of an Opaque must be a whole number of {least} or more, got {number!r}.")
        if isinstance(backoff, bool) or not isinstance(backoff, (int, float)) or not 0 <= backoff < math.inf:
            raise PlanError(f"backoff of an Opaque must be a number of seconds, 0 or more, got {backoff!r}.")
        kinds = retry_on if isinstance(retry_on, tuple) else (retry_on,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise PlanError(f"retry_on of an Opaque must be a class of exceptions or several, got {retry_on!r:.99}.")
        if version and cache is None:
            raise PlanError(
                "version of an Opaque tells answers in its cache apart: name the file, cache='calls.jsonl'."
            )
        if not isinstance(version, str):
            raise PlanError(f"version of an Opaque must be a text, got {version!r:.100}.")
        self.function = function
        self._calls = Calls(concurrency=concurrency, retries=retries, backoff=backoff, retry_on=kinds)
        self._cache = None if cache is None else Path(cache).absolute()
        self._version = version
        self._answers: CallCache | None = None

    def __repr__(self) -> str:
        return f"Opaque({getattr(self.function, '__qualname__', self.function)})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_answers": None}  # another process reads the file anew

    def sample(self, inputs: Sequence[Any], *, generator: RowGenerator = None) -> list[Draw]:
        return [Draw(value) for value in (self._made(inputs) if self._cache is None else self._kept(inputs))]

    def _made(self, inputs: Sequence[Any], keep: Callable[[int, Any], None] = lambda number, value: None) -> list[Any]:
        try:
            return self._calls.make(self.function, inputs, keep)
        except Exception as error:
            if (number := failed_call(error)) is not None:
                mark_element(error, number)
            raise

    def _kept(self, inputs: Sequence[Any]) -> list[Any]:
        """Answers from the cache, and calls for the inputs that it lacks, once for equal ones."""
        if self._answers is None:
            assert self._cache is not None
            self._answers = CallCache(self._cache, self.function, self._version)
        answers = self._answers
        keys = []
        for number, argument in enumerate(inputs):
            try:
                keys.append(answers.key(argument))
            except DataError as error:
                error.element = number
                raise
        first: dict[str, int] = {}
        for number, key in enumerate(keys):
            if key not in first and not answers.known(key):
                first[key] = number
        places = list(first.values())

        def keep(number: int, value: Any) -> None:
            answers.put(keys[places[number]], value)

        try:
            self._made([inputs[place] for place in places], keep)
        except Exception as error:
            if (failed := failed_element(error)) is not None:
                mark_element(error, places[failed])
            raise
        return [answers.get(key) for key in keys]

    def observe(self, values: Sequence[Any]) -> list[Draw]:
        return [Draw(value) for value in values]

    def save_pretrained(self, folder: Path) -> Mapping[str, Any]:
        numbers = {name: getattr(self._calls, name) for name in _SAVED}
        declared = self._cache is not None or self._calls.retry_on != (Exception,)
        return {"function": hooks.describe("function", self.function), **numbers, "declared": declared}

    @classmethod
    def from_pretrained(cls, folder: Path, options: Mapping[str, Any]) -> Self:
        function = _saved_function(options)
        if options.get("declared", False):
            raise DeclarationNeeded(
                f"Opaque({function.__qualname__}) has a cache or a `retry_on`, which code names and no folder."
            )
        try:
            return cls(function, **{name: options[name] for name in _SAVED if name in options})
        except PlanError as error:
            raise SerializationError(str(error)) from error

    def refilled(self, folder: Path, options: Mapping[str, Any]) -> Self:
        if _saved_function(options) is not self.function:
            raise SerializationError(f"{self!r} calls another function than the saved {options['function']['path']}.")
        return self


def _saved_function(options: Mapping[str, Any]) -> Callable[..., Any]:
    found = hooks.load("function", only(options, _KINDS, "Opaque").get("function"))
    if found is None:
        raise SerializationError("Opaque: a saved one has a function.")
    return found
