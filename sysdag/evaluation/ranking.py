"""Preference pairs from judged runs: the runs of each prompt are ranked, and the best stand against the worst."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sysdag.errors import JudgeError
from sysdag.evaluation.judges import ColumnScore, ComparingJudge, Judge, ScoringJudge, same_outputs
from sysdag.evaluation.statistics import reaches
from sysdag.evaluation.verdicts import Verdict
from sysdag.traces.feedback import NOUNS
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
        noun: what runs without a score lack.
    """

    scores: Sequence[float | None]
    lower_is_better: bool = False
    verdicts: Sequence[Verdict] = ()
    compared: Sequence[tuple[int, int]] = ()
    noun: str = "verdict"

    def gap(self, better: int, worse: int) -> float:
        """By how much the score of one run is better than that of another."""
        one, other = self.scores[better], self.scores[worse]
        assert one is not None
        assert other is not None
        return other - one if self.lower_is_better else one - other


Pairing = Literal["ends", "all"]
Weighting = Literal["prompt", "gap"]


@dataclass(frozen=True)
class Chosen:
    """Preferences among runs.

    Attributes:
        pairs: rows, the chosen and the rejected one.
        prompts: how many prompts there are.
        without: how many of them gave no pair, by reason.
        prompt_of: of each pair, the number of its prompt.
        left_out: how many pairs of runs were left out, by reason.
        unjudged: how many runs have no score, and `noun` what they lack.
    """

    pairs: Sequence[tuple[int, int]]
    prompts: int
    without: Mapping[str, int]
    prompt_of: Sequence[int] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    unjudged: int = 0
    noun: str = "verdict"

    def __str__(self) -> str:
        empty = sum(self.without.values())
        lines = [f"{len(self.pairs)} pairs from {self.prompts - empty} of {self.prompts} prompts."]
        lines += [f"  {count} without: {reason}" for reason, count in self.without.items()]
        if self.unjudged:
            lines.append(f"  Runs left out: {self.unjudged} without a {self.noun}")
        if self.left_out:
            lines.append("  Pairs left out: " + ", ".join(f"{n} {reason}" for reason, n in self.left_out.items()))
        return "\n".join(lines)

    def weights(self, judged: Judged, weighting: Weighting) -> list[float]:
        """A weight for each pair; those of one prompt sum to 1, so that a prompt of many runs counts as much as any.

        Args:
            judged: what the pairs were chosen by.
            weighting: `prompt` gives all pairs of a prompt the same weight (Ouyang et al. 2022, arXiv 2203.02155);
                `gap` gives each in proportion to how far its scores are apart.
        """
        sizes = [judged.gap(*pair) if weighting == "gap" else 1.0 for pair in self.pairs]
        sums: Counter[int] = Counter()
        for prompt, size in zip(self.prompt_of, sizes, strict=True):
            sums[prompt] += size  # type: ignore[assignment]
        return [size / sums[prompt] for prompt, size in zip(self.prompt_of, sizes, strict=True)]


def judge_runs(trace: Trace, judge: Judge, outputs: Sequence[str], *, comparisons: int = 15) -> Judged:
    """Scores every run of a trace.

    Args:
        outputs: the nodes that are judged, for a judge that sees outputs only.
        comparisons: for a comparing judge, how many of the pairs of one prompt's runs are compared, at most; 15 are
            all pairs of 6 runs. Beyond that runs meet about equally many others.

    Raises:
        JudgeError: if the judge fails, or there is nothing to compare.
    """
    if isinstance(judge, ColumnScore):
        return Judged(judge.known(trace), judge.lower_is_better, noun=NOUNS[judge.holds])
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
    trace: Trace,
    judged: Judged,
    outputs: Sequence[str],
    *,
    pairs_per_prompt: int | None = None,
    margin: float = 0.0,
    pairing: Pairing = "ends",
) -> Chosen:
    """Preferences for the runs of each prompt.

    Args:
        outputs: runs whose values of these nodes are equal are no pair.
        pairs_per_prompt: at most; by default 1 of the ends, and all of all.
        margin: the least difference of scores; a pair always has different ones.
        pairing: `ends`: best against worst, second best against second worst, and so on; `all`: every better run
            against every worse one, the widest first.

    Raises:
        JudgeError: for another `pairing`.
    """
    if pairing not in ("ends", "all"):
        raise JudgeError(f"pairing must be 'ends' or 'all', got {pairing!r}.")
    most = 1 if pairs_per_prompt is None and pairing == "ends" else pairs_per_prompt
    pairs: list[tuple[int, int]] = []
    prompt_of: list[int] = []
    without, left_out = Counter[str](), Counter[str]()
    groups = runs_by_input(trace)
    for prompt, rows in enumerate(groups):
        known = [row for row in rows if judged.scores[row] is not None]
        ranked = _ranked(known, judged, pairing)
        apart = [pair for pair in ranked if judged.gap(*pair) > 0]
        wide = [pair for pair in apart if reaches(judged.gap(*pair), margin)]
        same = _same(trace, wide, outputs)
        found = [pair for pair, equal in zip(wide, same, strict=True) if not equal]
        pairs += found[:most]
        prompt_of += [prompt] * len(found[:most])
        close = f"scores differ by less than the margin {margin:g}"
        left_out["equally good"] += len(ranked) - len(apart)
        left_out[f"whose {close}"] += len(apart) - len(wide)
        left_out["with equal outputs"] += len(wide) - len(found)
        if len(rows) == 1:
            without["one run only"] += 1
        elif not ranked:
            without[f"fewer than two runs with a {judged.noun}"] += 1
        elif not apart:
            without["all runs equally good"] += 1
        elif not wide:
            without[close] += 1
        elif not found:
            without["better and worse runs have equal outputs"] += 1
    unjudged = sum(score is None for score in judged.scores)
    return Chosen(pairs, len(groups), dict(without), prompt_of, dict(+left_out), unjudged, judged.noun)


def _ranked(rows: Sequence[int], judged: Judged, pairing: Pairing) -> list[tuple[int, int]]:
    """Pairs of rows that come into question, the better one first; equally good ones among them."""
    sign = 1 if judged.lower_is_better else -1
    order = sorted(rows, key=lambda row: sign * (judged.scores[row] or 0.0))
    if pairing == "all":
        return sorted(itertools.combinations(order, 2), key=lambda pair: -judged.gap(*pair))
    half = len(order) // 2
    return list(zip(order[:half], order[::-1][:half], strict=True))


def _same(trace: Trace, pairs: Sequence[tuple[int, int]], outputs: Sequence[str]) -> list[bool]:
    if not pairs:
        return []
    first, second = (trace.select(rows) for rows in zip(*pairs, strict=True))
    return same_outputs(first, second, outputs)
