"""diffusion_error, forward and backward, against the same in torch: `python -m bench diffusion_error`.

"with reference" is sum |eps - policy|^2 - sum |eps - reference|^2, "policy only" its first term. The peers are torch's
eager form, two mse_loss without reduction, and torch.compile of the eager form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from sysdag.ops import diffusion_error

SHAPES = [(16, 4, 64, 64), (16, 16, 128, 128), (256, 3, 32, 32)]  # latents of SD 1.5 and SD3, pixels of CIFAR
GPU_SHAPES = [*SHAPES, (256, 16, 128, 128)]
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
BASELINE, PEERS = "eager", ("mse_loss", "torch.compile")


def eager(eps: Tensor, policy: Tensor, reference: Tensor | None = None) -> Tensor:
    error = (eps - policy).square().flatten(1).sum(1)
    return error if reference is None else error - (eps - reference).square().flatten(1).sum(1)


def mse_loss(eps: Tensor, policy: Tensor, reference: Tensor | None = None) -> Tensor:
    error = F.mse_loss(policy, eps, reduction="none").flatten(1).sum(1)
    if reference is None:
        return error
    return error - F.mse_loss(reference, eps, reduction="none").flatten(1).sum(1)


def run(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    eps, policy, *reference = tensors
    result = function(eps, policy, *reference)
    return result.detach(), torch.autograd.grad(result, policy, grad)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    options = measure.options(__doc__, "diffusion_error", arguments, peers=PEERS)
    rows, notes = [], []
    for shape, dtype in itertools.product(GPU_SHAPES if options.device == "cuda" else SHAPES, DTYPES[options.device]):
        generator = torch.Generator(options.device).manual_seed(0)
        drawn = torch.randn(3, *shape, generator=generator, device=options.device).to(getattr(torch, dtype))
        grad = torch.randn(shape[0], generator=generator, device=options.device)
        for what, count in (("policy only", 2), ("with reference", 3)):
            tensors = [tensor.clone() for tensor in drawn[:count]]
            doubles = [tensor.double() for tensor in tensors]
            tensors[1].requires_grad_()
            doubles[1].requires_grad_()
            parts = ("errors", "gradient")
            found = (run(f, tensors, grad) for f in (diffusion_error, eager))
            for part, own, theirs, truth in zip(parts, *found, run(eager, doubles, grad.double()), strict=True):
                measure.gate(f"diffusion_error, {shape}, {what}, {part}", own, theirs, truth)
            functions: dict[str, Callable[..., Tensor]] = {
                BASELINE: eager,
                "mse_loss": mse_loss,
                "sysdag": diffusion_error,
                "torch.compile": eager,
            }
            functions = measure.wanted(functions, options.peers, baseline=BASELINE)
            notes += measure.compile_peer(functions, *tensors)
            calls = {name: partial(run, function, tensors, grad) for name, function in functions.items()}
            times = measure.interleave(calls, options.repeats)
            columns = {"shape": "x".join(map(str, shape)), "dtype": dtype, "what": what}
            rows += measure.rows(times, baseline=BASELINE, **columns)
    measure.report("diffusion_error, forward and backward", rows, options.csv, notes)
