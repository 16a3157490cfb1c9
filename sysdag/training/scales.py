"""Whether each bound's beta fits the scale of its scores, before training and at its first step.

A language model's score is a sum of log-probabilities, and beta 0.1 the field's default. A diffusion model's is an
error on the scale of its convention: under a common beta its part of the margin is a millionth of the others' or a
million times theirs, and training says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sysdag.data.preferences import Feedback, collate
from sysdag.execution.execute import flat_draws
from sysdag.graph.plan import Objective, Plan
from sysdag.objectives.options import NodeOptions
from sysdag.traces.cells import Draw

_FAR = 10.0  # by which factor a beta may lie outside the usual ones
_DRIFT = 0.01  # a part of a score


def beyond_scale(
    plan: Plan,
    pairs: Sequence[Feedback],
    *,
    objective: Objective,
    beta: float,
    nodes: Mapping[str, NodeOptions],
    scores: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """A sentence for each node whose beta is far from those that its scores are trained with, with the one to set.

    Args:
        pairs: some that are trained on; only their values are read.
        beta: the common one.
        nodes: options of every random node.
        scores: of a batch, by node, where it has been scored.
    """
    told = []
    for name in plan.factors(objective):
        node, component = nodes[name], plan.system[name].component
        assert component is not None  # factors are random nodes
        if component.likelihood != "bound" or not node.trainable:
            continue
        draws = _draws(pairs, name)
        usual = component.usual_beta(draws) if draws else None  # without any where no run takes its branch
        own = _beta(beta, node)
        if usual is None or usual[0] / _FAR <= own <= usual[1] * _FAR:
            continue
        low, high = (_rounded(each) for each in usual)
        is_low = own < usual[0]
        effect = (
            "its part of the margin stays near 0, and it hardly learns"
            if is_low
            else "its part of the margin decides the loss alone, and the others hardly learn"
        )
        said = (
            f"Node {name!r}: its beta is {own:g}, and {component!r} is usually trained at {low:g} to {high:g}: so far "
            f"{'below' if is_low else 'above'}, {effect}."
        )
        if scores is not None and name in scores:
            said += f" {_measured(name, beta, nodes, scores)}"
        told.append(f"{said} {_advice(plan, name, low / node.scale, objective)}")
    return told


def _draws(pairs: Sequence[Feedback], name: str) -> list[Draw]:
    return [draw for side in collate(pairs) if name in side.cells for draw in flat_draws(side.cells[name])]


def _beta(common: float, node: NodeOptions) -> float:
    return (common if node.beta is None else node.beta) * node.scale


def _measured(name: str, beta: float, nodes: Mapping[str, NodeOptions], scores: Mapping[str, Tensor]) -> str:
    """What a small change of each node's score is in the margin."""
    changes = {
        other: _DRIFT * _beta(beta, nodes[other]) * float(values.detach().abs().mean())
        for other, values in scores.items()
    }
    others = [f"of {other!r} {change:.2g}" for other, change in changes.items() if other != name]
    return (
        f"In this batch a change of its scores by {_DRIFT:.0%} changes the margin by {changes[name]:.2g}"
        f"{', and ' + ', '.join(others) if others else ''}."
    )


def _advice(plan: Plan, name: str, beta: float, objective: Objective) -> str:
    if objective == "direct":
        base = plan.system[name].base_name
        return f"Set nodes={{{base!r}: {{'beta': {_rounded(beta):g}}}}}."
    return (
        f"objective='sampling' has one beta for all nodes: set convention= of {name!r} to the one whose scores are "
        "nearest to the others'."
    )


def _rounded(value: float) -> float:
    """To two digits."""
    return round(value, 1 - math.floor(math.log10(value)))
