"""How much better one system is than another, or than given responses: win rate, scores, intervals and exact tests."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from sysdag.errors import DataError, JudgeError
from sysdag.evaluation.judges import ComparingJudge, Judge, ScoringJudge
from sysdag.evaluation.statistics import Interval, PairedTest, cluster_bootstrap, reaches, sign_test, win_rate
from sysdag.evaluation.verdicts import Consistency, Verdict, consistency
from sysdag.files.encoding import encode_value
from sysdag.traces.trace import Trace
from sysdag.versions import installed_versions

FORMAT_VERSION = 1
SEED_OF_THE_OTHER = 2**32  # more than that of the first: with equal ones the runs would not be independent


@dataclass(frozen=True)
class Matched:
    """Two systems' runs, row by row of the same prompt.

    Attributes:
        first, second: the runs.
        prompts: (n,) the prompt of each row, numbered in order of first appearance.
        runs: (n,) which of the prompt's rows it is, from 0.
        unmatched: runs of the first and of the second that have no partner.
    """

    first: Trace
    second: Trace
    prompts: Sequence[int]
    runs: Sequence[int]
    unmatched: tuple[int, int] = (0, 0)


def match(first: Trace, second: Trace) -> Matched:
    """Puts runs of the same inputs side by side: of each prompt the first run with the first, and so on.

    Raises:
        DataError: for traces over other inputs, or without a prompt in common.
    """
    if first.inputs.keys() != second.inputs.keys():
        raise DataError(f"The traces have different inputs: {sorted(first.inputs)} and {sorted(second.inputs)}.")
    groups: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, trace in enumerate((first, second)):
        for row in range(len(trace)):
            inputs = {name: encode_value(column[row], name) for name, column in trace.inputs.items()}
            groups[json.dumps(inputs, sort_keys=True)][side].append(row)
    rows = [
        (one, other, prompt, run)
        for prompt, (ones, others) in enumerate(pair for pair in groups.values() if all(pair))
        for run, (one, other) in enumerate(zip(ones, others, strict=False))
    ]
    if not rows:
        raise DataError("The traces have no prompt in common, so there is nothing to compare.")
    one, other, prompts, runs = (list(column) for column in zip(*rows, strict=True))
    left = len(first) - len(rows), len(second) - len(rows)
    return Matched(first.select(one), second.select(other), prompts, runs, left)


@dataclass(frozen=True)
class Scores:
    """What a scoring judge says of two systems; all intervals are over prompts.

    Attributes:
        first, second: mean scores.
        difference: of the means, first minus second.
    """

    first: Interval
    second: Interval
    difference: Interval


@dataclass(frozen=True)
class Successes:
    """Runs whose score reaches a threshold.

    Attributes:
        threshold: the least score of a success (the largest one, where lower is better).
        first, second: shares of successes.
        test: McNemar's exact test; with several runs a prompt, an exact sign test of which system has more successes
            on each.
    """

    threshold: float
    first: Interval
    second: Interval
    test: PairedTest


@dataclass(frozen=True)
class Evaluation:
    """One system against another.

    Attributes:
        rows: one dict a comparison: `prompt`, `run`, `outcome` (1 the first is better, 0 a tie, -1, or None for a
            verdict that could not be read), and `scores` (of both), or `votes` (see `Verdict`) and `asked`.
        prompts: how many there are.
        wins, ties, losses: comparisons of the first with the second; the rest could not be read.
        win_rate: of the first, ties counted half.
        test: an exact sign test of wins against losses, each prompt counted once.
        scores, successes: of a scoring judge, and where a threshold is given.
        consistency: of a comparing judge.
        confidence: of all intervals.
    """

    rows: Sequence[Mapping[str, Any]]
    prompts: int
    wins: int
    ties: int
    losses: int
    win_rate: Interval
    test: PairedTest
    confidence: float
    scores: Scores | None = None
    successes: Successes | None = None
    consistency: Consistency | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the rows last; a bound that the sample cannot tell is null."""
        found = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return _without_nan({**{name: value for name, value in found.items() if name != "rows"}, "rows": found["rows"]})

    def table(self, first: str, second: str) -> str:
        """The figures as text; `first` and `second` name the two sides."""
        lines = [
            ("A", first),
            ("B", second),
            ("comparisons", f"{len(self.rows)} on {self.prompts} prompts; intervals at {self.confidence:.0%}"),
            ("win rate of A", _text(self.win_rate, percent=True)),
            ("wins, ties, losses", f"{self.wins}, {self.ties}, {self.losses}"),
            ("sign test", _test(self.test)),
        ]
        if self.scores is not None:
            lines += [
                ("mean score of A", _text(self.scores.first)),
                ("mean score of B", _text(self.scores.second)),
                ("difference, A - B", _text(self.scores.difference, signed=True)),
            ]
        if self.successes is not None:
            reached = f"reached {self.successes.threshold:g}"
            lines += [
                (f"A {reached}", _text(self.successes.first, percent=True)),
                (f"B {reached}", _text(self.successes.second, percent=True)),
                ("exact test", _test(self.successes.test)),
            ]
        text = "\n".join(f"{name:20} {value}" for name, value in lines)
        return text if self.consistency is None else f"{text}\n{self.consistency}"


def evaluate(
    judge: Judge,
    matched: Matched,
    outputs: Sequence[str],
    *,
    threshold: float | None = None,
    margin: float = 0.0,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Evaluation:
    """Judges the first system's runs against the second's.

    Args:
        judge: scores or compares.
        outputs: the nodes that a judge sees which does not see whole runs.
        threshold: of a scoring judge: the score from which on a run is a success.
        margin: of a scoring judge: scores that differ by less are a tie.
        confidence: of the intervals.
        resamples, seed: of the bootstrap.

    Raises:
        JudgeError: if the judge fails, no verdict could be read, or an option is not for this kind of judge.
    """
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    check_options(judge, threshold=threshold, margin=margin)
    clusters = numpy.asarray(matched.prompts)
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "run": run} for prompt, run in zip(matched.prompts, matched.runs, strict=True)
    ]
    scores = successes = found = None
    if isinstance(judge, ScoringJudge):
        pair = numpy.array([judge.scores(matched.first), judge.scores(matched.second)])
        better = (-1 if judge.lower_is_better else 1) * (pair[0] - pair[1])
        outcomes: list[int | None] = [int(o) for o in numpy.sign(better) * reaches(abs(better), margin)]
        for row, one, other in zip(rows, *pair.tolist(), strict=True):
            row["scores"] = [one, other]
        scores = Scores(
            cluster_bootstrap(pair[0], clusters, **options),
            cluster_bootstrap(pair[1], clusters, **options),
            cluster_bootstrap(pair[0] - pair[1], clusters, **options),
        )
        if threshold is not None:
            successes = _successes(pair, threshold, judge.lower_is_better, clusters, options)
    else:
        assert isinstance(judge, ComparingJudge)
        verdicts: list[Verdict] = judge.compare(matched.first, matched.second, outputs)
        outcomes = [verdict.outcome for verdict in verdicts]
        for row, verdict in zip(rows, verdicts, strict=True):
            row |= {"votes": list(verdict.votes), "asked": verdict.asked}
        found = consistency(verdicts)
    for row, outcome in zip(rows, outcomes, strict=True):
        row["outcome"] = outcome
    read = [number for number, outcome in enumerate(outcomes) if outcome is not None]
    if not read:
        raise JudgeError(f"{judge.name} gave no verdict that could be read.\n{found}")
    known = numpy.array([outcomes[number] for number in read])
    return Evaluation(
        rows=rows,
        prompts=len(set(matched.prompts)),
        wins=int((known == 1).sum()),
        ties=int((known == 0).sum()),
        losses=int((known == -1).sum()),
        win_rate=win_rate(known, clusters[read], **options),
        test=sign_test(known, clusters[read]),
        confidence=confidence,
        scores=scores,
        successes=successes,
        consistency=found,
    )


def evaluation_record(
    found: Evaluation, judge: Judge, outputs: Sequence[str], *, sources: Mapping[str, Any], seed: int, margin: float
) -> dict[str, Any]:
    """What is kept of an evaluation, JSON-ready: where the runs are from, who judged, and what was found."""
    facts = {
        "sources": dict(sources), "seed": seed, "margin": margin, "outputs": list(outputs), "judge": judge.to_dict(),
        "versions": installed_versions(),
    }  # fmt: skip
    return facts | found.to_dict()


def check_options(judge: Judge, *, threshold: float | None = None, margin: float = 0.0) -> None:
    """Raises a JudgeError for an option out of range, or that needs scores where the judge gives none."""
    if threshold is not None and not math.isfinite(threshold):
        raise JudgeError(f"threshold (--threshold) must be a finite number, got {threshold}.")
    if not isinstance(judge, ScoringJudge):
        for name, given in (("threshold", threshold is not None), ("margin", margin != 0)):
            if given:
                raise JudgeError(f"{judge.name} compares two runs and gives no scores; {name} (--{name}) needs them.")


def _successes(
    scores: numpy.ndarray, threshold: float, lower_is_better: bool, clusters: numpy.ndarray, options: Mapping[str, Any]
) -> Successes:
    reached = (scores <= threshold) if lower_is_better else (scores >= threshold)
    first, second = (win_rate(2 * side.astype(int) - 1, clusters, **options) for side in reached)
    return Successes(threshold, first, second, sign_test(reached[0].astype(int) - reached[1].astype(int), clusters))


def _test(test: PairedTest) -> str:
    return f"{test.first} prompts for A, {test.second} for B, p = {test.p_value:.3g}"


def _text(interval: Interval, *, percent: bool = False, signed: bool = False) -> str:
    numbers = [interval.estimate, interval.low, interval.high]
    sign = "+" if signed else ""
    texts = [f"{100 * n:.1f} %" if percent else f"{n:{sign}.4g}" for n in numbers]
    return texts[0] if math.isnan(interval.low) else f"{texts[0]} ({texts[1]} to {texts[2]})"


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(element) for element in value]
    return None if isinstance(value, float) and math.isnan(value) else value
