"""Host time of the ops: forward and backward on tensors so small that no kernel takes time, against plain torch.

    python -m bench overhead

A time is one of `in a row` calls, on one thread; `times_plain` is plain torch's time over a row's, in the same turns of
the same run, and `ratio` its inverse: what a call costs of plain torch's. "plain torch" is what one writes without the
op; "shorter" is the shortest way of torch's to the same numbers where that is another: `cross_entropy`, `mse_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import diffusion_error, measure, token_logprob
from sysdag import ops
from sysdag.objectives import candidate_log_sum

BASELINE, PEERS = "plain torch", ("shorter",)
CALLS = 100
BETA = 0.1
Ways = dict[str, Callable[[], Tensor]]


class Case:
    """An op on small tensors.

    Args:
        op: its name.
        what: the arguments, in words.
        leaf: what the result is differentiated by.
        ways: by name; each gives a result of one shape.
    """

    def __init__(self, op: str, what: str, leaf: Tensor, ways: Ways) -> None:
        self.op, self.what, self.leaf, self.ways = op, what, leaf.requires_grad_(), ways
        self.grad = torch.linspace(-1, 1, len(ways[BASELINE]()))

    def call(self, name: str) -> tuple[Tensor, Tensor]:
        result = self.ways[name]()
        return result, torch.autograd.grad(result, self.leaf, self.grad)[0]


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits, labels = drawn(4, 16), torch.tensor([3, 0, 15, 7])
    eps, policy, reference = drawn(3, 2, 4, 4, 4)
    found = [
        Case("token_logprob", "logits 4x16", logits, {
            "sysdag": lambda: ops.token_logprob(logits, labels),
            BASELINE: lambda: token_logprob.log_softmax_gather(logits, labels),
            "shorter": lambda: token_logprob.cross_entropy(logits, labels),
        }),
        Case("diffusion_error", "policy 2x4x4x4", policy, {
            "sysdag": lambda: ops.diffusion_error(eps, policy),
            BASELINE: lambda: diffusion_error.eager(eps, policy),
            "shorter": lambda: diffusion_error.mse_loss(eps, policy),
        }),
        Case("diffusion_error", "policy and reference 2x4x4x4", policy, {
            "sysdag": lambda: ops.diffusion_error(eps, policy, reference),
            BASELINE: lambda: diffusion_error.eager(eps, policy, reference),
            "shorter": lambda: diffusion_error.mse_loss(eps, policy, reference),
        }),
    ]  # fmt: skip
    return [*found, *(preference_case(2, k, drawn) for k in (1, 4))]


def preference_case(pairs: int, k: int, drawn: Callable[..., Tensor]) -> Case:
    logps, ref_logps = drawn(2 * pairs * k) - 5, drawn(2 * pairs * k) - 5
    offsets = torch.arange(0, 2 * pairs * k + 1, k)
    index = torch.arange(2 * pairs).repeat_interleave(k)

    def plain() -> Tensor:
        if k == 1:
            chosen, rejected = (logps - ref_logps).chunk(2)
        else:
            log_p, log_q = (candidate_log_sum(each, index, 2 * pairs) for each in (logps, ref_logps))
            chosen, rejected = (log_p - log_q).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected))

    ways: Ways = {"sysdag": lambda: ops.preference_loss(logps, ref_logps, offsets, BETA)[0], BASELINE: plain}
    return Case("preference_loss", f"{pairs} pairs by {k} candidate{'s' if k > 1 else ''}", logps, ways)


def repeated(case: Case, name: str) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            case.call(name)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "overhead", arguments, peers=PEERS, devices=("cpu",), threads=1, repeats=31)
    rows = []
    for case in cases():
        theirs, their_gradient = case.call(BASELINE)
        for name in case.ways:
            result, gradient = case.call(name)
            torch.testing.assert_close(result, theirs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-5)
        names = measure.wanted(case.ways, options.peers, baseline=BASELINE)
        times = measure.interleave({name: repeated(case, name) for name in names}, options.repeats)
        each = {name: measure.Times(tuple(s / CALLS for s in taken.seconds)) for name, taken in times.items()}
        columns = {"op": case.op, "what": case.what, "in a row": CALLS}
        for row in measure.rows(each, baseline=BASELINE, **columns):
            rows.append(row | {"ratio": 1 / row[f"times_{BASELINE}"]})
    measure.report("host time, forward and backward", rows, options.csv)
