"""What is not finite stops here, with its place, before it reaches the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sysdag.components.component import Component
from sysdag.components.residence import admit
from sysdag.engine.distributed import whole
from sysdag.engine.scored import MicroBatchScores
from sysdag.errors import TrainingError


def check_finite(found: Sequence[MicroBatchScores]) -> None:
    """Checks the scores of a step's micro-batches, which are on the host.

    Raises:
        TrainingError: naming node, row of the data and token of the first score that is nan or infinite.
    """
    for term, batch, component, reference, policy_scores, reference_scores, *_ in found:
        sides = (("policy", component, policy_scores), ("reference", reference or component, reference_scores))
        for side, scorer, values in sides:
            if values is None:
                continue
            bad = (~values.isfinite()).nonzero()[:, 0].tolist()
            if not bad:
                continue
            admit(component, reference)
            # A nan of one element may have reached others that were packed with it; its source is the one that has a
            # place when it is scored alone.
            places = ((at, scorer.locate_non_finite(batch.inputs[at], batch.draws[at])) for at in bad)
            at, place = next(((at, place) for at, place in places if place), (bad[0], ""))
            raise TrainingError(
                f"Node {term.name!r}: the {side}'s score of {term.described(batch.rows[at])} is "
                f"{values[at].item()}{place and f', from {place} on'}. The weights were not changed."
            )


def gradient_norms(components: Mapping[str, Component]) -> Tensor:
    """The 2-norm of each component's accumulated gradients, (n,); to be called by all processes where weights are
    sharded."""
    norms = []
    for component in components.values():
        kept = [parameter.grad for parameter in component.own_parameters().values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(kept) if kept else torch.zeros((), device=component.device)
        norms.append(whole(norm).float())
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def check_gradients(
    components: Mapping[str, Component], norms: Tensor, add_up: Callable[[Tensor], Tensor] = lambda flags: flags
) -> None:
    """Checks the norms of the components' gradients.

    Args:
        components: by the name of their node.
        norms: their `gradient_norms`.
        add_up: sums a tensor over all processes, so that all of them stop together.

    Raises:
        TrainingError: naming the components whose gradient's norm is nan or infinite, and a tensor of the first.
    """
    flags = add_up((~norms.isfinite()).float())
    found = [name for name, flag in zip(components, flags.tolist(), strict=True) if flag]
    if found:
        raise TrainingError(
            f"Node {found[0]!r}: the norm of its gradient is not finite{_first(components[found[0]])}"
            f"{f'; nor is that of {found[1:]}' if found[1:] else ''}. The weights were not changed. A lower beta or "
            "learning rate, bf16 in place of fp16, or engine='two_pass' with the pair that caused it show more."
        )


def _first(component: Component) -> str:
    for name, parameter in component.own_parameters().items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f" (tensor {name!r})"
    return ""  # every number is finite, their squares' sum is not; or another process has it
