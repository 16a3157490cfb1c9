"""Judges: what says which of two runs is better. A score of one run, or a comparison of two, in both orders.

A run is a dict of the values of its inputs and nodes by name, and of the trace's columns where their names are free
(but not of `prompt` and `run`, which only number the runs).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sysdag.errors import DataError, JudgeError
from sysdag.evaluation.verdicts import Verdict
from sysdag.files.encoding import encode_value
from sysdag.saving.loading import load_function
from sysdag.traces.feedback import EXPECTED, NOUNS, Kind, read_feedback
from sysdag.traces.trace import Trace

Run = Mapping[str, Any]
_NUMBERS = ("prompt", "run")  # of sampled runs; not what a function means by `run["prompt"]`


@runtime_checkable
class ScoringJudge(Protocol):
    """Scores single runs.

    Attributes:
        name: of the judge, for messages.
        lower_is_better: whether a smaller score is the better one.
    """

    @property
    def name(self) -> str: ...

    @property
    def lower_is_better(self) -> bool: ...

    def scores(self, trace: Trace) -> list[float]:
        """A finite score for each run.

        Raises:
            JudgeError: naming the run that has none.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """All that the scores depend on, JSON-ready and without secrets."""
        ...


@runtime_checkable
class ComparingJudge(Protocol):
    """Compares two runs of the same inputs.

    Attributes:
        name: of the judge, for messages.
    """

    @property
    def name(self) -> str: ...

    def compare(self, first: Trace, second: Trace, outputs: Sequence[str]) -> list[Verdict]:
        """A verdict for each row, asked for in both orders.

        Args:
            first, second: row by row two runs with equal inputs.
            outputs: the nodes that a judge sees which does not see whole runs.

        Raises:
            JudgeError: if the judge fails.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """All that the verdicts depend on, JSON-ready and without secrets."""
        ...


Judge = ScoringJudge | ComparingJudge


@dataclass(frozen=True)
class ColumnScore:
    """Scores that the traces hold already, as a column.

    Attributes:
        holds: what the column has: scores; thumbs, which count as 1 and 0; or ranks, for which `lower_is_better` is
            set, as 1 is the best.
    """

    name: str
    lower_is_better: bool = False
    holds: Kind = "scores"

    def __post_init__(self) -> None:
        if self.holds not in NOUNS:
            raise JudgeError(f"holds must be one of {', '.join(NOUNS)}, got {self.holds!r}.")
        if self.holds != "scores" and self.lower_is_better:
            raise JudgeError(
                f"lower_is_better (--lower-is-better) belongs to scores, and {self.name} holds {self.holds}."
            )
        if self.holds == "ranks":
            object.__setattr__(self, "lower_is_better", True)

    def known(self, trace: Trace) -> list[float | None]:
        """The score of each run; None where the column has none.

        Raises:
            JudgeError: if there is no such column, or naming the run whose value is something else.
        """
        if self.name not in trace.columns:
            raise JudgeError(
                f"The traces have no column {self.name!r}; their columns are {sorted(trace.columns)}. (A function is "
                "named FILE.py:function, an endpoint by its URL.)"
            )
        try:
            return read_feedback(trace.columns[self.name], self.holds, f"column {self.name!r}")
        except DataError as error:
            raise JudgeError(str(error)) from error

    def scores(self, trace: Trace) -> list[float]:
        found = self.known(trace)
        if None in found:
            raise JudgeError(
                f"column {self.name!r}, run {found.index(None)}: expected {EXPECTED[self.holds]}, got nothing."
            )
        return [score for score in found if score is not None]

    def to_dict(self) -> dict[str, Any]:
        kind = {} if self.holds == "scores" else {"holds": self.holds}
        return {"kind": "column", "name": self.name, "lower_is_better": self.lower_is_better, **kind}


@dataclass(frozen=True)
class FunctionScore:
    """A Python function of one run that returns a number."""

    name: str
    function: Callable[[Run], Any]
    lower_is_better: bool = False

    def scores(self, trace: Trace) -> list[float]:
        return [
            _number(_call(self, row, run), f"{self.name}, run {row}", "a finite number")
            for row, run in enumerate(progress(runs_of(trace), len(trace), "scoring"))
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "score", "name": self.name, "lower_is_better": self.lower_is_better}


@dataclass(frozen=True)
class FunctionComparison:
    """A Python function of two runs: an int 1, 0 or -1 for first better, tie, second better; or a float (or bool), the
    probability that the first is better."""

    name: str
    function: Callable[[Run, Run], Any]

    def compare(self, first: Trace, second: Trace, outputs: Sequence[str]) -> list[Verdict]:
        pairs = zip(runs_of(first), runs_of(second), strict=True)
        verdicts = []
        for row, (one, other) in enumerate(progress(pairs, len(first), "judging")):
            verdicts.append(Verdict((self._vote(row, one, other), 1 - self._vote(row, other, one))))
        return verdicts

    def _vote(self, row: int, shown_first: Run, shown_second: Run) -> float:
        value = _plain(_call(self, row, shown_first, shown_second))
        if type(value) is int and value in (-1, 0, 1):
            return (1 + value) / 2
        if isinstance(value, (bool, float)) and 0 <= value <= 1:
            return float(value)
        raise JudgeError(
            f"{self.name}, comparison {row}: expected an int 1, 0 or -1 (first better, tie, second better) or a float "
            f"from 0 to 1 (the probability that the first is better), got {type(value).__name__} {value!r:.80}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "comparison", "name": self.name}


def function_judge(spec: str | Callable[..., Any], *, lower_is_better: bool = False) -> Judge:
    """A judge from a Python function: of one parameter, `score(run)`, or of two, `prefer(first, second)`.

    Args:
        spec: the function, or `FILE.py:function` or `package.module:function`.
        lower_is_better: of scores.

    Raises:
        LoadingError: if it is not there.
        JudgeError: for another number of parameters.
    """
    function = load_function(spec) if isinstance(spec, str) else spec
    name = spec if isinstance(spec, str) else getattr(function, "__qualname__", repr(function))
    names = _parameters(function, name)
    if len(names) == 1:
        return FunctionScore(name, function, lower_is_better)
    if len(names) != 2 or names[0] in ("input", "inputs"):
        raise JudgeError(
            f"{name}({', '.join(names)}): a judge takes one run, score(run), or two runs, prefer(first, second). A run "
            "is a dict of the values of inputs and nodes."
        )
    if lower_is_better:
        raise JudgeError(f"{name} compares two runs; lower_is_better belongs to scores.")
    return FunctionComparison(name, function)


def _parameters(function: Callable[..., Any], name: str) -> list[str]:
    """The names of the parameters that have to be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise JudgeError(f"{name}: Python does not know its parameters ({error}); wrap it in a function.") from error
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def runs_of(trace: Trace) -> Iterable[Run]:
    """The runs of a trace, one after the other, as judges see them."""
    columns = {name: column for name, column in trace.columns.items() if name not in _NUMBERS}
    columns |= {name: trace[name] for name in (*trace.inputs, *trace.cells)}
    for row in range(len(trace)):
        yield {name: column[row] for name, column in columns.items()}


def same_outputs(first: Trace, second: Trace, outputs: Sequence[str]) -> list[bool]:
    """For each row, whether two runs have equal outputs, whatever the tokens that wrote them."""
    columns = [[trace[name] for trace in (first, second)] for name in outputs]
    return [
        all(encode_value(one[row], "output") == encode_value(other[row], "output") for one, other in columns)
        for row in range(len(first))
    ]


def progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """The items, with a progress bar on standard error where that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=what, disable=None)


def _call(judge: FunctionScore | FunctionComparison, row: int, *runs: Run) -> Any:
    try:
        return judge.function(*runs)
    except Exception as error:  # the function is the user's
        unit = "run" if len(runs) == 1 else "comparison"
        hint = f"; the run has {sorted(set.intersection(*map(set, runs)))}" if isinstance(error, KeyError) else ""
        raise JudgeError(f"{judge.name}, {unit} {row}: {type(error).__name__}: {error}{hint}.") from error


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _number(value: Any, where: str, expected: str) -> float:
    value = _plain(value)
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    raise JudgeError(f"{where}: expected {expected}, got {type(value).__name__} {value!r:.80}.")
