"""The texts that a completion may be: a regular expression, or the JSON texts of a schema, as an automaton over bytes.

outlines-core (an extra: `pip install "sysdag[grammar]"`) makes the automaton; a completion is to match as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from sysdag.components.language.json_schema import check_schema, ordered
from sysdag.errors import DataError, PlanError, shown

DEAD = 0  # the state that no text of the grammar leads to
_END_ID = 256  # in outlines-core's vocabulary of bytes
_MARK = "\U0010ffff"  # no character, by the Unicode Standard


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over the bytes of UTF-8; every state but `DEAD` leads to an accepting one.

    Attributes:
        table: (S, 256) int32, the state after each byte.
        accepts: (S,) whether a text may end in a state.
        start: the state of the empty text.
    """

    table: numpy.ndarray
    accepts: numpy.ndarray
    start: int

    def after(self, state: int, text: bytes) -> int:
        for byte in text:
            state = int(self.table[state, byte])
        return state

    @classmethod
    def of(cls, regex: str) -> Automaton:
        """The automaton of a regular expression in the syntax of Rust's crate `regex`.

        outlines-core searches leftmost-first, and stops at a match that a longer text might go on from: by itself
        `a|ab` would not have "ab", nor `x(ab)?` "xab". A mark behind the expression leaves no match before it. Texts
        that hold the mark, which is no character, are not looked after.

        Raises:
            PlanError: for one that has no automaton or that no text matches, or without outlines-core.
        """
        try:
            from outlines_core import Index, Vocabulary
        except ImportError as error:
            raise PlanError('grammar= needs outlines-core: pip install "sysdag[grammar]".') from error
        bytes_ = Vocabulary(_END_ID, {bytes([byte]): [byte] for byte in range(256)})
        try:
            Index(regex, bytes_)  # which must stand by itself, before anything is put around it
            index = Index(f"(?:{regex}){_MARK}", bytes_)
        except (ValueError, RuntimeError) as error:
            raise PlanError(
                f"grammar: {shown(regex, 200)} gives no automaton ({str(error)[:200]}). A completion matches as a "
                "whole: leave out ^ and $, and write it without look-around, \\b and references to groups."
            ) from error
        moves = index.get_transitions()
        states = sorted({index.get_initial_state(), *moves, *(s for row in moves.values() for s in row.values())})
        number = {state: place + 1 for place, state in enumerate(states)}
        table = numpy.zeros((len(states) + 1, 256), numpy.int32)
        for state, row in moves.items():
            for byte, target in row.items():
                if byte != _END_ID:
                    table[number[state], byte] = number[target]
        matched = numpy.zeros(len(table), bool)
        matched[[number[state] for state in index.get_final_states()]] = True
        accepts = matched[_walk(table, numpy.arange(len(table)), _MARK.encode())]
        alive = accepts.copy()
        while (more := alive | alive[table].any(1)).sum() > alive.sum():
            alive = more
        start = number[index.get_initial_state()]
        if not alive[start]:
            raise PlanError(f"grammar: no text matches {shown(regex, 200)}.")
        return cls(numpy.where(alive[table], table, DEAD), accepts, start)


def _walk(table: numpy.ndarray, states: numpy.ndarray, text: bytes) -> numpy.ndarray:
    for byte in text:
        states = table[states, byte]
    return states


class Grammar:
    """A regular expression or a JSON schema, and the values that its texts stand for.

    Args:
        given: a regular expression, alone or as `{"regex": ...}`; or a JSON schema whose values are objects or arrays,
            of the keywords that `json_schema` lists.

    Attributes:
        is_json: whether a text's value is what it says in JSON, and not the text itself.

    Raises:
        PlanError: for anything else, and see `Automaton.of`.
    """

    def __init__(self, given: str | Mapping[str, Any]) -> None:
        if isinstance(given, Mapping) and given.keys() == {"regex"}:
            given = given["regex"]
            if not isinstance(given, str):
                raise PlanError(f"grammar: a regular expression is a text, got {shown(given)}.")
        if not isinstance(given, (str, Mapping)):
            raise PlanError(
                f"grammar: expected a JSON schema (dict) or a regular expression (str or {{'regex': ...}}), got "
                f"{shown(given)}."
            )
        self.is_json = not isinstance(given, str)
        self.automaton = Automaton.of(given if isinstance(given, str) else _regex_of(given))
        self.given: str | dict[str, Any] = given if isinstance(given, str) else json.loads(json.dumps(given))

    def value(self, text: str) -> Any:
        """What a whole text of the grammar stands for."""
        return json.loads(text) if self.is_json else text

    def text(self, value: Any) -> str:
        """The text of an observed value: itself, or of an object its JSON, spelled as `json.dumps` does.

        Raises:
            DataError: for what has no text in the grammar, with the character where it leaves it.
        """
        if isinstance(value, str) or not self.is_json:
            if not isinstance(value, str):
                raise DataError(f"a completion of a grammar of text is a string, got {shown(value, 200)}.")
            text = value
        else:
            assert isinstance(self.given, Mapping)
            try:
                text = json.dumps(ordered(value, self.given, self.given), ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise DataError(f"the completion {shown(value, 200)} is no value of JSON: {error}.") from error
        place = self.leaves(text)
        if place is not None:
            found = f"{text[place]!r} may not stand there" if place < len(text) else "the text ends too early"
            raise DataError(
                f"the completion {shown(text, 200)} is outside the grammar at character {place + 1}: {found}. Mend the "
                "text, or the component's grammar."
            )
        return text

    def leaves(self, text: str) -> int | None:
        """The place of the first character with which no text of the grammar begins; `len(text)` for one that only
        begins one; None for a text of the grammar."""
        state = self.automaton.start
        for place, char in enumerate(text):
            state = self.automaton.after(state, char.encode("utf-8", "surrogatepass"))
            if state == DEAD:
                return place
        return None if self.automaton.accepts[state] else len(text)


def _regex_of(schema: Mapping[str, Any]) -> str:
    """The regular expression of a schema's texts."""
    for pattern in check_schema(schema):
        table = Automaton.of(pattern).table
        if table[:, [*range(0x20), ord('"'), ord("\\")]].any():
            raise PlanError(
                f"grammar: the pattern {pattern!r} can write a quotation mark, a backslash or a control character, "
                "which JSON would have to escape. Name the characters that it may write instead."
            )
    try:
        from outlines_core import json_schema
    except ImportError as error:
        raise PlanError('grammar= needs outlines-core: pip install "sysdag[grammar]".') from error
    try:
        return str(json_schema.build_regex_from_schema(json.dumps(schema)))
    except (ValueError, RuntimeError) as error:
        raise PlanError(f"grammar: outlines-core refuses the schema: {str(error)[:300]}.") from error
