"""Prompts that wait to be decoded, and which of them enter when: continuous batching by a budget of tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

_READ_AT_ONCE = 2048  # tokens of prompts, padding included: more make a call no faster
_ROOM_TO_ENTER = 8  # rows enter when this part of the places is free: single prompts read slowly


class WaitingPrompts:
    """The rows that have not entered, by prompt, longest first: so a batch has little padding, and memory falls.

    Args:
        prompts: token ids; equal prompts enter as one.
        num_samples: rows of each prompt.
        max_new_tokens: most tokens that a row may grow by.
        max_batch_tokens: most tokens of the rows that are there, each with its prompt and all that it may grow by; a
            single row may take more.
        max_batch_rows: most rows that are there; None leaves that to the tokens.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], num_samples: int, max_new_tokens: int, max_batch_tokens: int,
        max_batch_rows: int | None,
    ) -> None:  # fmt: skip
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            rows.setdefault(tuple(prompt), []).extend(range(number * num_samples, (number + 1) * num_samples))
        self.rows = deque(sorted(rows.items(), key=lambda each: (-len(each[0]), each[0])))
        self._num_samples, self._max_new_tokens = num_samples, max_new_tokens
        self._tokens, self._most = max_batch_tokens, max_batch_rows

    def admitted(self, running: Sequence[int], joins: bool) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Prompts to be read at once, by number, with the rows of each, until there is no room.

        Args:
            running: tokens of the prompts of the rows that are there.
            joins: whether rows may enter while others are there.
        """
        if not self.rows or (running and not joins):
            return
        longest = max([*running, len(self.rows[0][0])])
        places = max(1, self._tokens // (longest + self._max_new_tokens))
        places = places if self._most is None else min(places, self._most)
        free, wanted = places - len(running), sum(len(rows) for _, rows in self.rows)
        if running and free < min(wanted, -(-places // _ROOM_TO_ENTER)):
            return
        while self.rows and free > 0:
            most = max(1, _READ_AT_ONCE // len(self.rows[0][0])) if joins else len(self.rows)
            read: list[int] = []
            found: list[list[int]] = []
            while self.rows and free > 0 and len(read) < most:
                prompt, rows = self.rows.popleft()
                read.append(rows[0] // self._num_samples)
                found.append(rows[:free])
                if rows[free:]:
                    self.rows.appendleft((prompt, rows[free:]))
                free -= len(found[-1])
            yield read, found
