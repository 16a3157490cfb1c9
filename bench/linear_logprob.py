"""Log-probabilities from hidden states and a head: time and peak extra memory against other ways to them.

    python -m bench linear_logprob

The gate comes first: a result less exact than eager torch's ends the run. Times are of forward and backward,
interleaved; `times_eager` is how many times faster than eager torch, in the same turns. "bare products" is the floor:
the matrix products that a case needs at least (1, 2 or 3), into memory that is there already; `share_of_floor` is their
median time over a row's. `peak_mib` is one call's peak memory beyond its arguments: on a CPU (Linux) the high-water
mark of resident memory, in a process of its own; on a GPU that of torch's allocator.

"sysdag, all tiles kept" has SYSDAG_KEPT_LOGITS_MB so large that a trained head's backward computes no logits again;
"sysdag, fused forward" has SYSDAG_HEAD_FORWARD=fused.
F.linear_cross_entropy is torch's chunked one (2.13 or newer); without `options` torch computes what "eager" does. The
kernels of liger-kernel, QuACK and cut-cross-entropy need CUDA; Liger's are in CuTe DSL where nvidia-cutlass-dsl is
installed, QuACK's always; cut-cross-entropy leaves small gradients out (filter_eps, as its default says).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from sysdag.ops import _head_fused, _head_walk, linear_logprob

CPU_SHAPE = (2048, 512, 32000)
GPU_SHAPES = ((8192, 4096, 128256), (16384, 2048, 151936))


class Case(NamedTuple):
    """One problem; all peers compute the labels' log-probabilities and the gradients that are needed."""

    shape: tuple[int, int, int]
    mode: str  # "no grad", "frozen" (hidden needs a gradient) or "trained" (the weight too)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    peaked: bool = False

    @property
    def name(self) -> str:
        return f"{self.mode}{', peaked' if self.peaked else ''}"


def cases(device: str) -> list[Case]:
    """What is measured on a kind of device."""
    if device == "cpu":
        return [
            Case(CPU_SHAPE, "frozen"), Case(CPU_SHAPE, "trained"), Case(CPU_SHAPE, "no grad"),
            Case(CPU_SHAPE, "frozen", peaked=True),
        ]  # fmt: skip
    modes = ("frozen", "trained", "no grad")
    return [Case(shape, mode, device, torch.bfloat16) for shape in GPU_SHAPES for mode in modes]


class Problem:
    """The arguments of a case."""

    def __init__(self, case: Case) -> None:
        made = {"generator": torch.Generator(case.device).manual_seed(0), "device": case.device}
        (N, H, V), self.case = case.shape, case
        scale = (4.0 if case.peaked else 1.0) / H**0.5
        self.hidden = torch.randn(N, H, **made).to(case.dtype).requires_grad_(case.mode != "no grad")
        self.weight = (torch.randn(V, H, **made) * scale).to(case.dtype).requires_grad_(case.mode == "trained")
        self.labels = torch.randint(V, (N,), **made)
        self.rows = torch.arange(N, device=case.device)
        self.grad = torch.randn(N, **made)

    def run(self, function: Callable[[Problem], Tensor]) -> list[Tensor]:
        """The result and its gradients."""
        wanted = [leaf for leaf in (self.hidden, self.weight) if leaf.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            result = function(self)
        grad = self.grad if result.dim() else None
        return [result.detach(), *(torch.autograd.grad(result, wanted, grad) if wanted else [])]


def ours(p: Problem) -> Tensor:
    return linear_logprob(p.hidden, p.weight, p.rows, p.labels)


def four_labels(p: Problem) -> Tensor:
    """Each row serves four labels; their mean, so that the gradient has the same shape."""
    labels = (p.labels + torch.arange(4, device=p.labels.device)[:, None] * 997) % len(p.weight)
    return linear_logprob(p.hidden, p.weight, p.rows.repeat(4), labels.flatten()).view(4, -1).mean(0)


def all_kept(p: Problem) -> Tensor:
    """A forward that keeps every tile of the logits for the backward of a trained head."""
    before = os.environ.get(_head_walk.KEEP_VARIABLE)
    os.environ[_head_walk.KEEP_VARIABLE] = "1e9"
    _head_walk._keep_budget.cache_clear()  # else the default, once computed, stays for the process
    try:
        return ours(p)
    finally:
        del os.environ[_head_walk.KEEP_VARIABLE]
        if before is not None:
            os.environ[_head_walk.KEEP_VARIABLE] = before
        _head_walk._keep_budget.cache_clear()


def fused_forward(p: Problem) -> Tensor:
    with mock.patch.dict(os.environ, {_head_fused.FORWARD_VARIABLE: "fused"}):
        return ours(p)


def eager(p: Problem) -> Tensor:
    return torch.log_softmax(p.hidden @ p.weight.T, -1).gather(1, p.labels[:, None])[:, 0]


@functools.cache
def _compiled_eager() -> Any:
    return torch.compile(lambda h, w, y: torch.log_softmax(h @ w.T, -1).gather(1, y[:, None])[:, 0], dynamic=False)


def compiled(p: Problem) -> Tensor:
    return _compiled_eager()(p.hidden, p.weight, p.labels)


def trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.labels, 1.0, 8192, None, 1.0, ())[0]


def chunked(p: Problem) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="none", options=options)


def chunked_mean(p: Problem) -> Tensor:
    """With a mean torch computes the gradients in the forward; for log-probabilities by label it cannot."""
    return -F.linear_cross_entropy(p.hidden, p.weight, p.labels, options=torch.nn.LinearCrossEntropyOptions())


def liger(p: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.labels)


def liger_by_token(p: Problem) -> Tensor:
    """Each token's gradient is folded in by a second forward, which its backward makes."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(p.weight, p.hidden, p.labels)


def quack(p: Problem) -> Tensor:
    """With a sum it computes the gradients in the forward; for log-probabilities by label it has nothing fused."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return -chunked_linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="sum")


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="none")


FUNCTIONS: dict[str, Callable[[Problem], Tensor]] = {
    "sysdag": ours,
    "sysdag, 4 labels a row": four_labels,
    "sysdag, all tiles kept": all_kept,
    "sysdag, fused forward": fused_forward,
    "eager": eager,
    "torch.compile": compiled,
    "F.linear_cross_entropy, chunked": chunked,
    "F.linear_cross_entropy, chunked (mean only)": chunked_mean,
    "trl": trl,
    "liger-kernel": liger_by_token,
    "liger-kernel (mean only)": liger,
    "quack (sum only)": quack,
    "cut-cross-entropy": cut_cross_entropy,
}
BASELINE = "eager"
PEERS = [name for name in FUNCTIONS if name != BASELINE and not name.startswith("sysdag")]
CUDA_ONLY = ("liger-kernel", "liger-kernel (mean only)", "quack (sum only)", "cut-cross-entropy")
PACKAGES = ("trl", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl", "cut-cross-entropy")
PRODUCTS = {"no grad": 1, "frozen": 2, "trained": 3}


def bare_products(p: Problem) -> Callable[[], None]:
    """The first products of a forward and backward, into memory that is there already."""
    (N, H, V), options = p.case.shape, {"device": p.case.device, "dtype": p.case.dtype}
    logits, dh, dw = torch.empty(N, V, **options), torch.empty(N, H, **options), torch.empty(V, H, **options)
    hidden, weight, count = p.hidden.detach(), p.weight.detach(), PRODUCTS[p.case.mode]

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if count > 1:
            torch.mm(logits, weight, out=dh)
        if count > 2:
            torch.mm(logits.T, hidden, out=dw)

    return run


def present(p: Problem, functions: dict[str, Callable[[Problem], Tensor]]) -> tuple[dict[str, Any], list[str]]:
    """The functions that run here, and of the others why they don't."""
    found, reasons = {}, []
    for name, function in functions.items():
        if name in CUDA_ONLY and p.case.device != "cuda":
            reasons.append(f"left out: {name}: its kernels need CUDA")
            continue
        try:
            p.run(function)
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            if name.startswith("sysdag"):
                raise
            lines = str(error).strip().splitlines() or [""]
            reasons.append(f"left out: {name}: {type(error).__name__}: {lines[0]}")
        else:
            found[name] = function
    return found, reasons


def check(case: Case) -> None:
    """The gate: every output against fp64, at a size where that is quick."""
    N, H, V = case.shape
    small = Problem(case._replace(shape=(min(N, 256), H, min(V, 8003))))
    wide = Problem(small.case)
    wide.hidden = small.hidden.detach().double().requires_grad_(small.hidden.requires_grad)
    wide.weight = small.weight.detach().double().requires_grad_(small.weight.requires_grad)
    wide.grad = small.grad.double()
    found, theirs, truth = small.run(ours), small.run(eager), wide.run(eager)
    for name, got, own, true in zip(("log-probabilities", "d hidden", "d weight"), found, theirs, truth, strict=False):
        measure.gate(f"linear_logprob, {case.name}, {name}", got, own, true)


def peak(case: Case, name: str, threads: int) -> None:
    """Prints the MiB of one call, beyond its arguments; for a process of its own."""
    torch.set_num_threads(threads)
    small = Problem(case._replace(shape=(64, 64, 1024)))
    small.run(FUNCTIONS[name])
    problem = Problem(case)
    torch.mm(problem.hidden.detach()[:64], problem.weight.detach()[:64].T)
    with measure.PeakMemory(case.device) as memory:
        problem.run(FUNCTIONS[name])
    print(memory.mib)


def peak_mib(problem: Problem, name: str) -> float:
    case = problem.case
    if case.device == "cuda":
        with measure.PeakMemory(case.device) as memory:
            problem.run(FUNCTIONS[name])
        return memory.mib
    code = f"import torch; from bench.linear_logprob import *; peak({case!r}, {name!r}, {torch.get_num_threads()})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measured(
    case: Case, functions: dict[str, Callable[[Problem], Tensor]], repeats: int, notes: list[str]
) -> list[dict[str, Any]]:
    """The table's rows for one case; what is left out is added to the notes."""
    check(case)
    problem = Problem(case)
    found, reasons = present(problem, functions)
    notes += [reason for reason in reasons if reason not in notes]
    floor = f"bare products: {PRODUCTS[case.mode]}"
    calls: dict[str, Callable[[], Any]] = {name: functools.partial(problem.run, f) for name, f in found.items()}
    times = measure.interleave(calls | {floor: bare_products(problem)}, repeats, warmup=1)
    N, H, V = case.shape
    shown = measure.rows(times, baseline=BASELINE, case=case.name, N=N, H=H, V=V, dtype=str(case.dtype)[6:])
    for row in shown:
        row["gflops"] = PRODUCTS[case.mode] * 2 * N * H * V / (row["median_ms"] * 1e6)
        row["share_of_floor"] = times[floor].median * 1e3 / row["median_ms"]
        row["peak_mib"] = peak_mib(problem, row["name"]) if row["name"] in found else ""
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "linear_logprob", arguments, peers=PEERS, threads=2, repeats=5)
    notes: list[str] = ["gflops counts the 1, 2 or 3 products that a case needs at least"]
    functions = measure.wanted(FUNCTIONS, options.peers, baseline=BASELINE)
    rows: list[dict[str, Any]] = []
    for case in cases(options.device):
        # Elsewhere they are "sysdag".
        special = {"sysdag, all tiles kept": case.mode == "trained"}
        special["sysdag, fused forward"] = case.mode == "no grad" and case.device == "cuda"
        own = {name: function for name, function in functions.items() if special.get(name, True)}
        rows += measured(case, own, options.repeats, notes)
    notes.append(", ".join(f"{name} {version}" for name in PACKAGES if (version := measure.version(name))))
    measure.report("linear_logprob", rows, options.csv, notes)
