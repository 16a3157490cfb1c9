"""Prompts that are texts, in which what a node's function wrote is told apart from the values that it was given.

A control token that the function writes is one: it may write a chat template by hand. One that a value spells, a
question or a draft, is text. Which of them a text holds does not show in it, so where a value spells a control token
that the prompt has, the function is called once more, with the spelling disguised, and what of the disguise comes
out again is the value's. The prompt is the text of the first call, whose function saw the values as they are; both
texts must be the same, and where no disguise achieves that, the function does something with the spelling that cannot
be followed, and the prompt is refused.

Two values bring control tokens with them. A row's own prompt may be a rendered chat, which the function hands on as it
is: one that begins with a control token, and not with an end, is tokenised as it stands, as TRL does. And what a
deterministic node computes may be the whole prompt, which then is that function's text.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sysdag.components.input_reader import Argument, InputReader
from sysdag.components.language.control_tokens import NONCHARACTERS, Spellings, any_of, texts_of
from sysdag.components.language.messages import ROW_OPTIONS, with_row_options
from sysdag.errors import DataError
from sysdag.graph.parts import PartPrompt

logger = logging.getLogger(__name__)
_PLANES = (0xF0000, 0x100000)  # two of Unicode for private use, as large as that of the usual characters
_ESCAPED = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")  # as JSON writes what is in another plane
_SHORTEST_PART = 2  # of a spelling at the edge of a value, which what stands beside it may complete
_ALLOW = "CausalLM(sanitize_control_tokens=False) lets it act"
Read = Callable[[str], tuple[str, set[int]] | None]


class TextPrompt(str):
    """A prompt with places where it only spells a control token.

    Attributes:
        spelled: the first character of each, and the place behind its last, ascending.
    """

    spelled: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, spelled: Iterable[tuple[int, int]]) -> TextPrompt:
        made = super().__new__(cls, text)
        made.spelled = tuple(spelled)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return TextPrompt, (str(self), self.spelled)


def spelled_in(text: str) -> tuple[tuple[int, int], ...]:
    """Where a prompt only spells a control token."""
    return text.spelled if isinstance(text, TextPrompt) else ()


class PromptReader(InputReader):
    """Takes the prompts of a language model.

    Args:
        owner: whose they are, for errors.
        spellings: of its control tokens; None where a value may bring some.
        end: how its end token is spelled, with which no rendered chat begins.
    """

    row_options = ROW_OPTIONS

    def __init__(self, owner: str, spellings: Spellings | None = None, end: str | None = None) -> None:
        self.owner, self.spellings, self.end = owner, spellings, end
        self._said: set[str] = set()

    def with_row_options(self, input: Any, options: Mapping[str, Any]) -> Any:
        return with_row_options(input, options)

    def tell_apart(self, input: Any, function: Callable[..., Any], arguments: Mapping[str, Argument]) -> Any:
        """Of a text, a `TextPrompt` where values spell control tokens in it; messages as they are.

        A part of a completion gets the draws of the parts before it.
        """
        if isinstance(input, PartPrompt):
            own = {name: argument for name, argument in arguments.items() if name not in input.earlier}
            prompt = self.tell_apart(input.prompt, lambda **given: function(**given).prompt, own)
            before = tuple(arguments[name].draw for name in input.earlier)
            return dataclasses.replace(input, prompt=prompt, before=before)
        if self.spellings is None or not isinstance(input, str):
            return input
        there = set(self.spellings.control.findall(input))
        if not there or self._is_whole(input, there, arguments):
            return input
        spelled = {name: self._spelled_by(argument, there) for name, argument in arguments.items()}
        if not any(spelled.values()):
            return input
        place, token = next((name, sorted(tokens)[0]) for name, tokens in spelled.items() if tokens)
        written = [input, *texts_of([_plain(argument.value) for argument in arguments.values()])]
        for disguise, read in _disguises(written):
            try:
                found = function(**{
                    name: _mapped(given.value, _changing(spelled[name], disguise)) if spelled[name] else given.value
                    for name, given in arguments.items()
                })  # fmt: skip
            except Exception as error:  # noqa: BLE001 - it may raise anything at a text that it does not know
                logger.debug("%s: its function refuses a disguised value (%r).", self.owner, error)
                continue
            told = read(found) if isinstance(found, str) else None
            if told is not None and told[0] == input:
                return self._prompt(input, told[1], place, arguments[place].origin)
        raise DataError(
            f"{self.owner}: the value of {place!r} spells the control token {token!r}, and so does the prompt, whose "
            "function does not just write the value down: what of the prompt is the value's, and so is text, cannot be "
            f"told. Return chat messages, or take the token out of the value; {_ALLOW}."
        )

    def _is_whole(self, input: str, there: set[str], arguments: Mapping[str, Argument]) -> bool:
        """Whether the prompt is a value as a whole, with the control tokens in it."""
        assert self.spellings is not None
        for name, argument in arguments.items():
            if argument.origin == "drawn" or not isinstance(argument.value, str) or argument.value != input:
                continue
            if argument.origin == "computed":
                if any(self._spelled_by(source, there) for source in argument.sources):
                    raise DataError(
                        f"{self.owner}: the prompt is the value of {name!r} as a whole, which spells control tokens, "
                        f"as what it was computed of does ({', '.join(sorted(there))}). Which of them are text cannot "
                        f"be told: write the prompt in the function of the node itself; {_ALLOW}."
                    )
                return True
            first = self.spellings.control.match(input)
            if first is not None and first.group() != self.end:
                self._say(
                    f"the prompt that a row has in {name!r} begins with the control token {first.group()!r}, so it is "
                    "taken for a rendered chat and tokenised as it stands. Return chat messages if it is a text"
                )
                return True
        return False

    def _spelled_by(self, argument: Argument, there: set[str]) -> set[str]:
        """Which control tokens of the prompt a value spells, or begins or ends with a part of."""
        assert self.spellings is not None
        kind = self.spellings.special if argument.origin == "drawn" else self.spellings.control
        tokens = {token for token in there if kind.fullmatch(token)}
        if not tokens:
            return set()
        pattern, parts = any_of(tokens), _parts(tokens)
        return tokens if any(pattern.search(t) or parts.search(t) for t in texts_of(_plain(argument.value))) else set()

    def _prompt(self, text: str, values: set[int], place: str, origin: str) -> str:
        assert self.spellings is not None
        found = [match.span() for match in self.spellings.control.finditer(text)]
        spelled = [span for span in found if not values.isdisjoint(range(*span))]
        if not spelled:
            return text
        meant = "" if origin != "computed" else " Write those that are meant in the function of the node itself."
        self._say(
            f"a value in a prompt (of {place!r}) spells the control token {text[slice(*spelled[0])]!r}, which is text "
            f"there; {_ALLOW}.{meant}"
        )
        return TextPrompt(text, spelled)

    def _say(self, text: str) -> None:
        kind = text.partition("'")[0]
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s: %s (said once).", self.owner, text.removesuffix("."))


def _parts(tokens: Iterable[str]) -> re.Pattern[str]:
    """What is a part of a spelling at the beginning or the end of a value."""
    tokens = list(tokens)
    cuts = [(token, cut) for token in tokens for cut in range(1, len(token))]
    ends = any_of(token[:cut] for token, cut in cuts if cut >= _SHORTEST_PART)
    begins = any_of(token[cut:] for token, cut in cuts if len(token) - cut >= _SHORTEST_PART)
    return re.compile(rf"\A(?:{begins.pattern})|(?:{ends.pattern})\Z")


def _changing(tokens: set[str], disguise: Callable[[str], str]) -> Callable[[str], str]:
    pattern = re.compile(f"{any_of(tokens).pattern}|{_parts(tokens).pattern}")
    return lambda text: pattern.sub(lambda found: disguise(found.group()), text)


def _disguises(texts: Sequence[str]) -> list[tuple[Callable[[str], str], Read]]:
    """Ways to disguise a spelling, and to read the text and the disguised characters out again.

    The first moves each character to a plane for private use: what counts, cuts and strips does the same with it. The
    second puts marks around it: what searches finds it. But what it finds it may take without the marks, so that all of
    these must come out again.
    """
    found: list[tuple[Callable[[str], str], Read]] = []
    plane = next((p for p in _PLANES if not any(p <= ord(c) < p + 0x10000 for text in texts for c in text)), None)
    if plane is not None:
        found.append((lambda spelled: _moved(spelled, plane), lambda text: _moved_back(text, plane)))
    marks = next((pair for pair in NONCHARACTERS if not any(m in text for text in texts for m in pair)), None)
    if marks is not None:
        marked = _Marked(*marks)
        found.append((marked.disguise, marked.read))
    return found


def _moved(text: str, plane: int) -> str:
    return "".join(chr(plane + ord(char)) if ord(char) < 0x10000 else char for char in text)


def _moved_back(text: str, plane: int) -> tuple[str, set[int]]:
    def unescaped(found: re.Match[str]) -> str:
        high, low = (int(half, 16) for half in found.groups())
        char = 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00)
        return chr(char) if plane <= char < plane + 0x10000 else found.group()

    text = _ESCAPED.sub(unescaped, text)
    moved = {place for place, char in enumerate(text) if plane <= ord(char) < plane + 0x10000}
    return "".join(chr(ord(c) - plane) if place in moved else c for place, c in enumerate(text)), moved


class _Marked:
    """Marks around spellings, and where they are in a text that was made of these."""

    def __init__(self, start: str, end: str) -> None:
        self._start, self._end, self._given = start, end, 0

    def disguise(self, spelled: str) -> str:
        self._given += 1
        return self._start + spelled + self._end

    def read(self, text: str) -> tuple[str, set[int]] | None:
        """None where marks are lost, or out of order."""
        for mark in (self._start, self._end):
            text = re.sub(rf"\\u{ord(mark):04x}", mark, text, flags=re.IGNORECASE)  # as JSON writes them
        pieces = re.split(f"([{self._start}{self._end}])", text)
        marks = pieces[1::2]
        if len(marks) < 2 * self._given or marks != [self._start, self._end] * (len(marks) // 2):
            return None
        places = list(itertools.accumulate(map(len, pieces[::2]), initial=0))
        inside = {place for begin, end in list(itertools.pairwise(places))[1::2] for place in range(begin, end)}
        return "".join(pieces[::2]), inside


def _plain(value: Any) -> Any:
    """A value with its dataclasses and keys as lists, whose texts are all there is to look at."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, each.name)) for each in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [_plain(part) for item in value.items() for part in item]
    return [_plain(part) for part in value] if isinstance(value, (list, tuple, set, frozenset)) else value


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of the same types with other texts."""
    if isinstance(value, str):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            each.name: _mapped(getattr(value, each.name), change) for each in dataclasses.fields(value) if each.init
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
