"""Whether two ways of computing a model's logits differ by more than the rounding of its dtype.

A model with many layers in bfloat16 moves its logits by a tenth of their spread when nothing but the order of a sum
changes; a wrong mask or position moves them by more, in a small fp32 model by much less than that. So the noise is
measured on the model itself: it runs again with each module's result moved by at most its last bit, which is what
another order of the same operations does (Monte Carlo arithmetic: Parker 1997, UCLA CSD-970002).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sysdag.components.component import evaluating

# Of the logits' spread. TF32 differs by less than 1e-3; a rounding that the modules' results do not show, in half
# precision, by less than 2e-2.
_FLOOR = {True: 2e-2, False: 1e-3}
_TIMES = 2.0
RAISED = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError)


@dataclass(frozen=True)
class Expected:
    """The logits that a computation must give, and how far rounding moves them.

    Attributes:
        logits: (n, V) fp32.
        limit: the largest error that is taken for rounding, as `error` measures it.
    """

    logits: Float[Tensor, "n V"]
    limit: float

    def error(self, found: Float[Tensor, "n V"]) -> float:
        """Root mean square over the rows of the distance in units of the row's own spread."""
        spread = self.logits - self.logits.mean(-1, keepdim=True)
        far = (found.float() - self.logits).norm(dim=-1) / spread.norm(dim=-1).clamp_min(1e-30)
        return float(far.square().mean().sqrt())

    def complaint(self, found: Float[Tensor, "n V"]) -> str:
        """What is wrong with the logits that another computation gave; "" where rounding explains it."""
        error = self.error(found)
        if error <= self.limit:
            return ""
        return f"a probe's logits differed by {error:.2g} of their spread, and rounding by {self.limit:.2g} at most"


def expected(model: nn.Module, compute: Callable[[], Float[Tensor, "n V"]]) -> Expected | None:
    """What `compute`, a plain way to the logits, gives; None where that is not finite and so tells nothing."""
    plain = compute()
    if not plain.isfinite().all():
        return None
    exact = Expected(plain.float(), 0.0)
    with _rounded_anew(model):
        noise = exact.error(compute())
    half = torch.is_autocast_enabled(plain.device.type) or plain.dtype in (torch.float16, torch.bfloat16)
    half = half or any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    return Expected(plain.float(), max(_FLOOR[half], _TIMES * noise))


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; modes and random states are put back."""
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(model):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def _rounded_anew(model: nn.Module) -> Iterator[None]:
    def move(module: nn.Module, arguments: Any, result: Any) -> Any:
        if isinstance(result, Tensor) and result.is_floating_point():
            unit = torch.finfo(result.dtype).eps / 2
            return result * (1 + unit * (2 * torch.rand_like(result, dtype=torch.float32) - 1)).to(torch.float32)
        return None

    def rounded(module: nn.Module, arguments: Any, result: Any) -> Any:
        moved = move(module, arguments, result)
        return None if moved is None else moved.to(result.dtype)

    handles = [module.register_forward_hook(rounded) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
