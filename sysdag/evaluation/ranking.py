"""Preference pairs from judged runs: the runs of each prompt are ranked, and the best stand against the worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sysdag.errors import JudgeError
from sysdag.evaluation.judges import ComparingJudge, Judge, ScoringJudge, same_outputs
from sysdag.evaluation.statistics import reaches
from sysdag.evaluation.verdicts import Verdict
from sysdag.traces.pairs import runs_by_input
from sysdag.traces.trace import Trace


@dataclass(frozen=True)
class Judged:
    """Runs with their scores.

    Attributes:
        scores: one a run, as the judge gave it, or the share of its comparisons that the run won (ties count half);
            None for a run of which no comparison could be read, or that has nothing to be compared with.
        lower_is_better: whether a smaller score is the better one.
        verdicts: of a comparing judge, one for each of `compared`.
        compared: pairs of rows.
    """

    scores: Sequence[float | None]
    lower_is_better: bool = False
    verdicts: Sequence[Verdict] = ()
    compared: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Chosen:
    """Preferences among runs.

    Attributes:
        pairs: rows, the chosen and the rejected one.
        prompts: how many prompts there are.
        without: how many of them gave no pair, by reason.
    """

    pairs: Sequence[tuple[int, int]]
    prompts: int
    without: Mapping[str, int]

    def __str__(self) -> str:
        empty = sum(self.without.values())
        lines = [f"{len(self.pairs)} pairs from {self.prompts - empty} of {self.prompts} prompts."]
        lines += [f"  {count} without: {reason}" for reason, count in self.without.items()]
        return "\n".join(lines)


def judge_runs(trace: Trace, judge: Judge, outputs: Sequence[str], *, comparisons: int = 15) -> Judged:
    """Scores every run of a trace.

    Args:
        outputs: the nodes that are judged, for a judge that sees outputs only.
        comparisons: for a comparing judge, how many of the pairs of one prompt's runs are compared, at most; 15 are
            all pairs of 6 runs. Beyond that runs meet about equally many others.

    Raises:
        JudgeError: if the judge fails, or there is nothing to compare.
    """
    if isinstance(judge, ScoringJudge):
        return Judged(judge.scores(trace), judge.lower_is_better)
    assert isinstance(judge, ComparingJudge)
    compared = [pair for rows in runs_by_input(trace) for pair in schedule(rows, comparisons)]
    if not compared:
        raise JudgeError(
            f"{judge.name} compares runs, but every prompt of the traces has one run only; sample several (--runs)."
        )
    first, second = (trace.select(rows) for rows in zip(*compared, strict=True))
    verdicts = judge.compare(first, second, outputs)
    won, counted = Counter[int](), Counter[int]()
    for (one, other), verdict in zip(compared, verdicts, strict=True):
        if verdict.outcome is not None:
            won[one] += 1 + verdict.outcome
            won[other] += 1 - verdict.outcome
            counted[one] += 2
            counted[other] += 2
    scores = [won[row] / counted[row] if row in counted else None for row in range(len(trace))]
    return Judged(scores, verdicts=verdicts, compared=compared)


def schedule(rows: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Pairs of rows to compare: all of them, or the first `most` of an order in which each row meets its neighbours on
    a ring (every second row first, so that few comparisons still reach all rows), then those two places away, and so
    on."""
    count = len(rows)
    pairs = []
    for distance in range(1, count // 2 + 1):
        every = count // 2 if 2 * distance == count else count
        starts = [*range(0, every, 2), *range(1, every, 2)]
        pairs += [(rows[start], rows[(start + distance) % count]) for start in starts]
    return pairs[:most]


def choose_pairs(
    trace: Trace, judged: Judged, outputs: Sequence[str], *, pairs_per_prompt: int = 1, margin: float = 0.0
) -> Chosen:
    """Preferences for the runs of each prompt: best against worst, second best against second worst, and so on.

    Args:
        outputs: runs whose values of these nodes are equal are no pair.
        pairs_per_prompt: at most.
        margin: the least difference of scores; a pair always has different ones.
    """
    sign = -1 if judged.lower_is_better else 1
    pairs: list[tuple[int, int]] = []
    without: Counter[str] = Counter()
    groups = runs_by_input(trace)
    for rows in groups:
        value = {row: sign * score for row in rows if (score := judged.scores[row]) is not None}
        order = sorted(value, key=value.__getitem__, reverse=True)
        half = len(order) // 2
        ranked = list(zip(order[:half], order[::-1][:half], strict=True))
        apart = [(best, worst) for best, worst in ranked if value[best] - value[worst] > 0]
        wide = [(best, worst) for best, worst in apart if reaches(value[best] - value[worst], margin)]
        same = _same(trace, wide, outputs)
        found = [pair for pair, equal in zip(wide, same, strict=True) if not equal]
        pairs += found[:pairs_per_prompt]
        if len(rows) == 1:
            without["one run only"] += 1
        elif not ranked:
            without["fewer than two runs with a verdict"] += 1
        elif not apart:
            without["all runs equally good"] += 1
        elif not wide:
            without[f"scores differ by less than the margin {margin:g}"] += 1
        elif not found:
            without["better and worse runs have equal outputs"] += 1
    return Chosen(pairs, len(groups), dict(without))


def _same(trace: Trace, pairs: Sequence[tuple[int, int]], outputs: Sequence[str]) -> list[bool]:
    if not pairs:
        return []
    first, second = (trace.select(rows) for rows in zip(*pairs, strict=True))
    return same_outputs(first, second, outputs)
