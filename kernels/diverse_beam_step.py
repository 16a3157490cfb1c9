"""The one pass over the logits of a step of beam search: every row's normaliser and its `count` best tokens.

Grid (rows, S): a program walks over one of S stretches of a row's V logits in blocks. It keeps the maximum m, the sum
of exp(x - m), and the L best as 64-bit keys

    key = ordered(x) << 32 | (2^31 - 1 - token)

where `ordered` maps floats to integers of the same order: a larger key is a larger logit, or the lower token of equal
logits, and sorting keys needs no second array. A block whose largest key is below the list's smallest is not sorted; of
random logits that is nearly every block after the first few. A second kernel, one program a row, merges the S lists
and normalisers in their order and writes (x - m) - log(sum). No atomics: the same bits from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
SCAN = {"num_warps": 2, "maxnreg": 160}  # the sort needs 90 registers; left to itself, ptxas saves some and spills
STRETCH = 8 * BLOCK  # logits a program, at least
LOWEST: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def _keys(x, token):
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scan_kernel(logits, keys_out, maximum_out, total_out, V, stretch, row_stride, BLOCK: tl.constexpr, L: tl.constexpr):
    """Partial results of one stretch: keys (rows, S, L), maximum and total (rows, S)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * stretch
    end = tl.minimum(begin + stretch, V)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((L,), LOWEST, tl.int64)
    bar = tl.min(best, 0)
    top = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + lanes
        inside = token < end
        x = tl.load(logits + row * row_stride + token, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = higher
        keys = tl.where(inside, _keys(x, token), LOWEST)
        if tl.max(keys, 0) > bar:
            best = tl.topk(tl.reshape(tl.join(best, tl.topk(keys, L)), (2 * L,)), L)
            bar = tl.min(best, 0)
    at = row * tl.num_programs(1) + part
    tl.store(keys_out + at * L + tl.arange(0, L), best)
    tl.store(maximum_out + at, top)
    tl.store(total_out + at, total)


@triton.jit
def merge_kernel(keys, maximum, total, log_probs, tokens, parts, count, PARTS: tl.constexpr, L: tl.constexpr):
    """The `count` best of a row's lists, as log-probabilities and tokens, best first."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    m = tl.load(maximum + row * parts + part, mask=part < parts, other=-float("inf"))
    s = tl.load(total + row * parts + part, mask=part < parts, other=0.0)
    top = tl.max(m, 0)
    log_sum = tl.log(tl.sum(s * tl.exp(m - top), 0))  # nan where all logits are -inf, as in torch
    place = tl.arange(0, PARTS * L)
    best = tl.topk(tl.load(keys + row * parts * L + place, mask=place < parts * L, other=LOWEST), L)
    rank = tl.arange(0, L)
    at = row * count + rank
    tl.store(log_probs + at, _value(best) - top - log_sum, mask=rank < count)
    tl.store(tokens + at, 0x7FFFFFFF - (best & 0x7FFFFFFF), mask=rank < count)


def top_log_probs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """log_softmax of each row's `count` largest logits (N, count) in fp32, and their tokens, best first."""
    rows, V = logits.shape
    if V > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    L = max(2, triton.next_power_of_2(count))
    most = max(1, min(64, 4096 // L))
    stretch = max(triton.cdiv(V, most), STRETCH)
    stretch = triton.cdiv(stretch, BLOCK) * BLOCK
    parts = triton.cdiv(V, stretch)
    keys = torch.empty(rows, parts, L, dtype=torch.int64, device=logits.device)
    maximum, total = torch.empty(2, rows, parts, dtype=torch.float32, device=logits.device)
    log_probs = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, count, dtype=torch.int64, device=logits.device)
    if rows:
        PARTS, stride = triton.next_power_of_2(parts), logits.stride(0)
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            scan_kernel[(rows, parts)](logits, keys, maximum, total, V, stretch, stride, BLOCK=BLOCK, L=L, **SCAN)
            merge_kernel[(rows,)](keys, maximum, total, log_probs, tokens, parts, count, PARTS=PARTS, L=L, num_warps=4)
    return log_probs, tokens


def aot_cases(arch: int) -> list[tuple[Any, dict[str, Any], dict[str, int]]]:
    """For tests/ops/aot_compile.py: every dtype, from the shortest list to the longest, which needs most registers.

    Sorting networks are the slowest of all kernels to compile, so dtypes and lengths are not combined, and the longest
    merge, half a minute of ptxas's work, is compiled where it comes closest to spilling: sm_80, 238 of 255 registers.
    """
    cases: list[tuple[Any, dict[str, Any], dict[str, int]]] = []
    for kind, L in (("*fp32", 2), ("*fp16", 16), ("*bf16", 256)):
        arguments = {
            "logits": kind, "keys_out": "*i64:16", "maximum_out": "*fp32", "total_out": "*fp32", "V": "i32",
            "stretch": "i32", "row_stride": "i64", "BLOCK": BLOCK, "L": L,
        }  # fmt: skip
        cases.append((scan_kernel, arguments, SCAN))
    for parts, L in ((1, 2), (16, 256 if arch == 80 else 64)):
        arguments = {
            "keys": "*i64:16", "maximum": "*fp32", "total": "*fp32", "log_probs": "*fp32", "tokens": "*i64",
            "parts": "i32", "count": "i32", "PARTS": parts, "L": L,
        }  # fmt: skip
        cases.append((merge_kernel, arguments, {"num_warps": 4}))
    return cases
