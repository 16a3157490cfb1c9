"""Diagnoses of nodes and of candidates: who earns everything, who learns nothing, latents that stopped learning."""

from __future__ import annotations

from sysdag.reporting.diagnosis import Diagnosis, Facts, end_of, observed
from sysdag.reporting.formats import number, percent
from sysdag.reporting.history import EMPTY, History
from sysdag.reporting.shares import last_shares
from sysdag.reporting.trends import LEAST, change

COLLAPSED_SIZE = 1.05
COLLAPSED_GAP = 0.01
"""Responsibilities have collapsed below both: one candidate has all the weight, for winner and loser the same one."""
EVERYTHING = 0.9
"""A node with more than this share of the margin carries everything."""
LEAST_MARGIN = 0.05
"""Below this sum of absolute margins (nats times beta) shares are those of noise."""
NOTHING = 0.01
"""A node learns nothing if its largest reward is less than this part of the largest of any node."""
LOW_COVERAGE = 0.1
"""Candidates that hold less than this part of the latents' probability bound the likelihood only loosely."""


def responsibilities_collapse(history: History, facts: Facts) -> Diagnosis | None:
    """In Sampling, one candidate takes the whole gradient, and winner and loser share it: latents stop learning.

    Fires where the last values of training's effective sample size have a mean of at most `COLLAPSED_SIZE` and those
    of the responsibility gap of at most `COLLAPSED_GAP`.
    """
    size = change(history.train.get("candidates/effective_sample_size", EMPTY).finite)
    gap = change(history.train.get("candidates/responsibility_gap", EMPTY).finite)
    if size is None or gap is None or size.last > COLLAPSED_SIZE or gap.last > COLLAPSED_GAP:
        return None
    return Diagnosis(
        "responsibilities_collapse",
        "problem",
        "The candidates' responsibilities have collapsed",
        f"From step {size.start_of_last} to step {size.end} the effective sample size is {number(size.last, 4)} and "
        f"the mean difference of responsibilities between winner and loser {number(gap.last)}: one candidate has "
        "all the weight on both sides, where its log-probability cancels. The latent nodes' models hardly learn.",
        "Candidates that are alike in probability (a smaller diversity_penalty, ngram_size > 1, more of them), "
        "responsibility_temperature > 1, or candidate_length_normalization=True.",
        size.start_of_last,
        size.end,
    )


def low_coverage(history: History, facts: Facts) -> Diagnosis | None:
    """The candidates hold little of the latents' probability, so the likelihood is bounded only loosely.

    Fires where the last values of `candidates/coverage` have a mean below `LOW_COVERAGE`.
    """
    found = end_of(history, "candidates/coverage")
    if found is None or found.mean >= LOW_COVERAGE:
        return None
    return Diagnosis(
        "low_coverage",
        "note",
        "Candidates cover little of the latents' probability",
        f"Between step {found.begin} and step {found.end} the candidates {found.split} hold "
        f"{percent(found.mean) if found.mean >= 1e-3 else number(found.mean)} of it; the certificate's bounds are as "
        "loose.",
        "Usual for long texts, and no hindrance to training by itself. More candidates, shorter latents, or a likelier "
        "search (a smaller diversity_penalty) raise it; importance sampling does not need it.",
        found.begin,
        found.end,
    )


def one_node_carries_everything(history: History, facts: Facts) -> Diagnosis | None:
    """One of several nodes has more than `EVERYTHING` of the margin at the last evaluation.

    Not where all absolute margins together are below `LEAST_MARGIN`, nor where it is the only one that trains.
    """
    found = last_shares(history)
    trained = [name for name in history.nodes if facts.trains(history, name)]
    if found is None or len(trained) < 2 or sum(abs(node.margin) for node in found.nodes) < LEAST_MARGIN:
        return None
    for node in found.nodes:
        if node.share is not None and node.share > EVERYTHING:
            split = found.split.replace("eval", "evaluation", 1)
            others = ", ".join(f"{n.name} {number(n.margin)}" for n in found.nodes if n is not node)
            largest = max(abs(n.margin) for n in found.nodes if n is not node)
            ratio = node.margin / largest if largest else 0.0
            factor = f" (at 1/{number(ratio, 2)} of it, {node.name} would be as large as the next)" if ratio else ""
            return Diagnosis(
                "one_node_carries_everything",
                "note",
                f"Node {node.name} carries everything",
                f"At step {found.step} ({split}) it has {percent(node.share)} of the margin: "
                f"{number(node.margin)}, and the others {others}.",
                f"It may be right, if the preference depends on {node.name} alone. If not, lower its beta, which "
                f"multiplies its part: nodes={{{node.name!r}: {{'beta': ...}}}}{factor}; or give the others a higher "
                "learning rate or scale. The separate gradient norms tell whether they get a signal.",
                found.step,
                found.step,
            )
    return None


def nodes_that_learn_nothing(history: History, facts: Facts) -> list[Diagnosis]:
    """Nodes that should train, and whose rewards stay 0 or whose gradient is 0, or whose branch no run takes.

    Fires for a node whose `nodes/<name>/taken` was 0 at each of at least `LEAST` logs; whose gradient norm was; or
    whose largest absolute reward over the second half of the log is less than `NOTHING` of that of the node with the
    largest, where that one reaches `LEAST_MARGIN`. A frozen node is none.
    """
    found = []
    for name in (name for name in history.nodes if facts.trains(history, name)):
        taken = history.train.get(f"nodes/{name}/taken", EMPTY).finite
        if len(taken) >= LEAST and max(taken.values) == 0:
            evidence = f"No run takes its branch from step {taken.steps[0]} to step {taken.steps[-1]}."
            advice = (
                "See what its router says in the preference data, or what candidates it gets in Sampling; a router "
                "that never chooses a branch learns nothing about it either."
            )
            found.append(_nothing(name, evidence, advice, taken.steps[0], taken.steps[-1]))
            continue
        norms = facts.gradient_norm(history, name).finite
        if len(norms) >= LEAST and max(norms.values) == 0:
            evidence = f"Its gradient norm is 0 from step {norms.steps[0]} to step {norms.steps[-1]}."
            advice = (
                "No gradient reaches it: see that its parameters require gradients (of an adapter, that it is the "
                "active one), and that its log-probability does not cancel between winner and loser: equal "
                "intermediates on both sides do, as one shared candidate does."
            )
            found.append(_nothing(name, evidence, advice, norms.steps[0], norms.steps[-1]))
            continue
        own, steps = _largest_reward(history, name)
        largest = max(_largest_reward(history, other)[0] for other in history.nodes)
        if steps and largest >= LEAST_MARGIN and own < NOTHING * largest:
            evidence = (
                f"From step {steps[0]} to step {steps[1]} its largest reward, on winners or losers, is {number(own)}; "
                f"the largest of any node is {number(largest)}."
            )
            advice = (
                "Raise its learning rate or scale (nodes={...}), and see that the preference depends on it. In "
                "Sampling, look at the effective sample size and the responsibility gap."
            )
            found.append(_nothing(name, evidence, advice, *steps))
    return found


def _nothing(name: str, evidence: str, advice: str, first: int, last: int) -> Diagnosis:
    return Diagnosis("node_learns_nothing", "warning", f"Node {name} learns nothing", evidence, advice, first, last)


def _largest_reward(history: History, name: str) -> tuple[float, tuple[int, int] | None]:
    """The largest absolute reward in the second half of the log, and that part's first and last step."""
    sides = [observed(history, f"nodes/{name}/rewards/{side}", LEAST)[1] for side in ("chosen", "rejected")]
    halves = [(s.steps[len(s) // 2 :], s.values[len(s) // 2 :]) for s in sides if len(s)]
    if not halves:
        return 0.0, None
    return max(abs(v) for _, values in halves for v in values), (halves[0][0][0], halves[0][0][-1])
