"""What is wrong with preference rows, before any weights load: every row is looked at, and all is told at once.

See `sysdag.data.checks` for what rows are dropped for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sysdag.data.checks import DROPPED, NOTED, Wanted, check_row
from sysdag.data.columns import advice_on, told_unread, unread_columns
from sysdag.data.preferences import Problem
from sysdag.data.screening import AT_ONCE, Screen
from sysdag.errors import DataError
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.dataset_rows import rows_of


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """What became of every row.

    Attributes:
        rows: how many there are, parts of the file that are no rows among them.
        kept: the numbers of those that can be used, in order.
        counts: how many rows have a problem, by its kind; a row may have several.
        dropped: how many rows have none but problems of the kinds in `DROPPED`.
        problems: the first ones of each kind, up to the limit that was asked for, in the order of the rows.
        strict: whether rows are errors that would be dropped otherwise.
        unread: columns that no node reads.
        advice: what to do where rows lack columns; or "".
    """

    rows: int
    kept: tuple[int, ...]
    counts: Mapping[str, int]
    dropped: int
    problems: tuple[Problem, ...]
    strict: bool = False
    unread: tuple[str, ...] = ()
    advice: str = ""

    @property
    def errors(self) -> int:
        """How many rows cannot be used; with `strict` every row that has a problem."""
        return self.rows - len(self.kept) - (0 if self.strict else self.dropped)

    @property
    def is_usable(self) -> bool:
        """Whether there is no error, and a row is left."""
        return self.errors == 0 and bool(self.kept)

    def raise_if_unusable(self, source: str = "The data") -> None:
        """Raises a DataError that says all of this, unless the data can be used; `source` is what it calls them."""
        if not self.is_usable:
            raise DataError(f"{source} cannot be used.\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON-ready."""
        return {
            "usable": self.is_usable,
            "strict": self.strict,
            "rows": self.rows,
            "kept": len(self.kept),
            "dropped": self.dropped,
            "errors": self.errors,
            "counts": dict(self.counts),
            "unread_columns": list(self.unread),
            "advice": self.advice,
            "problems": [vars(problem) for problem in self.problems],
        }

    def __str__(self) -> str:
        dropped = "" if self.strict else f", {self.dropped} are dropped"
        lines = [f"{self.rows} rows: {len(self.kept)} can be used{dropped}, {self.errors} cannot."]
        if not self.kept:
            lines.append("No row is left." if self.rows else "There is no row.")
        for kind, count in self.counts.items():
            listed = [problem for problem in self.problems if problem.kind == kind]
            verdict = "kept" if kind in NOTED else "dropped" if kind in DROPPED and not self.strict else "error"
            lines.append(f"\n{kind} ({verdict}): {count} {'row' if count == 1 else 'rows'}")
            lines += [f"  {problem}" for problem in listed]
            if len({(problem.row, problem.source) for problem in listed}) < count:
                lines.append("  ...")
        if self.advice:
            lines.append(f"\n{self.advice}")
        if self.unread:
            lines.append(f"\n{told_unread(self.unread)}")
        return "\n".join(lines)


def validate_rows(
    plan: Plan,
    rows: Iterable[Any],
    objective: Objective,
    *,
    limit: int = 20,
    strict: bool = False,
    empty: str = "drop",
    damaged: Sequence[tuple[str, str]] = (),
    wanted: Wanted | None = None,
) -> ValidationReport:
    """Looks at every row and loads no weights. Rows are pairs, or unpaired rows; all of them are of one kind.

    Args:
        plan: of the system that is to be aligned.
        rows: see `sysdag.data.encode_rows`; an iterator's are not kept, and those with `damage` stand for no row.
        objective: what the rows are for.
        limit: how many problems of each kind are told; all are counted.
        strict: makes errors of the problems that rows are otherwise dropped for.
        empty: `keep` uses rows whose chosen or desirable output is empty, which are dropped otherwise.
        damaged: of the rows' file, each part that is no row: its place and what is wrong with it.
        wanted: of which kind they have to be (see `ObjectiveOptions.wanted`); that of the first by default.
    """
    lost, found = _Findings(limit), _Findings(limit)
    for place, text in damaged:
        lost.add([Problem(None, "malformed", "", "", text, place)])
    kept: list[int] = []
    keys: dict[tuple[Any, ...], None] = {}
    screen = Screen(plan, objective)
    given = iter(rows if isinstance(rows, Iterator) else rows_of(rows))
    number = 0
    while part := list(itertools.islice(given, AT_ONCE)):
        wanted = wanted or Wanted.of(plan, [row for row in part if not getattr(row, "damage", "")], number)
        for row, passes in zip(part, screen.passing(part), strict=True):
            if damage := getattr(row, "damage", ""):
                lost.add([Problem(None, "malformed", "", "", damage, row.place)])
                continue
            if isinstance(row, Mapping):
                keys[tuple(row)] = None
            is_pair = wanted is None or not wanted.unpaired  # what passes is one
            problems = [] if passes and is_pair else check_row(plan, row, number, objective, empty, wanted)
            if all(problem.kind in NOTED for problem in problems):
                kept.append(number)
            found.add(problems)
            number += 1
    columns = [dict.fromkeys(each) for each in keys]
    return ValidationReport(
        rows=number + lost.counts["malformed"], kept=tuple(kept), counts=dict(lost.counts) | dict(found.counts),
        dropped=found.dropped, problems=(*lost.problems, *found.problems), strict=strict,
        unread=unread_columns(plan, columns, objective), advice=advice_on(plan, columns),
    )  # fmt: skip


class _Findings:
    """Problems as they are found, the first of each kind kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.dropped = 0
        self.problems: list[Problem] = []

    def add(self, problems: Sequence[Problem]) -> None:
        """All problems of one row."""
        if not problems:
            return
        kinds = dict.fromkeys(problem.kind for problem in problems)
        self.counts.update(kinds.keys())
        wrong = [kind for kind in kinds if kind not in NOTED]
        self.dropped += bool(wrong) and all(kind in DROPPED for kind in wrong)
        for problem in problems:
            if self._kept[problem.kind] < self._limit:
                self._kept[problem.kind] += 1
                self.problems.append(problem)
