"""Log-probability of a label under softmax over a row of logits x (V,), and its derivative.

    forward:   m = max_v x_v,  s = sum_v exp(x_v - m),  log p = (x_y - m) - log s
    backward:  dx_v = g ([v = y] - exp(x_v - m) / s)

The forward reads a row once, a block at a time. Each lane of the block keeps a sum of its own relative to the largest
logit so far; where a block raises that, all lanes are rescaled, and they are added up once at the end. So an element
costs one exponential, and a block one reduction. m and s are stored apart: behind a large common offset m + log s would
lose log s. The backward is elementwise and may write over x; [v = y] is a comparison, so nobody reads x_y after it is
overwritten. Rows are independent: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_BLOCK = 4096
BACKWARD_BLOCK = 2048


@triton.jit
def forward_kernel(logits, labels, logp, stats, width, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    kind: tl.constexpr = logp.dtype.element_ty
    if label == ignore_index:
        tl.store(logp + row, 0.0)
        tl.store(stats + 2 * row, 0.0)
        tl.store(stats + 2 * row + 1, 1.0)
    else:
        x = logits + row * width
        lanes = tl.arange(0, BLOCK)
        largest = tl.full((), float("-inf"), kind)
        total = tl.zeros((BLOCK,), kind)
        for start in range(0, width, BLOCK):
            here = tl.load(x + start + lanes, mask=start + lanes < width, other=float("-inf")).to(kind)
            raised = tl.maximum(largest, tl.max(here, 0))
            shift = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - (-inf) would be nan
            total = total * tl.exp(largest - shift) + tl.exp(here - shift)
            largest = raised
        inside = (label >= 0) & (label < width)
        chosen = tl.load(x + label, mask=inside, other=float("nan")).to(kind)
        total_sum = tl.sum(total, 0)
        tl.store(logp + row, (chosen - largest) - tl.log(total_sum))
        tl.store(stats + 2 * row, largest)
        tl.store(stats + 2 * row + 1, total_sum)


@triton.jit
def backward_kernel(grad, logits, labels, stats, out, width, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    kind: tl.constexpr = grad.dtype.element_ty
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    to = out + row * width + columns
    if label == ignore_index:
        tl.store(to, tl.zeros((BLOCK,), kind), mask=inside)
    else:
        g = tl.load(grad + row)
        largest, total = tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1)
        here = tl.load(logits + row * width + columns, mask=inside, other=float("-inf")).to(kind)
        probability = tl.exp(here - largest) / total
        tl.store(to, g * (tl.where(columns == label, 1.0, 0.0) - probability), mask=inside)


def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,), and m and s of each row (N, 2), for contiguous logits (N, V)."""
    rows, width = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logp, stats = logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, 2, dtype=dtype)
    if rows:
        block = min(FORWARD_BLOCK, triton.next_power_of_2(max(width, 1)))
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            forward_kernel[(rows,)](logits, labels, logp, stats, width, ignore_index, BLOCK=block, num_warps=8)
    return logp, stats


def backward(grad: Tensor, logits: Tensor, labels: Tensor, stats: Tensor, ignore_index: int, out: Tensor) -> None:
    """Writes the logits' gradient to `out`, contiguous (N, V); it may be the logits."""
    rows, width = logits.shape
    if rows and width:
        block = min(BACKWARD_BLOCK, triton.next_power_of_2(width))
        grid = (rows, triton.cdiv(width, block))
        with torch.cuda.device_of(logits):
            backward_kernel[grid](grad, logits, labels, stats, out, width, ignore_index, BLOCK=block, num_warps=4)


def aot_cases(arch: int) -> list[tuple]:
    """(kernel, arguments, options) for tests/ops/test_aot.py."""
    cases: list[tuple] = []
    for kind, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        x, a = f"*{kind}:16", f"*{wide}:16"
        scalars = {"width": "i32", "ignore_index": "i32"}
        forward_types = {"logits": x, "labels": "*i64", "logp": a, "stats": a, **scalars, "BLOCK": FORWARD_BLOCK}
        backward_types = {"grad": a, "logits": x, "labels": "*i64", "stats": a, "out": x, **scalars}
        cases.append((forward_kernel, forward_types, {"num_warps": 8}))
        cases.append((backward_kernel, {**backward_types, "BLOCK": BACKWARD_BLOCK}, {"num_warps": 4}))
    return cases
