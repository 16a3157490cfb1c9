"""What is wrong with preference rows, before any weights load: every row is looked at, and all is told at once.

A row that cannot be used is an error. One that could be scored, but would teach nothing or something else than it
says, is dropped:

| kind        | the row is dropped because                                                                         |
|-------------|----------------------------------------------------------------------------------------------------|
| `empty`     | a completion has no text but white space, or a plate has no element                                |
| `identical` | `chosen` and `rejected` are the same in everything that is observed, so there is no preference     |
| `over-long` | a completion has more tokens than its component can score behind its prompt; the rest would be cut |

The functions of those nodes run whose parents are all observed, so a row that one of them fails on is found, too.
Values are checked by tokenizers and configs (see `Component.check`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sysdag.components.component import Component
from sysdag.data.preferences import PreferencePair, Problem, encode_row
from sysdag.errors import DataError, PlanError
from sysdag.execution.execute import flat_draws, node_inputs
from sysdag.files.encoding import encode_value
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.cells import Cell, Draw
from sysdag.traces.readers import rows_of
from sysdag.traces.trace import Trace

DROPPED = ("empty", "identical", "over-long")
"""Kinds of problems that rows are dropped for; all others are errors."""


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """What became of every row.

    Attributes:
        rows: how many there are, parts of the file that are no rows among them.
        kept: the numbers of those that can be used, in order.
        counts: how many rows have a problem, by its kind; a row may have several.
        dropped: how many rows have none but problems of the kinds in `DROPPED`.
        problems: the first ones of each kind, up to the limit that was asked for, in the order of the rows.
        strict: whether every problem is an error.
    """

    rows: int
    kept: tuple[int, ...]
    counts: Mapping[str, int]
    dropped: int
    problems: tuple[Problem, ...]
    strict: bool = False

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
            "problems": [vars(problem) for problem in self.problems],
        }

    def __str__(self) -> str:
        dropped = "" if self.strict else f", {self.dropped} are dropped"
        lines = [f"{self.rows} rows: {len(self.kept)} can be used{dropped}, {self.errors} cannot."]
        if not self.kept:
            lines.append("No row is left." if self.rows else "There is no row.")
        for kind, count in self.counts.items():
            listed = [problem for problem in self.problems if problem.kind == kind]
            verdict = "dropped" if kind in DROPPED and not self.strict else "error"
            lines.append(f"\n{kind} ({verdict}): {count} {'row' if count == 1 else 'rows'}")
            lines += [f"  {problem}" for problem in listed]
            if len({(problem.row, problem.source) for problem in listed}) < count:
                lines.append("  ...")
        return "\n".join(lines)


def validate_rows(
    plan: Plan,
    rows: Iterable[Any],
    objective: Objective,
    *,
    limit: int = 20,
    strict: bool = False,
    damaged: Sequence[tuple[str, str]] = (),
) -> ValidationReport:
    """Looks at every row and loads no weights.

    Args:
        plan: of the system that is to be aligned.
        rows: see `sysdag.data.preferences.encode_pairs`.
        objective: what the rows are for.
        limit: how many problems of each kind are told; all are counted.
        strict: makes errors of the problems that rows are otherwise dropped for.
        damaged: of the rows' file, each part that is no row: its place and what is wrong with it.
    """
    found = _Findings(limit)
    for place, text in damaged:
        found.add([Problem(None, "malformed", "", "", text, place)])
    number = -1
    kept = []
    for number, row in enumerate(rows_of(rows)):
        pair, problems = encode_row(plan, row, number, objective, loads=False)
        if pair is not None:
            problems = _Check(plan, objective, number, getattr(row, "place", "")).problems_of(pair)
        if not problems:
            kept.append(number)
        found.add(problems)
    return ValidationReport(
        rows=number + 1 + len(damaged), kept=tuple(kept), counts=dict(found.counts), dropped=found.dropped,
        problems=tuple(found.problems), strict=strict,
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
        kinds = dict.fromkeys(problem.kind for problem in problems)
        self.counts.update(kinds.keys())
        self.dropped += bool(kinds) and all(kind in DROPPED for kind in kinds)
        for problem in problems:
            if self._kept[problem.kind] < self._limit:
                self._kept[problem.kind] += 1
                self.problems.append(problem)


@dataclass
class _Check:
    """What there is to say of one row whose values are all there and of the right types."""

    plan: Plan
    objective: Objective
    number: int
    source: str
    problems: list[Problem] = field(default_factory=list)

    def problems_of(self, pair: PreferencePair) -> list[Problem]:
        names = self.plan.observed(self.objective)
        for side in ("chosen", "rejected"):
            trace = self._filled(pair, side)
            for name in names:
                self._check_node(trace, name, side)
        if not self.problems and all(_same(pair.chosen[name], pair.rejected[name]) for name in names):
            self._add("identical", "", "", "chosen and rejected are the same.")
        return self.problems

    def _add(self, kind: str, name: str, side: str, text: str) -> None:
        self.problems.append(Problem(self.number, kind, name, side, text, self.source))

    def _filled(self, pair: PreferencePair, side: str) -> Trace:
        """The row's values of one side, with the deterministic nodes that they determine."""
        cells: dict[str, Sequence[Cell]] = {name: [cell] for name, cell in getattr(pair, side).items()}
        trace = Trace({name: [value] for name, value in pair.inputs.items()}, cells)
        for name in self.plan.order:
            if name in trace.cells or self.plan.system[name].is_random or not self._has_parents(trace, name):
                continue
            elements = self._elements(trace, name, side)
            if elements is not None:
                trace = trace.updated({name: elements.cells([Draw(value) for value in elements.values])})
        return trace

    def _has_parents(self, trace: Trace, name: str) -> bool:
        return all(edge.parent in trace.inputs or edge.parent in trace.cells for edge in self.plan.parents(name))

    def _elements(self, trace: Trace, name: str, side: str) -> Any:
        """What the node's function makes of its parents' values; None, and a problem, if it fails."""
        try:
            return node_inputs(self.plan, trace, name)
        except PlanError as error:
            what = str(error).partition(", row 0: ")[2]  # of a trace of one row, whose number says nothing
            self._add("invalid value", name, side, what or str(error))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            self._add("invalid value", name, side, f"its function fails on this row: {type(error).__name__}: {error}")
        return None

    def _check_node(self, trace: Trace, name: str, side: str) -> None:
        component = self.plan.system[name].component
        assert component is not None  # random nodes alone are observed
        draws = flat_draws(trace.cells[name])
        if any(map(component.is_empty, draws)):
            self._add("empty", name, side, "the completion is empty.")
        inputs: list[Any] = [None] * len(draws)
        if self._has_parents(trace, name):
            elements = self._elements(trace, name, side)
            if elements is None:
                return
            if len(elements.values) != len(draws):
                text = f"its plate has {len(elements.values)} elements, but {len(draws)} values are given."
                self._add("invalid value", name, side, text)
                return
            inputs = elements.values
        try:
            self._check_lengths(component, inputs, draws, name, side)
        except DataError as error:
            self._add("invalid value", name, side, str(error))

    def _check_lengths(
        self, component: Component, inputs: Sequence[Any], draws: Sequence[Draw], name: str, side: str
    ) -> None:
        for given, length in zip(inputs, component.lengths(draws), strict=True):
            longest = component.longest_draw(given)
            if longest is not None and length > longest:
                behind = "" if given is None else " behind its prompt"
                text = f"the completion has {length} tokens, of which {longest} can be scored{behind}."
                self._add("over-long", name, side, text)
                return


def _same(first: Cell, second: Cell) -> bool:
    """Whether two cells are one outcome: in values, and in records where both have one."""
    ours, theirs = flat_draws([first]), flat_draws([second])
    return len(ours) == len(theirs) and all(map(_same_draw, ours, theirs))


def _same_draw(first: Draw, second: Draw) -> bool:
    if first is second:
        return True
    try:
        if first.record and second.record:
            return _content(dict(first.record)) == _content(dict(second.record))
        return _content(first.value) == _content(second.value)
    except DataError:  # a type that only the component knows
        return first.value is second.value and not (first.record and second.record)


def _content(value: Any) -> Any:
    return encode_value(value, "value")
