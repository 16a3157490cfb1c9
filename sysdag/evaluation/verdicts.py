"""What judges say about two runs, asked in both orders, and how far the two answers bear each other out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a judge said about two runs.

    Attributes:
        votes: the probability that the first is better, as said with the first shown first and with the second shown
            first; None for an answer that could not be read.
        asked: False where the two were the same to the judge, and it was not asked.
        problems: why answers could not be read.
    """

    votes: tuple[float | None, float | None]
    asked: bool = True
    problems: tuple[str, ...] = ()

    @property
    def outcome(self) -> int | None:
        """1 or -1 where both orders say that the first or the second is better, None where one could not be read,
        and otherwise 0, a tie."""
        first, second = self.votes
        if first is None or second is None:
            return None
        signs = {(vote > 0.5) - (vote < 0.5) for vote in (first, second)}
        return signs.pop() if len(signs) == 1 else 0


SAME = Verdict((0.5, 0.5), asked=False)


@dataclass(frozen=True)
class Consistency:
    """How far a judge's verdicts on the two orders bear each other out.

    Attributes:
        asked: comparisons that were asked about, twice each.
        same: comparisons of equal outputs, which were not.
        agreed: of those asked and read, the ones with the same answer in both orders.
        unread: comparisons with an answer that could not be read, which count for neither side.
        decisive: answers that preferred one of the two, and `for_shown_first` those of them that preferred the run
            shown first; half of them, for a judge without position bias.
        problems: how many answers could not be read, by reason.
    """

    asked: int
    same: int
    agreed: int
    unread: int
    decisive: int
    for_shown_first: int
    problems: Mapping[str, int]

    def __str__(self) -> str:
        read = self.asked - self.unread
        lines = [f"{self.asked} comparisons in both orders; the orders agree in {_share(self.agreed, read)}."]
        if self.same:
            lines.append(f"{self.same} comparisons of equal outputs are ties.")
        if self.decisive:
            lines.append(f"The run shown first is preferred in {_share(self.for_shown_first, self.decisive)} answers.")
        if self.unread:
            lines.append(f"{self.unread} comparisons have an answer that could not be read and are left out:")
            lines += [f"  {count} times: {problem}" for problem, count in self.problems.items()]
        return "\n".join(lines)


def consistency(verdicts: Iterable[Verdict]) -> Consistency:
    """What both orders together tell about a judge."""
    verdicts = list(verdicts)
    asked = [verdict for verdict in verdicts if verdict.asked]
    agreed = unread = decisive = for_shown_first = 0
    for verdict in asked:
        first, second = verdict.votes
        if first is None or second is None:
            unread += 1
        else:
            agreed += (first > 0.5) - (first < 0.5) == (second > 0.5) - (second < 0.5)
        shown = [vote for vote in (first, None if second is None else 1 - second) if vote is not None]
        decisive += sum(vote != 0.5 for vote in shown)
        for_shown_first += sum(vote > 0.5 for vote in shown)
    problems = Counter(problem for verdict in asked for problem in verdict.problems)
    return Consistency(
        len(asked), len(verdicts) - len(asked), agreed, unread, decisive, for_shown_first, dict(problems.most_common(5))
    )


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else "none"
