"""Who earned the preference: the implicit reward of each node, and its share of the margin.

The implicit reward of a node is beta times its log-ratio of policy to reference, a mean over pairs; its margin is the
reward on winners minus the one on losers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sysdag.reporting.history import EMPTY, History, Series

DEFINITION = (
    "A node's share is its margin divided by the sum of the absolute margins of all nodes. Where all margins have one "
    "sign, that is its part of the whole margin; where signs are mixed, a negative share is that of a node which works "
    "against the preference, and the absolute values of the shares add up to 100 %."
)


@dataclass(frozen=True)
class NodeShare:
    """One node's part.

    Attributes:
        name: the node.
        chosen, rejected: its mean implicit reward on winners and on losers.
        margin: chosen - rejected.
        share: between -1 and 1, see `DEFINITION`; None where no node has a margin.
        taken: of a node in a branch of a switch, which part of the runs takes it; its rewards are means over all runs,
            with 0 for those that do not. None for any other node.
    """

    name: str
    chosen: float
    rejected: float
    margin: float
    share: float | None
    taken: float | None = None


@dataclass(frozen=True)
class Shares:
    """The parts of all nodes at one step.

    Attributes:
        step: the optimizer step.
        split: `training`, or the evaluation's name.
        nodes: in the order asked for.
        margin: `rewards/margins` of the same line, or None. In Sampling it is not the sum of the nodes' margins, which
            are means under the responsibilities.
    """

    step: int
    split: str
    nodes: tuple[NodeShare, ...]
    margin: float | None

    @property
    def has_mixed_signs(self) -> bool:
        """Whether some nodes work for the preference and others against it."""
        return any(node.margin > 0 for node in self.nodes) and any(node.margin < 0 for node in self.nodes)

    @property
    def total(self) -> float:
        """The sum of the nodes' margins."""
        return sum(node.margin for node in self.nodes)

    def of(self, name: str) -> NodeShare | None:
        """A node's part; None for one that was not scored."""
        return next((node for node in self.nodes if node.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"nodes": [asdict(node) for node in self.nodes]}


def shares_of(margins: Sequence[float]) -> list[float | None]:
    """Each margin over the sum of the absolute margins; None where that is 0."""
    whole = sum(map(abs, margins))
    return [margin / whole if whole > 0 else None for margin in margins]


def last_shares(history: History, order: Sequence[str] = ()) -> Shares | None:
    """The shares at the last evaluation, or without one at the last log of training; None without rewards by node.

    Args:
        order: names of nodes; those that were logged come in this order, others behind.
    """
    names = [name for name in order if name in history.nodes] + [name for name in history.nodes if name not in order]
    for split, metrics in ((history.evaluation_name, history.evaluation), ("training", history.train)):
        step = _last_step(metrics, names)
        if step is None:
            continue
        rows = [_row(metrics, name, step) for name in names]
        found = [row for row in rows if row is not None]
        parts = shares_of([margin for *_, margin in found])
        nodes = tuple(
            NodeShare(*row, share, metrics.get(f"nodes/{row[0]}/taken", EMPTY).finite.at(step))
            for row, share in zip(found, parts, strict=True)
        )
        return Shares(step, split, nodes, metrics.get("rewards/margins", EMPTY).finite.at(step))
    return None


def _last_step(metrics: Mapping[str, Series], names: Sequence[str]) -> int | None:
    found = [metrics.get(f"nodes/{name}/rewards/margins", EMPTY).finite for name in names]
    return max((series.steps[-1] for series in found if len(series)), default=None)


def _row(metrics: Mapping[str, Series], name: str, step: int) -> tuple[str, float, float, float] | None:
    keys = [f"nodes/{name}/rewards/{kind}" for kind in ("chosen", "rejected", "margins")]
    chosen, rejected, margin = (metrics.get(key, EMPTY).finite.at(step) for key in keys)
    if chosen is None or rejected is None or margin is None:
        return None
    return name, chosen, rejected, margin
