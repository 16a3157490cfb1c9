"""preference_loss, forward and backward, against plain torch: `python -m bench preference_loss`.

The peers are the op's own reference in eager torch (loss and coefficients), and `candidate_log_sum` with the loss of
`sysdag.objectives.losses` (`objective`: the loss alone, its index prepared). A time is one of `in a row` calls: of a
single call between calls of the others, the larger part is spent on the processor's cold caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from sysdag.objectives import candidate_log_sum
from sysdag.ops import preference_loss
from sysdag.ops.preference_loss import preference_loss_reference

SHAPES = [(256, 4), (256, 1), (16, 4), (4096, 8)]  # pairs, candidates of each side
CALLS = (20, 1)
BASELINE, PEERS = "eager", ("objective",)
BETA = 0.1


class Problem:
    def __init__(self, pairs: int, k: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        count = 2 * pairs * k
        self.logps = (torch.randn(count, generator=generator, device=device) * 3 - 50).requires_grad_()
        self.ref_logps = torch.randn(count, generator=generator, device=device) * 3 - 50
        self.offsets = torch.arange(0, count + 1, k, device=device)
        self.index = torch.arange(2 * pairs, device=device).repeat_interleave(k)
        self.grad = torch.randn(pairs, generator=generator, device=device) / pairs

    def objective(self) -> tuple[Tensor, Tensor | None]:
        sides = len(self.offsets) - 1
        log_p = candidate_log_sum(self.logps, self.index, sides)
        chosen, rejected = (BETA * (log_p - candidate_log_sum(self.ref_logps, self.index, sides))).chunk(2)
        return -F.logsigmoid(chosen - rejected), None

    def op(self, function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return function(self.logps, self.ref_logps, self.offsets, BETA)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logps, self.grad)[0]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        logps = self.logps.detach().double().requires_grad_()
        loss, coefficients = preference_loss_reference(logps, self.ref_logps.double(), self.offsets, BETA)
        return loss.detach(), coefficients, torch.autograd.grad(loss, logps, self.grad.double())[0]


def repeated(function: Callable[[], tuple[Tensor, Tensor | None]], problem: Problem, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            problem.gradient(function()[0])

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "preference_loss", arguments, peers=PEERS, repeats=31)
    rows = []
    for pairs, k in SHAPES:
        problem = Problem(pairs, k, options.device)
        functions: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
            BASELINE: lambda p=problem: p.op(preference_loss_reference),
            "objective": problem.objective,
            "sysdag": lambda p=problem: p.op(preference_loss),
        }
        functions = measure.wanted(functions, options.peers, baseline=BASELINE)
        found, eager = (problem.op(function) for function in (preference_loss, preference_loss_reference))
        truth = problem.exact()
        measure.gate("loss", found[0].detach(), eager[0].detach(), truth[0])
        measure.gate("coefficients", found[1], eager[1], truth[1])
        measure.gate("gradient", problem.gradient(found[0]), problem.gradient(eager[0]), truth[2])
        for calls in CALLS:
            timed = {name: repeated(function, problem, calls) for name, function in functions.items()}
            times = measure.interleave(timed, options.repeats)
            each = {name: measure.Times(tuple(s / calls for s in taken.seconds)) for name, taken in times.items()}
            columns = {"pairs": pairs, "candidates": k, "dtype": "float32", "in a row": calls}
            rows += measure.rows(each, baseline=BASELINE, **columns)
    measure.report("preference_loss, forward and backward", rows, options.csv)
