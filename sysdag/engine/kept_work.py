"""What the first of two passes keeps of a micro-batch, so that the second need not compute it again.

The loss's gradient is sum_i c_i ds_i, and the c_i are known after the first pass. The graph of the last micro-batch can
wait for them, since the second pass would build the same one. A single element's ds_i can be computed at once and wait,
which takes an adapter's size instead of a graph's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.footprint import bytes_of
from sysdag.components.module_walk import parameters_of
from sysdag.engine.host_copy import beside


class KeptGraph:
    """The scores (n,) of a micro-batch with their graph, and its auxiliary loss with its factor, if there is one."""

    def __init__(self, scores: Tensor, auxiliary: tuple[float, Tensor] | None) -> None:
        self._scores, self._auxiliary = scores, auxiliary

    def part_of_loss(self, coefficients: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
        """sum_i coefficient_i score_i, with `share` of the auxiliary loss."""
        part = (beside(coefficients, self._scores) * self._scores).sum()
        if self._auxiliary is None:
            return part
        factor, loss = self._auxiliary
        return part + factor * share * loss


class KeptGradient:
    """The gradient of one element's score by the parameters that it depends on.

    By a backward like any other, outside autocast: `torch.autograd.grad` leaves out, in silence, parameters that are
    used inside a checkpoint with reentrance.
    """

    def __init__(self, score: Float[Tensor, " 1"], parameters: Sequence[nn.Parameter]) -> None:
        accumulated = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with torch.autocast(score.device.type, enabled=False):
                score.sum().backward()
            reached = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        finally:
            for parameter, gradient in zip(parameters, accumulated, strict=True):
                parameter.grad = gradient
        self._score = score.detach()
        self._parameters, self._gradients = [p for p, _ in reached], [g for _, g in reached]

    def part_of_loss(self, coefficients: Float[Tensor, " 1"], share: float) -> Float[Tensor, ""]:
        """coefficient x score, which can be differentiated once: what was kept goes into the gradients."""
        coefficient = beside(coefficients, self._score)[0]
        return _Linear.apply(self._score[0] * coefficient, coefficient, self._gradients, *self._parameters)


Kept = KeptGraph | KeptGradient


class _Linear(torch.autograd.Function):
    """A value whose gradient by the parameters is known up to a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.factor, ctx.gradients = factor, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        factor, found = grad * ctx.factor, []
        while ctx.gradients:  # each goes as its product comes
            found.append(ctx.gradients.pop() * factor)
        return None, None, None, *reversed(found)


_SHARE_OF_WEIGHTS = 16


@dataclass
class Room:
    """How much of the first pass may wait for the second.

    Attributes:
        parameters: those that train.
        gradients: bytes that are left for single elements' gradients.
    """

    parameters: Sequence[nn.Parameter]
    gradients: int

    @classmethod
    def of(cls, model: nn.Module) -> Room:
        """A sixteenth of the weights' bytes; or what the gradients will take, while there are none yet.

        None where parameters have hooks, which must see each gradient once.
        """
        every = list(parameters_of(model))
        trained = [parameter for parameter in every if parameter.requires_grad]
        if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in trained):
            return cls(trained, 0)
        missing = 0 if any(parameter.grad is not None for parameter in trained) else sum(map(bytes_of, trained))
        return cls(trained, room_for_gradients(sum(map(bytes_of, every)), missing))

    def take(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether one more element's gradient by these parameters may wait, which is counted then.

        In fp16 it may not: scaled by its coefficient and the loss's scale it would not lose small numbers.
        """
        needed = sum(map(bytes_of, parameters))
        device = parameters[0].device.type if parameters else "cpu"
        in_fp16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        if not needed or needed > self.gradients or in_fp16:
            return False
        self.gradients -= needed
        return True


def room_for_gradients(weights: int, missing: int) -> int:
    """Bytes for single elements' gradients, given those of all weights and of gradients that are still to come."""
    return max(weights // _SHARE_OF_WEIGHTS, missing)
