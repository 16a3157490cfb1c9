"""The second pass of a step: each turn forward and backward, also when memory runs out on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from sysdag.engine.kept_work import KeptGradient
from sysdag.engine.out_of_memory import attempt
from sysdag.engine.step import StepOutput, SystemModel


def accumulate_gradients(
    model: SystemModel, output: StepOutput, backward: Callable[[Tensor], object] = Tensor.backward
) -> None:
    """Adds the gradient of a step's loss to the trained parameters' `grad`, in one pass or in two.

    When memory runs out, what the interrupted backward had accumulated is kept and the rest is computed in smaller
    parts, so the sum is the same.

    Args:
        model: what made the output.
        output: of a batch of pairs.
        backward: differentiates a part of the loss; by default `Tensor.backward`.

    Raises:
        TrainingError: if memory runs out on a single element.
    """
    parameters = model.trained_parameters()
    queue = deque(output.turns)
    if output.loss.requires_grad:
        before = _gradients(parameters)
        if attempt(lambda: _done(backward(output.loss))):
            return
        output.loss = output.loss.detach()
        model.budget.keeps_graphs = False
        queue = deque(turn.without(_changed(parameters, before)) for turn in queue)
    while queue:
        turn, before = queue.popleft(), _gradients(parameters)
        if not attempt(lambda: _done(backward(model(turn)))):  # noqa: B023
            rest = turn.without(_changed(parameters, before))
            if any(isinstance(other.batch.kept, KeptGradient) for other in (turn, *queue)):
                model.budget.reuses = False
                queue = deque(other.without(()) for other in (rest, *queue))
            else:
                queue.extendleft(reversed(model.split(rest)))


def _done(_: object) -> bool:
    return True


_Versions = list[tuple[Tensor | None, int]]


def _gradients(parameters: Sequence[nn.Parameter]) -> _Versions:
    return [(p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]


def _changed(parameters: Sequence[nn.Parameter], before: _Versions) -> list[nn.Parameter]:
    """Those whose gradient a backward has reached: each parameter gets its own at once, in full."""
    return [
        parameter
        for parameter, now, then in zip(parameters, _gradients(parameters), before, strict=True)
        if now[0] is not then[0] or now[1] != then[1]
    ]
