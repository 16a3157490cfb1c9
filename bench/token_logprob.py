"""token_logprob, forward and backward, against log_softmax and gather: `python -m bench token_logprob`.

The peers are torch's eager log_softmax and gather, torch's cross_entropy (eager), and torch.compile of the former. Ours
runs with a gradient of its own and with the gradient written over the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from sysdag.ops import token_logprob

SHAPES = [(2048, 32000, "float32"), (256, 151936, "float32"), (2048, 4096, "float32")]
GPU_SHAPES = [*SHAPES, (8192, 128256, "bfloat16"), (2048, 32000, "bfloat16")]
BASELINE, PEERS = "log_softmax+gather", ("cross_entropy", "torch.compile")


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels, reduction="none")


def inplace(logits: Tensor, labels: Tensor) -> Tensor:
    return token_logprob(logits, labels, inplace_backward=True)


class Problem:
    """One shape. Each function gets logits that were computed, as a model's head gives them, and sends a gradient."""

    def __init__(self, rows: int, width: int, dtype: str, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        drawn = torch.randn(rows, width, generator=generator, device=device) * 3
        self.source = drawn.to(getattr(torch, dtype))
        self.labels = torch.randint(width, (rows,), generator=generator, device=device)
        self.grad = torch.randn(rows, generator=generator, device=device)
        self.values = self.source.clone()
        self.gradient: Tensor | None = None

    def restore(self) -> None:
        """Before each call: the in-place backward has written over the logits."""
        self.gradient = None
        self.values.copy_(self.source)

    def run(self, function: Callable[..., Tensor], backward: bool = True) -> tuple[Tensor, Tensor | None]:
        logits = _Computed.apply(torch.zeros((), requires_grad=True, device=self.values.device), self)
        if not backward:
            with torch.no_grad():
                return function(logits, self.labels), None
        result = function(logits, self.labels)
        result.backward(self.grad)
        return result.detach(), self.gradient


class _Computed(torch.autograd.Function):
    """Stands for the model: its output is the logits, and it keeps the gradient that arrives."""

    @staticmethod
    def forward(ctx, anchor, problem):
        ctx.problem = problem
        return problem.values.view_as(problem.values)

    @staticmethod
    def backward(ctx, gradient):
        ctx.problem.gradient = gradient
        return torch.zeros((), device=gradient.device), None


def gate(name: str, problem: Problem, function: Callable[..., Tensor], eager: tuple[Tensor, Tensor]) -> None:
    """On the first rows: their fp64 truth fits in memory."""
    few = slice(0, 64)
    problem.restore()
    result, gradient = problem.run(function)
    exact = problem.source[few].double().requires_grad_()
    truth = log_softmax_gather(exact, problem.labels[few])
    truth.backward(problem.grad[few].double())
    assert exact.grad is not None
    assert gradient is not None
    measure.gate(f"{name}, log-probabilities", result[few], eager[0][few], truth.detach())
    measure.gate(f"{name}, gradient", gradient[few], eager[1][few], exact.grad)


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "token_logprob", arguments, peers=PEERS)
    rows, notes = [], []
    for count, width, dtype in GPU_SHAPES if options.device == "cuda" else SHAPES:
        problem = Problem(count, width, dtype, options.device)
        functions: dict[str, Callable[..., Tensor]] = {
            BASELINE: log_softmax_gather,
            "cross_entropy": cross_entropy,
            "sysdag": token_logprob,
            "sysdag inplace": inplace,
            "torch.compile": log_softmax_gather,
        }
        functions = measure.wanted(functions, options.peers, baseline=BASELINE)
        example = problem.source.clone().requires_grad_(), problem.labels
        notes += measure.compile_peer(functions, *example)
        problem.restore()
        result, gradient = problem.run(log_softmax_gather)
        assert gradient is not None
        eager = result[:64].clone(), gradient[:64].clone()
        for name in ("sysdag", "sysdag inplace"):
            gate(name, problem, functions[name], eager)
        for what, backward in (("forward", False), ("forward+backward", True)):
            calls = {name: partial(problem.run, function, backward) for name, function in functions.items()}
            times = measure.interleave(calls, options.repeats, before=problem.restore)
            columns = {"N": count, "V": width, "dtype": dtype, "what": what}
            rows += measure.rows(times, baseline=BASELINE, **columns)
    measure.report("token_logprob", rows, options.csv, notes)
