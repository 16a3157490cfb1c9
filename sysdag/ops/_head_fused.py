"""Which forward finds the statistics of the head's logits on a GPU, where nothing is kept for a backward.

`chunked` has the BLAS fill tiles of logits and folds them (`_head_walk.py`); `fused` multiplies and folds in one kernel
(kernels/linear_logprob_fused.py). `SYSDAG_HEAD_FORWARD` chooses:
  - `chunked`, the default;
  - `fused`: an error where it cannot serve;
  - `measure`: the first call of a shape class times both on its own arguments, as torch.backends.cudnn.benchmark does,
    and the faster one serves the class for the rest of the process. The two add in different orders, so results may
    differ by rounding from one process to the next; with torch.use_deterministic_algorithms(True) nothing is timed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sysdag.ops._dispatch import Backend, BackendError
from sysdag.ops._head_labels import Labels

FORWARD_VARIABLE = "SYSDAG_HEAD_FORWARD"
Forward = Literal["chunked", "fused"]
Choice = Literal["chunked", "fused", "measure"]
Statistics = tuple[Tensor, Tensor, Tensor]  # top (R,), total (R,), chosen (L,), all written in place
CAPABILITIES = (9, 10)  # major; those that kernels/linear_logprob_fused.py has configurations for
REPEATS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """R rows, all of which have labels, and the head."""

    hidden: Tensor  # (R, H), rows contiguous
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float  # 0: none
    targets: Labels


class ShapeClass(NamedTuple):
    """Calls that share a winner."""

    device: torch.device
    dtype: torch.dtype
    width: int
    vocabulary: int
    rows: int  # rounded up to a power of two
    softcap: bool


_winners: dict[ShapeClass, Forward] = {}


def statistics(problem: Problem, backend: Backend, chunked: Callable[..., None], *out: Tensor) -> None:
    """Fills top, total and chosen by the forward that is asked for.

    Args:
        problem: what to compute.
        backend: that serves the op.
        chunked: the other forward, called with the same three tensors.
        out: `Statistics`.

    Raises:
        BackendError: the fused forward is forced and cannot serve, or the variable has another value.
    """
    choice = asked()
    if choice == "chunked" or len(problem.hidden) == 0:
        return chunked(*out)
    reason = why_not_fused(problem, backend)
    if reason is not None:
        if choice == "fused":
            raise BackendError(f"linear_logprob: {FORWARD_VARIABLE}=fused cannot serve: {reason}.")
        return chunked(*out)

    def fused(*out: Tensor) -> None:
        from sysdag.kernels.linear_logprob_fused import statistics as kernel

        kernel(problem, *out)

    if choice == "measure":
        choice = _measured(problem, {"chunked": chunked, "fused": fused}, out)
    return fused(*out) if choice == "fused" else chunked(*out)


def asked() -> Choice:
    """What the environment asks for."""
    named = os.environ.get(FORWARD_VARIABLE) or "chunked"
    if named not in get_args(Choice):
        raise BackendError(f"{FORWARD_VARIABLE}: expected one of {list(get_args(Choice))}, got {named!r}.")
    return named  # type: ignore[return-value]


def why_not_fused(problem: Problem, backend: Backend) -> str | None:
    """Why the fused forward cannot serve; None where it can."""
    hidden, weight = problem.hidden, problem.weight
    if backend != "triton":
        return f"it is a Triton kernel and the backend is {backend!r}, for tensors on {hidden.device}"
    if not hidden.is_cuda:
        return f"it needs CUDA tensors, got tensors on {hidden.device}"
    if hidden.dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies in fp16 or bf16, got {hidden.dtype}"
    major, minor = torch.cuda.get_device_capability(hidden.device)
    if major not in CAPABILITIES:
        expected = " or ".join(f"{known}.x" for known in CAPABILITIES)
        return f"it needs a GPU of compute capability {expected}, got {major}.{minor}"
    return _why_not_copied(hidden, weight)


def _why_not_copied(hidden: Tensor, weight: Tensor) -> str | None:
    """What keeps the copy engine (TMA) from reading tiles of these."""
    if len(weight) >= 1 << 30:
        return f"it counts tokens up to 2^30, got {len(weight)}"
    for name, matrix in (("hidden", hidden), ("weight", weight)):
        size = matrix.element_size()
        if matrix.shape[1] * size % 16 != 0 or matrix.shape[1] == 0:
            return f"H must be a multiple of {16 // size} (16 bytes), got {matrix.shape[1]}"
        if matrix.stride(1) != 1 or matrix.stride(0) * size % 16 != 0 or matrix.data_ptr() % 16 != 0:
            got = f"strides {tuple(matrix.stride())} at an address of {matrix.data_ptr() % 16} modulo 16"
            return f"{name} must have contiguous rows that begin at multiples of 16 bytes, got {got}"
    return None


def shape_class(problem: Problem) -> ShapeClass:
    hidden, (vocabulary, width) = problem.hidden, problem.weight.shape
    rows = 1 << (len(hidden) - 1).bit_length()
    return ShapeClass(hidden.device, hidden.dtype, width, vocabulary, rows, problem.softcap != 0)


def _measured(problem: Problem, forwards: dict[Forward, Callable[..., None]], out: tuple[Tensor, ...]) -> Forward:
    """The class's winner, found on its first call."""
    key = shape_class(problem)
    if key not in _winners:
        if not _may_time():
            return "chunked"
        _winners.setdefault(key, _race(key, forwards, out))
    return _winners[key]


def _may_time() -> bool:
    """Not while a graph is traced or captured, where nothing runs, nor where runs have to repeat."""
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _race(key: ShapeClass, forwards: dict[Forward, Callable[..., None]], out: tuple[Tensor, ...]) -> Forward:
    """Runs each into memory of its own, compares the results, then times them in turn."""
    found = {name: [torch.zeros_like(part) for part in out] for name in forwards}  # not every place is written
    try:
        for name, forward in forwards.items():
            forward(*found[name])
        if not _agree(found["chunked"], found["fused"]):
            logger.warning("linear_logprob, %s: the fused forward's results are off; the chunked one is used.", key)
            return "chunked"
        times: dict[Forward, list[float]] = {name: [] for name in forwards}
        for _ in range(REPEATS):
            for name, forward in forwards.items():
                times[name].append(_milliseconds(forward, found[name]))
    except torch.cuda.OutOfMemoryError:
        raise
    except _failures() as error:  # of the compiler or the driver: there is another forward
        logger.warning("linear_logprob, %s: the fused forward failed, the chunked one is used: %s", key, error)
        return "chunked"
    medians = {name: median(each) for name, each in times.items()}
    winner = min(medians, key=lambda name: medians[name])
    said = ", ".join(f"{name} {each:.3f} ms" for name, each in medians.items())
    logger.info("linear_logprob, %s: %s; %s is used from here on.", key, said, winner)
    return winner


def _failures() -> tuple[type[Exception], ...]:
    from triton.errors import TritonError

    return RuntimeError, TritonError


def _agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """To what sums in another order may differ by; a nan or infinity in the arguments shows in both."""
    (top, total, chosen), (other_top, other_total, other_chosen) = ours, theirs
    pairs = ((top + total.log(), other_top + other_total.log()), (chosen, other_chosen))
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-3, equal_nan=True) for one, other in pairs)


def _milliseconds(forward: Callable[..., None], out: list[Tensor]) -> float:
    with torch.cuda.device(out[0].device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        forward(*out)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
