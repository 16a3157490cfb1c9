"""Squared error of a prediction minus that of a reference's, summed over a sample, and its derivative.

    forward:   e_b = sum_i mask_i [(eps_i - policy_i)^2 - (eps_i - reference_i)^2]
    backward:  dpolicy_i = -2 g_b mask_i (eps_i - policy_i)

The difference of squares is taken as (reference - policy)((eps - policy) + (eps - reference)), which does not cancel
where the two predictions are close. A program sums CHUNK elements of one sample lane by lane and writes a partial sum;
a second step adds those of a sample in a fixed order. No atomics: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, CHUNK = 1024, 8192


@triton.jit
def forward_kernel(
    eps, policy, reference, mask, parts, size, chunks, HAS_REFERENCE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # of samples * chunks: a grid's other axes end at 65535
    start = program // chunks * size
    first = program % chunks * CHUNK
    kind: tl.constexpr = parts.dtype.element_ty
    total = tl.zeros((BLOCK,), kind)
    for step in range(0, CHUNK, BLOCK):
        element = first + step + tl.arange(0, BLOCK)
        inside = element < size
        target = tl.load(eps + start + element, mask=inside, other=0.0).to(kind)
        own = tl.load(policy + start + element, mask=inside, other=0.0).to(kind)
        if HAS_REFERENCE:
            other = tl.load(reference + start + element, mask=inside, other=0.0).to(kind)
            value = (other - own) * ((target - own) + (target - other))
        else:
            value = (target - own) * (target - own)
        if HAS_MASK:
            weight = tl.load(mask + start + element, mask=inside, other=0.0).to(kind)
            value = tl.where(weight == 0.0, 0.0, value * weight)  # what is masked may be nan
        total += value
    tl.store(parts + program, tl.sum(total, 0))


@triton.jit
def backward_kernel(grad, eps, policy, mask, out, size, blocks, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    element = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    at = row * size + element
    kind: tl.constexpr = grad.dtype.element_ty
    factor = -2.0 * tl.load(grad + row)
    target = tl.load(eps + at, mask=inside, other=0.0).to(kind)
    own = tl.load(policy + at, mask=inside, other=0.0).to(kind)
    value = factor * (target - own)
    if HAS_MASK:
        weight = tl.load(mask + at, mask=inside, other=0.0).to(kind)
        value = tl.where(weight == 0.0, 0.0, value * weight)
    tl.store(out + at, value, mask=inside)


def forward(eps: Tensor, policy: Tensor, reference: Tensor | None, mask: Tensor | None) -> Tensor:
    """(B,) from contiguous (B, elements)."""
    samples, size = eps.shape
    dtype = torch.float64 if policy.dtype == torch.float64 else torch.float32
    chunks = triton.cdiv(size, CHUNK)
    parts = policy.new_empty(samples, chunks, dtype=dtype)
    if samples and size:
        given = (reference is not None, mask is not None)
        others = (eps if reference is None else reference, eps if mask is None else mask)
        with torch.cuda.device_of(eps):  # Triton launches on the current device
            forward_kernel[(samples * chunks,)](
                eps, policy, *others, parts, size, chunks, *given, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4
            )
    return parts.sum(1)


def backward(grad: Tensor, eps: Tensor, policy: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of policy, (B, elements)."""
    samples, size = eps.shape
    out = torch.empty_like(policy)
    if samples and size:
        blocks = triton.cdiv(size, BLOCK)
        weights = eps if mask is None else mask
        with torch.cuda.device_of(eps):
            backward_kernel[(samples * blocks,)](
                grad, eps, policy, weights, out, size, blocks, mask is not None, BLOCK=BLOCK, num_warps=4
            )
    return out


def aot_cases(arch: int) -> list[tuple]:
    """(kernel, arguments, options) for tests/ops/test_aot.py."""
    cases: list[tuple] = []
    for kind, wide in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        x, a = f"*{kind}:16", f"*{wide}:16"
        for has_reference, has_mask in ((True, False), (False, True)):
            data = {"eps": a, "policy": x, "reference": x, "mask": a, "parts": a, "size": "i32", "chunks": "i32"}
            options = {"HAS_REFERENCE": has_reference, "HAS_MASK": has_mask, "BLOCK": BLOCK, "CHUNK": CHUNK}
            cases.append((forward_kernel, {**data, **options}, {"num_warps": 4}))
            data = {"grad": a, "eps": a, "policy": x, "mask": a, "out": x, "size": "i32", "blocks": "i32"}
            cases.append((backward_kernel, {**data, "HAS_MASK": has_mask, "BLOCK": BLOCK}, {"num_warps": 4}))
    return cases
