"""Who judges the runs of a round: a judge by name or at hand, or scores that come from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sysdag.errors import JudgeError
from sysdag.evaluation.judge_choice import JudgeChoice
from sysdag.evaluation.judges import ColumnScore, ComparingJudge, Judge, ScoringJudge, function_judge
from sysdag.graph.source import source_hash
from sysdag.traces.trace import Trace

_SCORED = "scored-"


def judge_of(given: JudgeChoice | Judge | Callable[..., Any], output: Path | None) -> Judge:
    """The judge that is meant; an endpoint's answers are kept beside `output`."""
    if isinstance(given, JudgeChoice):
        return given.judge(output)
    if isinstance(given, (ScoringJudge, ComparingJudge)):
        return given
    return function_judge(given)


def judge_facts(judge: Judge) -> dict[str, Any]:
    """What tells a judge from others: also the source of a function."""
    function = getattr(judge, "function", None)
    return judge.to_dict() | ({} if function is None else {"source_sha256": source_hash(function)})


def with_scores(judge: Judge, trace: Trace, file: Path) -> Trace:
    """The runs with the column that a judge takes its scores from, which a file beside them may bring.

    Raises:
        JudgeError: if the column is not there yet; or if what is there are other runs.
    """
    if not isinstance(judge, ColumnScore) or judge.name in trace.columns:
        return trace
    scored = file.with_name(f"{_SCORED}{file.name}")
    if not scored.is_file():
        raise JudgeError(
            f"Waiting for scores: {file} has no column {judge.name!r}. Write its runs with that column to {scored} (as "
            f"`sysdag judge {file} --by ... --scores {scored} --score-name {judge.name}` does), and give the same "
            "command again, which goes on from here."
        )
    found = Trace.load(scored)
    if judge.name not in found.columns:
        raise JudgeError(f"{scored} has no column {judge.name!r}; its columns are {sorted(found.columns)}.")
    bare = replace(found, columns={name: column for name, column in found.columns.items() if name in trace.columns})
    if list(bare.rows()) != list(trace.rows()):
        raise JudgeError(
            f"{scored} holds other runs than {file}; write these with {judge.name!r} beside them, in order."
        )
    return found
