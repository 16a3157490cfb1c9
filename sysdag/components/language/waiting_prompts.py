"""Prompts that wait to be decoded, and which of them enter when: continuous batching by a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_READ_AT_ONCE = 2048  # tokens of prompts, padding included: more make a call no faster
_ROOM_TO_ENTER = 8  # rows enter when this part of the places is free: single prompts read slowly


class WaitingPrompts:
    """The rows that have not entered, by prompt, longest first: so a batch has little padding, and memory falls.

    Args:
        max_new_tokens: most tokens that a row may grow by.
        max_batch_tokens: most tokens of the rows that are there, each with its prompt and all that it may grow by; a
            single row may take more.
        max_batch_rows: most rows that are there; None leaves that to the tokens.

    Attributes:
        rows: prompts with the numbers of their rows; equal prompts are one.
    """

    def __init__(self, max_new_tokens: int, max_batch_tokens: int, max_batch_rows: int | None) -> None:
        self.rows: dict[tuple[int, ...], list[int]] = {}
        self._max_new_tokens, self._tokens, self._most = max_new_tokens, max_batch_tokens, max_batch_rows
        self._sorted = False

    def add(self, prompt: Sequence[int], rows: Sequence[int]) -> None:
        """Has the rows, by number, of a prompt wait."""
        self.rows.setdefault(tuple(prompt), []).extend(rows)
        self._sorted = False

    def admitted(self, running: Sequence[int], joins: bool) -> Iterator[list[list[int]]]:
        """The numbers of the rows of each prompt that is to be read at once with the others, until there is no room.

        Args:
            running: tokens of the prompts of the rows that are there.
            joins: whether rows may enter while others are there.
        """
        if not self.rows or (running and not joins):
            return
        if not self._sorted:
            self.rows = dict(sorted(self.rows.items(), key=lambda each: (-len(each[0]), each[0])))
            self._sorted = True
        longest = max([*running, len(next(iter(self.rows)))])
        places = max(1, self._tokens // (longest + self._max_new_tokens))
        places = places if self._most is None else min(places, self._most)
        free, wanted = places - len(running), sum(map(len, self.rows.values()))
        if running and free < min(wanted, -(-places // _ROOM_TO_ENTER)):
            return
        while self.rows and free > 0:
            most = max(1, _READ_AT_ONCE // len(next(iter(self.rows)))) if joins else len(self.rows)
            found: list[list[int]] = []
            while self.rows and free > 0 and len(found) < most:
                prompt, rows = next(iter(self.rows.items()))
                found.append(rows[:free])
                if rows[free:]:
                    self.rows[prompt] = rows[free:]
                else:
                    del self.rows[prompt]
                free -= len(found[-1])
            yield found
