"""What keeps a row from being trained on, though its values are all there and of the right types.

A row that cannot be used is an error; so is one that is a pair among unpaired rows, or the reverse. One that could be
scored, but would teach nothing or something else than it says, is dropped:

| kind        | the row is dropped because                                                                         |
|-------------|----------------------------------------------------------------------------------------------------|
| `empty`     | a chosen or desirable output has no text but white space, or a plate has no element; for Sampling, |
|             | also an observed part of a completion that ended before it came there                              |
| `identical` | `chosen` and `rejected` are the same in everything that is observed, so there is no preference     |
| `beginning` | of two whole texts or conversations one begins the other: where their prompt ends is not known     |
| `unpaired`  | it holds no preference: a tie, or one that nobody rated (see `sysdag.traces.shapes`)               |
| `over-long` | a completion has more tokens than its component can score behind its prompt; the rest would be cut |

A rejected or undesirable output, or an intermediate, may be empty: that a text is better than none is a preference. A
row whose prompt is cut is used, and told (`cut prompt`); so is one with chat messages that are written down as one text
(`messages as text`).

The functions of those nodes run whose parents are all observed, so a row that one of them fails on is found, too.
Values are checked by tokenizers and configs (see `Component.check`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sysdag.components.component import Component
from sysdag.data.branches import told_function
from sysdag.data.columns import is_unpaired, read_columns
from sysdag.data.preferences import Feedback, PreferencePair, Problem, UnpairedRun
from sysdag.data.row_encoding import encode_row
from sysdag.errors import DataError, PlanError
from sysdag.execution.execute import flat_draws, node_inputs, resolved
from sysdag.files.encoding import encode_value
from sysdag.graph.parts import part_of
from sysdag.graph.plan import Objective, Plan
from sysdag.traces.cells import Cell, Draw
from sysdag.traces.csv_rows import is_written_messages
from sysdag.traces.rows import number_of
from sysdag.traces.trace import Trace

DROPPED = ("empty", "identical", "beginning", "unpaired", "over-long")
"""Kinds of problems that rows are dropped for."""
NOTED = ("cut prompt", "messages as text")
"""Kinds of problems that are told of rows that are used; all others are errors."""


@dataclass(frozen=True)
class Wanted:
    """Of which kind rows have to be.

    Attributes:
        unpaired: whether single runs with a label, or pairs.
        why: what asks for them, and what to do with others; the end of a message.
    """

    unpaired: bool
    why: str

    @classmethod
    def of(cls, plan: Plan, rows: Sequence[Any], first: int = 0) -> Wanted | None:
        """What the first row is: a training takes one kind. None where no row can be told.

        Args:
            first: the number of the first one.
        """
        for place, row in enumerate(rows):
            if isinstance(row, Mapping) and (is_unpaired(plan, row) or "chosen" in row or "rejected" in row):
                other = cls(is_unpaired(plan, row), "")
                number = number_of(row, first + place)
                return cls(other.unpaired, f"Row {number} is {other.kind}, and a training takes rows of one kind.")
        return None

    @property
    def kind(self) -> str:
        return "an unpaired row (output and label)" if self.unpaired else "a pair (chosen and rejected)"

    def problem(self, plan: Plan, row: Any, number: int) -> Problem | None:
        """Why a row is of the other kind, if it is."""
        if not isinstance(row, Mapping) or is_unpaired(plan, row) == self.unpaired:
            return None
        kind = "other kind"
        text = f"it is {Wanted(not self.unpaired, '').kind}, expected {self.kind}. {self.why}"
        if self.unpaired and "chosen" not in row and "rejected" not in row:
            kind = "missing"
            text = f"'output' (or 'completion') and 'label' are missing; the row has {sorted(map(str, row))}."
        return Problem(number, kind, "", "", text, getattr(row, "place", ""))


def check_row(
    plan: Plan, row: Any, number: int, objective: Objective, empty: str, wanted: Wanted | None = None
) -> list[Problem]:
    """All that there is to say of a row; no weights load.

    Args:
        plan, row, number, objective: see `encode_row`.
        empty: what becomes of a row whose chosen or desirable output is empty.
        wanted: of which kind it has to be; of either by default.

    Raises:
        PlanError: for an `empty` that is neither `drop` nor `keep`.
    """
    if empty not in ("drop", "keep"):
        raise PlanError(f"empty must be 'drop' or 'keep', got {empty!r}.")
    if wanted is not None and (other := wanted.problem(plan, row, number)) is not None:
        return [other]
    pair, problems = encode_row(plan, row, number, objective, loads=False)
    if pair is None:
        return problems
    source = getattr(row, "place", "")
    written = [
        name
        for name in sorted(read_columns(plan, row, objective))
        if isinstance(row.get(name), str) and is_written_messages(row[name])
    ]
    text = "a text that is chat messages, written down; it is used as a text. Give the list of messages itself."
    noted = [Problem(number, "messages as text", "", "", f"{name} is {text}", source) for name in written]
    return _Check(plan, objective, number, source, empty).problems_of(pair) + noted


@dataclass
class _Check:
    """What there is to say of one row whose values are all there and of the right types."""

    plan: Plan
    objective: Objective
    number: int
    source: str
    empty: str
    problems: list[Problem] = field(default_factory=list)

    def problems_of(self, feedback: Feedback) -> list[Problem]:
        names = self.plan.observed(self.objective)
        cut: dict[str, str] = {}
        for side in feedback.sides:
            trace = self._filled(feedback, side)
            is_good = feedback.label if isinstance(feedback, UnpairedRun) else side == "chosen"
            for name in names:
                self._check_node(trace, name, side, is_good=is_good)
            if not self.problems:
                cut = self._cut_prompts(trace, side) | cut
        if isinstance(feedback, PreferencePair) and not self.problems:
            self._check_difference(feedback, names)
        for name, text in cut.items():
            self._add("cut prompt", name, "", text)
        return self.problems

    def _check_difference(self, pair: PreferencePair, names: Sequence[str]) -> None:
        if all(_same(pair.chosen[name], pair.rejected[name]) for name in names):
            self._add("identical", "", "", "chosen and rejected are the same.")

    def _add(self, kind: str, name: str, side: str, text: str) -> None:
        self.problems.append(Problem(self.number, kind, name, side, text, self.source))

    def _filled(self, feedback: Feedback, side: str) -> Trace:
        """The row's values of one side, with the deterministic nodes that they determine."""
        cells: dict[str, Sequence[Cell]] = {name: [cell] for name, cell in feedback.sides[side].items()}
        trace = Trace({name: [value] for name, value in feedback.inputs.items()}, cells)
        unknown: set[str] = set()  # observed, and not what they stand for, which is told where they are checked
        for name in self.plan.order:
            if unknown.intersection(edge.parent for edge in self.plan.parents(name)):
                unknown |= set() if name in trace.cells else {name}
                continue
            if name in trace.cells or self.plan.system[name].is_random or not self._has_parents(trace, name):
                try:
                    trace = resolved(self.plan, trace, name)
                except Exception:  # noqa: BLE001 - of a user's function, too
                    unknown.add(name)
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
        except (PlanError, DataError) as error:
            what = str(error).partition(", row 0: ")[2]  # of a trace of one row, whose number says nothing
            self._add("invalid value", name, side, what or str(error))
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            self._add("invalid value", name, side, told_function(error))
        return None

    def _check_node(self, trace: Trace, name: str, side: str, *, is_good: bool) -> None:
        component = self.plan.system[name].component
        assert component is not None  # random nodes alone are observed
        draws = flat_draws(trace.cells[name])
        is_output = is_good and name in self.plan.results
        if is_output and self.empty == "drop" and any(map(component.is_empty, draws)):
            self._add("empty", name, side, "the completion is empty.")
        is_part = self.objective == "sampling" and part_of(self.plan.system[name]) is not None
        if is_part and any(draw.record.get("token_ids") == [] for draw in draws):
            text = (
                "its completion ended before it came to this part, so that a sum over the parts before cannot say how "
            )
            self._add("empty", name, side, f"{text}probable that is. Direct can (objective='direct').")
            return
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

    def _cut_prompts(self, trace: Trace, side: str) -> dict[str, str]:
        """Of every node whose prompts are known and lose a part, what is lost of the longest."""
        found = {}
        for name in self.plan.random_nodes:
            if not self._has_parents(trace, name):
                continue
            component = self.plan.system[name].component
            assert component is not None
            elements = self._elements(trace, name, side)
            if elements is None:
                continue
            try:
                lost = max(map(component.cut_from, elements.values), default=0)
            except DataError as error:
                self._add("invalid value", name, side, str(error))
                continue
            if lost:
                limit = getattr(component, "limits_prompts", "max_length")
                found[name] = f"the prompt loses {lost} tokens, for which there is no room ({limit})."
        return found

    def _check_lengths(
        self, component: Component, inputs: Sequence[Any], draws: Sequence[Draw], name: str, side: str
    ) -> None:
        if any(given is not None for given in inputs):
            draws = component.in_context(inputs, draws)
        for given, length in zip(inputs, component.positions(draws), strict=True):
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
